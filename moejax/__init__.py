"""moejax: compression of DeepSeek-V3-class mixture-of-experts models as a chain of pure, jitted functions."""

__version__ = "0.1.0"
