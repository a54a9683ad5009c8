"""The harness of the controlled experiments: what a cell runs, what is read of it, and what is said of all."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from scipy.stats import ttest_rel
from support import ROOT, load_script

from ssl_gradmix import command_line
from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation.results import Row as Result
from ssl_gradmix.evaluation.results import write_rows
from ssl_gradmix.settings import BYOLSettings, Data, SimCLRSettings

sys.path.insert(0, str(ROOT / "benchmarks"))
from evidence import differences, figures, images, page, rows, runner
from evidence.cells import CHANGES, DATA, VARIANTS, Cell, Grid, Step, passes, steps

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid("tiny", tmp_path / "data", 100, 20, 32, "resnet10_tiny", 10, (), (), tmp_path / "cache", 1)


def write_folder(root: Path, train: int, test: int) -> Path:
    """Noise in ten class folders, a color a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CIFAR):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3)) + np.array([15 * label, 0, 150 - 15 * label])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:04d}.png")
    return root


def training(cell: Cell, grid: Grid) -> dict:
    """What the recipe's own parser makes of a cell's training, as flat names."""
    kind = {"simclr": SimCLRSettings, "byol": BYOLSettings}[cell.method]
    parser = command_line.recipe_parser(kind, "", recipe=cell.method)
    _, plain = command_line.read(parser, steps(cell, grid)[0].command[2:])
    sections = {name: part for name, part in plain.items() if isinstance(part, dict)}
    flat = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    return {**plain, **flat} | dict.fromkeys(sections)


def changed(one: dict, two: dict) -> dict:
    return {name: value for name, value in one.items() if two.get(name) != value and name != "run"}


