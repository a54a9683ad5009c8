"""The controlled experiments: what a cell runs, what is read of it, and what is said of all."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel
from support import ROOT, load_script
from torch import nn

from ssl_gradmix import GradMix
from ssl_gradmix.data import planted
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.planted import Stamps
from ssl_gradmix.settings import Augmentation, Data

sys.path.insert(0, str(ROOT / "benchmarks"))
from evidence import images, page, rows, runner
from evidence.cells import VARIANTS, Cell, Grid, Step, passes, steps

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid("tiny", tmp_path / "data", 100, 20, 32, "resnet10_tiny", 10, (), tmp_path / "cache", 1)


def write_folder(root: Path, train: int, test: int) -> Path:
    """Noise in ten class folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(10):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{i:04d}.png")
    return root


class TestCells:
    def test_command_line(self, grid):
        options = (
            "--run RUN --data.name folder --data.root DATA --backbone.name resnet10_tiny --training.epochs 20 "
            "--training.batch_size 32 --training.seed 1 --training.threads 1 --extra_view gradmix "
            "--gradmix.layers [layer3] --gradmix.target agreement --gradmix.region random --data.open_set cifar10:2"
        )
        run = str(grid.cache / "runs/tiny/byol-random-box-known-1")
        options = options.replace("RUN", run).replace("DATA", str(grid.cache / "data-100"))
        train, osr = steps(Cell("byol", "random-box", "known", 1), grid)
        assert train == (["python", "recipes/byol_gradmix.py", *options.split()], None)
        assert osr == (["python", "eval/osr.py", run], Path(run) / "eval/osr.json")

    def test_labels_are_measured_by_more(self, grid):
        commands = [step.command for step in steps(Cell("supcon", "gradmix", "known", 7), grid)]
        assert [command[1] for command in commands] == [
            *("recipes/supcon_gradmix.py", "eval/osr.py", "eval/osr.py", "eval/osr.py", "eval/corruption.py")
        ]
        assert commands[0][-2:] == ["--data.open_set", "cifar10:4"]
        assert commands[2][-2:] == ["--feature", "projector"]

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_recipe_reads_every_variant(self, variant, grid, capsys):
        method = "supcon" if variant == "supervised-only" else "simclr"
        command = steps(Cell(method, variant, "two-cue", 0), grid)[0].command
        command = command[command.index(f"recipes/{method}_gradmix.py") :]
        with pytest.raises(SystemExit) as done:
            load_script(command[0]).main([*command[1:], "--print_config"])
        assert done.value.code in (0, None)
        settings = yaml.safe_load(capsys.readouterr().out)
        for name, value in VARIANTS[variant].items():
            section, _, key = name.rpartition(".")
            assert (settings[section][key] if section else settings[key]) == yaml.safe_load(value)
        assert settings["training"]["epochs"] == (30 if variant == "plain-more-epochs" else 20)

    def test_stamps(self, grid):
        train, probe, reliance, exchange, corruption = steps(Cell("simclr", "oracle", "stamps-16", 0), grid)
        assert train.command[1:4] == ["benchmarks/evidence/boxes.py", "stamp", "recipes/simclr_gradmix.py"]
        assert train.command[train.command.index("--data.stamp_bits") + 1] == "16"
        assert [probe.command[1], reliance.command[1]] == ["eval/linear_probe.py", "eval/reliance.py"]
        assert [exchange.command[1], corruption.command[1]] == ["benchmarks/evidence/exchange.py", "eval/corruption.py"]
        other = steps(Cell("simclr", "gradmix-attract", "stamps-9", 0), grid)[0].command
        boxes, loss = ["benchmarks/evidence/boxes.py", "attributed"], ["benchmarks/evidence/mixed_loss.py", "attract"]
        assert other[1:6] == [*boxes, *loss, "recipes/simclr_gradmix.py"]
        assert len(steps(Cell("simclr", "plain", "stamps-0", 0), replace(grid, corrupted=0))) == 3
        overlaid = steps(Cell("simclr", "plain", "overlaid-digits", 0), grid)
        assert str(grid.cache / "data-100-digits") in overlaid[0].command
        assert all(str(grid.subset) in step.command for step in (overlaid[1], overlaid[-1]))

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("simclr/plain-more-epochs/all", (60, 0, 0)),
            ("simclr/third-view/all", (60, 0, 0)),
            ("simclr/gradmix-layer2/known", (60, 20, 0)),
            ("byol/plain/all", (40, 0, 40)),
            ("byol/gradmix/two-cue", (60, 20, 40)),
            ("simclr/oracle/stamps-9", (60, 0, 0)),
        ],
    )
    def test_passes(self, cell, expected, grid):
        assert passes(Cell(*cell.split("/"), 0), grid) == expected


