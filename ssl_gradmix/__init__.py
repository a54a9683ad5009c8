"""GradMix as a view generator for self-supervised learning.

`from ssl_gradmix import GradMix` needs torch alone. Methods, backbones, data, training and evaluation are submodules,
imported when asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssl_gradmix.version import __version__

if TYPE_CHECKING:
    from ssl_gradmix.attribution import attribute
    from ssl_gradmix.gradmix import GradMix, MixedViews

__all__ = ["GradMix", "MixedViews", "__version__", "attribute"]

_MODULES = {"GradMix": "gradmix", "MixedViews": "gradmix", "attribute": "attribution"}
_MODULES |= {module: module for module in ("attribution", "gradmix", "mixing")}


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is asked for, so that command lines answer `--help` without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == _MODULES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
