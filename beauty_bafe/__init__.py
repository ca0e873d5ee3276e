"""Background-agnostic product retrieval learned from catalogue photos alone."""

__version__ = "0.1.0"
