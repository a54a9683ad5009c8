"""Files of strangers: nothing in them runs, and what is rejected is named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import PICKLES, Planted

from ssl_gradmix import backbones, cli
from ssl_gradmix.evaluation.encoders import load_encoder, start_from
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.files import read_yaml
from ssl_gradmix.methods import SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.training import checkpoint


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_in_place_of_weights_is_rejected(run: Path, planted: Planted, kind: str) -> None:
    for path in (run / "backbone" / "model.safetensors", run / "projector.safetensors"):
        PICKLES[kind](planted, path)
        with pytest.raises(ValueError, match="pickled"):
            backbones.read_weights(path)
    for read in (
        lambda: load_encoder(run),
        lambda: backbones.create(f"local-dir:{run / 'backbone'}", pretrained=True),
        lambda: start_from(SimCLR(backbones.create("resnet10_tiny"), 128), str(run)),
    ):
        with pytest.raises(ValueError, match="pickled"):
            read()


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_in_place_of_a_checkpoint_is_not_executed(
    tmp_path: Path, planted: Planted, kind: str
) -> None:
    for name in ("w.pth", "w.bin"):
        PICKLES[kind]({"state_dict": planted}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_encoder("timm:resnet10_tiny", weights=tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "log.jsonl", ".lock", "checkpoint/epoch-00001-batch-0000000"),
        *("backbone/config.json", "backbone/model.safetensors", "projector.safetensors"),
    ],
)
def test_pipe_in_a_run_folder_is_rejected(run: Path, name: str) -> None:
    """Opened as usual, it would wait for a writer for ever."""
    (run / "checkpoint").mkdir()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    folder = RunFolder(run)
    with pytest.raises((ValueError, OSError), match=Path(name).name):  # noqa: PT012
        load_encoder(run, feature="projector") if "back" in name or "proj" in name else None
        folder.read_log()
        checkpoint.load(folder.checkpoint)
        with folder.locked():
            folder.check({})


def test_pickle_in_place_of_kept_features_is_rejected(
    run: Path, tmp_path: Path, planted: Planted
) -> None:
    encoder, images = load_encoder(run), np.zeros((4, 16, 16, 3), np.uint8)
    extract(encoder, images, cache=tmp_path / "kept", progress=False)
    (kept,) = (tmp_path / "kept").iterdir()
    torch.save(planted, kept)
    with pytest.raises(ValueError, match=kept.name):
        extract(encoder, images, cache=tmp_path / "kept", progress=False)


@pytest.fixture
def tag(tmp_path: Path) -> Iterator[str]:
    """YAML that makes a folder when its tag is obeyed; the test must not."""
    trace = tmp_path / "obeyed"
    text = f"!!python/object/apply:os.mkdir ['{trace}']"
    yield text
    assert not trace.exists()
    yaml.unsafe_load(text)
    assert trace.exists()


@pytest.mark.parametrize("place", ["run: {}", "data: {{root: {}}}", "{}"])
def test_tag_in_a_config_is_not_obeyed(tmp_path: Path, tag: str, place: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(place.format(tag))
    with pytest.raises(ValueError, match=r"hostile\.yaml"):
        read_yaml(path)  # as a run's config.yaml is read
    parser = cli.recipe_parser(SimCLR, "simclr", "")
    assert cli.run(lambda argv: cli.read(parser, argv), ["--config", str(path)]) == 2


@pytest.mark.parametrize(
    "text",
    [
        "data: {class_path: hostile_module.Data}",
        "data: hostile_module.Data",
        "gradmix: {class_path: hostile_module.GradMix}",
        "method: hostile_module.Method",
        "optimizer: {name: hostile_module.sgd}",
    ],
)
def test_class_in_a_config_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    trace = tmp_path / "imported"
    module = tmp_path / "hostile_module.py"
    module.write_text(f"open({str(trace)!r}, 'w')\nfrom ssl_gradmix.data.datasets import Data\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "hostile.yaml").write_text(text)
    parser = cli.recipe_parser(SimCLR, "simclr", "")
    arguments = ["--config", str(tmp_path / "hostile.yaml")]
    assert cli.run(lambda argv: cli.read(parser, argv), arguments) == 2
    assert not trace.exists()


@pytest.mark.parametrize(
    "argument", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"]
)
def test_description_that_points_to_other_weights_is_rejected(
    run: Path, tmp_path: Path, planted: Planted, argument: str
) -> None:
    torch.save(planted, tmp_path / "w.pt")
    path = run / "backbone" / "config.json"
    described = json.loads(path.read_text())
    described["model_args"][argument] = str(tmp_path / "w.pt")
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=argument):
        load_encoder(run)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


HEADER = b'{"x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'


@pytest.mark.parametrize(
    "content",
    [b"", safetensors(b"{}", 1 << 40), safetensors(b"[" * 100_000), safetensors(HEADER)],
    ids=["empty", "long header", "deep header", "more data than there is"],
)
def test_safetensors_that_lie_about_their_size_are_rejected(run: Path, content: bytes) -> None:
    path = run / "backbone" / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_encoder(run)
