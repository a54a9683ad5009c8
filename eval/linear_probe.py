"""How well a linear classifier, and nearest neighbors, tell the classes apart on frozen features.

The encoder sees images as they are, BatchNorm frozen. The learning rate of the linear classifier is chosen on a tenth
of the training images; its test accuracy is read once, after its last epoch.

    python eval/linear_probe.py runs/x
    python eval/linear_probe.py timm:resnet18.a1_in1k --data.name cifar10 --data.root data --out results
    accelerate launch eval/linear_probe.py runs/x --label_fractions '[0.01, 0.1]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssl_gradmix.evaluation import cli

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_gradmix.evaluation.probes import LinearProbe
    from ssl_gradmix.evaluation.results import Row
    from ssl_gradmix.evaluation.setup import Evaluation


@dataclass
class Options:
    """What is measured, and how.

    Args:
        epochs: Passes over the training features.
        k: Neighbors that vote in weighted kNN.
        temperature: Of their weights exp(cosine / temperature).
        label_fractions: Shares of the training labels to train further linear classifiers on, for instance [0.01, 0.1].
        logistic: Train scikit-learn's LogisticRegression too, as a cross-check.
        augment: Train on random crops and flips too, which the encoder sees anew in every epoch: slow.
        seed: Of the held-out share, the order of batches, the label fractions and the crops.
    """

    epochs: int = 100
    k: int = 20
    temperature: float = 0.07
    label_fractions: list[float] | None = None
    logistic: bool = False
    augment: bool = False
    seed: int = 0


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `linear_probe.json` and `.png` and prints a table."""
    from ssl_gradmix.evaluation.intervals import accuracy_interval
    from ssl_gradmix.evaluation.knn import knn_predict, used_k
    from ssl_gradmix.evaluation.plots import class_accuracies
    from ssl_gradmix.evaluation.probes import augmented_probe, label_subset, linear_probe, logistic_regression
    from ssl_gradmix.evaluation.results import console_table, write_figure, write_rows

    train, test = evaluation.load_labeled("train"), evaluation.load_labeled("test")
    features, labels = evaluation.features(train)
    test_features, test_labels = evaluation.features(test)
    if not evaluation.accelerator.is_main_process:
        return

    schedule = {"epochs": options.epochs, "seed": options.seed}

    def row(score: str, metric: str, hits: Tensor, **params: object) -> Row:
        return evaluation.row("linear_probe", test, score, metric, accuracy_interval(hits), len(hits), **params)

    def rows_of(score: str, probe: LinearProbe, **params: object) -> list[Row]:
        top1, top5 = probe.accuracy(test_features, test_labels)
        if probe.learning_rate is not None:
            params |= {"learning_rate": probe.learning_rate, **schedule}
        rows = [row(score, "top1", top1, **params)]
        return rows if top5 is None else [*rows, row(score, "top5", top5, **params)]

    fractions = options.label_fractions or []
    parts = {fraction: label_subset(labels, fraction, options.seed).to(labels.device) for fraction in fractions}
    nearest = knn_predict(test_features, features, labels, options.k, options.temperature)
    probe = linear_probe(features, labels, **schedule)
    rows = rows_of("linear", probe)
    for fraction, part in parts.items():
        few = linear_probe(features[part], labels[part], **schedule)
        rows += rows_of("linear", few, label_fraction=fraction, labels=len(part))
    if options.augment:
        rows += rows_of("linear_augmented", augmented_probe(evaluation.encoder, train, features, **schedule))
    if options.logistic:
        rows += rows_of("logistic_regression", logistic_regression(features, labels))
    votes = {"k": used_k(options.k, features), "temperature": options.temperature}
    rows.append(row("knn", "top1", nearest == test_labels, **votes))

    top1, _ = probe.accuracy(test_features, test_labels)
    by_class = [
        row("linear", "class_accuracy", top1[test_labels == label], **{"class": train.classes[label]})
        for label in test_labels.unique().tolist()
    ]
    title = f"{evaluation.encoder.title} on {rows[0].dataset}: linear probe by class"
    validation = {f"{rate:g}": accuracy for rate, accuracy in probe.validation.items()}
    written = evaluation.out / "linear_probe.json"
    write_rows(written, rows + by_class, {**evaluation.describe(), "validation": validation})
    write_figure(written.with_suffix(".png"), class_accuracies(by_class, rows[0], title))
    print(f"{evaluation.encoder.title} on {test.name}, trained on {len(train)} labeled images")
    print(console_table(rows))
    print(f"Rows, also by class: {written}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
