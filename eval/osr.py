"""How well scores on frozen features tell test images of known classes from unknown ones.

Classifiers and scores see training images of the known classes alone. The unknown images are those of the data's other
classes, over several trials; or those of other data sets, which is out-of-distribution detection.

    python eval/osr.py runs/x
    python eval/osr.py runs/x --protocol random --n_known 6 --trials '[0, 1, 2]'
    python eval/osr.py runs/x --protocol cifar+10 --unknown.name cifar100 --unknown.root data
    python eval/osr.py runs/x --unknown.name svhn --unknown.root data
    python eval/osr.py runs/x --unknown '[{name: svhn, root: data}, {name: folder, root: textures}]'
    python eval/osr.py runs/x --compare runs/y
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ssl_gradmix.evaluation import cli
from ssl_gradmix.settings import Data

if TYPE_CHECKING:
    from ssl_gradmix.data.datasets import ImageSet
    from ssl_gradmix.evaluation.open_set.samples import Samples
    from ssl_gradmix.evaluation.open_set.trials import Group, Labeled
    from ssl_gradmix.evaluation.probes import LinearProbe
    from ssl_gradmix.evaluation.results import Row
    from ssl_gradmix.evaluation.setup import Evaluation

_SHOWN = {"auroc": "AUROC", "fpr95_id_pos": "FPR95, known positive", "oscr": "OSCR"}
_DIFFERENCES = {"auroc_difference": "AUROC difference", "oscr_difference": "OSCR difference"}


@dataclass
class Options:
    """What is measured, and how.

    Args:
        protocol: Trials of the literature, which go by class numbers (of a folder too, in the order of its class
            folders' names), or random ones. `auto` takes the known classes that the run was pretrained on, or that
            --data.open_set or --data.classes give; else the trials of the data set; else random ones.
        trials: Numbers of the trials, or seeds of random ones; null takes 0 to 4.
        n_known: Number of known classes in random trials; null takes 60%.
        unknown: Other data sets, each with the settings of --data; a single one also as --unknown.name and so on. Their
            test images, or all images of a folder without train/ and test/, are the unknown ones. With protocol
            cifar+10 or cifar+50: where CIFAR-100 is.
        compare: Another run evaluated so, to test whether the two differ on the same images.
        k: Whose neighbor's distance is the score knn_distance; null takes 50, or as many as there are.
        top_k: Neighbors in each class of the score top_k_cosine; null takes 3, or as many as there are.
        epochs: Passes over the training features, of the linear classifier.
        seed: Of the linear classifier's training.
    """

    protocol: Literal["auto", "mnist", "svhn", "cifar10", "cifar+10", "cifar+50", "tinyimagenet", "random"] = "auto"
    trials: list[int] | None = None
    n_known: int | None = None
    unknown: list[Data] | None = None
    compare: str | None = None
    k: int | None = None
    top_k: int | None = None
    epochs: int = 100
    seed: int = 0


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes rows, samples and a picture, and prints tables."""
    from ssl_gradmix.evaluation.open_set.samples import Samples, Settings

    # All that may be wrong with what is asked for is found before the encoder starts.
    every_class = replace(evaluation.data, classes=None, open_set=None)
    train, test = (evaluation.load_labeled(split, every_class) for split in ("train", "test"))
    task, groups = _groups(evaluation, options, test)
    settings = Settings(options.k, options.top_k, options.epochs, options.seed)
    for group in groups:
        group.check(train, test)
        settings.check(train.only(group.trial.known).labels)
    samples = Samples(evaluation.encoder.title, settings, {group.name: group.fingerprint(test) for group in groups})
    other = None if options.compare is None else _read_other(options.compare, task, evaluation.encoder.feature)
    if other is not None:
        samples.check_comparable(other)

    train = train.only(sorted({label for group in groups for label in group.trial.known}))
    sets = dict.fromkeys([train, test, *(group.images for group in groups)])
    features = {images: evaluation.features(images) for images in sets}
    if evaluation.accelerator.is_main_process:
        rows = _measure(evaluation, task, groups, (train, test), features, samples, other)
        _report(evaluation, task, groups, test, rows, samples)


def _groups(evaluation: Evaluation, options: Options, test: ImageSet) -> tuple[str, list[Group]]:
    """The task, `osr` or `ood`, and what is told apart in it."""
    from ssl_gradmix.evaluation.open_set.trials import (
        ELSEWHERE,
        choose_trials,
        load_cifar100,
        set_groups,
        trial_groups,
    )

    data, config = evaluation.data, evaluation.encoder.config
    others = None if options.unknown is None else [Data(**vars(other)) for other in options.unknown]
    if others is not None and options.protocol not in ELSEWHERE:
        if (options.protocol, options.trials, options.n_known) != ("auto", None, None):
            raise ValueError(
                "unknown goes with protocol cifar+10 or cifar+50, or else without protocol, trials and n_known: "
                "then the known test images are told from other data sets"
            )
        with evaluation.one_first():
            return "ood", set_groups(data, test, config, others)
    protocol, trials = choose_trials(data, test.classes, options.protocol, options.trials, options.n_known)
    with evaluation.one_first():
        images = load_cifar100(data, others) if protocol in ELSEWHERE else test
    return "osr", trial_groups(protocol, trials, data, test, images, config)


def _read_other(run: str, task: str, feature: str) -> Samples:
    from ssl_gradmix.evaluation.open_set.samples import Samples
    from ssl_gradmix.evaluation.results import results_folder

    folders = [results_folder(out, feature) for out in (Path(run, "eval"), Path(run))]
    places = [folder / f"{task}_samples.safetensors" for folder in folders]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"compare: there is no {places[0]}: evaluate that run in the same way first")
    return Samples.read(path)


