"""Linear classifiers of frozen features: what a representation makes linearly separable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ssl_gradmix.evaluation.checks import finite_matrix

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""What the rate of a linear probe is chosen from, for batches of `BATCH_SIZE` features scaled as in `linear_probe`."""

BATCH_SIZE = 256

ENOUGH = 500
"""Held-out samples on which the rate is chosen."""

_MOMENTUM = 0.9


class Accuracy(NamedTuple):
    """How a probe did on labeled features.

    Attributes:
        top1: (N,) boolean, whether the first guess is right.
        top5: (N,) boolean, whether one of the first five is, or None where there are five classes or fewer.
    """

    top1: Tensor
    top5: Tensor | None


@dataclass(eq=False)
class LinearProbe:
    """A linear classifier of features as the encoder gives them.

    Args:
        classes: (C,) int64, the labels that it knows, ascending.
        weight: (C, D).
        bias: (C,).
        learning_rate: The rate it was trained with.
        validation: Cross-entropy on held-out training features by learning rate.
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor
    learning_rate: float
    validation: dict[float, float]

    @property
    def remark(self) -> str | None:
        """Says so where the rate is an end of what it was chosen from: one beyond might have done better."""
        if len(self.validation) > 1 and self.learning_rate in (min(self.validation), max(self.validation)):
            return f"the learning rate chosen, {self.learning_rate:g}, is at an end of the grid"
        return None

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) from features (N, D); column k belongs to `classes[k]`."""
        return features.to(self.weight) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Labels (N,) of features (N, D)."""
        return self.classes[self.logits(features).argmax(1)]

    def accuracy(self, features: Tensor, labels: Tensor) -> Accuracy:
        """Compares guesses for features (N, D) with their labels (N,).

        Raises:
            ValueError: If there are no features, or a label is none of `classes`.
        """
        labels = torch.as_tensor(labels, device=self.classes.device)
        if len(labels) == 0 or len(labels) != len(features):
            raise ValueError(f"labels must be one a feature and at least one, got {len(labels)} for {len(features)}")
        strange = sorted(set(labels.tolist()) - set(self.classes.tolist()))
        if strange:
            raise ValueError(f"labels must be among the classes of the training features, got {strange} besides")
        ranked = self.classes[self.logits(features).topk(min(5, len(self.classes))).indices]
        hits = ranked == labels[:, None]
        return Accuracy(top1=hits[:, 0], top5=hits.any(1) if len(self.classes) > 5 else None)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    folds: int = 10,
    seed: int = 0,
) -> LinearProbe:
    """Trains a linear classifier with SGD, at a learning rate chosen on held-out training features.

    Momentum 0.9, no weight decay, batches of 256, a cosine to 0 by step, zero weights at the start. All learning rates
    are trained in one pass over the same batches. A part of the features, a tenth, is held out, and the rate whose
    classifier has the lowest cross-entropy on it after the last epoch is trained once more on all features; that
    classifier after its last epoch is returned. Where the part holds fewer than 500 samples, further parts are held out
    in turn, as in cross-validation, until 500 samples are judged or all. Test features play no part, and no epoch is
    picked. (Accuracy on a single part, which others choose by, is coarse where few samples are held out: it then takes
    rates so large that every softmax is 0 or 1.)

    The usual protocol (SimCLR, DINO, solo-learn) trains on raw features. Here each feature is centered and divided by
    its standard deviation over `features` first, so that one grid of rates serves encoders of any scale; MAE and VISSL
    do the like with a BatchNorm. The scaling is folded into the classifier that is returned, which reads raw features.
    A feature that never varies gets weight 0.

    Args:
        features: (N, D), finite. The classifier is trained and returned on their device, in float32.
        labels: (N,) integers from 0, not necessarily contiguous.
        learning_rates: What to choose from, for batches of 256.
        epochs: Passes over the features, for the choice and for the classifier each.
        folds: Parts that the samples of each class are cut into. A class of a single sample is never held out; if all
            are such, the choice is made on the training features.
        seed: Of the parts and the order of batches; the same seed gives the same classifier.

    Raises:
        ValueError: If shapes do not fit, features are not finite, labels are missing (-1) or of fewer than two classes,
            or a setting is out of range.
    """
    features = finite_matrix("features", features, may_be_empty=True)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"features must be (N, D) and labels (N,), got {tuple(features.shape)}, {tuple(labels.shape)}")
    unlabeled = (labels < 0).sum().item()
    if unlabeled:
        raise ValueError(f"labels must not be missing, got {unlabeled} of {len(labels)} samples without (-1)")
    classes, targets = labels.to(features.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must be of at least two classes, got {classes.tolist()}")
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates must be at least one, all above 0, got {tuple(learning_rates)}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    std, mean = torch.std_mean(features.float(), 0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0.0)  # what varies less varies by rounding
    scaled = (features.float() - mean) * scale
    everything = torch.arange(len(targets), device=targets.device)
    parts = _parts(targets, folds, seed) or [(everything, everything)]
    losses, judged = torch.zeros(len(learning_rates), device=targets.device, dtype=torch.float64), 0
    for rest, part in parts:
        weight, bias = _train(scaled, rest, targets, len(classes), learning_rates, epochs, seed)
        logits = scaled[part] @ weight.mT + bias[:, None]  # (L, B, C)
        losses += torch.stack([functional.cross_entropy(each, targets[part], reduction="sum") for each in logits])
        judged += len(part)
        if judged >= ENOUGH:
            break
    losses = (losses / judged).tolist()
    validation = dict(zip(learning_rates, losses, strict=True))
    best = min(validation, key=validation.__getitem__)

    weight, bias = _train(scaled, everything, targets, len(classes), [best], epochs, seed)
    weight = weight[0] * scale
    return LinearProbe(classes, weight, bias[0] - weight @ mean, best, validation)


def label_subset(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Draws the labeled part of a training set for semi-supervised protocols (1%, 10% of the labels).

    Args:
        labels: (N,) integers.
        fraction: Share of each class, in (0, 1]; of every class at least one sample is taken.
        seed: Of the draw. With the same seed, a smaller fraction is part of a larger one.

    Returns:
        Ascending indices of the samples drawn, on the CPU.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        drawn.append(members[order[: max(round(fraction * len(members)), 1)]])
    return torch.cat(drawn).sort().values


def _parts(targets: Tensor, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts the samples of each class into parts: for each that has any, the indices of the others and of its own."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.full((len(targets),), -1)
    for label in targets.unique().tolist():
        members = (targets.cpu() == label).nonzero().flatten()
        if len(members) > 1:
            part[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    part = part.to(targets.device)
    found = [((part != i).nonzero().flatten(), (part == i).nonzero().flatten()) for i in range(folds)]
    return [(rest, own) for rest, own in found if len(own)]


@torch.no_grad()
def _train(
    scaled: Tensor,
    kept: Tensor,
    targets: Tensor,
    n_classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Trains a classifier at each of L rates on the samples `kept`: weight (L, C, D), bias (L, C).

    The cross-entropy's gradient is written out, (softmax - one-hot) x features, which is quicker than autograd. Samples
    come last in logits and gradients, because a softmax over few classes is slow where these do.
    """
    rates = torch.tensor(learning_rates, device=targets.device).view(-1, 1, 1)
    rows, n_features = len(rates) * n_classes, scaled.shape[1]
    weight, weight_velocity = torch.zeros(2, rows, n_features, device=targets.device)
    bias, bias_velocity = torch.zeros(2, rows, 1, device=targets.device)
    steps = epochs * math.ceil(len(kept) / BATCH_SIZE)
    for step, batch in enumerate(_batches(kept, epochs, seed)):
        features = scaled[batch]
        error = torch.addmm(bias, weight, features.T).view(len(rates), n_classes, len(batch)).softmax(1)
        error[:, targets[batch], torch.arange(len(batch), device=batch.device)] -= 1
        # Each classifier has its rate in its gradient, as the steps have the cosine, which is common to all.
        gradient = (error * (rates / len(batch))).flatten(0, 1)
        weight_velocity.addmm_(gradient, features, beta=_MOMENTUM)
        bias_velocity.mul_(_MOMENTUM).add_(gradient.sum(1, keepdim=True))
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        weight.sub_(weight_velocity, alpha=cosine)
        bias.sub_(bias_velocity, alpha=cosine)
    return weight.view(len(rates), n_classes, n_features), bias.view(len(rates), n_classes)


def _batches(kept: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """Shuffles indices anew each epoch; the order is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(kept), generator=generator).to(kept.device)
        yield from kept[order].split(BATCH_SIZE)