@pytest.mark.parametrize(
    ("oracle", "lines"),
    [
        ([0.5, 0.4, 0.6], ["GradMix has 73% [36%, 110%] of what the oracle gains over plain views."]),  # by hand
        ([0.2, 0.1, 0.3], []),  # no gain to have a share of
    ],
)
def test_the_share_of_what_the_oracle_gains(oracle, lines):
    values = {"plain": [0.2, 0.2, 0.2], "gradmix": [0.4, 0.38, 0.45], "oracle": oracle}
    made = [
        row(variant, "unstamped_linear", value, seed, data="stamps-9")
        for variant, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    found = load_script("benchmarks/shortcuts.py").recovered(pd.DataFrame(made))
    assert [line.strip() for line in found] == lines


def test_the_tables_of_shortcuts(tmp_path):
    values = {"random-box": [0.23, 0.21, 0.24], "gradmix": [0.39, 0.38, 0.35]}
    path = tmp_path / "rows.jsonl"
    for variant, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            measured = {"unstamped_linear": value, "unstamped_knn": 0.2, "reliance": 0.5}
            rows.append(path, cell_line(variant, measured, seed, data="stamps-9"))
    load_script("benchmarks/shortcuts.py").main(["--report", "--results", str(path)])
    paired = ttest_rel(values["gradmix"], values["random-box"])
    low, high = (100 * end for end in paired.confidence_interval(0.95))
    first, second = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| gradmix ")]
    assert first == f"| gradmix | 37.3 ± 2.1 (3) | +14.7 [{low:+.1f}, {high:+.1f}] |"
    assert second == "| gradmix | 20.0 ± 0.0 (3) | 50.0 ± 0.0 (3) |"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["stamp", "anywhere", "attributed"])
def test_boxes_and_the_share_of_the_stamps_they_hit(place, monkeypatch):
    torch.manual_seed(0)
    boxes = load_script("benchmarks/evidence/boxes.py")
    monkeypatch.setattr(GradMix, "_attribute", boxes.PLACES[place])
    monkeypatch.setattr(Views, "forward", boxes.views_noted)
    views = Views(Augmentation(), 32, (0.5,) * 3, (0.25,) * 3, stamps=Stamps(9))
    pixels = torch.randint(0, 256, (300, 3, 40, 40), dtype=torch.uint8)
    first, second = views(pixels, 2)
    encoder, gradmix = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), GradMix(layers=["0"], lam_range=(0.85, 0.85))
    with gradmix.observe(encoder) as observed:
        loss = encoder(first).square().mean()
    mixed, _ = boxes.mix_noted(gradmix, first, loss, observed, second)
    stamps = Stamps(9).boxes(planted.name(pixels), (32, 32))
    hit = torch.zeros(300)
    for i, ((x0, y0, x1, y1), (a, b, c, d)) in enumerate(zip(stamps.tolist(), mixed.boxes.tolist(), strict=True)):
        hit[i] = len(set(range(x0, x1)) & set(range(a, c))) * len(set(range(y0, y1)) & set(range(b, d))) / 36
    assert boxes.hits[-1] == pytest.approx(hit.mean().item(), abs=1e-6)
    if place == "stamp":
        assert hit.min() == 1
    if place == "anywhere":  # a uniform center, then shifted inside: corners are as likely as 6x6 centers of 32x32
        corner = (mixed.boxes[:, :2] == 0).all(1).float().mean()
        assert corner == pytest.approx((7 / 32) ** 2, abs=0.04)


