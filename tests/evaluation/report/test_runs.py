from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from reports import add_linear_probe, add_osr, report
from safetensors.numpy import save_file


def test_nothing_evaluated(runs):
    with pytest.raises(ValueError, match=r"nothing to report: no evaluation in .*a, .*b; run eval/linear_probe.py .*a"):
        report(*runs)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder '.*nowhere'"):
        report(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        report(tmp_path)


def test_a_run_given_twice(runs):
    add_linear_probe(runs[0])
    with pytest.raises(ValueError, match="given twice"):
        report(runs[0], runs[0].parent / "b" / ".." / "a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval/linear_probe.json", b'{"rows": [{"task": 1}]}', "is no file of result rows"),
        ("eval/linear_probe.json", b"\xff\xfe", "is no file of result rows"),
        ("eval/osr_samples.safetensors", b"\x10\x00", "osr_samples.safetensors is damaged"),
        ("config.yaml", b"a: [", "config.yaml is damaged"),
        ("config.yaml", b"just text", "config.yaml is damaged: it holds no settings"),
        ("samples/epoch-00009.png", b"GIF89a", "epoch-00009.png is damaged"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(runs, name, content, message):
    add_osr(runs[0])
    (runs[0] / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        report(*runs)
    assert not (runs[0].parent / "report").exists()


def test_a_truncated_picture_is_named(runs):
    add_linear_probe(runs[0])
    picture = runs[0] / "samples" / "epoch-00003.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    with pytest.raises(ValueError, match="epoch-00003.png is damaged"):
        report(*runs)


def test_samples_without_is_known(runs):
    add_osr(runs[0])
    save_file({"random:6:0/energy": np.zeros(3)}, runs[0] / "eval" / "osr_samples.safetensors")
    with pytest.raises(ValueError, match="no random:6:0/is_known"):
        report(*runs)


# Hostile files, and a page that stands alone


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (self.trace.touch, ())


@pytest.mark.parametrize("name", ["eval/osr_samples.safetensors", "eval/linear_probe.json", "samples/epoch-9.png"])
def test_pickles_are_refused_and_not_run(runs, tmp_path, name):
    add_osr(runs[0])
    trace = tmp_path / "ran"
    (runs[0] / name).write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises((ValueError, OSError), match=Path(name).name):
        report(*runs)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Planted(trace)))
    assert trace.exists()  # the attack itself works


def test_yaml_tags_are_refused_and_not_run(runs, tmp_path):
    add_linear_probe(runs[0])
    trace = tmp_path / "ran"
    attack = f"a: !!python/object/apply:os.mkdir ['{trace}']\n"
    (runs[0] / "config.yaml").write_text(attack)
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        report(*runs)
    assert not trace.exists()
    yaml.unsafe_load(attack)
    assert trace.exists()  # the attack itself works
