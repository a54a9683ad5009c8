"""Self-supervised methods, and one with labels, each a module with the whole step in one `forward`."""

from __future__ import annotations

from torch import nn

from ssl_gradmix.backbones import num_features
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import Losses
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon
from ssl_gradmix.settings import BYOLSettings, SimCLRSettings, SupConSettings

__all__ = ["BYOL", "Losses", "SimCLR", "SupCon", "create"]


def create(
    settings: SimCLRSettings | BYOLSettings | SupConSettings, backbone: nn.Module, gradmix: GradMix | None = None
) -> SimCLR | BYOL | SupCon:
    """Builds a method: for a training, and for an evaluation that reads a run's projector.

    Args:
        settings: Its own settings, whose `name` says which it is.
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        gradmix: The view generator, or None.
    """
    own = {"hidden_dim": settings.hidden_dim, "output_dim": settings.output_dim, "gradmix": gradmix}
    if settings.name == "byol":
        return BYOL(backbone, num_features(backbone), momentum=settings.momentum, weight=settings.weight, **own)
    own["temperature"] = settings.temperature
    if settings.name == "simclr":
        return SimCLR(backbone, num_features(backbone), weight=settings.weight, **own)
    factors = {"supervised": settings.supervised, "self_supervised": settings.self_supervised}
    return SupCon(backbone, num_features(backbone), attributed_loss=settings.attributed_loss, **factors, **own)
