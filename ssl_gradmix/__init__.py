"""GradMix as a view generator for self-supervised learning.

`from ssl_gradmix import GradMix` needs torch alone. Methods, backbones, data, training and evaluation are submodules,
imported when asked for.
"""

from ssl_gradmix.attribution import attribute
from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.version import __version__

__all__ = ["GradMix", "MixedViews", "__version__", "attribute"]
