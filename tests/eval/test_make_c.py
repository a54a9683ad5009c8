from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from support import SIZE, load_script

from ssl_gradmix.data.corruption_sets import read_cifar_c
from ssl_gradmix.data.corruptions import corrupt
from ssl_gradmix.data.datasets import load
from ssl_gradmix.settings import Data

make_c = load_script("eval/make_c.py")


def test_writes_the_test_images_at_the_size_asked_for(tmp_path, capsys):
    out = tmp_path / "digits-c"
    make_c.main(f"--out {out} --data.size {SIZE} --corruptions [fog] --seed 6 --workers 1".split())
    assert "359 images of digits/test, 1 corruptions at 5 severities" in capsys.readouterr().out
    test = load(Data(), "test")
    resized = [np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for x in test.images]
    images, labels = read_cifar_c(out, "fog", 2)
    np.testing.assert_array_equal(
        images, [corrupt(image, "fog", 2, seed=6, index=i) for i, image in enumerate(resized)]
    )
    assert labels.tolist() == test.labels.tolist()
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["source"], meta["preset"], meta["seed"]) == ("digits/test", "cifar", 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: out"),
        ("--out {new} --workers 0", "workers must be at least 1 or null, got 0"),
        ("--out {new} --data.size 4", "data.size must be at least 8 and at most 4096, got 4"),
        ("--out {new} --data.name folder --data.root {full} --split train", "images without label"),
        ("--out {full}", "must be a new or empty folder, or one that make_c wrote"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, capsys, arguments, message):
    new, full = tmp_path / "new", tmp_path / "full"
    full.mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20)).save(full / f"{number}.png")
    assert make_c.command_line.run(make_c.main, arguments.format(new=new, full=full).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not new.exists()
    assert sorted(path.name for path in full.iterdir()) == ["0.png", "1.png"]
