"""Open-set recognition: how well scores on frozen features tell known from unknown classes.

Classifiers and scores see the training images of the known classes only. They are tested on test
images of the known classes and of the unknown ones, over several trials. Trials are named as in
--data.open_set: `cifar10` is the five of the literature, `cifar10:2` one of them, `random:6` five
random ones with six known classes, `random:6:0` one of these. The unknown classes of `cifar+10`
and `cifar+50` are those of CIFAR-100, in the same root folder. Unknown images of other data sets:
eval/ood.py.

The CSV has a line per image with all scores. `threshold_tpr95` in the JSON is the threshold for a
score that 95% of held-out training images of the known classes reach. Files are named after
--trials, if given: `osr-digits-random_6.json`.

    python eval/osr.py runs/x
    python eval/osr.py runs/x --trials random:6
    python eval/osr.py runs/x --data.name cifar10 --data.root data --trials cifar+10
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ssl_gradmix import cli
from ssl_gradmix.console import show
from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import Data
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import (
    SHOWN,
    Labeled,
    closed_set,
    detect,
    held_out_scores,
    name_images,
)
from ssl_gradmix.evaluation.probes import linear_probe


def choose_trials(
    names: str | Sequence[str] | None, data: Data, classes: Sequence[str]
) -> list[open_set.Trial]:
    """The trials to evaluate; of trials with the same known classes the first one.

    Args:
        names: One name of trials or several; None takes those that the data settings imply.
        data: Settings of the data.
        classes: All classes of the data set.
    """
    if names is None:
        found = open_set.own_trials(data, classes)
    else:
        names = [names] if isinstance(names, str) else names
        found = [each for name in names for each in open_set.trials(name, data.name, classes)]
    if len({trial.name.rpartition(":")[0] for trial in found}) != 1:
        raise ValueError("trials must be of one kind, because results are averaged over them")
    distinct: dict[frozenset[int], open_set.Trial] = {}
    for trial in found:
        distinct.setdefault(frozenset(trial.known), trial)
    return list(distinct.values())


def measure(
    train: Labeled,
    test: Labeled,
    unknown: Labeled,
    trial: open_set.Trial,
    k: int,
    top_k: int,
    epochs: int,
    seed: int,
) -> tuple[list[results.Number], pd.DataFrame]:
    """Evaluates one trial; see `detection.detect`.

    Args:
        train: Features (N, D) and labels (N,) of training images, of the known classes at least.
        test: The same of test images.
        unknown: The same of images with the unknown classes: `test` again, or another data set.
        trial: The known and unknown classes.
        k: Neighbor of the score `knn_distance`.
        top_k: Neighbors in each class of the score `top_k_cosine`.
        epochs: Epochs of the linear classifier.
        seed: Seed of its training.

    Returns:
        The numbers, and a table of scores with one line per test image, whose column `image` is the
        position in `test` or `unknown`.
    """

    def select(images: Labeled, classes: Sequence[int]) -> tuple[torch.Tensor, Labeled]:
        features, labels = images
        chosen = torch.isin(labels, labels.new_tensor(classes)).nonzero().flatten()
        return chosen, (features[chosen], labels[chosen])

    _, bank = select(train, trial.known)
    known_places, known = select(test, trial.known)
    unknown_places, others = select(unknown, trial.unknown)
    probe = linear_probe(*bank, epochs=epochs, seed=seed)
    training: dict[str, Any] = {"learning_rate": probe.learning_rate, "epochs": epochs}
    training["seed"] = seed
    held_out = held_out_scores(bank, k, top_k, **training)
    numbers, samples = detect(probe, bank, held_out, known, others, k, top_k, **training)
    samples["image"] = torch.cat([known_places, unknown_places]).cpu().numpy()
    return closed_set(probe, bank, known, **training) + numbers, samples


def over_trials(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over trials, one row for each score and metric.

    Parameters stay if all trials agree on them. `n` is the mean number of images of a trial.
    Thresholds are not averaged.
    """
    means = []
    averaged = rows[rows["metric"] != "threshold_tpr95"]
    for _, group in averaged.groupby(["score", "metric"], sort=False):
        first, *others = group["params"]
        shared = {
            name: value
            for name, value in first.items()
            if all(params.get(name) == value for params in others)
        }
        trials = group["trial"].astype(int).tolist()
        params = {**shared, "over": "trials", "std": group["value"].std(), "trials": trials}
        mean = {"value": group["value"].mean(), "n": round(group["n"].mean()), "params": params}
        without = dict.fromkeys(("trial", "ci_low", "ci_high"))
        means.append({**group.iloc[0], **without, **mean})
    return results.table(means)


