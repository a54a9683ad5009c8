"""Linear classifiers of frozen features: what a representation makes linearly separable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssl_gradmix.console import progress

LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Candidates for the learning rate of a linear probe, for batches of 256 scaled features. Some tens
of samples ask for 0.001, thousands for 0.03."""

BATCH_SIZE = 256

ENOUGH = 500
"""Held-out samples that suffice to choose the learning rate."""

_MOMENTUM = 0.9


@dataclass(eq=False)
class LinearProbe:
    """A linear classifier of features as the encoder gives them.

    Args:
        classes: (C,) int64, the labels of the training features, ascending.
        weight: (C, D).
        bias: (C,).
        learning_rate: Learning rate it was trained with.
        validation: Cross-entropy on held-out training features by learning rate; empty if there was
            one rate only.
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor
    learning_rate: float
    validation: dict[float, float]

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D). Column k belongs to `classes[k]`."""
        return features.to(self.weight) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Labels (N,) of features (N, D)."""
        return self.classes[self.logits(features).argmax(1)]

    def accuracy(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hits among the first guess and the first five for features (N, D) with labels (N,).

        Returns:
            Top-1 and top-5 hits, (N,) boolean. There is no top 5 of five classes or fewer. A label
            that is not one of `classes` is never hit.
        """
        guesses = self.logits(features).topk(min(5, len(self.classes))).indices
        hits = self.classes[guesses] == labels.to(self.classes.device)[:, None]
        top5 = hits.any(1) if len(self.classes) > 5 else None
        return hits[:, 0], top5


def linear_probe(
    features: Tensor,
    labels: Tensor,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    folds: int = 10,
    seed: int = 0,
) -> LinearProbe:
    """Trains a linear classifier with SGD, at a learning rate chosen on held-out training features.

    Momentum 0.9, no weight decay, batches of 256, cosine decay to 0 by step, zero weights at the
    start. One fold of the features is held out, and all learning rates are trained on the others in
    one pass over the same batches. With fewer than 500 samples in the fold, more folds are held out
    in turn, as in cross-validation, until 500 samples are judged or all. The rate with the lowest
    cross-entropy after the last epoch is trained once more, on all features. Test features are not
    used, and no epoch is picked. (Accuracy on one fold, the usual criterion, is coarse if few
    samples are held out: it then picks rates so large that every softmax is 0 or 1.)

    The usual protocol (SimCLR, DINO, solo-learn) trains on raw features. Here each feature is first
    centered and divided by its standard deviation over `features`, so that one grid of rates serves
    encoders of any scale; MAE and VISSL use a BatchNorm likewise. The scaling is folded into the
    returned classifier, which reads raw features. A constant feature gets weight 0.

    Args:
        features: (N, D), finite. Training is on their device, in float32.
        labels: (N,) integers from 0, not necessarily contiguous.
        learning_rates: Candidates, for batches of 256. A single one is taken as it is.
        epochs: Passes over the features, both for the choice and for the classifier.
        folds: Number of folds, in which each class has the same share. A class of one sample is
            never held out; if all are, the rate is chosen on the training features.
        seed: Seed of the folds and of the order of batches.

    Raises:
        ValueError: Labels are not one a feature, missing (-1), or of fewer than two classes.
    """
    if len(labels) != len(features):
        raise ValueError(f"labels must be one a feature, got {len(labels)} for {len(features)}")
    classes, targets = labels.to(features.device).unique(return_inverse=True)
    if len(classes) < 2 or classes[0] < 0:
        raise ValueError(f"labels must be of two classes or more, from 0, got {classes.tolist()}")
    std, mean = torch.std_mean(features.float(), 0, correction=0)
    varies = std > 1e-6 * mean.abs()  # below that, features vary by rounding
    scale = torch.where(varies, 1 / std, 0.0)
    scaled = (features.float() - mean) * scale

    validation, best = {}, learning_rates[0]
    if len(learning_rates) > 1:
        validation = _validate(scaled, targets, learning_rates, epochs, folds, seed)
        best = min(validation, key=validation.__getitem__)
    everything = torch.arange(len(targets), device=targets.device)
    weights, biases = _train(scaled, targets, everything, [best], epochs, seed)
    weight = weights[0] * scale
    return LinearProbe(classes, weight, biases[0] - weight @ mean, best, validation)


