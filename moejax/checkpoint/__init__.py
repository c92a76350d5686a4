"""Checkpoints: Hugging Face in, native store and manifest; nothing outside this folder knows files."""
