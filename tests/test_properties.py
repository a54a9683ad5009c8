"""What holds of the view generator for any shapes, types and settings, on generated cases.

Activations are made by hand, so that a case costs milliseconds; encoders are in test_gradmix.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_gradmix import GradMix, MixedViews
from ssl_gradmix.attribution import Observed, attribute

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS = ("map", "channels last", "tokens", "tokens behind a class token")

stable = settings(deadline=None, derandomize=True, database=None)
"""The same cases each time, and none kept on the disk."""


@dataclass(frozen=True)
class Case:
    """Images, donors beside them, and layers of an encoder that saw both.

    Args:
        count: Images.
        size: (H, W), multiples of 4.
        channels: Of the images.
        dtype: Of the images.
        memory_format: Of the images.
        layers: Layout, channels and dtype of each layer's outputs; maps have a quarter of the image's side.
        seed: Of all values.
    """

    count: int
    size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    memory_format: torch.memory_format
    layers: tuple[tuple[str, int, torch.dtype], ...]
    seed: int

    def views(self) -> tuple[Tensor, Tensor]:
        """Images in [0, 1) and donors in [2, 3), so that no pixel is in both."""
        draws = torch.Generator().manual_seed(self.seed)
        values = torch.rand(2, self.count, self.channels, *self.size, generator=draws)
        images, donors = (each.to(self.dtype).contiguous(memory_format=self.memory_format) for each in values)
        return images, donors + 2

    def activations(self) -> Observed:
        """Two forward passes of each layer."""
        draws = torch.Generator().manual_seed(self.seed + 1)
        height, width = self.size[0] // 4, self.size[1] // 4
        found: dict[str, list[Tensor]] = {}
        for number, (layout, channels, dtype) in enumerate(self.layers):
            shape = {
                "map": (channels, height, width),
                "channels last": (height, width, channels),
                "tokens": (height * width, channels),
                "tokens behind a class token": (height * width + 1, channels),
            }[layout]
            values = torch.randn(2, self.count, *shape, generator=draws).to(dtype)
            found[f"layer{number}"] = [each.clone().requires_grad_() for each in values]
        return Observed(found)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layer = st.tuples(st.sampled_from(LAYOUTS), st.integers(2, 6), st.sampled_from(DTYPES))
    return Case(
        draw(st.integers(1, 5)),
        (4 * draw(st.integers(2, 6)), 4 * draw(st.integers(2, 6))),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(FORMATS)),
        tuple(draw(st.lists(layer, min_size=1, max_size=3))),
        draw(st.integers(0, 2**31)),
    )


@st.composite
def generators(draw: st.DrawFn) -> GradMix:
    low, high = sorted(draw(st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98))))
    return GradMix(
        attribution=draw(st.sampled_from(["layercam", "gradcam"])),
        target=draw(st.sampled_from(["agreement", "loss"])),
        fill=draw(st.sampled_from(["donor", "crop", "noise", "mean"])),
        region=draw(st.sampled_from(["peak", "max_mean", "mask", "random", "center"])),
        alpha=draw(st.floats(0.05, 20)),
        lam_range=(low, high),
    )


def loss_of(activations: Mapping[str, list[Tensor]]) -> Tensor:
    """A sum over images: of each the loss depends on its own activations alone, and differently by place."""
    return sum(output.float().square().mul(0.1).sin().sum() for passes in activations.values() for output in passes)


def mix(gradmix: GradMix, case: Case, images: Tensor, donors: Tensor | None, seed: int = 0) -> MixedViews:
    activations = case.activations()
    seeded = replace(gradmix, layers=list(activations), generator=torch.Generator().manual_seed(seed))
    return seeded(images, loss_of(activations), activations, donors)


def region_of(mixed: MixedViews, images: Tensor) -> Tensor:
    """Boolean (N, H, W): inside the boxes, or where there are none, wherever anything changed."""
    if mixed.boxes is None:
        return (mixed.images != images).any(1)
    region = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
    for each, (x0, y0, x1, y1) in zip(region, mixed.boxes.tolist(), strict=True):
        assert 0 <= x0 < x1 <= images.shape[3]
        assert 0 <= y0 < y1 <= images.shape[2]
        each[y0:y1, x0:x1] = True
    return region


@given(case=cases(), gradmix=generators())
@settings(stable, max_examples=100)
def test_pixels_come_from_where_they_should_and_lam_counts_them(case: Case, gradmix: GradMix) -> None:
    images, donors = case.views()
    before = images.clone(), donors.clone()
    mixed = mix(gradmix, case, images, donors)
    region = region_of(mixed, images)[:, None].expand_as(images)

    assert torch.equal(images, before[0])
    assert torch.equal(donors, before[1])
    assert mixed.images.dtype == case.dtype
    assert mixed.images.isfinite().all()
    assert mixed.images.is_contiguous(memory_format=case.memory_format)
    assert torch.equal(mixed.images[~region], images[~region])

    area, pixels = region[:, 0].sum((1, 2)), case.size[0] * case.size[1]
    if mixed.boxes is not None or gradmix.fill in ("donor", "crop"):
        assert (area == area[0]).all()
        assert mixed.lam.item() == pytest.approx(1 - area[0].item() / pixels, abs=1e-7)
    else:  # a fill may happen to equal what was there
        assert (1 - area / pixels >= mixed.lam - 1e-6).all()

    if gradmix.fill in ("donor", "crop"):
        assert (mixed.images[region] > 1.5).all()
        taken = donors[mixed.donor_index]
        if gradmix.fill == "crop" or gradmix.region == "mask":
            assert torch.equal(mixed.images, torch.where(region, taken, images))
        else:  # resized: a weighted mean of the donor's pixels
            low, high = (extreme((2, 3), keepdim=True) for extreme in (taken.float().amin, taken.float().amax))
            inside = (mixed.images.float() >= low - 1e-5) & (mixed.images.float() <= high + 1e-5)
            assert inside[region].all()
    elif gradmix.fill == "mean":
        mean = images.float().mean((0, 2, 3), keepdim=True).expand_as(images)
        torch.testing.assert_close(mixed.images.float()[region], mean[region], atol=1e-2, rtol=0)
    else:
        deviation, mean = torch.std_mean(images.float(), (0, 2, 3), correction=0, keepdim=True)
        assert ((mixed.images.float() - mean).abs() <= 3**0.5 * deviation + 1e-2)[region].all()


@given(case=cases(), gradmix=generators(), given_donors=st.booleans())
@settings(stable, max_examples=60)
def test_no_image_is_its_own_donor_and_each_is_one(case: Case, gradmix: GradMix, given_donors: bool) -> None:
    images, donors = case.views()
    mixed = mix(gradmix, case, images, donors if given_donors else None)
    if gradmix.fill in ("noise", "mean"):
        assert mixed.donor_index is None
        return
    assert sorted(mixed.donor_index.tolist()) == list(range(case.count))
    assert case.count == 1 or (mixed.donor_index != torch.arange(case.count)).all()
    if not given_donors and gradmix.fill == "crop":
        region = region_of(mixed, images)[:, None]
        assert torch.equal(mixed.images, torch.where(region, images[mixed.donor_index], images))


@given(case=cases(), gradmix=generators(), seed=st.integers(0, 2**31))
@settings(stable, max_examples=60)
def test_a_generator_decides_everything_and_leaves_the_global_one_alone(
    case: Case, gradmix: GradMix, seed: int
) -> None:
    images, donors = case.views()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mix(gradmix, case, images, donors, seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = mix(gradmix, case, images, donors, seed)
    for name in ("images", "lam", "boxes", "attribution", "donor_index", "flat"):
        one, other = getattr(first, name), getattr(second, name)
        assert one is other is None or torch.equal(one, other)


@given(case=cases(), gradmix=generators())
@settings(stable, max_examples=80)
def test_attribution_is_a_share_whose_largest_is_one_unless_flat(case: Case, gradmix: GradMix) -> None:
    images, donors = case.views()
    mixed = mix(gradmix, case, images, donors)
    attribution = mixed.attribution
    assert attribution.shape == (case.count, *case.size)
    assert attribution.dtype == torch.float32
    assert attribution.min() >= 0
    control = gradmix.region in ("random", "center")
    for peak, flat in zip(attribution.amax((1, 2)).tolist(), mixed.flat.tolist(), strict=True):
        assert peak == (0 if control or flat else 1)
    assert not (control and mixed.flat.any())
    if gradmix.region == "mask" and gradmix.fill in ("donor", "crop"):  # what is replaced is what is attributed most
        replaced = region_of(mixed, images)
        kept_highest = torch.where(replaced, -1, attribution).amax((1, 2))
        assert (torch.where(replaced, attribution, 2).amin((1, 2)) >= kept_highest).all()
    assert mixed.layers == (() if control else tuple(case.activations()))


@given(
    case=cases(),
    method=st.sampled_from(["layercam", "gradcam"]),
    target=st.sampled_from(["agreement", "loss"]),
    data=st.data(),
)
@settings(stable, max_examples=80)
def test_a_map_does_not_depend_on_the_other_images(case: Case, method: str, target: str, data: st.DataObject) -> None:
    """Where the loss is a sum over images: any part of the batch, in any order, has the same maps."""
    activations = case.activations()
    chosen = data.draw(st.lists(st.integers(0, case.count - 1), min_size=1, max_size=case.count, unique=True))
    part = {
        name: [output.detach()[chosen].clone().requires_grad_() for output in passes]
        for name, passes in activations.items()
    }
    whole, alone = (
        attribute(loss_of(each), each, case.size, count, method, target)
        for each, count in ((activations, case.count), (part, len(chosen)))
    )
    torch.testing.assert_close(alone, whole[chosen], atol=1e-4, rtol=0)