def held_out_parts(
    targets: Tensor, folds: int = 10, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields indices of training and held-out samples, fold by fold, stratified by class.

    Stops when 500 samples were held out, or all. A class of one sample is never held out; if all
    classes are, training and held-out samples are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    fold = torch.full((len(targets),), -1)
    for members in _by_class(targets.cpu()):
        if len(members) > 1:
            order = torch.randperm(len(members), generator=generator)
            fold[members[order]] = torch.arange(len(members)) % folds
    fold = fold.to(targets.device)
    judged = 0
    for i in range(int(fold.max()) + 1):
        held_out = (fold == i).nonzero().flatten()
        yield (fold != i).nonzero().flatten(), held_out
        judged += len(held_out)
        if judged >= ENOUGH:
            return
    if judged == 0:
        everything = torch.arange(len(targets), device=targets.device)
        yield everything, everything


def label_subset(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Draws the labeled part of a training set for semi-supervised protocols (1%, 10% of labels).

    Args:
        labels: (N,) integers.
        fraction: Fraction of each class, in (0, 1]. At least one sample of each class is drawn.
        seed: Seed of the draw. With the same seed, a smaller fraction is part of a larger one.

    Returns:
        Ascending indices of the samples drawn, on the CPU.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for members in _by_class(labels.cpu()):
        order = torch.randperm(len(members), generator=generator)
        count = max(round(fraction * len(members)), 1)
        drawn.append(members[order[:count]])
    return torch.cat(drawn).sort().values


def _validate(
    scaled: Tensor,
    targets: Tensor,
    learning_rates: Sequence[float],
    epochs: int,
    folds: int,
    seed: int,
) -> dict[float, float]:
    """Mean cross-entropy of held-out samples by learning rate."""
    losses = torch.zeros(len(learning_rates), device=targets.device, dtype=torch.float64)
    judged = 0
    for rest, held_out in held_out_parts(targets, folds, seed):
        weights, biases = _train(scaled, targets, rest, learning_rates, epochs, seed)
        logits = scaled[held_out] @ weights.mT + biases[:, None]  # (L, B, C)
        for i, of_rate in enumerate(logits):
            losses[i] += functional.cross_entropy(of_rate, targets[held_out], reduction="sum")
        judged += len(held_out)
    means = (losses / judged).tolist()
    return dict(zip(learning_rates, means, strict=True))


def _by_class(labels: Tensor) -> tuple[Tensor, ...]:
    """Ascending indices of the samples of each class, in the order of the labels."""
    _, counts = labels.unique(return_counts=True)
    return labels.argsort(stable=True).split(counts.tolist())


@torch.no_grad()
def _train(
    scaled: Tensor,
    targets: Tensor,
    kept: Tensor,
    learning_rates: Sequence[float],
    epochs: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Trains a classifier at each of L rates on the samples `kept`.

    The gradient of the cross-entropy is written out, (softmax - one-hot) x features, which is
    faster than autograd. Samples come last in logits and gradients, because a softmax over few
    classes is slow if classes come last.

    Returns:
        Weights (L, C, D) and biases (L, C).
    """
    rates = torch.tensor(learning_rates, device=targets.device).view(-1, 1, 1)
    n_classes = int(targets.max()) + 1
    rows, n_features = len(rates) * n_classes, scaled.shape[1]
    weight, weight_velocity = torch.zeros(2, rows, n_features, device=targets.device)
    bias, bias_velocity = torch.zeros(2, rows, 1, device=targets.device)
    steps = epochs * math.ceil(len(kept) / BATCH_SIZE)
    bar = progress(steps, "linear probe", "step", delay=3)
    for step, batch in enumerate(_batches(kept, epochs, seed)):
        features = scaled[batch]
        logits = torch.addmm(bias, weight, features.T)
        error = logits.view(len(rates), n_classes, len(batch)).softmax(1)
        error[:, targets[batch], torch.arange(len(batch), device=batch.device)] -= 1
        # The rates differ, so they scale the gradients; the cosine is common to all steps.
        gradient = (error * (rates / len(batch))).flatten(0, 1)
        weight_velocity.addmm_(gradient, features, beta=_MOMENTUM)
        bias_velocity.mul_(_MOMENTUM).add_(gradient.sum(1, keepdim=True))
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        weight.sub_(weight_velocity, alpha=cosine)
        bias.sub_(bias_velocity, alpha=cosine)
        bar.update()
    bar.close()
    return weight.view(len(rates), n_classes, n_features), bias.view(len(rates), n_classes)


def _batches(kept: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """Shuffles indices anew each epoch. The order is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(kept), generator=generator).to(kept.device)
        yield from kept[order].split(BATCH_SIZE)
