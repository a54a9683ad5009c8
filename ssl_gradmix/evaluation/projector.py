"""A run's projection head, built from its weights alone: their names and shapes say which head it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def build_projector(weights: Mapping[str, Tensor], num_features: int, path: Path) -> nn.Module:
    """The head of SimCLR or of BYOL that has exactly these weights, as `ssl_gradmix.methods` trains it.

    Args:
        weights: By name. They become the head's own.
        num_features: D of the backbone's features.
        path: Where they are from, for errors.

    Returns:
        A module from features (N, D) to embeddings (N, E).

    Raises:
        ValueError: If they are of neither head, or of one for features of another width.
    """
    from lightly.models.modules import BYOLProjectionHead, SimCLRProjectionHead

    for kind in (SimCLRProjectionHead, BYOLProjectionHead):
        head = _of_widths(kind, weights)
        if head is not None and _kinds(head.state_dict()) == _kinds(weights):
            break
    else:
        raise ValueError(f"{path} does not fit: its weights are those of neither a SimCLR nor a BYOL projector")
    width = weights["layers.0.weight"].shape[1]
    if width != num_features:
        raise ValueError(f"{path} does not fit the backbone, which gives {num_features} features: it takes {width}")
    head.load_state_dict(weights, assign=True)
    return head


def _of_widths(kind: Callable[[int, int, int], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module | None:
    """A head without values, of the widths that its two linear layers have in `weights`."""
    shapes = [weights[name].shape for name in ("layers.0.weight", "layers.3.weight") if name in weights]
    if [len(shape) for shape in shapes] != [2, 2]:
        return None
    (hidden, given), (out, _) = shapes
    with torch.device("meta"):  # takes no memory, whatever the file asks for
        return kind(given, hidden, out)


def _kinds(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
