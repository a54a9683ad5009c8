"""Self-supervised methods, each a module with the whole step in one `forward`."""

from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.methods.simclr import SimCLR

__all__ = ["BYOL", "Losses", "SimCLR"]
