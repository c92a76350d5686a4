"""The compression steps as pure functions: prune, experts_per_token, quantize."""
