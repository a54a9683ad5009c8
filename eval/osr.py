"""How well scores on frozen features tell test images of known classes from unknown ones.

Classifiers and scores see training images of the known classes alone. The unknown images are those of the data's other
classes, over several trials; or those of other data sets, which is out-of-distribution detection. Trials are named as
in --data.open_set: `cifar10` is the five of the literature, `cifar10:2` one of them, `random:6` five random ones with
six known classes, `random:6:0` one of these.

    python eval/osr.py runs/x
    python eval/osr.py runs/x --trials random:6
    python eval/osr.py runs/x --trials cifar+10 --unknown.name cifar100 --unknown.root data
    python eval/osr.py runs/x --unknown.name svhn --unknown.root data
    python eval/osr.py runs/x --unknown '[{name: svhn, root: data}, {name: folder, root: textures}]'
    python eval/osr.py runs/x --compare runs/y
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from tqdm import tqdm

from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import ImageSet, has_splits, load
from ssl_gradmix.evaluation import cli, plots, rows
from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_intervals, paired_difference
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import all_metrics, auroc, oscr, threshold_at_tpr
from ssl_gradmix.evaluation.probes import LinearProbe, linear_probe
from ssl_gradmix.evaluation.scores import all_scores, parameters_used
from ssl_gradmix.files import write_whole
from ssl_gradmix.settings import Data

_VOTERS, _TEMPERATURE = 20, 0.07  # those of `knn_predict`
_K, _TOP_K = 50, 3  # those of `all_scores`
_ON_LOGITS = ("vim", "msp", "max_logit", "energy")
_NO_SCORES = ("is_known", "correct", "labels")

_SHOWN = {"auroc": "AUROC", "fpr95_id_pos": "FPR95, known positive", "oscr": "OSCR"}
_DIFFERENCES = {"auroc_difference": "AUROC difference", "oscr_difference": "OSCR difference"}


@dataclass
class Options:
    """What is measured, and how.

    Args:
        trials: One name of trials, or a list of names. Null takes the known classes that the run was pretrained on, or
            that --data.open_set or --data.classes give; else the trials of the data set; else random ones with 60% of
            the classes known. Trials of the literature go by class numbers (of a folder too, in the order of its class
            folders' names).
        unknown: Other data sets, each with the settings of --data; a single one also as --unknown.name and so on. Their
            test images, or all images of a folder without train/ and test/, are the unknown ones. With the trials
            cifar+10 or cifar+50: where CIFAR-100 is.
        compare: Another run evaluated so, to test whether the two differ on the same images.
        k: Whose neighbor's distance is the score knn_distance; null takes 50, or as many as there are.
        top_k: Neighbors in each class of the score top_k_cosine; null takes 3, or as many as there are.
        epochs: Passes over the training features, of the linear classifier.
        seed: Of the linear classifier's training.
    """

    trials: list[str] | str | None = None
    unknown: list[Data] | None = None
    compare: str | None = None
    k: int | None = None
    top_k: int | None = None
    epochs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")
        if self.unknown is not None:
            self.unknown = [Data(**vars(each)) for each in self.unknown]  # the parser leaves them plain

    def check(self, labels: np.ndarray) -> None:
        """Refuses more neighbors than the training images of the known classes, with labels (N,), can be."""
        sizes = np.unique(labels, return_counts=True)[1]
        for name, value, most, what in (
            ("k", self.k, sizes.sum(), "the training images of all known classes"),
            ("top_k", self.top_k, sizes.min(), "those of the smallest known class"),
        ):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, {what}, got {value}")

    def scoring(self) -> dict[str, int | None]:
        """What two runs must have in common to be compared."""
        return {name: getattr(self, name) for name in ("k", "top_k", "epochs", "seed")}


@dataclass(eq=False)
class Group:
    """Test images of known classes against unknown ones: a trial, or another data set."""

    name: str  # of its results, for instance random:6:0 or svhn
    trial: int | None  # its number; None where the unknown images are another data set's, whatever their class
    known: tuple[int, ...]  # labels
    images: ImageSet  # the unknown images are in: the test images themselves, or another set
    is_unknown: np.ndarray  # which of them they are
    params: dict[str, Any]  # what result rows say of it

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """Makes sure that each known class has a training image, and that there are known and unknown test images."""
        missing = sorted(set(self.known) - set(train.labels.tolist()))
        if missing:
            raise ValueError(f"{self.name}: {train.name} has no image of the known classes {missing}")
        if not np.isin(test.labels, self.known).any():
            raise ValueError(f"{self.name}: {test.name} has no image of the known classes {list(self.known)}")
        if not self.is_unknown.any():
            raise ValueError(f"{self.name}: {self.images.name} has no image of an unknown class")

    def fingerprint(self, test: ImageSet) -> str:
        """Of the images and labels compared, in their order; of files by folder, name and size."""
        both = test.only(self.known), self.images.subset(self.is_unknown)
        return hashlib.sha256(" ".join(images.fingerprint() for images in both).encode()).hexdigest()[:16]

    def select(self, test: cli.Labeled, unknown: cli.Labeled) -> tuple[cli.Labeled, torch.Tensor]:
        """The known of all test images, then the unknown of `images`; and which of them are known."""
        known = torch.isin(test[1], test[1].new_tensor(self.known))
        other = torch.from_numpy(self.is_unknown).to(known.device)
        features, labels = (torch.cat([mine[known], theirs[other]]) for mine, theirs in zip(test, unknown, strict=True))
        return (features, labels), torch.arange(len(labels), device=labels.device) < known.sum()


def evaluate(evaluation: cli.Evaluation, options: Options) -> None:
    """Measures, and on the main process writes rows, samples and a picture, and prints tables."""
    # All that may be wrong with what is asked for is found before the encoder starts.
    every_class = replace(evaluation.data, classes=None, open_set=None)
    train, test = (evaluation.load(split, every_class) for split in ("train", "test"))
    with evaluation.one_first():
        task, groups, repeated = choose_groups(evaluation, options, test)
    for group in groups:
        group.check(train, test)
        options.check(train.only(group.known).labels)
    samples = Samples(evaluation.encoder.title, options.scoring(), {g.name: g.fingerprint(test) for g in groups})
    other = None if options.compare is None else read_other(options.compare, task, evaluation.encoder.feature)
    if other is not None:
        samples.check_comparable(other)

    sets = dict.fromkeys([train, test, *(group.images for group in groups)])
    seen = train.only(sorted({label for group in groups for label in group.known}))
    features = {images: evaluation.features(seen if images is train else images) for images in sets}
    if not evaluation.accelerator.is_main_process:
        return
    found, remarks, probes = [], [], {}
    for group in tqdm(groups, desc="scoring", delay=3, disable=None):
        of_known = torch.isin(features[train][1], features[train][1].new_tensor(group.known))
        bank = tuple(part[of_known] for part in features[train])
        tested, is_known = group.select(features[test], features[group.images])
        if group.known not in probes:
            probes[group.known] = linear_probe(*bank, epochs=options.epochs, seed=options.seed)
            if remark := probes[group.known].remark:
                remarks.append(f"{group.name}: {remark}")
        probe = probes[group.known]
        if task == "osr" or group is groups[0]:  # data sets are told from the same known images
            closed = closed_set(probe, bank, tuple(part[is_known] for part in tested), options)
            found.append(evaluation.frame(task, test.name, closed, group.trial, **group.params))
        numbers, arrays = detect(probe, bank, tested, is_known, options)
        if other is not None and group.name in other.arrays:
            numbers += compare(arrays, other.arrays[group.name], other.encoder)
        name = test.name if task == "osr" else group.images.name
        found.append(evaluation.frame(task, name, numbers, group.trial, **group.params))
        samples.arrays[group.name] = arrays
    about = {**evaluation.about(*sets), "groups": {group.name: describe(group, test) for group in groups}}
    report(evaluation, task, groups, test.name, rows.joined(found), samples, about, [*repeated, *remarks])


def choose_groups(
    evaluation: cli.Evaluation, options: Options, test: ImageSet
) -> tuple[str, list[Group], Sequence[str]]:
    """The task, `osr` or `ood`, what is told apart in it, and remarks on trials that are left out."""
    data, config = evaluation.data, evaluation.encoder.config
    if options.trials is None:
        trials = [] if options.unknown is not None else open_set.own_trials(data, test.classes)
    else:
        names = [options.trials] if isinstance(options.trials, str) else options.trials
        trials = [trial for name in names for trial in open_set.trials(name, data.name, len(test.classes))]
        kinds = sorted({trial.name.rpartition(":")[0] for trial in trials})
        if len(kinds) != 1:
            several = f"of one split, as means are taken over them, got {' and '.join(kinds)}: evaluate each by itself"
            raise ValueError(f"trials must be {several if kinds else 'at least one'}")
    elsewhere = [trial for trial in trials if trial.elsewhere]
    if options.unknown is not None and len(elsewhere) < len(trials):
        raise ValueError(
            "unknown goes with the trials cifar+10 or cifar+50, or else without trials: then the known test images are "
            "told from other data sets"
        )
    if not trials:
        return "ood", set_groups(data, test, config, options.unknown), []

    others = load_cifar100(data, options.unknown) if elsewhere else test
    first: dict[frozenset[int], open_set.Trial] = {}
    repeated = []
    for trial in trials:
        same = first.setdefault(frozenset(trial.known), trial)
        if same is not trial:
            repeated.append(f"{trial.name} is left out, as it has the known classes of {same.name}")
    groups = [trial_group(trial, data, test, others if trial.elsewhere else test, config) for trial in first.values()]
    return "osr", groups, repeated


def trial_group(
    trial: open_set.Trial, data: Data, test: ImageSet, images: ImageSet, config: Mapping[str, Any] | None
) -> Group:
    """The images of a trial, of which the unknown ones are in `images`."""
    unknown_here = trial.unknown if images is test else ()
    params = {
        "protocol": trial.protocol,
        "pretraining": open_set.pretraining(config, data, test.classes, trial.known, unknown_here),
        "n_known": len(trial.known),
        **({} if images is test else {"unknown": images.name}),
    }
    return Group(trial.name, trial.number, trial.known, images, np.isin(images.labels, trial.unknown), params)


def set_groups(data: Data, test: ImageSet, config: Mapping[str, Any] | None, others: Sequence[Data]) -> list[Group]:
    """The test images of a data set, of those classes that the settings name, against each of other sets."""
    known = open_set.known_classes(data, test.classes) or list(range(len(test.classes)))
    if len(known) < 2:
        raise ValueError(f"at least two known classes are needed, {test.name} has {[test.classes[i] for i in known]}")
    names = [open_set.data_name(other) for other in others]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"unknown must be at least one data set, and none twice, got {names}")
    groups = []
    for name, other in zip(names, others, strict=True):
        images = load_unknown(other)
        same = open_set.data_name(data) == name and (data.name != "folder" or _place(data) == _place(other))
        unknown_here = np.unique(images.labels).tolist() if same else []
        if set(unknown_here) & set(known):
            raise ValueError(f"unknown: {images.name} has images of the known classes, as it is the same data")
        params = {
            "known": test.name,
            "pretraining": open_set.pretraining(config, data, test.classes, known, unknown_here),
            "n_known": len(known),
            **({} if len(known) == len(test.classes) else {"classes": ", ".join(test.classes[i] for i in known)}),
        }
        groups.append(Group(name, None, tuple(known), images, np.ones(len(images), bool), params))
    return groups


def load_unknown(data: Data) -> ImageSet:
    """Loads the test images of another data set, or all images of a folder that has neither train/ nor test/."""
    try:
        images = load(data, "all" if data.name == "folder" and not has_splits(_place(data)) else "test")
        wanted = open_set.known_classes(data, images.classes)
    except (OSError, ValueError) as error:
        raise ValueError(f"unknown: {error}") from error
    return images if wanted is None else images.only(wanted)


def load_cifar100(data: Data, others: Sequence[Data] | None) -> ImageSet:
    """Loads the test images that have the unknown classes of the trials cifar+10 and cifar+50."""
    if others is None and data.name == "cifar10":
        others = [Data("cifar100", data.root, download=data.download)]
    if others is None or len(others) != 1:
        raise ValueError(
            "the unknown classes are CIFAR-100's: say where it is, as --unknown.name cifar100 --unknown.root DIR"
        )
    images = load_unknown(replace(others[0], classes=None, open_set=None))
    if len(images.classes) != 100:
        raise ValueError(
            f"the split does not fit: {images.name} has {len(images.classes)} classes, and CIFAR-100, of which the "
            "unknown ones are, has 100"
        )
    return images


def closed_set(probe: LinearProbe, bank: cli.Labeled, test: cli.Labeled, options: Options) -> list[rows.Number]:
    """Accuracy on known test images, of the linear probe of `bank` and weighted kNN, with Wilson 95% intervals."""
    features, labels = test
    votes = {"k": used_k(_VOTERS, bank[0]), "temperature": _TEMPERATURE}
    linear = accuracy_interval(probe.predict(features) == labels)
    nearest = accuracy_interval(knn_predict(features, *bank, _VOTERS, _TEMPERATURE) == labels)
    return [
        rows.number("linear", "accuracy", linear, len(labels), **_training(probe, options)),
        rows.number("knn", "accuracy", nearest, len(labels), **votes),
    ]


def detect(
    probe: LinearProbe, bank: cli.Labeled, test: cli.Labeled, is_known: torch.Tensor, options: Options
) -> tuple[list[rows.Number], dict[str, np.ndarray]]:
    """Tells known from unknown test samples by every score of `scores.all_scores`.

    The numbers are those of `metrics.all_metrics`, with bootstrap 95% intervals, where OSCR counts what the probe names
    right, whatever the score; and `threshold_tpr95`, which 95% of the known test samples reach. The samples are (M,) by
    name: `is_known`, `correct` (False where unknown), `labels`, and each score.
    """
    features, labels = test
    k, top_k = (default if given is None else given for given, default in ((options.k, _K), (options.top_k, _TOP_K)))
    scores = all_scores(*bank, features, probe.logits(bank[0]), probe.logits(features), k, top_k)
    used = parameters_used(*bank, k, top_k)
    known = is_known.cpu().numpy()
    correct = known & (probe.predict(features) == labels).cpu().numpy()
    training = _training(probe, options)
    numbers = []
    for name, values in scores.items():
        params = used.get(name, {}) | (training if name in _ON_LOGITS else {})
        for metric, interval in bootstrap_intervals(all_metrics, values, known, correct, strata=known).items():
            of_probe = training if metric == "oscr" else {}
            numbers.append(rows.number(name, metric, interval, len(values), **params | of_probe))
        threshold = threshold_at_tpr(values, known)
        numbers.append(rows.number(name, "threshold_tpr95", threshold, int(known.sum()), **params))
    return numbers, {"is_known": known, "correct": correct, "labels": labels.cpu().numpy(), **scores}


def compare(samples: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str) -> list[rows.Number]:
    """Tests by paired bootstrap whether a run and the `other`, called `name`, differ in AUROC and OSCR.

    Both hold the same images, sample for sample. A difference is this run's value minus the other's. The p-values,
    which stand among the parameters, are not corrected for the number of tests.
    """
    known, numbers = samples["is_known"], []
    for score in samples:
        if score in _NO_SCORES or score not in other:
            continue
        ours, theirs = (samples[score], known), (other[score], known)
        differences = {
            "auroc_difference": paired_difference(auroc, ours, theirs, strata=known),
            "oscr_difference": paired_difference(
                oscr, (*ours, samples["correct"]), (*theirs, other["correct"]), strata=known
            ),
        }
        for metric, (*interval, p_value) in differences.items():
            params = {"compared_with": name, "p_value": p_value}
            numbers.append(rows.number(score, metric, tuple(interval), len(known), **params))
    return numbers


def over_trials(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over trials, a row for each score and metric that several trials have.

    Parameters are kept where all trials agree on them, and `n` is the mean number of images of one trial. Thresholds
    and p-values have no mean.
    """
    means = []
    for _, group in found[found["metric"] != "threshold_tpr95"].groupby(["score", "metric"], sort=False):
        if group["trial"].nunique() < 2:
            continue  # such as the difference to a run that was evaluated on one of the trials
        first, *others = group["params"]
        shared = {
            name: value
            for name, value in first.items()
            if name != "p_value" and all(params.get(name) == value for params in others)
        }
        over = {"over": "trials", "std": group["value"].std(), "trials": group["trial"].astype(int).tolist()}
        mean = {"trial": None, "value": group["value"].mean(), "ci_low": None, "ci_high": None}
        means.append({**group.iloc[0], **mean, "n": round(group["n"].mean()), "params": {**shared, **over}})
    return rows.typed(means)


@dataclass(eq=False)
class Samples:
    """What was found of each test image, for curves and for comparing runs."""

    encoder: str  # its name
    settings: dict[str, Any]  # how they were scored, `Options.scoring()`
    images: dict[str, str]  # by group, the fingerprint of its test images in their order
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by group, as `detect` gives them

    def write(self, path: Path) -> None:
        """Writes safetensors, whole or not at all: arrays as `<group>/<name>`, booleans as uint8, the rest as metadata.

        Scores stay float64: in float32 all confident softmaxes would be 1.
        """
        tensors = {
            f"{group}/{name}": array.astype(np.uint8) if array.dtype == bool else array
            for group, arrays in self.arrays.items()
            for name, array in arrays.items()
        }
        header = {"encoder": self.encoder, "settings": json.dumps(self.settings), "images": json.dumps(self.images)}
        write_whole(path, lambda temporary: temporary.write_bytes(save(tensors, header)))

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Reads what `write` wrote."""
        try:
            arrays, header = rows.read_samples(path)
            settings, images = dict(json.loads(header["settings"])), dict(json.loads(header["images"]))
            if images.keys() != arrays.keys():
                raise ValueError(f"it has arrays of {', '.join(arrays)}, but names {', '.join(images)}")
            for group, named in arrays.items():
                if not {"is_known", "correct"} <= named.keys() or len({array.shape for array in named.values()}) > 1:
                    raise ValueError(f"{group} lacks is_known or correct, or its arrays differ in length")
            return cls(header["encoder"], settings, images, arrays)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no file of open-set samples, or damaged: {error}") from error

    def check_comparable(self, other: Samples) -> None:
        """Refuses other samples where no group is in both, one has other images, or scores were made otherwise."""
        shared = [group for group in self.images if group in other.images]
        if not shared:
            theirs, ours = ", ".join(other.images), ", ".join(self.images)
            raise ValueError(f"{other.encoder} has other samples: it was evaluated on {theirs}, not {ours}")
        different = [group for group in shared if self.images[group] != other.images[group]]
        if different:
            raise ValueError(f"{other.encoder} has other samples: the images of {', '.join(different)} differ")
        if self.settings != other.settings:
            raise ValueError(f"{other.encoder} was scored with {other.settings}, this with {self.settings}")

    def add_earlier(self, path: Path, groups: Sequence[str]) -> None:
        """Takes over those of these groups that an earlier evaluation scored in the same way."""
        try:
            earlier = Samples.read(path)
        except (FileNotFoundError, ValueError):
            return
        if earlier.settings == self.settings:
            for group in earlier.arrays.keys() & set(groups) - self.arrays.keys():
                self.images[group], self.arrays[group] = earlier.images[group], earlier.arrays[group]


def read_other(run: str, task: str, feature: str) -> Samples:
    """The samples of another run."""
    folders = [rows.results_folder(out, feature) for out in (Path(run, "eval"), Path(run))]
    places = [folder / f"{task}_samples.safetensors" for folder in folders]
    path = next((path for path in places if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"compare: there is no {places[0]}: evaluate that run in the same way first")
    return Samples.read(path)


def report(
    evaluation: cli.Evaluation,
    task: str,
    groups: Sequence[Group],
    known_from: str,
    found: pd.DataFrame,
    samples: Samples,
    about: dict[str, Any],
    remarks: Sequence[str],
) -> None:
    """Writes the files and prints tables."""
    means = over_trials(found) if task == "osr" else rows.typed([])
    settings = ", ".join(dict.fromkeys(group.params["pretraining"] for group in groups))
    title = f"{evaluation.encoder.title} on {known_from}, encoder pretrained on: {settings}"
    path = evaluation.out / f"{task}.json"
    files = [path, path.with_name(f"{task}_samples.safetensors"), path.with_suffix(".png")]
    shown = {group.name: samples.arrays[group.name] for group in groups}
    figure = plots.open_set(shown, found, title, several_sets=task == "ood" and len(groups) > 1)
    samples.add_earlier(files[1], rows.kept(path, about)[1]["groups"])
    samples.write(files[1])
    plots.write(files[2], figure)
    rows.add(path, rows.joined([found, means]), about)

    print(title)
    for name, group in about["groups"].items():
        known = group["known_names"]
        more = f" and {len(known) - 12} more" if len(known) > 12 else ""
        print(f"{name}: known are {', '.join(known[:12])}{more}; unknown ones from {group['unknown_from']}")
    print(*remarks, sep="\n", end="\n" if remarks else "")
    told = rows.joined([means, found[~found["metric"].isin(means["metric"])]])  # a single trial has no mean
    accuracies = [f"{row.score} {with_spread(row)}" for row in told[told["metric"] == "accuracy"].itertuples()]
    print(f"closed-set accuracy: {', '.join(accuracies)}")
    tables = {"known against unknown classes": told}
    if task == "ood":
        tables = {group.name: told[told["dataset"] == group.images.name.rpartition("/")[0]] for group in groups}
    for heading, table in tables.items():
        for what, metrics in ((heading, _SHOWN), ("this run minus the other", _DIFFERENCES)):
            chosen = table[table["metric"].isin(metrics)]
            if len(chosen):
                trials = chosen["params"].iloc[0].get("trials")
                beside = "with 95% intervals" if trials is None else f"mean ± standard deviation over trials {trials}"
                print(f"\n{what}, {beside}\n{score_table(chosen, metrics)}")
    if means.empty:
        print("\nIntervals: bootstrap over test images; with few images, or near 0 and 1, they are too narrow.")
    print(f"\nWritten: {', '.join(map(str, files))}")


def describe(group: Group, test: ImageSet) -> dict[str, Any]:
    """What the file of results says of a group."""
    return {
        "known": list(group.known),
        "known_names": [test.classes[label] for label in group.known],
        "known_from": test.name,
        "unknown": np.unique(group.images.labels[group.is_unknown]).tolist(),
        "unknown_from": group.images.name,
    }


def score_table(found: pd.DataFrame, metrics: Mapping[str, str]) -> str:
    """Lays out a line a score and a column a metric for a terminal."""
    lines = {score: [score] for score in found["score"]}
    for row in found.itertuples():
        lines[row.score].append(with_spread(row))
    return rows.aligned([("score", *metrics.values()), *lines.values()])


def with_spread(row: Any) -> str:
    """A value with its 95% interval, or with its standard deviation over trials."""
    if "std" in row.params:
        return f"{row.value:.4f} ± {row.params['std']:.4f}"
    tested = f" {plots.p_value(row.params['p_value'])}" if "p_value" in row.params else ""
    return f"{row.value:.4f} ({row.ci_low:.4f} to {row.ci_high:.4f}){tested}"


def _training(probe: LinearProbe, options: Options) -> dict[str, object]:
    return {"learning_rate": probe.learning_rate, "epochs": options.epochs, "seed": options.seed}


def _place(data: Data) -> Path:
    return Path(data.root or "").expanduser().resolve()


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
