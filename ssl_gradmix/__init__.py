"""GradMix as a view generator for self-supervised learning.

`from ssl_gradmix import GradMix` needs torch alone. SimCLR, BYOL and SupCon need the `train` extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.version import __version__

if TYPE_CHECKING:
    from ssl_gradmix.methods import BYOL, SimCLR, SupCon

__all__ = ["BYOL", "GradMix", "MixedViews", "SimCLR", "SupCon", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the methods when they are asked for, because they need lightly."""
    if name in ("BYOL", "SimCLR", "SupCon"):
        return getattr(import_module("ssl_gradmix.methods"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
