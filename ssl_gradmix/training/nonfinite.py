"""Losses and weights that are not finite: found, and taken back, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all floating-point numbers of some tensors are finite: a boolean scalar, on the device."""
    return torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()]).isfinite()


class Undo:
    """Takes optimizer steps back on the device: weights, BatchNorm statistics, a teacher, and the optimizer's state.

    It costs a copy of all of these, kept during each step. AdamW counts its steps on the host, which knows nothing of
    the device's verdict: where it trains on an accelerator, its bias correction counts a step that was taken back.

    Args:
        method: The module that is trained, not wrapped.
        optimizer: Over its parameters; a fresh state of zeros must mean the same as none, as it does for SGD with
            momentum, LARS and AdamW.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.method, self.optimizer = method, optimizer
        self.before: dict[tuple[object, str], Tensor] = {}

    def remember(self) -> None:
        """To be called before the first forward pass of an optimizer step."""
        self.before = {key: tensor.clone() for key, tensor in self._tensors().items()}

    @torch.no_grad()
    def take_back(self, bad: Tensor) -> None:
        """Restores what was remembered where `bad`, a boolean scalar on the device, holds; else changes nothing."""
        for key, tensor in self._tensors().items():
            before = self.before.get(key)
            tensor.copy_(torch.where(bad, torch.zeros_like(tensor) if before is None else before, tensor))
        self.before = {}

    def _tensors(self) -> dict[tuple[object, str], Tensor]:
        weights = {(None, name): tensor for name, tensor in self.method.state_dict().items()}
        device = next(self.method.parameters()).device
        states = {
            (parameter, name): value
            for parameter, state in self.optimizer.state.items()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.device == device
        }
        return weights | states
