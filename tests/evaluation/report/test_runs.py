from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from reports import add_osr, report
from safetensors.numpy import save


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval/linear_probe.json", b'{"rows": [{"task": 1}]}', "is no file of result rows"),
        ("eval/linear_probe.json", b"\xff\xfe", "is no file of result rows"),
        ("eval/osr_samples.safetensors", b"\x10\x00", "osr_samples.safetensors is damaged"),
        ("config.yaml", b"a: [", "config.yaml is damaged"),
        ("samples/epoch-00009.png", b"GIF89a", "epoch-00009.png is damaged"),
        ("samples/epoch-00003.png", None, "epoch-00003.png is damaged"),
        ("eval/osr_samples.safetensors", save({"random:6:0/energy": np.zeros(3)}), "no random:6:0/is_known"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(runs, name, content, message):
    add_osr(runs[0])
    kept = (runs[0] / name).read_bytes()[:-20] if content is None else content
    (runs[0] / name).write_bytes(kept)
    with pytest.raises((ValueError, OSError), match=message):
        report(*runs)
    assert not (runs[0].parent / "report").exists()


@pytest.mark.parametrize("name", ["eval/osr_samples.safetensors", "eval/linear_probe.json", "samples/epoch-9.png"])
def test_pickles_are_refused_and_not_run(runs, planted, name):
    add_osr(runs[0])
    (runs[0] / name).write_bytes(pickle.dumps(planted))
    with pytest.raises((ValueError, OSError), match=Path(name).name):
        report(*runs)
