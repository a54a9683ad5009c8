"""The examples run, mix at the layer that they name, and keep criteria with a state intact."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from support import ROOT, load_script
from torch import Tensor

from ssl_gradmix import GradMix, MixedViews
from ssl_gradmix.adaptive import Adaptive

LAYERS = {
    "adaptive": "layer2",
    "dino": "layer2",
    "hugging_face": "model.encoder.layer.2",
    "lejepa": "layer2",
    "lightning_module": "layer2",
    "moco": "layer2",
    "simclr": "layer2",
    "timm_vit": "blocks.2",
    "vicreg": "layer2",
}
STEPS = 2
NUMBER = r"(?<![\w.])-?(?:\d+\.\d+|nan|inf)"


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> list[MixedViews]:
    """The mixed views that GradMix makes."""
    made: list[MixedViews] = []
    call = GradMix.__call__

    def recorded(self: GradMix, *args: Any, **kwargs: Any) -> MixedViews:
        made.append(call(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(GradMix, "__call__", recorded)
    return made


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Loads an example that trains on few digits, as if it were started from its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def load(name: str) -> ModuleType:
        module = load_script(f"examples/{name}.py")
        if hasattr(module, "Digits"):
            monkeypatch.setattr(module.Digits, "__len__", lambda data: STEPS * 128 + 1)
        return module

    yield load
    sys.modules.pop("digits", None)


@pytest.mark.parametrize("name", LAYERS)
def test_example_mixes_at_its_layer(
    name: str, example: Any, mixed: list[MixedViews], capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "hugging_face":
        pytest.importorskip("transformers")
    example(name).main(epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    for line in lines:
        numbers = [float(each) for each in re.findall(NUMBER, line)]
        assert len(numbers) >= 2
        assert all(map(math.isfinite, numbers))
    assert [each.layers for each in mixed] == [(LAYERS[name],)] * STEPS * 2
    assert all(each.flat.float().mean() < 0.5 for each in mixed)


@pytest.mark.slow
def test_shortcut_is_found_and_drawn(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What plain training loses with the box is more than with a random one."""
    example("find_a_shortcut").main(epochs=6)
    plain, adaptive = capsys.readouterr().out.splitlines()
    assert (plain[:5], adaptive[:8]) == ("plain", "adaptive")
    _, lost, at_random = (float(each) for each in re.findall(r"([\d.]+)%", plain))
    assert lost > 2 * at_random
    assert Path("shortcut.png").stat().st_size > 10_000


def test_bank_of_moco_gets_the_keys_of_the_pairs_alone(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both calls of a step see the keys of earlier steps, each once, and none of their own."""
    module, calls = example("moco"), []
    forward = lightly.loss.NTXentLoss.forward

    def recorded(self: Any, queries: Tensor, keys: Tensor) -> Tensor:
        calls.append((self.memory_bank.bank.clone(), F.normalize(keys, dim=1)))
        return forward(self, queries, keys)

    monkeypatch.setattr(lightly.loss.NTXentLoss, "forward", recorded)
    module.main(epochs=2)
    (expected, _), *_ = calls
    assert len(calls) == 2 * 2 * STEPS
    for step, (pair, third) in enumerate(zip(calls[::2], calls[1::2], strict=True)):
        keys = pair[1]
        assert torch.equal(third[1], keys)
        assert torch.equal(pair[0], expected)
        assert torch.equal(third[0], expected)
        expected = expected.clone()
        expected[step * 128 : (step + 1) * 128] = keys


def test_center_of_dino_follows_the_teacher_on_the_pairs_alone(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both calls of a step start from the center of earlier steps, computed here by hand."""
    module, calls = example("dino"), []
    forward = lightly.loss.DINOLoss.forward

    def recorded(self: Any, targets: list[Tensor], student: list[Tensor], **more: Any) -> Tensor:
        calls.append((self.center.flatten().clone(), torch.cat(targets).mean(0), len(student)))
        return forward(self, targets, student, **more)

    monkeypatch.setattr(lightly.loss.DINOLoss, "forward", recorded)
    module.main(epochs=2)
    assert [students for *_, students in calls] == [4, 1] * STEPS * 2
    expected = torch.zeros(512)
    for pair, third in zip(calls[::2], calls[1::2], strict=True):
        torch.testing.assert_close(pair[0], expected)
        torch.testing.assert_close(third[0], expected)
        expected = 0.9 * expected + 0.1 * pair[1]


def test_reading_of_adaptive_moves(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, made = example("adaptive"), []
    monkeypatch.setattr(module, "Adaptive", lambda: made.append(Adaptive()) or made[-1])
    module.main(epochs=1)
    (adaptive,) = made
    reading = adaptive.state_dict()["reading"]
    assert reading.isfinite()
    assert reading != Adaptive().reading
    assert f"reading {reading:.2f}, p {adaptive.probability:.2f}" in capsys.readouterr().out
