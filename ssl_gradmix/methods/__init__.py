"""Self-supervised methods, each a module with the whole step in one `forward`."""

from __future__ import annotations

from torch import nn

from ssl_gradmix.backbones import num_features
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.settings import BYOLSettings, SimCLRSettings

__all__ = ["BYOL", "Losses", "SimCLR", "create"]


def create(
    settings: SimCLRSettings | BYOLSettings, backbone: nn.Module, gradmix: GradMix | None = None
) -> SimCLR | BYOL:
    """Builds a method: for a training, and for an evaluation that reads a run's projector.

    Args:
        settings: Its own settings, whose `name` says which it is.
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        gradmix: The view generator, or None.
    """
    widths = {"hidden_dim": settings.hidden_dim, "output_dim": settings.output_dim, "weight": settings.weight}
    if settings.name == "simclr":
        temperature = settings.temperature
        return SimCLR(backbone, num_features(backbone), temperature=temperature, gradmix=gradmix, **widths)
    return BYOL(backbone, num_features(backbone), momentum=settings.momentum, gradmix=gradmix, **widths)
