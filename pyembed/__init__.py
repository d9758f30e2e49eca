"""pyembed: text to vectors with LLM embedding models, without padding, on its own kernels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyembed.encoder import Encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]


def __getattr__(name: str) -> Any:
    """Encoder, and torch with it, is imported when it is first asked for: `pyembed --help` needs neither."""
    if name == "Encoder":
        from pyembed.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'pyembed' has no attribute {name!r}")
