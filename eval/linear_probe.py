"""How well a linear classifier, and nearest neighbors, tell the classes apart on frozen features.

The encoder sees images as they are, BatchNorm frozen. The learning rate of the linear classifier is chosen by its loss
on held-out training images; its test accuracy is read once, after its last epoch.

    python eval/linear_probe.py runs/x
    python eval/linear_probe.py timm:resnet18.a1_in1k --data.name cifar10 --data.root data --out results
    accelerate launch eval/linear_probe.py runs/x --label_fractions '[0.01, 0.1]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ssl_gradmix.evaluation import cli, plots, rows
from ssl_gradmix.evaluation.intervals import accuracy_interval
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset, linear_probe


@dataclass
class Options:
    """What is measured, and how.

    Args:
        epochs: Passes over the training features.
        k: Neighbors that vote in weighted kNN.
        temperature: Of their weights exp(cosine / temperature).
        label_fractions: Shares of the training labels to train further linear classifiers on, for instance [0.01, 0.1].
        seed: Of the held-out share, the order of batches and the label fractions.
    """

    epochs: int = 100
    k: int = 20
    temperature: float = 0.07
    label_fractions: list[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")


def measure(
    train: cli.Labeled, test: cli.Labeled, classes: Sequence[str], options: Options
) -> tuple[list[rows.Number], list[rows.Number], LinearProbe, dict[str, Tensor]]:
    """Accuracies on test features, with Wilson 95% intervals.

    Over all images; of the linear classifier by class; that classifier; and by score which images were named right, for
    a paired comparison with another encoder.
    """
    (features, labels), (test_features, test_labels) = train, test

    def accuracies(probe: LinearProbe, **params: object) -> list[rows.Number]:
        params |= {"learning_rate": probe.learning_rate, "epochs": options.epochs, "seed": options.seed}
        top1, top5 = probe.accuracy(test_features, test_labels)
        hits = {"top1": top1} if top5 is None else {"top1": top1, "top5": top5}
        return [rows.number("linear", name, accuracy_interval(hit), len(hit), **params) for name, hit in hits.items()]

    probe = linear_probe(features, labels, epochs=options.epochs, seed=options.seed)
    overall = accuracies(probe)
    for fraction in options.label_fractions or []:
        part = label_subset(labels, fraction, options.seed).to(labels.device)
        few = linear_probe(features[part], labels[part], epochs=options.epochs, seed=options.seed)
        overall += accuracies(few, label_fraction=fraction, labels=len(part))
    votes = {"k": used_k(options.k, features), "temperature": options.temperature}
    nearest = knn_predict(test_features, features, labels, options.k, options.temperature) == test_labels
    overall.append(rows.number("knn", "top1", accuracy_interval(nearest), len(nearest), **votes))

    def of_class(label: int, hits: Tensor) -> rows.Number:
        params = {"class": classes[label], "epochs": options.epochs, "seed": options.seed}
        return rows.number("linear", "class_accuracy", accuracy_interval(hits), len(hits), **params)

    top1 = probe.accuracy(test_features, test_labels).top1
    by_class = [of_class(label, top1[test_labels == label]) for label in test_labels.unique().tolist()]
    return overall, by_class, probe, {"linear": top1, "knn": nearest}


def evaluate(evaluation: cli.Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `linear_probe.json` and `.png` and prints a table."""
    train, test = evaluation.load("train"), evaluation.load("test")
    features = evaluation.features(train), evaluation.features(test)
    if not evaluation.accelerator.is_main_process:
        return
    overall, by_class, probe, right = measure(*features, train.classes, options)
    hits = {score: np.packbits(of_score.cpu().numpy()).tobytes().hex() for score, of_score in right.items()}
    found, of_classes = (
        evaluation.frame("linear_probe", test.name, numbers, **evaluation.of_classes())
        for numbers in (overall, by_class)
    )
    written = evaluation.out / "linear_probe.json"
    validation = {f"{rate:g}": loss for rate, loss in probe.validation.items()}
    about = evaluation.about(train, test, **evaluation.of_classes())
    more = {"validation": validation, "hits": {"images": test.fingerprint(), "n": len(test), **hits}}
    rows.add(written, rows.joined([found, of_classes]), {**about, **more})
    title = f"{evaluation.encoder.title} on {test.name.rpartition('/')[0]}: linear probe by class"
    plots.write(written.with_suffix(".png"), plots.class_accuracies(of_classes, found.iloc[0], title))
    print(f"{evaluation.encoder.title} on {test.name}, trained on {len(train)} labeled images")
    print(rows.console(found))
    if probe.remark:
        print(probe.remark)
    print(f"Rows, also by class: {written}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
