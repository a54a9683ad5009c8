"""Linear probe and weighted kNN: how well frozen features tell the classes apart.

Images are not augmented and BatchNorm is frozen. The learning rate of the linear classifier is
chosen by its loss on held-out training images; test accuracy is read once, after the last epoch.

    python eval/linear_probe.py runs/x
    python eval/linear_probe.py timm:resnet18.a1_in1k --data.name cifar10 --out results
    accelerate launch eval/linear_probe.py runs/x --label_fractions '[0.01, 0.1]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pandas as pd
from jsonargparse.typing import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)
from torch import Tensor

from ssl_gradmix import cli
from ssl_gradmix.console import show
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.intervals import accuracy_interval
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset, linear_probe

Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)])


def measure(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    epochs: PositiveInt = 100,
    k: PositiveInt = 20,
    temperature: PositiveFloat = 0.07,
    label_fractions: list[Fraction] | None = None,
    seed: NonNegativeInt = 0,
) -> tuple[list[results.Number], list[results.Number], LinearProbe]:
    """Accuracies on test images, with Wilson 95% intervals.

    Args:
        train: Features (N, D) and labels (N,) of training images.
        test: The same of test images.
        classes: Names of the classes by label.
        epochs: Epochs of the linear classifier.
        k: Number of neighbors that vote in weighted kNN.
        temperature: Temperature of their weights exp(cosine / temperature).
        label_fractions: Fractions of the training labels to train further linear classifiers on,
            for instance [0.01, 0.1].
        seed: Seed of the held-out images, the order of batches and the label fractions.

    Returns:
        Numbers of all images, numbers of each class, and the linear classifier.
    """
    (features, labels), (test_features, targets) = train, test

    def accuracies(probe: LinearProbe, **params: object) -> list[results.Number]:
        params |= {"learning_rate": probe.learning_rate, "epochs": epochs, "seed": seed}
        top1, top5 = probe.accuracy(test_features, targets)
        hits = {"top1": top1} if top5 is None else {"top1": top1, "top5": top5}
        return [
            results.number("linear", metric, accuracy_interval(hit), len(hit), **params)
            for metric, hit in hits.items()
        ]

    probe = linear_probe(features, labels, epochs=epochs, seed=seed)
    overall = accuracies(probe)
    for fraction in label_fractions or []:
        subset = label_subset(labels, fraction, seed).to(labels.device)
        few = linear_probe(features[subset], labels[subset], epochs=epochs, seed=seed)
        overall += accuracies(few, label_fraction=fraction, labels=len(subset))

    nearest = knn_predict(test_features, features, labels, k, temperature) == targets
    votes = {"k": used_k(k, features), "temperature": temperature}
    overall.append(results.number("knn", "top1", accuracy_interval(nearest), len(nearest), **votes))

    by_class = []
    correct = probe.predict(test_features) == targets
    for label in targets.unique().tolist():
        hits = correct[targets == label]
        params = {"class": classes[label], "epochs": epochs, "seed": seed}
        accuracy = accuracy_interval(hits)
        by_class.append(results.number("linear", "class_accuracy", accuracy, len(hits), **params))
    return overall, by_class, probe


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(measure, __doc__, argv)
    train, test = evaluation.load("train"), evaluation.load("test")
    features = evaluation.features(train), evaluation.features(test)
    if not evaluation.accelerator.is_main_process:
        return
    *numbers, probe = measure(*features, train.classes, **options)
    overall, by_class = (
        evaluation.frame("linear_probe", test, found, **evaluation.classes) for found in numbers
    )
    rows = pd.concat([overall, by_class], ignore_index=True)
    title = f"{evaluation.encoder.title} on {test.name}, linear probe on {len(train):,} images"
    figure = plots.class_accuracies(by_class, overall.iloc[0], title)
    copies = evaluation.copies(test, features[1][0], features[0][0])
    about = {"validation": probe.validation, "copies": copies}
    evaluation.write(rows, figure, [train, test], **about)
    show(f"{title}\n{results.console(overall)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