class TestCells:
    def test_variants_differ_in_what_they_say_alone(self, grid):
        found = {name: training(Cell("simclr", name, "all", 1), grid) for name in VARIANTS}
        e = found["e"]
        assert (e["extra_view"], e["gradmix.target"], e["gradmix.layers"]) == ("gradmix", "agreement", ["layer3"])
        assert (e["gradmix.attribution"], e["gradmix.fill"], e["gradmix.region"]) == ("layercam", "donor", "box")
        assert e["training.seed"] == 1
        assert changed(found["d"], e) == {"gradmix.attribution": "random"}
        assert changed(found["f"], e) == {"gradmix.target": "loss"}
        assert changed(found["g"], e) == {"gradmix.fill": "noise"}
        assert changed(found["h"], e) == {"gradmix.region": "mask"}
        assert changed(found["c"], e) == {"extra_view": "augmented"}  # the rest is not read then
        assert changed(found["a"], found["c"]) == {"extra_view": "none"}
        assert changed(found["b"], found["a"]) == {"training.epochs": 30}

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_change_changes_one_setting(self, change, grid):
        base, other = (training(Cell("simclr", name, "all", 0), grid) for name in ("f", f"f-{change}"))
        ((name, value),) = changed(other, base).items()
        assert name == next(iter(CHANGES[change]))
        assert value == yaml.safe_load(CHANGES[change][name])

    def test_a_plain_third_view_may_count_as_much_as_a_mixed_one(self, grid):
        base, other = (training(Cell("simclr", name, "all", 0), grid) for name in ("c", "c-weight0.7"))
        assert changed(other, base) == {"method.weight": 0.7}

    def test_data(self, grid):
        found = {name: training(Cell("byol", "e", name, 1), grid) for name in DATA}
        assert found["all"]["data.root"] == str(grid.cache / "data-100")
        assert changed(found["known"], found["all"]) == {"data.open_set": "cifar10:2"}
        assert changed(found["two-cue"], found["all"]) == {
            "data.root": str(grid.cache / "two-cues-50" / "pretraining"),
            "augmentation.flip": 0,
            "augmentation.min_scale": 0.5,
        }

    def test_seeds_are_distinct_trials(self):
        trials = [Cell("simclr", "a", "known", seed).trial for seed in range(4)]
        assert trials == [0, 2, 3, 4]
        assert len({frozenset(open_set.split("cifar10", trial)[0]) for trial in trials}) == 4

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("simclr/a/all/0", (40, 0, 0)),
            ("simclr/b/all/0", (60, 0, 0)),
            ("simclr/c/all/0", (60, 0, 0)),
            ("simclr/d/all/0", (60, 0, 0)),
            ("simclr/e/all/0", (60, 20, 0)),
            ("simclr/f-layer2/known/0", (60, 20, 0)),
            ("byol/a/all/0", (40, 0, 40)),
            ("byol/b/all/0", (60, 0, 60)),
            ("byol/e/two-cue/0", (60, 20, 40)),
        ],
    )
    def test_passes(self, cell, expected, grid):
        assert passes(Cell.parse(cell), grid) == expected

    def test_plain_views_get_no_fewer_passes_where_epochs_are_odd(self, grid):
        counts = [passes(Cell("simclr", name, "all", 0), replace(grid, epochs=7)).encoder for name in "be"]
        assert counts == [22, 21]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("simclr/e/all", "METHOD/VARIANT/DATA/SEED"),
            ("simclr/z/all/0", "variant must be one of a, b"),
            ("simclr/e-layer9/all/0", "e-layer2"),
            ("simclr/c-crop/all/0", "'c-crop' is the same as c, which does not read gradmix.fill"),
            ("simclr/b-weight2.0/all/0", "the same as b, which does not read method.weight"),
            ("moco/e/all/0", "method must be one of simclr, byol"),
            ("simclr/e/mnist/0", "data must be one of all, known, two-cue"),
        ],
    )
    def test_what_is_no_cell_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            Cell.parse(text)

    def test_prints_commands(self, tmp_path, capsys):
        main = load_script("benchmarks/evidence.py").main
        grid = ["--cache", str(tmp_path), "--ood", "my textures", "--", "--optimizer.lr", "0.1"]
        main(["--data", "cifar", "--print", "simclr/e/all/2", *grid])
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        assert [line[2] for line in lines] == [
            "recipes/simclr_gradmix.py",
            *("eval/linear_probe.py", "benchmarks/evidence/rankme.py", "eval/osr.py", "eval/corruption.py"),
        ]
        assert lines[0][-2:] == ["--optimizer.lr", "0.1"]
        assert {line[3] for line in lines[1:]} == {str(tmp_path / "runs" / "cpu" / "simclr-e-all-2")}
        unknown = yaml.safe_load(lines[3][lines[3].index("--unknown") + 1])
        assert unknown == [{"name": "digits"}, {"name": "folder", "root": str(Path("my textures").absolute())}]
        assert list(tmp_path.iterdir()) == []

    def test_an_estimate_counts_what_is_to_be_done_at_the_rate_seen(self, tmp_path, grid, capsys):
        main = load_script("benchmarks/evidence.py").main
        command = ["--data", "cifar", "--results", str(tmp_path / "rows.jsonl"), "--seeds", "0", "1", "--estimate"]
        command += ["--variants", "a", "e", "--kinds", "all"]
        main(command)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("0 cells are done, 4 to do")
        assert "40 encoder passes" in lines[1]
        assert " 7.4 training" in lines[1]  # 40 passes of 10,000 images, 900 a second
        assert "60 encoder passes,  20 attributions" in lines[2]
        settings = {**grid.settings(), "data": "cifar", "images": 10_000, "batch": 256, "corrupted": 2000}
        done = replace(row("a", "linear", 0.5), grid="cpu", settings=settings, passes=40, seconds=4000.0)
        rows.append(tmp_path / "rows.jsonl", [done])
        main(command)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("1 cells are done, 3 to do")
        assert "simclr/a/all/1" in lines[2]
        assert "66.7 training" in lines[2]
        assert lines[-1] == f"{66.7 + 2 * 66.7 * 64 / 40 + 3 * 4:.0f} minutes, 4.9 hours"


