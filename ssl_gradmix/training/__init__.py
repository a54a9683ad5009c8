"""The training loop on Accelerate, and what it needs."""

from ssl_gradmix.training.loop import Trainer

__all__ = ["Trainer"]