def _measure(
    evaluation: Evaluation,
    task: str,
    groups: Sequence[Group],
    images: tuple[ImageSet, ImageSet],
    features: Mapping[ImageSet, Labeled],
    samples: Samples,
    other: Samples | None,
) -> list[Row]:
    """Rows of all groups; their samples are added to `samples`."""
    from tqdm import tqdm

    from ssl_gradmix.evaluation.open_set.recognition import closed_set, compare, detect, fit

    train, test = images
    rows: list[Row] = []
    probes: dict[frozenset[int], LinearProbe] = {}
    for group in tqdm(groups, desc="scoring", delay=3, disable=None):
        of_test = partial(evaluation.row, task, test, trial=group.trial.number, **group.params)
        of_group = of_test if task == "osr" else partial(evaluation.row, task, group.images, **group.params)
        bank, (tested, labels), is_known = group.select(features[train], features[test], features[group.images])
        known = frozenset(group.trial.known)
        if known not in probes:
            probes[known] = fit(bank, samples.settings)
        if task == "osr" or not rows:  # data sets are told from the same known images
            rows += closed_set(probes[known], bank, (tested[is_known], labels[is_known]), samples.settings, of_test)
        found, arrays = detect(probes[known], bank, (tested, labels), is_known, samples.settings, of_group)
        rows += found
        if other is not None and group.name in other.arrays:
            rows += compare(arrays, other.arrays[group.name], other.encoder, of_group)
        samples.arrays[group.name] = arrays
    return rows


def _report(
    evaluation: Evaluation, task: str, groups: Sequence[Group], test: ImageSet, rows: list[Row], samples: Samples
) -> None:
    """Writes the files and prints tables."""
    from ssl_gradmix.evaluation.open_set.plots import overview
    from ssl_gradmix.evaluation.open_set.recognition import over_trials
    from ssl_gradmix.evaluation.open_set.trials import distinct
    from ssl_gradmix.evaluation.results import write_figure, write_rows

    trials = distinct([group.trial for group in groups])  # just [None] where there are none
    counted = [group.name for group in groups if group.trial.number in trials]
    of_counted = [row for row in rows if row.trial in trials]
    means = over_trials(rows, trials) if task == "osr" else []
    settings = ", ".join(dict.fromkeys(group.params["pretraining"] for group in groups))
    title = f"{evaluation.encoder.title} on {test.name}, encoder pretrained on: {settings}"
    figure = overview(
        {name: samples.arrays[name] for name in counted},
        of_counted,
        title,
        several_sets=task == "ood" and len(groups) > 1,
    )
    described = {
        "settings": asdict(samples.settings),
        "groups": [
            {
                "name": group.name,
                "known": list(group.trial.known),
                "known_names": [test.classes[label] for label in group.trial.known],
                "unknown": list(group.trial.unknown),
                "unknown_from": group.images.name,
            }
            for group in groups
        ],
    }
    path = evaluation.out / f"{task}.json"
    files = [path, path.with_name(f"{task}_samples.safetensors"), path.with_suffix(".png")]
    samples.write(files[1])
    write_figure(files[2], figure)
    write_rows(path, rows + means, {**evaluation.describe(), **described})

    print(title)
    for group in described["groups"]:
        known = group["known_names"]
        more = f" and {len(known) - 12} more" if len(known) > 12 else ""
        print(f"{group['name']}: known are {', '.join(known[:12])}{more}; unknown ones from {group['unknown_from']}")
    repeated = [group.name for group in groups if group.name not in counted]
    if repeated:
        print(f"Warning: {', '.join(repeated)} repeats known classes, so means and figure are of {', '.join(counted)}")
    averaged = {(row.score, row.metric) for row in means}
    shown = means + [row for row in of_counted if (row.score, row.metric) not in averaged]
    tables = {"known against unknown classes": shown}
    if task == "ood":
        tables = {name: [row for row in rows if row.dataset == name] for name in counted}
    _print(shown, tables)
    print(f"\nWritten: {', '.join(map(str, files))}")


def _print(shown: Sequence[Row], tables: Mapping[str, Sequence[Row]]) -> None:
    from ssl_gradmix.evaluation.open_set.recognition import score_table, with_spread

    accuracies = [f"{row.score} {with_spread(row)}" for row in shown if row.metric == "accuracy"]
    print(f"closed-set accuracy: {', '.join(accuracies)}")
    for heading, rows in tables.items():
        for what, metrics in ((heading, _SHOWN), ("this run minus the other", _DIFFERENCES)):
            told = [row for row in rows if row.metric in metrics]
            if told:
                print(f"\n{what}, {_spread(told[0])}\n{score_table(told, metrics)}")


def _spread(row: Row) -> str:
    trials = row.params.get("trials")
    return "with 95% intervals" if trials is None else f"mean ± standard deviation over trials {trials}"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