def test_other_losses_of_mixed_views():
    """Against sums over images, negatives and positives as they are written."""
    losses = load_script("benchmarks/evidence/mixed_loss.py")
    z = torch.nn.functional.normalize(torch.randn(3, 5, 4, dtype=torch.float64), dim=2)
    (u, z0, z1), index, lam, heat = z, torch.tensor([2, 3, 4, 0, 1]), torch.tensor(0.8, dtype=torch.float64), 0.3

    def similar(a, b):
        return math.exp(float(a @ b) / heat)

    attracted = 0.0
    for i in range(5):
        others = [each for part in (z0, z1) for k, each in enumerate(part) if not (part is z1 and k == i)]
        attracted += math.log(sum(similar(z1[i], each) for each in others)) - float(z1[i] @ u[i]) / heat
    assert losses.attract(u, z0, z1, lam, index, heat) == pytest.approx(0.8 * attracted / 5, abs=1e-9)

    def contrast(positives):
        everyone, total = [*u, *positives], 0.0
        for i, each in enumerate(everyone):
            below = sum(similar(each, other) for k, other in enumerate(everyone) if k != i)
            total += math.log(below) - float(each @ everyone[(i + 5) % 10]) / heat
        return total / 10

    expected = 0.8 * contrast(z1) + 0.2 * contrast([z1[i] for i in index])
    assert losses.donor(u, z0, z1, lam, index, heat) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["donor", "attract"])