class TestImages:
    def test_subset(self, tmp_path):
        data = write_folder(tmp_path / "cifar", 5, 2)
        before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
        for count in (20, 40):
            images.subset(data, count, tmp_path / str(count))
        few, more = (load(Data("folder", str(tmp_path / str(count))), "train") for count in (20, 40))
        whole, test = (load(Data("folder", str(data)), split) for split in ("train", "test"))
        assert (few.classes, more.classes) == (CIFAR, CIFAR)
        assert np.bincount(few.labels).tolist() == [2] * 10
        chosen = [{path.resolve() for path in part.images} for part in (few, more, whole)]
        assert [len(paths) for paths in chosen] == [20, 40, 50]
        assert chosen[0] < chosen[1] < chosen[2]
        assert all(path.resolve().parent.name == few.classes[k] for path, k in zip(few.images, few.labels, strict=True))
        linked = load(Data("folder", str(tmp_path / "20")), "test")
        assert [path.resolve() for path in linked.images] == [path.resolve() for path in test.images]
        assert sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*")) == before

        with pytest.raises(ValueError, match="multiple of the 10 classes .* at most 50, got 25"):
            images.subset(data, 25, tmp_path / "25")
        with pytest.raises(ValueError, match="at most 50, got 60"):
            images.subset(data, 60, tmp_path / "60")
        with pytest.raises(ValueError, match="part of another folder"):
            images.subset(write_folder(tmp_path / "other" / "cifar", 2, 1), 20, tmp_path / "20")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "40", "cifar", "other"]

    def test_two_cues(self, tmp_path):
        images.two_cues(500, tmp_path / "cues")
        seen: dict[str, set[bytes]] = {}
        for place in ("pretraining/train", "usual/train", "usual/test"):
            left = {}
            for path in sorted((tmp_path / "cues" / place).rglob("*.png")):
                pixels = np.asarray(Image.open(path))
                assert pixels.shape == (32, 32)
                assert pixels[:, 16:].max() <= round(images.CONTRAST * 255) < pixels[:, :16].max()
                left[path.name] = (path.parent.name, pixels[:, :16].tobytes())
            seen[place] = {half for _, half in left.values()}
            assert len(left) == (500 if place == "pretraining/train" else 100)
        assert not seen["usual/test"] & (seen["usual/train"] | seen["pretraining/train"])
        assert seen["usual/train"] & seen["pretraining/train"]

        for split in ("train", "test"):
            sides = []
            for cue in ("usual", "neglected"):
                part = load(Data("folder", str(tmp_path / "cues" / cue)), split)
                sides.append({path.name: (path.read_bytes(), part.labels[i]) for i, path in enumerate(part.images)})
            usual, neglected = sides
            assert usual.keys() == neglected.keys()
            assert all(usual[name][0] == neglected[name][0] for name in usual)
            pairs = np.array([[usual[name][1], neglected[name][1]] for name in usual])
            assert [np.bincount(side).tolist() for side in pairs.T] == [[10] * 10] * 2
            assert (pairs[:, 0] == pairs[:, 1]).mean() < 0.25  # a tenth by chance

    def test_the_right_digit_agrees_as_often_as_said(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(images, "_write_pairs", lambda digits, *pair: written.append(pair))
        images.two_cues(20_000, tmp_path / "cues")
        left, right, _, places = written[0]
        assert (left == right).mean() == pytest.approx(images.CORRELATION, abs=0.01)
        others = np.bincount((right - left)[left != right] % 10, minlength=10)
        assert others[1:].min() > 150  # about 222 each
        (labels,) = places.values()
        assert (labels == left).all()


def result(score: str, metric: str, value: float, **params: object) -> Result:
    return Result("task", "data", "test", None, "run", "backbone", score, metric, value, None, None, 10, params)


def make_run(cell: Cell, grid: Grid, files: dict[str, list[Result]], extra: dict | None = None) -> None:
    run = cell.run(grid)
    for name, found in files.items():
        write_rows(run / "eval" / name, found, extra)
    config = {"training": {"batch_size": 32}, "environment": {"commit": "abc123"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    log = [
        {"epoch": 1, "step": 3, "images_per_second": 32.0},
        {"epoch": 2, "step": 6, "images_per_second": 96.0, "knn": 0.4},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


def row(variant: str, measure: str, value: float, seed: int = 0, **others: object) -> rows.Row:
    cost = {"a": (40, 0, 60.0), "c": (60, 0, 80.0)}.get(variant, (60, 20, 100.0))
    settings = {
        "data": "cifar10",
        "images": 100,
        "epochs": 20,
        "batch": 32,
        "backbone": "resnet10_tiny",
        "corrupted": 10,
    }
    settings |= {"recipe": [], "ood": ["digits"]}
    (data,) = [each.data for each in rows.MEASURES if each.name == measure]
    made = rows.Row(
        "tiny", "simclr", variant, data, seed, measure, value, *cost[:2], 0, cost[2] + seed, 1, "abc123", settings
    )
    return replace(made, **others)


class TestRows:
    def test_of_all_classes(self, grid):
        cell = Cell("simclr", "e", "all", 3)
        files = {
            "linear_probe.json": [
                result("linear", "top1", 0.51),
                result("linear", "top5", 0.9),
                result("linear", "top1", 0.21, label_fraction=0.01),
                result("linear", "top1", 0.31, label_fraction=0.1),
                result("knn", "top1", 0.47, k=20),
                result("linear", "class_accuracy", 0.8, **{"class": "cat"}),
            ],
            "corruption.json": [
                result("linear", "mean_corruption_error", 0.61, corruptions=15),
                result("knn", "mean_corruption_error", 0.66, corruptions=15),
            ],
            "ood.json": [
                result("knn_distance", "auroc", 0.7),
                result("knn_distance", "auroc", 0.9),
                result("energy", "auroc", 0.1),
                result("mahalanobis", "auroc", 0.95),
            ],
            "rankme.json": [result("rankme", "rankme", 33.0)],
        }
        make_run(cell, grid, files, {"validation": {"0.1": 0.48, "1": 0.52}})
        found = rows.condense(cell, grid)
        assert {each.measure: each.value for each in found} == {
            "validation_knn": 0.4,
            "validation_linear": 0.52,
            "linear": 0.51,
            "knn": 0.47,
            "linear_10": 0.31,
            "linear_1": 0.21,
            "corruption_error": 0.61,
            "ood_auroc": pytest.approx(0.8),
            "ood_auroc_mahalanobis": 0.95,
            "rankme": 33.0,
        }
        first = found[0]
        assert all(replace(each, measure="", value=0) == replace(first, measure="", value=0) for each in found)
        assert (first.cell, first.grid, first.commit, first.threads) == (cell, "tiny", "abc123", 1)
        assert (first.passes, first.attributions, first.target_passes) == (60, 20, 0)
        assert first.seconds == 3 * 32 / 32 + 3 * 32 / 96
        assert first.settings == grid.settings()

    @pytest.mark.parametrize(("seen", "fine"), [("known classes only", True), ("all classes, unlabeled", False)])
    def test_open_set_encoders_must_not_have_seen_the_unknown(self, seen, fine, grid):
        cell = Cell("simclr", "e", "known", 0)
        found = [
            result(score, metric, 0.6, pretraining=seen)
            for score in ("knn_distance", "max_logit", "top_k_cosine")
            for metric in ("auroc", "oscr")
        ]
        make_run(cell, grid, {"osr.json": [*found, result("linear", "accuracy", 0.7, pretraining=seen)]})
        if fine:
            values = {each.measure: each.value for each in rows.condense(cell, grid)}
            assert values == {
                **dict.fromkeys(
                    ("osr_auroc", "osr_oscr", "osr_auroc_logit", "osr_oscr_logit", "osr_auroc_cosine"), 0.6
                ),
                "closed_set": 0.7,
            }
        else:
            with pytest.raises(ValueError, match="must have been pretrained on known classes only"):
                rows.condense(cell, grid)

    def test_a_missing_number_is_named(self, grid):
        cell = Cell("simclr", "e", "two-cue", 0)
        make_run(cell, grid, {"usual/linear_probe.json": [result("knn", "top1", 0.5)]})
        with pytest.raises(ValueError, match=r"usual/linear_probe.json has no row linear top1"):
            rows.condense(cell, grid)

    def test_appended_by_several_at_once(self, tmp_path):
        path = tmp_path / "results" / "rows.jsonl"
        new = [[row("e", "linear", 0.1 * seed, seed), row("e", "knn", 0.2, seed)] for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: rows.append(path, part), new))
        found = rows.read(path)
        assert sorted(found, key=lambda each: (each.seed, each.measure)) == [
            each for part in new for each in sorted(part, key=lambda one: one.measure)
        ]
        assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"]

    def test_a_file_that_will_not_do_is_named(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        assert rows.read(path) == []
        rows.append(path, [row("e", "linear", 0.1)])
        with path.open("a") as file:
            file.write('{"grid": "tin')
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is no row"):
            rows.read(path)
        path.write_text(path.read_text().splitlines()[0] + "\n")
        rows.append(path, [row("e", "linear", 0.2)])
        with pytest.raises(ValueError, match=r"has linear of the cell simclr/e/all/0 of the grid tiny twice"):
            rows.read(path)

    def test_finished_cells_have_the_settings_asked_for(self, grid):
        mine = replace(row("e", "linear", 0.1), settings=grid.settings())
        foreign = replace(row("c", "linear", 0.1), grid="gpu")
        assert rows.finished([mine, foreign], grid) == {mine.cell}
        assert rows.finished([mine], replace(grid, threads=2, cache=grid.data)) == {mine.cell}
        with pytest.raises(ValueError, match=r"--grid tiny has rows with other settings \(epochs was 20, now 21\)"):
            rows.finished([mine], replace(grid, epochs=21))


class TestDifferences:
    def test_equals_scipy_and_the_formula(self):
        one, two = {0: 0.51, 1: 0.55, 2: 0.50, 5: 0.9}, {0: 0.50, 1: 0.51, 2: 0.50, 4: 0.1}
        found = differences.paired(one, two)
        expected = ttest_rel([0.51, 0.55, 0.50], [0.50, 0.51, 0.50]).confidence_interval(0.95)
        assert found[1:] == pytest.approx((expected.low, expected.high, 3))
        changes = np.array([0.01, 0.04, 0.0])
        half = 4.302653 * changes.std(ddof=1) / math.sqrt(3)  # the table's t at two degrees of freedom
        assert found == pytest.approx((changes.mean(), changes.mean() - half, changes.mean() + half, 3), abs=1e-7)

    def test_few_or_equal_differences(self):
        assert differences.paired({0: 1.0}, {1: 2.0}) is None
        alone = differences.paired({0: 0.5, 1: 3.0}, {0: 0.25})
        assert (alone.mean, alone.seeds) == (0.25, 1)
        assert math.isnan(alone.low)
        assert differences.paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5}) == (0.25, 0.25, 0.25, 2)

    @pytest.mark.parametrize(
        ("measure", "interval", "verdict"),
        [
            ("linear", (0.1, 0.3), "better"),
            ("linear", (-0.3, -0.1), "worse"),
            ("corruption_error", (0.1, 0.3), "worse"),
            ("corruption_error", (-0.3, -0.1), "better"),
            ("linear", (-0.1, 0.3), "open"),
            ("linear", (math.nan, math.nan), "open"),
            ("linear", (0.0, 0.0), "open"),
        ],
    )
    def test_verdict(self, measure, interval, verdict):
        (measure,) = [each for each in rows.MEASURES if each.name == measure]
        low, high = interval
        mean = 0.2 if math.isnan(low) else (low + high) / 2
        assert differences.Difference(mean, low, high, 3).verdict(measure) == verdict


@pytest.fixture
def some_rows() -> list[rows.Row]:
    """Three seeds of a, c and e, and one of e with another layer."""
    linear = {"a": (0.50, 0.52, 0.54), "c": (0.55, 0.56, 0.58), "e": (0.60, 0.63, 0.64), "e-layer2": (0.7,)}
    error = {"a": (0.6, 0.6, 0.6), "e": (0.65, 0.66, 0.64)}
    return [
        row(variant, measure, value, seed)
        for measure, numbers in (("linear", linear), ("corruption_error", error), ("validation_knn", linear))
        for variant, by_seed in numbers.items()
        for seed, value in enumerate(by_seed)
    ]


def line(text: str, heading: str, beginning: str) -> str:
    section = text.partition(heading)[2].partition("\n##")[0]
    (found,) = [each for each in section.splitlines() if each.startswith(beginning)]
    return found


class TestPage:
    def test_numbers(self, some_rows, tmp_path):
        written = page.write(some_rows, tmp_path / "EVIDENCE.md", tmp_path / "results")
        text = written[0].read_text()
        assert line(text, "### Every number", "| measure") == "| measure | a | c | e |"
        assert line(text, "### Every number", "| linear probe |") == (
            "| linear probe | 52.0 ± 2.0 (3) | 56.3 ± 1.5 (3) | 62.3 ± 2.1 (3) |"
        )
        assert line(text, "### Every number", "| mean corruption") == (
            "| mean corruption error (less is better) | 60.0 ± 0.0 (3) |  | 65.0 ± 1.0 (3) |"
        )
        # e − a is 10, 11, 10; e − c is 5, 7, 6: the mean, and 4.3027 standard errors to either side
        assert line(text, "### Does e help?", "| linear probe |") == (
            "| linear probe | **+10.3 [+8.9, +11.8]** (3) | **+6.0 [+3.5, +8.5]** (3) |"
        )
        assert line(text, "### Does e help?", "| mean corruption") == (
            "| mean corruption error (less is better) | ***+5.0 [+2.5, +7.5]*** (3) |  |"
        )
        assert line(text, "### Does e help?", "- e against a") == (
            "- e against a (plain two views, equal epochs): better on 1, worse on 1, open on 0 of 2 measures."
        )
        assert line(text, "### Settings of e: every number", "| linear probe |") == (
            "| linear probe | 62.3 ± 2.1 (3) | 70.0 (1) |"
        )
        assert line(text, "### Settings of e: differences", "| linear probe |") == "| linear probe | +10.0 (1) |"
        assert "### Does f help?" not in text
        assert line(text, "### What it costs", "| e |") == "| e | 60 | 20 | 0 | 1 | 101 | 1.25 (1.24 to 1.25) |"
        assert line(text, "### What it costs", "| a |") == "| a | 40 | 0 | 0 | 1 | 61 | 0.75 (0.75 to 0.76) |"
        command = (
            "    python benchmarks/evidence.py --grid tiny --data cifar10 --images 100 --epochs 20 --batch 32 "
            "--backbone resnet10_tiny --corrupted 10 --methods simclr"
        )
        assert f"{command} --variants a c e --kinds all --seeds 0 1 2\n" in text
        assert f"{command} --variants e-layer2 --kinds all --seeds 0\n" in text

        (figure,) = written[1:]  # nothing can be compared with d
        assert f"](results/{figure.name})" in text
        assert figure.stat().st_size < 100 * 1024
        with Image.open(figure) as picture:
            assert min(picture.size) > 150

    def test_what_people_wrote_stays(self, some_rows, tmp_path):
        path = tmp_path / "EVIDENCE.md"
        page.write([], path, tmp_path)
        begun = path.read_text()
        assert "Not measured yet." in begun
        path.write_text(begun.replace("Not measured yet.", "It depends.") + "\nMore by hand.\n")
        page.write(some_rows, path, tmp_path)
        once = path.read_text()
        page.write(some_rows, path, tmp_path)
        assert path.read_text() == once
        assert "It depends." in once
        assert once.endswith("\nMore by hand.\n")
        assert "SimCLR, grid `tiny`" in once

        path.write_text("Nothing but words.\n")
        with pytest.raises(ValueError, match=r"EVIDENCE.md must have the lines"):
            page.write(some_rows, path, tmp_path)
        assert path.read_text() == "Nothing but words.\n"

    def test_settings_do_not_mix(self, some_rows, tmp_path):
        other = replace(some_rows[0], seed=9, settings={**some_rows[0].settings, "epochs": 21})
        with pytest.raises(ValueError, match="grid 'tiny' has cells with different settings"):
            page.write([*some_rows, other], tmp_path / "EVIDENCE.md", tmp_path)

    def test_right_is_better_in_every_panel(self, some_rows):
        figure = figures.forest(differences.values(some_rows), "a")
        panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
        assert list(panels) == ["kNN on held-out training images", "linear probe", "mean corruption error"]
        assert [axes.xaxis_inverted() for axes in panels.values()] == [False, False, True]
        marks = [each for each in panels["linear probe"].lines if each.get_marker() == "o"]
        assert [float(np.ravel(mark.get_xdata())[0]) for mark in marks] == pytest.approx(
            [100 * 0.13 / 3, 100 * 0.31 / 3]
        )


class TestRunner:
    """With small commands in place of the recipes and evaluations."""

    @pytest.fixture
    def run(self, grid, tmp_path, monkeypatch) -> Callable[..., list[Cell]]:
        monkeypatch.setattr(runner.images, "two_cues", lambda pairs, target: None)
        monkeypatch.setattr(
            runner.rows, "condense",
            lambda cell, grid: [replace(row(cell.variant, "usual_cue", 1.0, cell.seed), settings=grid.settings())],
        )  # fmt: skip

        def run(commands: dict[str, str], cells: int = 1, jobs: int = 1) -> list[Cell]:
            """Runs Python code, by the name of the file that it writes."""
            made = [Step(["python", "-c", code], tmp_path / name) for name, code in commands.items()]
            monkeypatch.setattr(runner, "steps", lambda cell, grid: made)
            chosen = [Cell("simclr", "e", "two-cue", seed) for seed in range(cells)]
            return runner.Runner(grid, tmp_path / "rows.jsonl").run(chosen, jobs)

        return run

    def test_a_failed_cell_goes_on_with_what_is_missing(self, run, tmp_path, grid, capsys):
        first = f"open({str(tmp_path / 'one')!r}, 'x')"  # fails where it is run twice
        assert run({"one": first, "two": "print('out of luck'); raise SystemExit(3)"}, cells=2) == [
            Cell("simclr", "e", "two-cue", 0),
            Cell("simclr", "e", "two-cue", 1),
        ]
        assert "simclr/e/two-cue/0: failed with status 3" in capsys.readouterr().out
        assert "out of luck" in (grid.cache / "runs/tiny/simclr-e-two-cue-0.txt").read_text()
        assert not (tmp_path / "rows.jsonl").exists()
        assert run({"one": first, "two": "pass"}) == []
        assert [each.cell.seed for each in rows.read(tmp_path / "rows.jsonl")] == [0]
        assert run({"one": "raise SystemExit(1)", "other": "raise SystemExit(1)"}) == []  # it has rows: nothing is run

    def test_sigterm_stops_the_commands_and_starts_no_more(self, run, tmp_path):
        pids = tmp_path / "pids"
        code = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"

        def stop() -> None:
            while not pids.exists() or pids.read_text().count("\n") < 2:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=stop)
        thread.start()
        began = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            run({"never": code}, cells=3, jobs=2)
        thread.join()
        assert stopped.value.code == 128 + signal.SIGTERM
        assert time.monotonic() - began < 30
        assert signal.getsignal(signal.SIGTERM) is before
        started = [int(pid) for pid in pids.read_text().split()]
        assert len(started) == 2  # of three
        for pid in started:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not (tmp_path / "rows.jsonl").exists()

    def test_a_command_that_outlives_the_harness_keeps_its_run_folder(self, run, tmp_path, capsys):
        left = tmp_path / "left"
        stays = f"import os, time; pid = os.fork(); open({str(left)!r}, 'w').write(str(pid)) if pid else time.sleep(60)"
        assert len(run({"one": f"{stays}; raise SystemExit(pid != 0)"})) == 1
        try:
            assert run({"one": "pass"}) == []
            assert "simclr/e/two-cue/0: another process runs it" in capsys.readouterr().out
            assert not (tmp_path / "rows.jsonl").exists()
        finally:
            os.kill(int(left.read_text()), signal.SIGKILL)
        while not (tmp_path / "rows.jsonl").exists():  # until the system has let go of the lock
            assert run({"one": "pass"}) == []
        assert len(rows.read(tmp_path / "rows.jsonl")) == 1


@pytest.mark.slow
def test_a_cell_of_each_kind_from_images_to_page(tmp_path, monkeypatch, capsys):
    """The commands as they are printed, in this process, which spares the imports."""
    write_folder(tmp_path / "cifar", 12, 4)

    class Here(nullcontext):
        """Instead of threads: the recipes want the main one."""

        def __enter__(self):
            return self

        map = staticmethod(map)

    def command(self: runner.Runner, step: Step, output: object) -> int:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        (_, script, *arguments) = step.command
        main = load_script(script).main
        status = command_line.run(main, arguments) if script.startswith("recipes") else main(arguments)
        assert step.writes is None or step.writes.exists()
        return status

    monkeypatch.setattr(runner.Runner, "_command", command)
    monkeypatch.setattr(runner, "ThreadPoolExecutor", Here)
    main = load_script("benchmarks/evidence.py").main
    paths = ["--results", str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "EVIDENCE.md")]
    grid = ["--data", str(tmp_path / "cifar"), "--cache", str(tmp_path / "cache"), *paths]
    grid += shlex.split("--grid tiny --variants d --seeds 0 --images 100 --epochs 1 --batch 32 --corrupted 10")
    main([*grid, "--", "--training.threads", "1"])
    found = rows.read(tmp_path / "rows.jsonl")
    assert {each.cell for each in found} == {Cell("simclr", "d", kind, 0) for kind in DATA}
    assert {each.measure for each in found} == {measure.name for measure in rows.MEASURES}
    assert all(0 <= each.value <= 1 for each in found if not each.measure.endswith("rank"))
    assert {each.passes for each in found} == {3}

    capsys.readouterr()
    main([*grid, "--estimate", "--", "--training.threads", "1"])
    assert "3 cells are done, 0 to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rows with other settings"):
        main([*grid, "--epochs", "2"])
    main(["--report", *paths])
    assert "| two cues: the neglected one |" in (tmp_path / "EVIDENCE.md").read_text()
