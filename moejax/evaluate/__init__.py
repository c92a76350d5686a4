"""What compression cost: texts, perplexity, KL divergence, generation."""
