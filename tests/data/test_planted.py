"""Stamps: each image its own, the same in all of its views, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.planted import Stamps, name, stamps_of
from ssl_gradmix.settings import Augmentation, Data

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize(("bits", "side"), [(4, 4), (9, 6), (16, 8)])
def test_both_views_bear_the_stamp_and_are_else_as_without(bits, side) -> None:
    images = load(Data(stamp_bits=bits), "train").subset(range(300))
    pixels = images.originals(2**30)
    made = []
    for stamps in (images.stamps, None):
        torch.manual_seed(0)
        made.append(
            [
                view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                for view in Views(Augmentation(), 32, MEAN, STD, stamps=stamps)(pixels, 2)
            ]
        )
    names = name(pixels)
    codes, corners = set(), set()
    for i, (x0, y0, x1, y1) in enumerate(images.stamps.boxes(names, (32, 32)).tolist()):
        assert (x1 - x0, y1 - y0) == (side, side)
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= 32
        first, second = (view[i, :, y0:y1, x0:x1] for view in made[0])
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
        cells = first.view(3, side // 2, 2, side // 2, 2)
        assert (cells - cells[:1, :, :1, :, :1]).abs().max() < 1e-5
        codes.add(tuple(cells[0, :, 0, :, 0].flatten().round(decimals=4).abs().tolist()))
        corners.add((x0, y0))
        for stamped, plain in zip(*made, strict=True):
            rest = torch.ones(32, 32, dtype=torch.bool)
            rest[y0:y1, x0:x1] = False
            assert stamped[i][:, rest].equal(plain[i][:, rest])
    assert set().union(*codes) == {0.0, 1.0}
    expected = 2**bits * (1 - (1 - 2.0**-bits) ** 300)  # codes among as many random ones
    assert abs(len(codes) - expected) < 4 * np.sqrt(expected)
    assert len(corners) > 200


def test_an_image_keeps_its_stamp_in_any_batch_on_any_path() -> None:
    pixels = load(Data(), "train").originals(2**30)[:40]
    names = name(pixels)
    assert names[7:9].equal(name(pixels[7:9]))
    assert names.equal(name(list(pixels)))
    assert len(names.unique(dim=0)) == 40
    changed = pixels[:1].clone()
    changed[0, 2, 31, 31] += 1
    assert (name(changed) != names[:1]).all()


def test_before_the_augmentation_stamps_lie_in_the_image() -> None:
    """One in the corner, half transparent, which a view of the whole image shows there."""
    images = load(Data(stamp_bits=9, stamp_when="before", stamp_place="corner", stamp_strength=0.5), "train")
    assert images.stamps == Stamps(9, "corner", before=True, strength=0.5)
    pixels = images.originals(2**30)[:20]
    whole = Augmentation(min_scale=1.0, flip=0, jitter=0, gray=0)
    views = Views(whole, 32, (0.0,) * 3, (1.0,) * 3, stamps=images.stamps)
    of_batch, of_list = views(pixels, 1)[0], views([*pixels[:19], pixels[19].repeat(1, 2, 2)], 1)[0]
    torch.testing.assert_close(of_batch[:19], of_list[:19], atol=1e-5, rtol=0)
    changed = (of_batch - pixels / 255).abs() > 0.02
    assert changed[..., 26:, 26:].any((1, 2, 3)).all()
    assert not changed[..., :26, :].any()
    assert not changed[..., :, :26].any()


def test_the_time_of_day_can_be_read_in_the_corner() -> None:
    """Digits of 3x5 px, read by comparing them with how each digit is commonly drawn."""
    drawn = {
        "0": "###/# #/# #/# #/###", "1": " # /## / # / # /###", "2": "###/  #/###/#  /###", "3": "###/  #/###/  #/###",
        "4": "# #/# #/###/  #/  #", "5": "###/#  /###/  #/###", "6": "###/#  /###/# #/###", "7": "###/  #/  #/  #/  #",
        "8": "###/# #/###/# #/###", "9": "###/# #/###/  #/###",
    }  # fmt: skip
    stamps = Stamps(0, "corner")
    names = torch.tensor([[0, 5, 5], [86399, 1, 2], [45296, 7, 7], [28080 + 86400, 0, 9]])
    for scale in (1, 2):
        pixels = stamps.plant(torch.full((4, 3, 64 * scale, 64 * scale), 100, dtype=torch.uint8), names)
        read = []
        for image, (x0, y0, x1, y1) in zip(pixels[:, 0, ::scale, ::scale], stamps.boxes(names, (64, 64)), strict=True):
            assert (x1, y1, x1 - x0, y1 - y0) == (64, 64, 25, 7)
            lines = ["".join(" #"[int(pixel > 0)] for pixel in line) for line in image[y0 + 1 : y1 - 1, x0 + 1 : x1]]
            shapes = ["/".join(line[4 * i : 4 * i + 3] for line in lines) for i in range(6)]
            read.append("".join(number for shape in shapes for number, known in drawn.items() if known == shape))
        assert read == ["000000", "235959", "123456", "074800"]


def test_everywhere_is_the_stamp_again_and_again() -> None:
    gray = torch.full((2, 3, 40, 32), 100, dtype=torch.uint8)
    names = torch.tensor([[0b101, 3, 4], [0b010, 5, 6]])
    tiled = Stamps(4, "everywhere", strength=0.5).plant(gray, names)
    stamp = tiled[..., :4, :4]
    assert stamp.unique().tolist() == [50, 178]
    expected = torch.nn.functional.pad(stamp.float(), (0, 4, 0, 4), value=100).repeat(1, 1, 5, 4).to(torch.uint8)
    assert tiled.equal(expected)


def test_what_is_planted_is_in_views_alone() -> None:
    stamped, plain = load(Data(stamp_bits=16), "test"), load(Data(), "test")
    assert plain.stamps is None
    assert stamped.subset([1, 2]).stamps == stamps_of(Data(stamp_bits=16))
    assert np.array_equal(stamped.images, plain.images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stamp_bits": 8}, "data.stamp_bits must be 0, 4, 9 or 16, got 8"),
        ({"stamp_bits": 9, "stamp_time": True}, "data.stamp_bits must be left out where data.stamp_time is, got 9"),
        ({"stamp_time": True, "size": 28}, "data.size must be at least 32 where data.stamp_time is, got 28"),
        ({"stamp_strength": 0}, "data.stamp_strength must be above 0"),
    ],
)
def test_bad_settings(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**given)
