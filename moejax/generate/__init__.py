"""Text from a model: sampling, decoding behind the latent cache, speculation with the MTP block."""
