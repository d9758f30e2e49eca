"""pyembed: text to vectors with LLM embedding models, without padding, on its own kernels."""

__version__ = "0.1.0"