def test_the_recipe_trains_with_another_loss_of_mixed_views(name, tmp_path, monkeypatch):
    losses, seen = load_script("benchmarks/evidence/mixed_loss.py"), []
    chosen = getattr(losses, name)

    def noted(*given):
        seen.append(chosen(*given))
        return seen[-1]

    monkeypatch.setattr(losses, name, noted)
    monkeypatch.setattr(losses.SimCLR, "forward", losses.SimCLR.forward)  # put back afterwards
    quick = "--training.epochs 1 --training.batch_size 512 --training.knn_every 0 --training.samples_every 0"
    arguments = f"{quick} --training.threads 1 --run {tmp_path / 'run'}".split()
    monkeypatch.setattr(sys, "argv", ["", name, str(ROOT / "recipes/simclr_gradmix.py"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        losses.main()
    assert stopped.value.code == 0
    entry = json.loads((tmp_path / "run/log.jsonl").read_text())
    *_, first, second = seen  # one before was the trial of the recipe
    assert entry["loss_mixed"] == pytest.approx((first + second).item() / 2, abs=1e-4)
    assert entry["loss"] == pytest.approx(entry["loss_views"] + entry["loss_mixed"], abs=1e-4)


def test_exchanged_stamps(tmp_path):
    """Of an encoder that sees the stamp's corner alone: bits decide, in cosines that can be counted."""
    exchange = load_script("benchmarks/evidence/exchange.py")
    data = Data(stamp_bits=9, stamp_place="corner")
    corner = nn.Sequential(nn.ZeroPad2d((-26, 0, -26, 0)), nn.Flatten())
    encoder = SimpleNamespace(model=corner, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = exchange.similarities(encoder, data, Augmentation())
    pixels = load(data, "train").originals(2**30)
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: exchange.IMAGES]]
    codes = planted.name(pixels)[:, 0].tolist()
    signs = torch.tensor([[2.0 * (code >> place & 1) - 1 for place in range(9)] for code in codes])
    expected = (signs * signs.roll(1, 0)).mean()
    assert found["other_bits"] == pytest.approx(expected.item(), abs=1e-5)
    for name in ("same_stamp", "other_place", "other_image"):
        assert found[name] == pytest.approx(1, abs=1e-6)
    encoder.model = nn.Sequential(corner, nn.Unflatten(1, (3, 6, 6)), nn.AvgPool2d(2), nn.Flatten())
    assert exchange.read_out(encoder, data)["first_bit"] == 1
    encoder.model = nn.Sequential(nn.ZeroPad2d((0, -6, 0, -6)), nn.AvgPool2d(13), nn.Flatten())
    assert exchange.read_out(encoder, data)["first_bit"] < 0.65  # of everything but the stamp


class TestImages:
    def test_subset(self, tmp_path):
        data = write_folder(tmp_path / "cifar", 5, 2)
        for count in (20, 40):
            images.subset(data, count, tmp_path / str(count))
        few, more = ({path.resolve() for path in (tmp_path / name).rglob("train/*/*")} for name in ("20", "40"))
        assert (len(few), len(more)) == (20, 40)
        assert few < more
        assert [sum(path.parent.name == f"class{label}" for path in few) for label in range(10)] == [2] * 10
        with pytest.raises(ValueError, match="multiple of the 10 classes .* at most 50, got 25"):
            images.subset(data, 25, tmp_path / "25")
        with pytest.raises(ValueError, match="part of another folder"):
            images.subset(write_folder(tmp_path / "other" / "cifar", 2, 1), 20, tmp_path / "20")

    def test_overlaid_digits(self, tmp_path):
        data = write_folder(tmp_path / "data", 3, 1)
        images.overlaid_digits(data, tmp_path / "overlaid")
        places = set()
        for path in sorted((data / "train").rglob("*.png")):
            number = int(path.stem) + 3 * int(path.parent.name[-1])
            made = tmp_path / "overlaid" / "train" / path.parent.name / f"{number:06d}.png"
            before, after = (np.asarray(Image.open(each)).astype(int) for each in (path, made))
            rows, columns = np.nonzero((before != after).any(2))
            y, x = (4 if each.max() < 15 else 16 for each in (rows, columns))
            places.add((y, x))
            assert min(rows.min() - y, columns.min() - x) >= 0
            assert max(rows.max() - y, columns.max() - x) < 10
            digit = np.where(after > before, after, 0)[y : y + 10, x : x + 10]
            assert ((digit == 0) | (digit == digit.max(2, keepdims=True))).all()  # gray
            assert (after >= before).all()
        assert len(places) == 4
        assert (tmp_path / "overlaid" / "test").resolve() == data / "test"

    def test_two_cues(self, tmp_path):
        images.two_cues(100, tmp_path / "cues")
        labels = {}
        for cue in ("usual", "neglected"):
            found = sorted((tmp_path / "cues" / cue / "test").rglob("*.png"), key=lambda path: path.name)
            labels[cue] = [int(path.parent.name) for path in found]
            assert np.bincount(labels[cue]).tolist() == [4] * 10
        assert np.mean(np.equal(labels["usual"], labels["neglected"])) < 0.3  # a tenth by chance
        for path in (tmp_path / "cues" / "pretraining").rglob("*.png"):
            pixels = np.asarray(Image.open(path))
            assert pixels[:, 16:].max() <= round(images.CONTRAST * 255) < pixels[:, :16].max()

    def test_the_right_digit_agrees_as_often_as_said(self):
        left = np.arange(20_000) % 10
        right = images.agreeing(left, np.random.default_rng(0))
        assert (left == right).mean() == pytest.approx(images.CORRELATION, abs=0.01)
        assert np.bincount((right - left)[left != right] % 10, minlength=10)[1:].min() > 150  # about 222 each


def cell_line(variant: str, measures: dict[str, float], seed: int = 0, **others: object) -> dict:
    settings = dict(data="data", images=100, epochs=20, batch=32, backbone="resnet10_tiny", corrupted=10)
    settings |= dict(recipe=[], ood=["digits"])
    data = rows.MEASURES[next(iter(measures))].data
    cell = dict(grid="tiny", method="simclr", variant=variant, data=data, seed=seed)
    cost = dict(passes=60, attributions=20, target_passes=0, seconds=100.0, threads=1, commit="abc123")
    return {**cell, **cost, "settings": settings, "measures": measures, **others}


def row(variant: str, measure: str, value: float, seed: int = 0, **others: object) -> dict:
    found = cell_line(variant, {measure: value}, seed, **others)
    return {**{name: found[name] for name in rows.CELL}, "measure": measure, "value": value}


def result(score: str, metric: str, value: float, **params: object) -> dict:
    return {"score": score, "metric": metric, "value": value, "params": params}


class TestRows:
    def test_of_a_run(self, grid):
        run = Cell("simclr", "gradmix", "all", 3).run(grid)
        files = {
            "linear_probe": [
                *(result("linear", "top1", 0.51), result("linear", "top5", 0.9), result("knn", "top1", 0.47, k=20)),
                *(
                    result("linear", "top1", 0.2, label_fraction=0.01),
                    result("linear", "top1", 0.3, label_fraction=0.1),
                ),
            ],
            "corruption": [result(name, "mean_corruption_error", 0.61) for name in ("linear", "knn")],
            "ood": [
                *(result("knn_distance", "auroc", 0.7), result("knn_distance", "auroc", 0.9)),
                *(result("energy", "auroc", 0.1), result("mahalanobis", "auroc", 0.95)),
            ],
        }
        (run / "eval").mkdir(parents=True)
        for name, found in files.items():
            content = {"rows": found, "validation": {"0.1": 1.48, "1": 1.52}}
            (run / "eval" / f"{name}.json").write_text(json.dumps(content))
        (run / "rankme.json").write_text('{"rankme": 33.0}')
        config = {"training": {"batch_size": 32}, "environment": {"commit": "abc123"}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        resumed_at_its_end = dict(step=4)
        log = [dict(step=3, images_per_second=32.0), resumed_at_its_end, dict(step=7, images_per_second=96.0, knn=0.4)]
        (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))

        rows.append(grid.cache / "rows.jsonl", rows.condense(Cell("simclr", "gradmix", "all", 3), grid))
        found = rows.read(grid.cache / "rows.jsonl")
        assert dict(zip(found.measure, found.value, strict=True)) == {
            **dict(validation_knn=0.4, validation_loss=1.48, linear=0.51, knn=0.47, linear_10=0.3, linear_1=0.2),
            **dict(corruption_error=0.61, ood_auroc=pytest.approx(0.8), ood_auroc_mahalanobis=0.95, rankme=33.0),
        }
        assert set(found.seconds) == {3 * 32 / 32 + 3 * 32 / 96}
        assert rows.finished(found, grid) == {Cell("simclr", "gradmix", "all", 3)}
        with pytest.raises(ValueError, match=r"--grid tiny has rows of .*'epochs': 20.*, not of .*'epochs': 21"):
            rows.finished(found, replace(grid, epochs=21))

        (run / "eval" / "ood.json").write_text('{"rows": []}')
        with pytest.raises(ValueError, match=r"ood.json has no row knn_distance auroc"):
            rows.condense(Cell("simclr", "gradmix", "all", 3), grid)

    def test_open_set_encoders_must_not_have_seen_the_unknown(self, tmp_path):
        (tmp_path / "eval").mkdir()
        content = {"rows": [result("linear", "accuracy", 0.7, pretraining="all classes, unlabeled")]}
        (tmp_path / "eval" / "osr.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no row linear accuracy with .*known classes only"):
            rows._value("closed_set", rows.MEASURES["closed_set"], tmp_path, [])

    def test_appended_by_several_at_once(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        new = [cell_line("gradmix", {"linear": 0.1, "knn": 0.2}, seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: rows.append(path, part), new))
        assert sorted(rows.read(path).seed) == sorted([*range(8), *range(8)])

    def test_a_file_that_will_not_do_is_named(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        for value in (0.1, 0.2):
            rows.append(path, cell_line("gradmix", {"linear": value}))
        with pytest.raises(ValueError, match=r"has linear of simclr/gradmix/all/0 in grid tiny twice"):
            rows.read(path)
        path.write_text(path.read_text().splitlines()[0] + '\n{"grid": "tin')
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is no cell's"):
            rows.read(path)


def test_differences_equal_scipy_and_the_formula():
    numbers = {"gradmix": {0: 0.51, 1: 0.55, 2: 0.50, 5: 0.9}, "plain": {0: 0.50, 1: 0.51, 2: 0.50, 4: 0.1}}
    numbers["third-view"] = {1: 0.55}
    made = [row(name, "linear", value, seed) for name, of in numbers.items() for seed, value in of.items()]
    compared = rows.differences(pd.DataFrame(made), "plain")
    found = compared.loc["linear", "gradmix"]
    expected = ttest_rel([0.51, 0.55, 0.50], [0.50, 0.51, 0.50]).confidence_interval(0.95)
    assert (found.low, found.high, found.seeds) == pytest.approx((expected.low, expected.high, 3))
    changes = np.array([0.01, 0.04, 0.0])
    half = 4.302653 * changes.std(ddof=1) / math.sqrt(3)  # the table's t at two degrees of freedom
    assert (found["mean"], found.high) == pytest.approx((changes.mean(), changes.mean() + half), abs=1e-7)
    alone = compared.loc["linear", "third-view"]
    assert (alone["mean"], alone.seeds, alone.verdict) == (pytest.approx(0.04), 1, "open")
    assert math.isnan(alone.low)


def test_differences_of_one_trial_are_averaged_before_the_interval():
    changes = {0: 0.01, 4: 0.03, 1: 0.05, 5: 0.07, 2: 0.02}  # seed s is of the trial s % 4
    made = [row("plain", "osr_auroc", 0.5, seed) for seed in changes]
    made += [row("gradmix", "osr_auroc", 0.5 + change, seed) for seed, change in changes.items()]
    found = rows.differences(pd.DataFrame(made), "plain").loc["osr_auroc", "gradmix"]
    expected = ttest_1samp([0.02, 0.06, 0.02], 0).confidence_interval(0.95)
    assert tuple(found[["mean", "low", "high"]]) == pytest.approx((0.1 / 3, *expected))
    assert found.seeds == 5


@pytest.mark.parametrize(
    ("measure", "changes", "verdict"),
    [
        ("linear", (0.2, 0.21, 0.22), "better"),
        ("corruption_error", (0.2, 0.21, 0.22), "worse"),
        ("linear", (-0.2, 0.21, 0.22), "open"),
    ],
)
def test_verdicts(measure, changes, verdict):
    made = [row("plain", measure, 0.0, seed) for seed in range(3)]
    made += [row("gradmix", measure, change, seed) for seed, change in enumerate(changes)]
    assert rows.differences(pd.DataFrame(made), "plain").verdict.tolist() == [verdict]


class TestPage:
    def test_numbers(self, tmp_path):
        linear = {"third-view": (0.55, 0.56, 0.58), "gradmix": (0.60, 0.63, 0.64)}
        error = {"third-view": (0.6, 0.6, 0.6), "gradmix": (0.65, 0.66, 0.64)}
        made = [
            row(variant, measure, value, seed)
            for measure, numbers in (("linear", linear), ("corruption_error", error), ("validation_knn", linear))
            for variant, by_seed in numbers.items()
            for seed, value in enumerate(by_seed)
        ]
        text, figure = page.write(pd.DataFrame(made), tmp_path / "evidence.md")
        lines = text.read_text().splitlines()
        assert "| linear probe | 56.3 ± 1.5 (3) | 62.3 ± 2.1 (3) |" in lines
        # The differences are 5, 7, 6 and 5, 6, 4: their mean, and 4.3027 standard errors to either side.
        assert "| gradmix | 62.3; **+6.0 [+3.5, +8.5]** (3) | 65.0; ***+5.0 [+2.5, +7.5]*** (3) |" in lines
        assert "| better / worse / open | 1 / 1 / 0 |" in lines  # held-out rows are not counted
        assert Image.open(figure).size > (200, 100)
        panels = {axes.get_title(loc="left"): axes for axes in page.forest(
            rows.differences(pd.DataFrame(made), "third-view")).axes}  # fmt: skip
        assert [axes.xaxis_inverted() for axes in panels.values()] == [False, True]  # right is better

        other = row("gradmix", "linear", 0.5, 9, settings=made[0]["settings"] | {"epochs": 21})
        with pytest.raises(ValueError, match="grid 'tiny' has cells with different settings"):
            page.write(pd.DataFrame([*made, other]), tmp_path / "evidence.md")

    def test_the_pages_of_this_repository_say_what_its_rows_say(self, tmp_path):
        found = rows.read(BENCHMARKS / "results/evidence.jsonl")
        written = page.write(found, tmp_path / "evidence.md")
        assert written[0].read_text() == (BENCHMARKS / "results/evidence.md").read_text()
        copied = shutil.copy(BENCHMARKS / "results/shortcuts.jsonl", tmp_path)
        load_script("benchmarks/shortcuts.py").main(["--report", "--results", copied])
        assert (tmp_path / "shortcuts.md").read_text() == (BENCHMARKS / "results/shortcuts.md").read_text()
        text = (BENCHMARKS / "EVIDENCE.md").read_text()
        cpu = found[found.grid == "cpu"]
        quoted = [line for line in text.splitlines() if line.startswith("|")]
        shortcuts, plain = quoted[:7], quoted[7:]
        assert len(plain) == 6
        assert set(plain) <= set(page.summary(cpu))
        stamps = rows.read(BENCHMARKS / "results/shortcuts.jsonl")
        stamps = stamps.query("grid == 'cpu' and method == 'simclr' and data == 'stamps-9'")
        probe = 100 * stamps[stamps.measure == "unstamped_linear"].pivot(
            index="seed", columns="variant", values="value"
        )
        for line, name in zip(shortcuts[2:], ("plain", "third-view", "random-box", "gradmix", "oracle"), strict=True):
            mean, std, *beyond = [float(found.replace("−", "-")) for found in re.findall(r"[+−]?\d+\.\d", line)]
            assert [mean, std] == pytest.approx([probe[name].mean(), probe[name].std()], abs=0.0501)
            if name != "gradmix":
                paired = ttest_rel(probe.gradmix, probe[name], nan_policy="omit").confidence_interval(0.95)
                difference = (probe.gradmix - probe[name]).mean()
                assert beyond == pytest.approx([difference, *paired], abs=0.0501)
        number = r"([+−]\d+\.\d)"
        prose = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
        claims = re.findall(rf"{number}\s+\[{number}, {number}\]", prose)
        assert len(claims) == 5
        compared = pd.concat(
            100 * rows.differences(grid, name)[["mean", "low", "high"]]
            for grid in (cpu, found[found.grid == "cpu-labels"])
            for name in set(grid.variant)
        )
        for claim in claims:
            stated = [float(end.replace("−", "-")) for end in claim]
            assert (compared.sub(stated).abs() < 0.0501).all(axis=1).any(), claim
        assert len(text.split()) <= 700


class TestRunner:
    """With small commands in place of the recipes and evaluations."""

    @pytest.fixture
    def run(self, grid, tmp_path, monkeypatch) -> Callable[..., list[Cell]]:
        def made(cell: Cell, grid: Grid) -> dict:
            return cell_line(cell.variant, {"usual_cue": 1.0}, cell.seed, settings=grid.settings())

        monkeypatch.setattr(runner.images, "two_cues", lambda pairs, target: None)
        monkeypatch.setattr(runner.rows, "condense", made)

        def run(commands: dict[str, str], cells: int = 1, jobs: int = 1) -> list[Cell]:
            """Runs Python code, by the name of the file that it writes."""
            of_cell = [Step(["python", "-c", code], tmp_path / name) for name, code in commands.items()]
            monkeypatch.setattr(runner, "steps", lambda cell, grid: of_cell)
            chosen = [Cell("simclr", "gradmix", "two-cue", seed) for seed in range(cells)]
            return runner.run(chosen, grid, tmp_path / "rows.jsonl", jobs)

        return run

    def test_a_failed_cell_goes_on_with_what_is_missing(self, run, tmp_path, grid, capsys):
        first = f"open({str(tmp_path / 'one')!r}, 'x')"  # fails where it is run twice
        failed = run({"one": first, "two": "print('out of luck'); raise SystemExit(3)"}, cells=2)
        assert [cell.seed for cell in failed] == [0, 1]
        assert "simclr/gradmix/two-cue/0: failed: status 3, see" in capsys.readouterr().out
        assert "out of luck" in (grid.cache / "runs/tiny/simclr-gradmix-two-cue-0.txt").read_text()
        assert not (tmp_path / "rows.jsonl").exists()
        assert run({"one": first, "two": "pass"}) == []
        assert rows.read(tmp_path / "rows.jsonl").seed.tolist() == [0]
        assert run({"other": "raise SystemExit(1)"}) == []  # it has rows: nothing is run

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
        with pytest.raises(SystemExit) as stopped:
            run({"never": code}, cells=3, jobs=2)
        thread.join()
        assert stopped.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
        started = [int(pid) for pid in pids.read_text().split()]
        assert len(started) == 2  # of three
        for pid in started:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    def test_a_command_that_outlives_a_killed_harness_keeps_its_run_folder(self, run, tmp_path, capsys):
        left = tmp_path / "left"
        stays = f"import os, time; pid = os.fork(); open({str(left)!r}, 'w').write(str(pid)) if pid else time.sleep(60)"
        assert len(run({"one": f"{stays}; raise SystemExit(pid != 0)"})) == 1
        try:
            assert run({"one": "pass"}) == []
            assert "simclr/gradmix/two-cue/0: another process runs it" in capsys.readouterr().out
            assert not (tmp_path / "rows.jsonl").exists()
        finally:
            os.kill(int(left.read_text()), signal.SIGKILL)
        while not (tmp_path / "rows.jsonl").exists():  # until the system has let go of the lock
            assert run({"one": "pass"}) == []


@pytest.mark.slow
def test_a_cell_of_each_kind_from_images_to_page(tmp_path):
    write_folder(tmp_path / "cifar", 12, 4)
    command = [sys.executable, str(BENCHMARKS / "evidence.py"), "--results", str(tmp_path / "rows.jsonl")]
    options = "--grid tiny --variants random-box --seeds 0 --images 100 --epochs 1 --batch 32 --corrupted 10 --jobs 2"
    data = ["--data", str(tmp_path / "cifar"), "--cache", str(tmp_path / "cache"), *shlex.split(options)]
    subprocess.run([*command, *data], check=True, timeout=600)
    subprocess.run([*command, *data, "--methods", "supcon", "--kinds", "known"], check=True, timeout=600)
    found = rows.read(tmp_path / "rows.jsonl")
    of_stamps = {name for name, measure in rows.MEASURES.items() if measure.data == "stamps"}
    assert set(found.measure) == set(rows.MEASURES) - of_stamps - {"validation_linear"}
    assert found.value[~found.measure.str.contains("rank|loss")].between(0, 1).all()
    subprocess.run([*command, "--report"], check=True)
    assert "| two cues: the neglected one |" in (tmp_path / "rows.md").read_text()