def evaluate(
    evaluation: cli.Evaluation,
    *,
    trials: str | list[str] | None = None,
    k: PositiveInt = 50,
    top_k: PositiveInt = 3,
    epochs: PositiveInt = 100,
    seed: NonNegativeInt = 0,
) -> None:
    """Evaluates all trials, writes their results, and prints a table.

    Args:
        evaluation: The encoder, its images, and the folder for results.
        trials: One name of trials, or a list of names. The default is the trial of the run or of
            --data.open_set or --data.classes, else the trials of the data set, else random ones
            with 60% of the classes known. Trials of the literature go by class numbers (in a
            folder, by the order of the class folders).
        k: Neighbor whose distance is the score `knn_distance`, at most the number of images.
        top_k: Neighbors in each class of the score `top_k_cosine`, at most the smallest class.
        epochs: Epochs of the linear classifier.
        seed: Seed of its training.
    """
    encoder, data = evaluation.encoder, evaluation.data
    every_class = replace(data, classes=None, open_set=None)
    train, test = evaluation.load("train", every_class), evaluation.load("test", every_class)
    chosen = choose_trials(trials, data, test.classes)
    unknown = test
    if chosen[0].elsewhere:
        unknown = evaluation.load("test", replace(every_class, name="cifar100"))
    params = {}
    for trial in chosen:
        missing = set(trial.known) - set(train.labels.tolist())
        if missing:
            raise ValueError(f"trials: {train.name} has no image of the known classes {missing}")
        here = trial.unknown if unknown is test else ()
        seen = open_set.pretraining(encoder.config, data, test.classes, trial.known, here)
        params[trial] = {
            "protocol": trial.protocol,
            "n_known": len(trial.known),
            "pretraining": seen,
        }

    known = sorted({label for trial in chosen for label in trial.known})
    bank, queries = evaluation.features(train.only(known)), evaluation.features(test)
    others = queries if unknown is test else evaluation.features(unknown)
    if not evaluation.accelerator.is_main_process:
        return
    copies = evaluation.copies(test, queries[0], bank[0])
    if unknown is not test:
        copies |= evaluation.copies(unknown, others[0], torch.cat([bank[0], queries[0]]))
    frames, samples = [], {}
    for trial in chosen:
        found = measure(bank, queries, others, trial, k, top_k, epochs, seed)
        numbers, samples[trial.name] = found[0], name_images(found[1], test, unknown)
        frames.append(evaluation.frame("osr", test, numbers, trial.number, **params[trial]))
    rows = summary = pd.concat(frames, ignore_index=True)
    if len(chosen) > 1:
        summary = over_trials(rows)
        rows = pd.concat([rows, summary], ignore_index=True)

    names, seen = ", ".join(samples), params[chosen[0]]["pretraining"]
    title = f"{encoder.title} on {test.name}, {names}, pretrained on: {seen}"
    lines = pd.concat(samples, names=["trial", None]).reset_index("trial")
    classes = {each.name: {"known": each.known, "unknown": each.unknown} for each in chosen}
    used = [train, unknown, test] if unknown is not test else [train, test]
    figure = plots.open_set(samples, rows, title)
    asked = "_".join([trials] if isinstance(trials, str) else trials or [])
    evaluation.write(rows, figure, used, lines, asked, trials=classes, copies=copies)
    show(f"{title}\n{results.comparison(summary, SHOWN)}")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
