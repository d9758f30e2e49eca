"""pyembed: text to vectors with LLM embedding models, without padding, on its own kernels."""

from pyembed.encoder import Encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]
