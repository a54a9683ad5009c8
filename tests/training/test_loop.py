"""The loop: an interrupted training ends as an uninterrupted one, and what goes wrong is said."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_support import TRAINING, before_step, final, image_set, trainer

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.knn import knn_accuracy
from ssl_gradmix.evaluation.rank import rankme
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Optimizer
from ssl_gradmix.training.loop import check_images
from ssl_gradmix.training.monitor import Monitor
from ssl_gradmix.training.processes import create_accelerator


@pytest.mark.parametrize(
    ("kind", "where", "number"),
    [
        (SimCLR, "device", signal.SIGTERM),
        (SimCLR, "workers", signal.SIGINT),
        (BYOL, "device", signal.SIGINT),
        (BYOL, "workers", signal.SIGTERM),
    ],
)
def test_stopped_by_a_signal_mid_epoch_it_ends_with_the_same_weights(
    tmp_path: Path, kind: type, where: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "whole", kind, where=where).run()

    stopped = trainer(tmp_path / "parts", kind, where=where)
    before_step(stopped, (1, 2), lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit_:
        stopped.run()
    assert exit_.value.code == 128 + number
    assert (
        f"stopped by {signal.Signals(number).name} and saved; the same command goes on from here"
        in capsys.readouterr().out
    )
    trainer(tmp_path / "parts", kind, where=where).run()
    assert "goes on after epoch 1 and 3 batches" in capsys.readouterr().out

    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [RunFolder(tmp_path / name).read_log() for name in ("whole", "parts")]
    for one, two in zip(*logs, strict=True):
        timed = ("images_per_second", "seconds_left")
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}


def test_stopped_in_the_last_step_of_an_epoch_it_reports_that_epoch_when_it_goes_on(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").run()
    stopped = trainer(tmp_path / "parts")
    before_step(stopped, (1, 3), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        stopped.run()
    trainer(tmp_path / "parts").run()
    logs = [RunFolder(tmp_path / name).read_log() for name in ("whole", "parts")]
    assert [(entry["epoch"], entry["loss"], entry["lr"]) for entry in logs[0]] == [
        (entry["epoch"], entry["loss"], entry["lr"]) for entry in logs[1]
    ]
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_finished_run_is_reported_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    trainer(tmp_path).run()
    assert f"{tmp_path} is finished: epoch 3/3  loss" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    (tmp_path / "log.jsonl").unlink()
    trainer(tmp_path).run()
    assert f"{tmp_path} is finished; --overwrite true starts anew" in capsys.readouterr().out


def test_the_run_folder_holds_a_backbone_that_timm_loads(tmp_path: Path) -> None:
    import timm

    training = replace(TRAINING, knn_every=1, samples_every=3)
    done = trainer(tmp_path, training=training)
    done.run()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), done.bare.backbone.eval()(images))
    assert loaded.pretrained_cfg["input_size"] == (3, 16, 16) or loaded.pretrained_cfg["input_size"] == [3, 16, 16]
    assert [entry["epoch"] for entry in RunFolder(tmp_path).read_log()] == [1, 2, 3]
    assert all(0 <= entry["knn"] <= 1 for entry in RunFolder(tmp_path).read_log())
    assert (tmp_path / "samples" / "epoch-00003.png").read_bytes().startswith(b"\x89PNG")


def test_looking_at_the_run_does_not_change_it(tmp_path: Path) -> None:
    trainer(tmp_path / "blind", training=replace(TRAINING, epochs=2)).run()
    trainer(tmp_path / "watched", training=replace(TRAINING, epochs=2, knn_every=1, samples_every=1)).run()
    blind, watched = final(tmp_path / "blind"), final(tmp_path / "watched")
    assert all(torch.equal(blind[name], watched[name]) for name in blind)


def test_accumulating_takes_as_many_optimizer_steps(tmp_path: Path) -> None:
    done = trainer(tmp_path, BYOL, training=replace(TRAINING, accumulate=2, epochs=1))
    updates = []
    done.bare.update_target = lambda step, steps: updates.append((step, steps))
    done.run()
    assert updates == [(step, 4) for step in range(4)]


def test_refuses_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training.batch_size 64 exceeds the 36 images of noise"):
        trainer(tmp_path, training=replace(TRAINING, batch_size=64))
    with pytest.raises(ValueError, match="expect_processes: 2 expected, 1 running"):
        create_accelerator(TRAINING, expect_processes=2)
    with pytest.raises(ValueError, match="training.trackers: nosuch not known to Accelerate or not installed"):
        create_accelerator(replace(TRAINING, trackers=["nosuch"]))
    vit = backbones.create("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"data.size, backbone.name: .* run on images of 32x32 \(Input height"):
        check_images(SimCLR(vit, 192), 32, torch.device("cpu"))


def test_the_monitor_reads_knn_and_leaves_the_backbone_alone() -> None:
    images = image_set(200)
    monitor = Monitor(images, 16, (0.5,) * 3, (0.5,) * 3, bank=120, queries=30)
    assert len(monitor.bank) == 120
    assert len(monitor.queries) == 30
    rows = {tuple(pixels.flatten().tolist()) for pixels in monitor.bank}
    assert not any(tuple(pixels.flatten().tolist()) in rows for pixels in monitor.queries)
    backbone = backbones.create("resnet10_tiny").train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    readings = monitor(backbone, torch.device("cpu"))
    assert backbone.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    backbone.eval()
    with torch.inference_mode():
        features = [backbone((pixels / 255 - 0.5) / 0.5) for pixels in (monitor.queries, monitor.bank)]
    assert readings == {
        "knn": pytest.approx(knn_accuracy(features[0], monitor.query_labels, features[1], monitor.bank_labels)),
        "rankme": pytest.approx(rankme(torch.cat(features)), rel=1e-4),
    }
    images.labels[:] = -1
    assert Monitor(images, 16, (0.5,) * 3, (0.5,) * 3)(backbone, torch.device("cpu")).keys() == {"rankme"}


def test_a_collapse_is_noticed_and_a_healthy_encoder_is_not_accused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "healthy", BYOL, training=replace(TRAINING, knn_every=1)).run()
    assert "collapses" not in capsys.readouterr().out

    # Without a predictor and a slower teacher nothing keeps all embeddings from becoming one.
    training, optimizer = replace(TRAINING, epochs=8), Optimizer(lr=30, warmup_epochs=0.2)
    collapsing = trainer(tmp_path / "collapsing", BYOL, training=training, optimizer=optimizer)
    collapsing.bare.predictor, collapsing.bare.momentum, collapsing.bare.gradmix = torch.nn.Identity(), 0.0, None
    collapsing.run()
    last = RunFolder(tmp_path / "collapsing").read_log()[-1]
    assert last["embedding_std"] < 0.1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        f"warning: the encoder collapses, it hardly tells images apart (embedding_std {last['embedding_std']:.3f}); a "
    )


@pytest.mark.parametrize(
    ("entry", "warned"),
    [
        ({"embedding_std": 0.3}, False),
        ({"embedding_std": 0.09}, True),
        ({"embedding_std": 0.8, "rankme": 1.26}, True),  # features on a line
        ({"embedding_std": 0.3, "rankme": 4.2}, False),
    ],
)
def test_either_reading_tells_of_a_collapse(
    entry: dict[str, float], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path)._warn_of_collapse(entry)
    assert ("the encoder collapses" in capsys.readouterr().out) == warned
