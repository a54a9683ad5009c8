"""Files of strangers: nothing in them runs, nothing beside them is read, and what is refused is named.

Attacks are planted and shown to work where they are let in. What a report reads is in eval/test_report.py.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from support import PICKLES, Planted, load_script, make_run, records, write_images

from ssl_gradmix import backbones, command_line
from ssl_gradmix.data.corruption_sets import Published, make_c, read_cifar_c
from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation import rows
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.files import read_json, read_yaml
from ssl_gradmix.settings import Data

ROW = rows.frame([rows.number("linear", "top1", (0.5, 0.4, 0.6), 10)], "linear_probe", "digits/test", "x")
Samples = load_script("eval/osr.py").Samples
DEEP = 1_000_000


def evaluate(*arguments: object) -> int:
    return load_script("eval/linear_probe.py").main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# Pickles


def of_backbone(run: Path) -> tuple[Callable[[], object], ...]:
    folder = f"local-dir:{run / 'backbone'}"
    return partial(load_encoder, run), partial(load_encoder, folder), partial(backbones.create, folder, pretrained=True)


READERS: dict[str, Callable[[Path], tuple[Callable[[], object], ...]]] = {
    "backbone/model.safetensors": of_backbone,
    "backbone/pytorch_model.bin": of_backbone,
    "w.safetensors": lambda run: (partial(load_encoder, "timm:resnet10_tiny", weights=run / "w.safetensors"),),
    "projector.safetensors": lambda run: (partial(load_encoder, run, feature="projector"),),
    "osr_samples.safetensors": lambda run: (partial(Samples.read, run / "osr_samples.safetensors"),),
}


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("name", READERS)
def test_pickles_in_place_of_weights_and_states(run: Path, planted: Planted, write: Callable, name: str) -> None:
    if name.startswith("backbone"):
        (run / "backbone" / "model.safetensors").unlink()
    write(planted, run / name)
    for read in READERS[name](run):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(run))):
            read()


@pytest.mark.parametrize("name", ["checkpoint_path: w.pt", "pretrained_cfg: {file: w.pt}", "pretrained: true"])
def test_weights_that_the_settings_of_a_recipe_name(
    recipe: Callable[..., int], tmp_path: Path, planted: Planted, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, ["images"])
    torch.save(planted, tmp_path / "w.pt")
    assert recipe("--backbone.kwargs", f"{{{name}}}", "--backbone.pretrained", "true") == 2
    assert re.search("backbone.kwargs must (not have|be without pretrained)", refusal(capsys))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["fog.npy", "labels.npy"])
@pytest.mark.parametrize("as_array", [True, False])
def test_a_corrupted_set(tmp_path: Path, planted: Planted, name: str, as_array: bool) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((10, 4, 4, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(10, np.int64))
    if as_array:
        np.save(tmp_path / name, np.array([planted] * 10, dtype=object), allow_pickle=True)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(planted))
    with pytest.raises(ValueError, match=f"{name} is damaged, or holds pickled objects"):
        read_cifar_c(tmp_path, "fog")


def test_files_of_cifar_10_are_unpickled_only_where_they_are_the_authors_own(tmp_path: Path, planted: Planted) -> None:
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    lists = torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list
    for name, _ in [*lists, ("batches.meta", "")]:
        (folder / name).write_bytes(pickle.dumps(planted))
    with pytest.raises(FileNotFoundError, match="cifar10 is not in data.root"):
        load(Data(name="cifar10", root=str(tmp_path)), "train")


def test_kept_features_are_computed_again(run: Path, tmp_path: Path, planted: Planted) -> None:
    encoder, images = load_encoder(run), np.zeros((4, 16, 16, 3), np.uint8)
    expected, _ = extract(encoder, images, cache=tmp_path / "kept", progress=False)
    (kept,) = (tmp_path / "kept").iterdir()
    torch.save(planted, kept)
    with pytest.warns(UserWarning, match=f"{kept.name} are damaged"):
        features, _ = extract(encoder, images, cache=tmp_path / "kept", progress=False)
    assert torch.equal(features, expected)


# Settings


@pytest.fixture
def tag(tmp_path: Path) -> Iterator[str]:
    """YAML that makes a folder when its tag is obeyed; the test must not."""
    trace = tmp_path / "obeyed"
    text = f"!!python/object/apply:os.mkdir ['{trace}']"
    yield text
    assert not trace.exists()
    yaml.unsafe_load(text)
    assert trace.exists()


@pytest.mark.parametrize("place", ["run: {}", "data: {{root: {}}}"])
def test_tags_in_a_file_given_by_config(
    recipe: Callable[..., int], tmp_path: Path, tag: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostile.yaml").write_text(place.format(tag))
    assert recipe("--config", "hostile.yaml") == 2
    assert "could not determine a constructor for the tag" in refusal(capsys)
    assert evaluate(tmp_path, "--config", tmp_path / "hostile.yaml") == 2
    assert "could not determine a constructor for the tag" in refusal(capsys)


def test_tags_in_a_run_that_is_evaluated_or_resumed(
    recipe: Callable[..., int], tmp_path: Path, tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs/simclr")
    (run / "config.yaml").write_text(f"data: {tag}\n")
    before = sorted(tmp_path.rglob("*"))
    for command in (lambda: evaluate(run), recipe):
        assert command() == 2
        assert re.search(r"config\.yaml is damaged: could not determine a constructor for the tag", refusal(capsys))
    assert sorted(tmp_path.rglob("*")) == before


SECTIONS = ("data", "augmentation", "backbone", "method", "optimizer", "training", "gradmix")
OTHERS = ("byol_gradmix", "linear_probe", "osr", "corruption", "make_c")
IN_A_FILE = [
    *(("simclr_gradmix", f"{section}: {{class_path: this.C}}") for section in SECTIONS),
    *((script, "data: {class_path: this.C}") for script in OTHERS),
    *(("simclr_gradmix", f"data: {text}") for text in ("other.yaml", "[this.C]", "null", "{classes: {class_path: C}}")),
    *(("simclr_gradmix", text) for text in ("environment: this.C", "run: [this.C]", "config: other.yaml")),
    *(("simclr_gradmix", text) for text in ("backbone: {kwargs: this.C}", "gradmix: {attribution: this.C}")),
    *(
        ("osr", text)
        for text in ("unknown: [{class_path: this.C}]", "unknown: [other.yaml]", "trials: {class_path: C}")
    ),
]
OPTIONS = [
    *((script, "data", "this.C") for script in OTHERS),
    *(("simclr_gradmix", section, "this.C") for section in SECTIONS),
    *(("simclr_gradmix", option, "this.C") for option in ("data.class_path", "gradmix.attribution")),
    *(("simclr_gradmix", option, "other.yaml") for option in ("data", "environment", "backbone.kwargs")),
    ("simclr_gradmix", "config", "training: this.C"),
    *(("osr", "unknown", value) for value in ("[this.C]", "other.yaml")),
]


@pytest.fixture
def refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Calls a script, which has to say in one line why not, and imports and writes nothing.

    `this` is a module of the standard library that prints when it is imported.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("size: 64\n")

    def call(script: str, *arguments: str) -> str:
        main = load_script(f"{'recipes' if 'gradmix' in script else 'eval'}/{script}.py").main
        if script in ("linear_probe", "osr", "corruption"):
            assert main((str(run), *arguments)) == 2
        else:
            assert command_line.run(main, arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith("error: ")
        return line

    before = sorted(tmp_path.rglob("*"))
    yield call
    assert "this" not in sys.modules
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "c.yaml") == before
    importlib.import_module("this")
    assert "Zen" in capsys.readouterr().out
    del sys.modules["this"]


@pytest.mark.parametrize(("script", "text"), IN_A_FILE)
def test_a_file_of_settings_has_no_module_imported_and_no_other_file_read(
    refused: Callable[..., str], script: str, text: str
) -> None:
    Path("c.yaml").write_text(text)
    assert text.partition(":")[0] in refused(script, "--config", "c.yaml")


@pytest.mark.parametrize(("script", "option", "value"), OPTIONS)
def test_nor_does_an_option(refused: Callable[..., str], script: str, option: str, value: str) -> None:
    refused(script, f"--{option}", value)


def test_a_class_path_of_plain_values_is_one(
    recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """jsonargparse tries to import it in any dictionary, and says nothing where it could not."""
    write_images(tmp_path, ["images"])
    assert recipe("--backbone.kwargs", "{class_path: this.C}") == 2
    assert "resnet10_tiny does not take {'class_path': 'this.C'}" in refusal(capsys)
    assert "this" not in sys.modules


def test_no_file_of_settings_empties_a_folder(refused: Callable[..., str]) -> None:
    Path("c.yaml").write_text("overwrite: true")
    assert "overwrite is for the command line alone" in refused("byol_gradmix", "--config", "c.yaml")


@pytest.mark.parametrize("text", ["data: {name: mnist, root: new, download: true}", "data.download: true"])
def test_no_file_of_settings_starts_a_download(
    run: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    options = ["--config", "c.yaml", "--data.name", "mnist", "--data.root", "new"]
    assert command_line.run(load_script("recipes/simclr_gradmix.py").main, options) == 2
    assert "mnist is not in data.root 'new': --data.download true fetches it" in refusal(capsys)
    (run / "config.yaml").write_text("data: {name: mnist, root: new, download: true}")
    assert evaluate(run) == 2
    assert "mnist is not in data.root 'new': --data.download true fetches it" in refusal(capsys)
    assert not (tmp_path / "new").exists()


def test_pipes_are_not_waited_for(refused: Callable[..., str], tmp_path: Path) -> None:
    os.mkfifo("c.yaml")
    assert "c.yaml is damaged: it is no regular file" in refused("simclr_gradmix", "--config", "c.yaml")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: " + "[" * 2_000, "nest"),
        ("a: &a {b: *a}", r"it has an alias, \*a"),
        (LAUGHS, r"it has an alias, \*a0"),
        ("- a", "it holds no settings"),
        ("a: 1:30", "1:30 is a number to the base of 60"),
        ("a: !!set {b, c}", "type set is not JSON"),
        ('a: "\\ud800"', "surrogates not allowed"),
        (b"\xff\xfe\x00", "codec can't decode"),
    ],
)
def test_strange_yaml(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"config\.yaml is damaged: .*{message}") as refused:
        read_yaml(path)
    assert len(str(refused.value).splitlines()) == 1


def test_settings_of_other_types_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("data: [1, 2]\n1: 2\n")
    assert evaluate(run) == 2
    assert "config.yaml is damaged: data holds no settings" in refusal(capsys)


# Descriptions of a backbone

PREPARATION = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}


def described(run: Path, **changes: object) -> None:
    path = run / "backbone" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_description_reads_no_weights_from_elsewhere(run: Path, tmp_path: Path, planted: Planted) -> None:
    own = load_file(run / "backbone" / "model.safetensors")
    elsewhere = {name: torch.full_like(tensor, 7) for name, tensor in own.items()}
    save_file(elsewhere, tmp_path / "elsewhere.safetensors")
    torch.save(planted, tmp_path / "elsewhere.pt")
    cfg = json.loads((run / "backbone" / "config.json").read_text())["pretrained_cfg"]
    for name in ("elsewhere.safetensors", "elsewhere.pt"):
        for pointer in (
            {"file": str(tmp_path / name)},
            {"file": f"../../{name}", "source": "local-dir"},
            {"url": (tmp_path / name).as_uri(), "source": ""},
            {"hf_hub_id": "someone/model", "source": "hf-hub", "custom_load": True},
        ):
            described(run, pretrained_cfg=cfg | pointer)
            loaded = load_encoder(run).model.state_dict()
            assert all(torch.equal(loaded[key], own[key]) for key in own)


@pytest.mark.parametrize(
    "argument", ["checkpoint_path", "'pretrained'", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"]
)
def test_arguments_that_would_read_from_elsewhere(run: Path, tmp_path: Path, planted: Planted, argument: str) -> None:
    torch.save(planted, tmp_path / "w.pt")
    described(run, model_args={argument.strip("'"): str(tmp_path / "w.pt")})
    with pytest.raises(ValueError, match=rf"config\.json describes no model: .* {argument}"):
        load_encoder(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "../../elsewhere"},
        {"architecture": ["resnet10t"]},
        {"model_args": {"channels": "many"}},
        {"model_args": {"block": "os.system"}},
        {"model_args": {"features_only": True}},
        {"model_args": {"device": "meta"}},
        {"model_args": [1]},
        {"architecture": None, "pretrained_cfg": None},
        {"pretrained_cfg": []},
        *(
            {"pretrained_cfg": PREPARATION | change}
            for change in (
                {"input_size": "x"},
                {"input_size": [3, 10**9, 10**9]},
                {"input_size": [3, 0, 0]},
                {"input_size": [1, 32, 32]},
                {"mean": [float("nan")] * 3},
                {"mean": [0.5] * 2},
                {"std": [0.0] * 3},
                {"std": None},
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:for .*. copying from a non-meta parameter")
def test_strange_descriptions(run: Path, changes: dict) -> None:
    described(run, **changes)
    with pytest.raises(ValueError, match=r"config\.json (is damaged|describes no model): [^\n]+$"):
        load_encoder(run)
    with pytest.raises(ValueError, match=r"^(.*config\.json is damaged|backbone\.(name|pretrained|kwargs))[^\n]+$"):
        backbones.create(f"local-dir:{run / 'backbone'}", pretrained=True)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_weights_are_not_converted_from_other_kinds_of_numbers(run: Path, kind: torch.dtype) -> None:
    path = run / "backbone" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv1.weight": weights["conv1.weight"].to(kind)}, path)
    with pytest.raises(ValueError, match=r"1 \(conv1.weight\) of another kind of number$"):
        load_encoder(run)
    with pytest.raises(ValueError, match=r"model\.safetensors has numbers of another kind .*: conv1.weight$"):
        backbones.create(f"local-dir:{run / 'backbone'}", pretrained=True)


def test_links_in_a_run_that_is_resumed_are_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "bashrc"
    mine.write_text("mine")
    (tmp_path / "backbone").mkdir()
    for name in ("config.json", "model.safetensors"):
        for left in (f".{name}.tmp", f".{name}.{os.getpid()}.tmp"):
            (tmp_path / "backbone" / left).symlink_to(mine)
    backbones.save(backbones.create("resnet10_tiny"), tmp_path / "backbone", image_size=32)
    assert mine.read_text() == "mine"
    assert load_encoder(f"local-dir:{tmp_path / 'backbone'}").size == 32


# Files that lie about their size


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES = {
    "empty": b"",
    "header longer than the file": safetensors(b"{}", 1 << 20),
    "deep header": safetensors(b"[" * DEEP),
    "more data than there is": safetensors({"x": TENSOR | {"shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
    "shape that overflows": safetensors({"x": TENSOR | {"shape": [2**33, 2**33]}}),
    "overlapping": safetensors({"x": TENSOR, "y": TENSOR}),
    "backwards": safetensors({"x": TENSOR | {"data_offsets": [16, 0]}}),
    "hidden data": safetensors({"x": TENSOR}, data=bytes(16) + pickle.dumps("hidden")),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lying_safetensors_are_named_wherever_they_are_read(lie: bytes, run: Path, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(lie)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: [^\n]+$"):
        load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors")
    (run / "backbone" / "model.safetensors").write_bytes(lie)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: [^\n]+$"):
        load_encoder(run)
    with pytest.raises(ValueError, match=r"w\.safetensors is no file of open-set samples, or damaged"):
        Samples.read(tmp_path / "w.safetensors")


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(480)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 4, 4, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 4, 3)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (10, 4, 4, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os').abort()}",
    ],
)
def test_arrays_with_lying_headers(tmp_path: Path, header: str) -> None:
    (tmp_path / "fog.npy").write_bytes(npy(header))
    np.save(tmp_path / "labels.npy", np.zeros(10, np.int64))
    with pytest.raises(ValueError, match=r"fog\.npy"):
        read_cifar_c(tmp_path, "fog")


# JSON


STRANGE_JSON = {
    "NaN": '{"rows": [NaN]}',
    "deep list": "[" * DEEP,
    "half a character": '{"rows": ["\\ud800"]}',
    "long number": '{"rows": ' + "1" * 10_000 + "}",
    "twice": "{}{}",
    "bytes": b"\xff\xfe{}",
}


@pytest.mark.parametrize("text", STRANGE_JSON.values(), ids=STRANGE_JSON)
def test_strange_json_is_named_wherever_it_is_read(text: str | bytes, run: Path, tmp_path: Path) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "x.json").write_bytes(content)
    (run / "backbone" / "config.json").write_bytes(content)
    (tmp_path / "meta.json").write_bytes(content)
    image, label = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64)
    for read, message in (
        (lambda: read_json(tmp_path / "x.json"), "x.json is damaged"),
        (lambda: rows.read(tmp_path / "x.json"), "x.json is no file of result rows"),
        *((read, "config.json is damaged") for read in of_backbone(run)),
        (Published(tmp_path, None, None).origin, "meta.json is damaged"),
        (lambda: make_c(image, label, tmp_path, "cifar", progress=False), "meta.json is damaged"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(message)}[^\n]*$"):
            read()


def test_deep_json_inside_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "osr_samples.safetensors"
    header = {"encoder": "x", "settings": "[" * DEEP, "images": "{}"}
    save_arrays({"trial0/is_known": np.ones(3, np.uint8)}, path, header)
    with pytest.raises(ValueError, match=r"osr_samples\.safetensors is no file of open-set samples"):
        Samples.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "<b>"},
        {"value": 10**400},
        {"score": 5},
        {"dataset": ["a"]},
        {"n": "<script>"},
        {"params": ["x"]},
        {"params": {"label_fraction": "<b>"}},
        {"params": {"corruption": ["fog"]}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_result_rows_of_other_types(tmp_path: Path, changes: dict) -> None:
    (row,) = records(ROW)
    (tmp_path / "r.json").write_text(json.dumps({"rows": [row]}))
    assert records(rows.read(tmp_path / "r.json")[0]) == [row]
    (tmp_path / "r.json").write_text(json.dumps({"rows": [row | changes]}))
    with pytest.raises(ValueError, match=r"r\.json is no file of result rows"):
        rows.read(tmp_path / "r.json")


# Pictures and names


@pytest.mark.parametrize("name", ["config.yaml", "backbone/config.json", "backbone/model.safetensors"])
def test_pipes_in_a_run_are_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
        load_encoder(run)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_that_nothing_can_print_or_that_look_like_formulas(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's bytes that are no UTF-8, control characters and markup go through an evaluation."""
    monkeypatch.chdir(tmp_path)
    for label in (os.fsdecode(b"caf\xe9"), "line\n\x1b[31m<script>$\\frac$"):
        for i in range(10):
            path = tmp_path / "images" / label / os.fsdecode(b"\xff%d.png" % i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(path)
    assert evaluate(run, "--data.name", "folder", "--data.root", "images", "--epochs", "1") == 0
    found, _ = rows.read(run / "eval" / "linear_probe.json")
    assert set(rows.param(found, "class").dropna()) == {"caf\\xe9", "line\n\x1b[31m<script>$\\frac$"}
