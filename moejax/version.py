"""The package's version, in a place every folder may import."""

__version__ = "0.3.0"
