"""Times all open-set scores and metrics of one trial of the size of CIFAR-10's, beside pytorch-ood's where installed.

    python benchmarks/osr_scores.py
    python benchmarks/osr_scores.py --dim 2048

Features are Gaussian clouds of 6 known and 4 unknown classes; what they hold does not change the time. Of the scores
compared, pytorch-ood's precision is float32 throughout. It has neither the other scores nor intervals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.evaluation import scores
from ssl_gradmix.evaluation.intervals import bootstrap_intervals
from ssl_gradmix.evaluation.metrics import all_metrics

KNOWN_CLASSES = 6


def clouds(centers: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    return centers[labels] + torch.randn(len(labels), centers.shape[1], generator=generator)


def timed(name: str, function: Callable):
    """The function's result; prints its time on the clock, and on all cores together."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    print(f"{name:<40}{time.perf_counter() - wall:>8.2f} s{time.process_time() - cpu:>8.2f} s CPU", flush=True)
    return result


def pytorch_ood_scores(
    train: Tensor, labels: Tensor, test: Tensor, weight: Tensor, test_logits: Tensor
) -> dict[str, Callable[[], Tensor]]:
    from pytorch_ood import detector

    def fitted(oracle) -> Tensor:
        return oracle.fit_features(train, labels).predict_features(test)

    dim = scores.parameters_used(train, labels)["vim"]["dim"]
    return {
        "knn_distance": lambda: fitted(detector.KNN(None, k=50)),
        "mahalanobis": lambda: fitted(detector.Mahalanobis(None)),
        "rmd": lambda: fitted(detector.RMD(None)),
        "vim": lambda: fitted(detector.ViM(None, dim, weight, torch.zeros(KNOWN_CLASSES))),
        "msp": lambda: detector.MaxSoftmax(None).predict_logits(test_logits),
        "max_logit": lambda: detector.MaxLogit(None).predict_logits(test_logits),
        "energy": lambda: detector.EnergyBased(None).predict_logits(test_logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=30_000, help="known training samples (default: %(default)s)")
    parser.add_argument("--test", type=int, default=10_000, help="test samples (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="features of a sample (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    centers = 0.1 * torch.randn(10, args.dim, generator=generator)
    labels = torch.randint(KNOWN_CLASSES, (args.train,), generator=generator)
    test_labels = torch.randint(len(centers), (args.test,), generator=generator)
    train, test = clouds(centers, labels, generator), clouds(centers, test_labels, generator)
    weight = centers[:KNOWN_CLASSES]
    train_logits, test_logits = train @ weight.T, test @ weight.T
    is_known = (test_labels < KNOWN_CLASSES).numpy()
    correct = (test_logits.argmax(1) == test_labels).numpy()

    def intervals(found: dict[str, np.ndarray]) -> None:
        for score in found.values():
            bootstrap_intervals(all_metrics, score, is_known, correct, strata=is_known, n=args.resamples)

    def trial() -> dict[str, np.ndarray]:
        found = timed("scores", lambda: scores.all_scores(train, labels, test, train_logits, test_logits))
        timed("metrics", lambda: [all_metrics(score, is_known, correct) for score in found.values()])
        timed(f"intervals, {args.resamples} resamples", lambda: intervals(found))
        return found

    print(f"{args.train} training, {args.test} test features of {args.dim} values, {torch.get_num_threads()} threads")
    found = timed("all scores and metrics of one trial", trial)

    if find_spec("pytorch_ood") is None:
        print("\npytorch-ood is not installed: no comparison")
        return
    from pytorch_ood.metrics import OODMetrics

    ours = {
        "knn_distance": lambda: scores.knn_distance(train, labels, test),
        "mahalanobis": lambda: scores.mahalanobis(train, labels, test),
        "rmd": lambda: scores.rmd(train, labels, test),
        "vim": lambda: scores.vim(train, labels, test, train_logits, test_logits),
        "msp": lambda: scores.msp(test_logits),
        "max_logit": lambda: scores.max_logit(test_logits),
        "energy": lambda: scores.energy(test_logits),
    }
    ood_labels = torch.from_numpy(np.where(is_known, 0, -1))
    print()
    for name, theirs in pytorch_ood_scores(train, labels, test, weight, test_logits).items():
        score = timed(f"{name}, ours", ours[name])
        outlier_score = timed(f"{name}, pytorch-ood", theirs)
        print(f"{'  their correlation':<40}{np.corrcoef(-score, outlier_score.numpy())[0, 1]:>10.6f}")

    def their_metrics() -> dict[str, float]:
        metrics = OODMetrics()
        metrics.update(torch.from_numpy(-found["energy"]), ood_labels)
        return metrics.compute()

    timed("metrics of one score, ours", lambda: all_metrics(found["energy"], is_known, correct))
    timed("metrics of one score, pytorch-ood", their_metrics)


if __name__ == "__main__":
    main()
