"""How well frozen features hold up where test images are corrupted: 15 common corruptions at 5 severities.

A linear classifier and kNN are fitted on clean training images, then judge the corrupted test images. These are made on
the fly, each reproducibly, or read from a published set: CIFAR-10-C, CIFAR-100-C, ImageNet-C, or what eval/make_c.py
wrote. Corruptions that are done are kept: the same command again goes on where an interrupted one stopped.

    python eval/corruption.py runs/x
    python eval/corruption.py runs/x --images 1000 --baseline runs/y
    python eval/corruption.py runs/x --osr true --data.open_set random:6:0
    python eval/corruption.py timm:resnet18.a1_in1k --data.name folder --data.root imagenet --out results
        --published ImageNet-C --baseline alexnet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssl_gradmix.evaluation import cli

if TYPE_CHECKING:
    from ssl_gradmix.data.datasets import ImageSet
    from ssl_gradmix.evaluation.results import Row
    from ssl_gradmix.evaluation.setup import Evaluation


@dataclass
class Options:
    """What is measured, and how.

    Args:
        corruptions: Which, such as [fog, jpeg_compression]; null is the 15 common ones.
        extra: Add the 4 extra corruptions, which are reported apart.
        preset: Parameters of the severities; null takes those made for images nearest in size.
        published: Folder of a published set to read, in place of corrupting the test images here.
        images: About so many test images, the same share of each class; null takes all. They are encoded 75 times.
        osr: Also tell known from unknown classes, both corrupted. The known ones are those of --data.open_set or
            --data.classes, a run's own by default.
        baseline: What mCE divides by: another run evaluated so, or `alexnet` (ImageNet only).
        epochs: Passes over the training features, of the linear classifier.
        k: Neighbors that vote in weighted kNN.
        temperature: Of their weights exp(cosine / temperature).
        seed: Of the corruptions, the linear classifier's training, and the choice of images.
        workers: Processes that corrupt, for each one that encodes; null shares the cores out.
    """

    corruptions: list[str] | None = None
    extra: bool = False
    preset: Literal["cifar", "imagenet64", "imagenet"] | None = None
    published: str | None = None
    images: int | None = None
    osr: bool = False
    baseline: str | None = None
    epochs: int = 100
    k: int = 20
    temperature: float = 0.07
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.published is not None and self.preset is not None:
            raise ValueError("preset is how corruptions are made here, so it cannot be given with published")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1 or null, got {self.workers}")


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `corruption.json` and `.png` and prints tables."""
    from accelerate.utils import broadcast_object_list
    from joblib import cpu_count
    from tqdm import tqdm

    from ssl_gradmix.data.corruptions import SEVERITIES
    from ssl_gradmix.data.datasets import known_classes, load
    from ssl_gradmix.evaluation.features import extract, fingerprint
    from ssl_gradmix.evaluation.probes import linear_probe
    from ssl_gradmix.evaluation.results import write_rows
    from ssl_gradmix.evaluation.robustness import (
        GROUP_OF,
        Classifiers,
        Generated,
        Measurement,
        Published,
        Selection,
        check_can_make,
        choose_corruptions,
        read_baseline,
        summarize,
    )

    accelerator, encoder = evaluation.accelerator, evaluation.encoder
    names = choose_corruptions(options.corruptions, options.extra)
    train = evaluation.load_labeled("train")
    with evaluation.one_first():
        test = load(evaluation.data, "test")
    known = known_classes(evaluation.data, test.classes)
    trial = _open_set(evaluation, test) if options.osr else {}
    selection = Selection(None if options.osr else known, options.images, options.seed)
    clean = test.subset(selection.numbers(test))
    if options.published is not None:
        corrupted = Published(options.published, test, selection)
    else:
        check_can_make(names)
        workers = options.workers or max(1, cpu_count() // accelerator.num_processes)
        corrupted = Generated(test, selection, encoder.size, options.preset, options.seed, workers)
    for name in names:
        corrupted.read(name, SEVERITIES[-1])  # damage is better known before hours of work than after

    origin = corrupted.origin()
    described = {
        **evaluation.describe(),
        "images": {
            "name": clean.name,
            "count": len(clean),
            "drawn_with_seed": None if options.images is None else options.seed,
            "n_classes": len(test.classes),
            "known_classes": known,
            "open_set": options.osr,
            "preset": origin.get("preset"),
            "frost_source": origin.get("frost_source"),
        },
        "corruptions": origin,
        "settings": {
            "published_files": corrupted.fingerprint(),
            "train": fingerprint(encoder, train),
            "test": fingerprint(encoder, clean),
            "epochs": options.epochs,
            "k": options.k,
            "temperature": options.temperature,
            "seed": options.seed,
        },
    }
    baseline = None
    if options.baseline is not None:
        baseline = read_baseline(options.baseline, names, described["images"], encoder.feature)
    # One process reads for all: the others might already find what it writes below.
    (measured,) = broadcast_object_list([_finished(evaluation, described)])

    train_features, train_labels = evaluation.features(train)
    features, labels = evaluation.features(clean)
    if accelerator.is_main_process:
        probe = linear_probe(train_features, train_labels, epochs=options.epochs, seed=options.seed)
        classifiers = Classifiers(probe, train_features, train_labels, options.k, options.temperature, options.osr)
        clean_numbers = classifiers.measure(features, labels)

    def row(number: Measurement, metric: str, **params: object) -> Row:
        params |= {**number.params, **origin, **trial}
        return evaluation.row("corruption", clean, number.score, metric, number.interval, number.n, **params)

    partial = evaluation.out / "corruption.partial.json"
    missing = [name for name in names if name not in measured]
    silent = None if accelerator.is_main_process else True
    with tqdm(total=len(missing) * len(SEVERITIES), unit="pass", disable=silent) as bar:
        for name in missing:
            measured[name] = []
            for severity in SEVERITIES:
                bar.set_description(f"{name} {severity}")
                images = corrupted.read(name, severity)
                seen = extract(encoder, images, evaluation.batch_size, accelerator=accelerator, progress=False)
                if accelerator.is_main_process:
                    where = {"corruption": name, "severity": severity, "group": GROUP_OF[name]}
                    numbers = classifiers.measure(*(part.to(accelerator.device) for part in seen))
                    measured[name] += [row(number, number.metric, **where) for number in numbers]
                bar.update()
            if accelerator.is_main_process:
                write_rows(partial, [row for rows in measured.values() for row in rows], described)

    if accelerator.is_main_process:
        rows = [row(number, f"clean_{number.metric}") for number in clean_numbers]
        rows += [row for name in names for row in measured[name]]
        summary, remarks = summarize(rows, baseline)
        _report(evaluation, described, rows, summary, remarks)
        partial.unlink(missing_ok=True)


def _open_set(evaluation: Evaluation, test: ImageSet) -> dict[str, Any]:
    """What rows say of the trial, whose known classes the data settings name."""
    from ssl_gradmix.evaluation.open_set.trials import ELSEWHERE, choose_trials, pretraining

    data = evaluation.data
    if data.classes is None and data.open_set is None:
        raise ValueError("osr needs known classes: give --data.open_set, such as random:6:0, or --data.classes")
    protocol, (trial,) = choose_trials(data, test.classes)
    if protocol in ELSEWHERE:
        raise ValueError(f"data.open_set {data.open_set!r} has unknown classes of another data set: osr cannot take it")
    seen = pretraining(evaluation.encoder.config, data, test.classes, trial.known, trial.unknown)
    return {"trial": trial.number, "protocol": protocol, "pretraining": seen, "n_known": len(trial.known)}


def _finished(evaluation: Evaluation, described: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows by corruption of an earlier call that evaluated the same in the same way."""
    from ssl_gradmix.evaluation.results import read_rows

    for name in ("corruption.partial.json", "corruption.json"):
        try:
            rows, extra = read_rows(evaluation.out / name)
        except (FileNotFoundError, ValueError):
            continue  # a damaged file is written anew
        if extra == described:
            corruptions = dict.fromkeys(row.params["corruption"] for row in rows if "corruption" in row.params)
            return {c: [row for row in rows if row.params.get("corruption") == c] for c in corruptions}
    return {}


def _report(
    evaluation: Evaluation, described: dict[str, Any], rows: list[Row], summary: list[Row], remarks: list[str]
) -> None:
    """Writes the files and prints tables."""
    from ssl_gradmix.evaluation.corruption_plots import severities
    from ssl_gradmix.evaluation.results import write_figure, write_rows
    from ssl_gradmix.evaluation.robustness import severity_table, summary_table

    written = evaluation.out / "corruption.json"
    write_rows(written, rows + summary, described)
    files = [written]

    images, origin = described["images"], described["corruptions"]
    print(f"{evaluation.encoder.title} on {images['count']} images of {images['name']}")
    print("corruptions " + ", ".join(str(v) if key == "source" else f"{key} {v}" for key, v in origin.items()))
    tables = [("linear", "accuracy", "accuracy of the linear classifier", "corruption.png")]
    if images["open_set"]:
        tables.append(("max_logit", "auroc", "AUROC of known against unknown, maximum logit", "corruption_osr.png"))
    for score, metric, what, name in tables:
        files.append(evaluation.out / name)
        title = f"{evaluation.encoder.title} on {images['name']}, corruptions {origin['source']}: {what}"
        write_figure(files[-1], severities(rows, score, metric, title))
        print(f"\n{what}, in %\n{severity_table(rows, score, metric)}")
    print(f"\nmeans (of how many corruptions)\n{summary_table(summary)}\n")
    if origin.get("frost_source") == "synthetic" and any(row.params.get("corruption") == "frost" for row in rows):
        remarks.append(
            "frost has synthetic textures, so it and its means do not compare with published results: "
            "pip install torch-uncertainty-assets brings the authors' photographs"
        )
    print(*remarks, f"Written: {', '.join(map(str, files))}", sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
