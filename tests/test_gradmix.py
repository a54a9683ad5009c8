"""The view generator against naive loops, pytorch-grad-cam and torchvision, on many encoders."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_grad_cam as cam
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from lightly.models.modules import SimCLRProjectionHead
from scipy.stats import chisquare
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ssl_gradmix import GradMix, MixedViews, gradmix

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Two stages and a head, small enough for loops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def agreement_loss(z0: Tensor, z1: Tensor) -> Tensor:
    return -torch.cosine_similarity(z0, z1).mean()


def mix(mixer: GradMix, images: Tensor, donors: Tensor | None = None, net=None) -> MixedViews:
    net = net or Net()
    other = images.flip(3) if donors is None else donors
    with mixer.observe(net) as activations:
        loss = agreement_loss(net(images), net(other))
    return mixer(images, loss, activations, donors)


def maps_of(loss: Tensor | None, activations: dict, size: tuple[int, int], **options) -> Tensor:
    """Maps of activations that were made by hand."""
    count = len(next(iter(activations.values()))[0])
    images = torch.zeros(count, 3, *size)
    return GradMix(layers=list(activations), **options).attribute(images, loss, activations)


# Attribution


def naive_smooth(values: Tensor) -> Tensor:
    """Weights 1, 2, 1 down and across, over (h, w); borders are reflected."""
    height, width = values.shape
    result = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            for dy, down in ((-1, 1), (0, 2), (1, 1)):
                for dx, across in ((-1, 1), (0, 2), (1, 1)):
                    row = height - 2 if y + dy == height else abs(y + dy)
                    column = width - 2 if x + dx == width else abs(x + dx)
                    result[y, x] += down * across * values[row, column] / 16
    return result


def naive_map(activation: Tensor, gradient: Tensor, kind: str) -> Tensor:
    """(C, h, w) each, to (h, w)."""
    result = torch.zeros(activation.shape[1:])
    for a, g in zip(activation, gradient, strict=True):
        weight = naive_smooth(g).clamp_min(0) if kind == "layercam" else g.mean()
        result += a * weight
    return result if kind == "layercam" else result.clamp_min(0)


def stretch(each: Tensor) -> Tensor:
    low, high = each.min(), each.max()
    return (each - low) / (high - low) if high > low else torch.zeros_like(each)


@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
@pytest.mark.parametrize("target", ["agreement", "loss"])
@pytest.mark.parametrize("layers", [["stage"], ["stem", "stage"]])
def test_maps_equal_a_loop_over_images_and_channels(
    kind: str, target: str, layers: list[str]
) -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(3, 3, 12, 16)
    mixer = GradMix(layers=layers, target=target, attribution=getattr(gradmix, kind))
    with mixer.observe(net) as activations:
        loss = net(images).square().sum(1).mean()
    maps = mixer.attribute(images, loss, activations)
    gradients = torch.autograd.grad(loss, [activations[name][0] for name in layers])
    sign = 1 if target == "loss" else -1
    for n in range(3):
        total = torch.zeros(12, 16)
        for name, gradient in zip(layers, gradients, strict=True):
            small = stretch(naive_map(activations[name][0][n].detach(), sign * gradient[n], kind))
            total += nn.functional.interpolate(small[None, None], (12, 16), mode="bilinear")[0, 0]
        torch.testing.assert_close(maps[n], stretch(total))


@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
def test_maps_equal_pytorch_grad_cam(kind: str) -> None:
    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(4, 3, 16, 16)
    mixer = GradMix(layers=["stage"], target="loss", attribution=getattr(gradmix, kind))
    with mixer.observe(net) as activations:
        loss = net(images)[:, 2].sum()  # the gradient of each term is that of its own image
    ours = mixer.attribute(torch.zeros(4, 3, 8, 8), loss, activations)
    targets = [cam.utils.model_targets.ClassifierOutputTarget(2)] * 4
    theirs_of = {"layercam": cam.LayerCAM, "gradcam": cam.GradCAM}[kind]
    with theirs_of(net, [net.stage]) as extractor:
        extractor(images, targets)
        kept = extractor.activations_and_grads
        theirs = extractor.get_cam_image(
            images,
            net.stage,
            targets,
            kept.activations[0].numpy(),
            kept.gradients[0].numpy(),
            False,
        )
    expected = torch.stack([stretch(each) for each in torch.from_numpy(theirs).clamp_min(0)])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((8, 8), 1, 2), ((6, 10), 2, 2), ((7, 9), 1, 2)]
)
def test_smoothing_removes_the_pattern_of_a_stride(
    size: tuple[int, int], kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    activation = torch.ones(1, 3, *size, requires_grad=True)
    downsample = nn.Conv2d(3, 4, kernel, stride, bias=False)
    gradient = torch.autograd.grad(downsample(activation).sum(), activation)[0]
    assert gradient.std((2, 3)).min() > 0.05
    maps = gradmix.layercam(activation.detach(), gradient)
    torch.testing.assert_close(maps, maps.mean().expand_as(maps))


def test_maps_of_several_passes_are_those_of_the_first_images() -> None:
    torch.manual_seed(0)
    net, images, mixer = Net(), torch.randn(6, 3, 8, 8), GradMix(layers=["stage"])
    with mixer.observe(net) as whole:
        loss = net(images).square().sum()
    expected = mixer.attribute(images, loss, whole)
    with mixer.observe(net) as parts:
        split = sum(net(part).square().sum() for part in images.split(2))
    maps = mixer.attribute(images[:3], split, parts)
    torch.testing.assert_close(maps, expected[:3])


@pytest.mark.parametrize("layers", [["layer2"], ["layer2", "layer3"]])
def test_gradients_left_by_backward_give_the_same_maps(layers: list[str]) -> None:
    torch.manual_seed(0)
    net, x0, x1 = timm.create_model("resnet18", num_classes=0), *torch.rand(2, 4, 3, 64, 64)
    mixer = GradMix(layers=layers)
    with mixer.observe(net) as activations:
        loss = agreement_loss(net(x0), net(x1))
    expected = mixer.attribute(x0, loss, activations)
    loss.backward()
    torch.testing.assert_close(mixer.attribute(x0, None, activations), expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 4, 6), (2, 8, 4, 6)),  # convolutional
        ((2, 4, 6, 8), (2, 8, 4, 6)),  # channels last, as in Swin
        ((2, 24, 8), (2, 8, 4, 6)),  # tokens
        ((2, 25, 8), (2, 8, 4, 6)),  # with a class token
        ((2, 29, 8), (2, 8, 4, 6)),  # and four registers
        ((2, 8), (2, 8, 1, 1)),  # no places
    ],
)
def test_spatial_reads_maps_and_tokens(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert gradmix.spatial(torch.zeros(shape), (64, 96)).shape == expected


def test_tokens_lie_row_by_row_behind_the_class_token() -> None:
    tokens = torch.arange(7).float().view(1, 7, 1)
    assert gradmix.spatial(tokens, (32, 48))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_half_precision_does_not_underflow() -> None:
    torch.manual_seed(0)
    half = torch.rand(2, 4, 6, 6).half().requires_grad_()
    full = half.detach().float().requires_grad_()
    weight = torch.randn(2, 4, 6, 6)
    # Gradients of about 3e-8, half of float16's smallest number.
    tiny = maps_of((half.float() * weight).mean() * 1e-5, {"layer": [half]}, (6, 6))
    expected = maps_of((full * weight).mean(), {"layer": [full]}, (6, 6))
    torch.testing.assert_close(tiny, expected, atol=0.05, rtol=0)


def test_autocast_maps_are_close_to_float32_ones() -> None:
    net, images = Net(), torch.rand(8, 3, 32, 32)
    maps = []
    for enabled in (False, True):
        mixer = GradMix(layers=["stage"])
        with (
            mixer.observe(net) as activations,
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            loss = agreement_loss(net(images).float(), net(images.flip(3)).float())
        maps.append(mixer(images, loss, activations).attribution)
    assert activations["stage"][0].dtype == torch.bfloat16
    assert (maps[0] - maps[1]).abs().mean() < 0.05


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_maps_that_are_not_finite_are_zero_and_their_boxes_random(bad: float) -> None:
    def spoiled(activation: Tensor, gradient: Tensor) -> Tensor:
        maps = activation.sum(1)
        maps[1:, 2, 3] = bad
        return maps

    activation = torch.rand(40, 2, 4, 4, requires_grad=True)
    mixer = GradMix(layers=["layer"], attribution=spoiled, lam_range=(0.9, 0.9))
    mixed = mixer(torch.rand(40, 3, 16, 16), activation.sum(), {"layer": [activation]})
    assert mixed.flat.tolist() == [False] + [True] * 39
    assert mixed.attribution[0].max() == 1
    assert not mixed.attribution[1:].any()
    assert mixed.boxes is not None
    assert len(mixed.boxes[1:].unique(dim=0)) > 20


@pytest.mark.parametrize("rounding", [0, 1e-7])
def test_constant_maps_are_zero_up_to_rounding(rounding: float) -> None:
    activation = torch.full((1, 3, 4, 4), 0.7)
    activation[0, 0, 1, 2] += rounding
    activation.requires_grad_()
    maps = maps_of(activation.sum(), {"layer": [activation]}, (8, 8), target="loss")
    assert not maps.any()


def test_the_map_marks_what_the_loss_looks_at() -> None:
    """An encoder that sees one corner alone."""

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x)[:, :, 24:, :8].mean((2, 3))

    torch.manual_seed(0)
    mixer = GradMix(layers=["stage"], lam_range=(0.8, 0.9))
    mixed = mix(mixer, torch.rand(8, 3, 32, 32), net=Corner())
    inside = mixed.attribution[:, 24:, :8].sum((1, 2)) / mixed.attribution.sum((1, 2))
    assert (inside > 0.7).all()
    assert (mixed.mask[:, 24:, :8].float().mean((1, 2)) > 0.5).all()


def test_targets_mark_opposite_signs() -> None:
    activation = torch.zeros(1, 2, 4, 4)
    activation[0, 0, 0, 0] = activation[0, 1, 3, 3] = 1
    activation.requires_grad_()
    loss = activation[:, 0].sum() - activation[:, 1].sum()
    peaks = []
    for target in ("loss", "agreement"):
        maps = maps_of(loss, {"layer": [activation]}, (16, 16), target=target)
        peaks.append(divmod(int(maps[0].argmax()), 16))
    assert peaks[0] == (0, 0)
    assert min(peaks[1]) >= 13


# Layers


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 64, "layer3.1"),
        ("vgg11", 64, "features.19"),  # the whole of `features` is too coarse
        ("efficientnet_b0", 64, "blocks.4.2"),  # not blocks.5.0.bn1, inside a strided block
        ("densenet121", 64, "features.denseblock3"),  # not the norm of the transition behind it
        ("mobilevit_xxs", 64, "stages.3.1"),
        ("convnext_atto", 64, "stages.2"),
        ("vit_tiny_patch16_224", 64, "blocks.10"),  # the last block reaches the class token alone
        ("mixer_s32_224", 224, "blocks.7"),
        ("swin_tiny_patch4_window7_224", 224, "layers.3"),
    ],
)
def test_layers_none_takes_the_last_block_with_room(name: str, size: int, expected: str) -> None:
    torch.manual_seed(0)
    kwargs = {"img_size": size} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=0, **kwargs)
    assert mix(GradMix(), torch.rand(2, 3, size, size), net=net).layers == (expected,)


def test_layers_none_chooses_once_per_encoder() -> None:
    mixer, images = GradMix(), torch.rand(2, 3, 64, 64)
    fine, coarse = (timm.create_model("resnet18", num_classes=0) for _ in range(2))
    coarse.conv1.stride = (4, 4)
    found = [mix(mixer, images, net=net).layers for net in (fine, fine, coarse, fine)]
    assert found == [("layer3.1",), ("layer3.1",), ("layer2.1",), ("layer3.1",)]
    with mixer.observe(fine) as activations:
        fine(images)
    assert set(activations) == {"", "layer3.1"}  # the others are no longer observed
    for copied in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert mix(copied, images, net=coarse).layers == ("layer2.1",)


class Odd(nn.Module):
    """One layer runs twice, one cuts images up, one never runs, one gives a tuple, one a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.twice, self.cut = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()
        self.idle = nn.Sequential(nn.Identity(), nn.Identity())
        self.pair = type("Pair", (nn.Module,), {"forward": lambda self, x: (x + 0, "weights")})()
        self.vector = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.act(self.conv(x))))
        x = self.cut(x.unflatten(3, (2, 4)).permute(0, 3, 1, 2, 4).flatten(0, 1))
        return self.vector(self.pair(x.unflatten(0, (-1, 2)).mean(1))[0])


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        ("conv", True),  # an in-place operation follows: the tensor is then that after it
        ("act", True),
        ("pair", True),
        ("twice", False),
        ("cut", False),
        ("idle", False),
        ("vector", False),
    ],
)
def test_layers_that_do_not_give_one_map_per_image_are_refused(layer: str, fits: bool) -> None:
    net, images, mixer = Odd(), torch.rand(2, 3, 8, 8), GradMix(layers=[layer], target="loss")
    with mixer.observe(net) as activations:
        loss = net(images).square().mean() + net(images).square().mean()
    if fits:
        assert mixer(images, loss, activations).attribution.amax() > 0
        return
    with pytest.raises(ValueError, match=layer):
        mixer(images, loss, activations)


@pytest.mark.parametrize("layers", [["blocks.11"], ["blocks.8", "blocks.11"]])
def test_a_layer_without_gradient_at_its_places_is_refused(layers: list[str]) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    with pytest.raises(ValueError, match=r"blocks\.11"):
        mix(GradMix(layers=layers), torch.rand(2, 3, 64, 64), net=vit)


def test_unknown_layers_name_close_ones() -> None:
    with pytest.raises(KeyError, match="stage"), GradMix(layers=["stge"]).observe(Net()):
        pass


def test_layers_none_needs_a_map_and_a_gradient() -> None:
    net, images = Net(), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="layers"):
        mix(GradMix(), images[..., :4, :4], net=net)
    with pytest.raises(ValueError, match="layers"), GradMix().observe(net) as activations:
        GradMix()(images, 0 * net(images).sum(), activations)
    net.requires_grad_(False)
    with GradMix().observe(net) as activations:
        loss = (net(images) * torch.ones(5, requires_grad=True)).sum()
    with pytest.raises(ValueError, match="layers"):
        GradMix()(images, loss, activations)


def test_gradients_that_no_backward_pass_left_are_refused() -> None:
    net, images = Net(), torch.rand(2, 3, 16, 16)
    for layers in (None, ["stage"]):
        with GradMix(layers).observe(net) as activations:
            net(images)
        with pytest.raises(ValueError, match="loss"):
            GradMix(layers)(images, None, activations)


# Observing


def test_observing_leaves_gradients_flags_buffers_and_hooks_alone() -> None:
    net, images = timm.create_model("resnet18", num_classes=0), torch.randn(2, 3, 64, 64)
    net.layer1.eval()
    training = [module.training for module in net.modules()]
    mixer = GradMix(layers=["layer2", "layer3"])
    with mixer.observe(net) as activations:
        loss = net(images).square().mean()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    mixer(images, loss, activations)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net.modules()] == training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert all(not module._forward_hooks for module in net.modules())
    loss.backward()  # the graph is still there
    with pytest.raises(ZeroDivisionError), mixer.observe(net):
        _ = 1 / 0
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("compiled", ["whole", "stage"])
def test_compiled_encoders_have_the_same_maps(compiled: str) -> None:
    torch._dynamo.reset()
    net, images, mixer = Net(), torch.randn(2, 3, 8, 8), GradMix(layers=["stage"])
    with mixer.observe(net) as activations:
        loss = net(images).square().mean()
    expected = mixer.attribute(images, loss, activations)
    if compiled == "stage":
        net.stage = torch.compile(net.stage, backend="aot_eager")
    outer = torch.compile(net, backend="aot_eager") if compiled == "whole" else net
    outer(images)
    for _ in range(2):
        with mixer.observe(outer) as activations:
            loss = outer(images).square().mean()
        torch.testing.assert_close(mixer.attribute(images, loss, activations), expected)


@pytest.mark.parametrize("layers", [None, ["stem", "stage"]])
def test_only_the_first_call_for_an_encoder_reads_from_the_device(
    layers: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fraction to replace, drawn on the CPU in float64, is read in each call."""
    reads: list[str] = []
    for method in ("__bool__", "item", "tolist", "__int__", "__float__"):
        original = getattr(Tensor, method)

        def watched(self: Tensor, original: Callable = original, method: str = method) -> object:
            if self.dtype != torch.float64:
                reads.append(method)
            return original(self)

        monkeypatch.setattr(Tensor, method, watched)
    net, images, mixer = Net(), torch.rand(4, 3, 16, 16), GradMix(layers=layers)
    for first in (True, False):
        reads.clear()
        mix(mixer, images, net=net)
        assert bool(reads) == first


# Placing and mixing


@pytest.mark.parametrize(
    ("region", "fill"), [("peak", "donor"), ("peak", "crop"), ("mask", "crop")]
)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_regions_equal_a_loop_over_images(region: str, fill: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images, donors = torch.rand(2, 5, 3, *size)
    mixed = mix(GradMix(layers=["stage"], region=region, fill=fill), images, donors)
    pixels = int(mixed.mask[0].sum())
    for i, each in enumerate(mixed.attribution):
        expected, donor = images[i].clone(), donors[mixed.donor_index[i]]
        if region == "mask":
            highest = each.flatten().sort(descending=True).values[pixels - 1]
            assert (each[mixed.mask[i]] >= highest).all()
            expected = torch.where(mixed.mask[i], donor, expected)
        else:
            x0, y0, x1, y1 = mixed.boxes[i].tolist()
            y, x = divmod(int(each.argmax()), size[1])
            if mixed.flat[i]:
                y, x = y0 + (y1 - y0) // 2, x0 + (x1 - x0) // 2
            assert y0 == min(max(y - (y1 - y0) // 2, 0), size[0] - (y1 - y0))
            assert x0 == min(max(x - (x1 - x0) // 2, 0), size[1] - (x1 - x0))
            box = torch.zeros(size, dtype=torch.bool)
            box[y0:y1, x0:x1] = True
            assert torch.equal(mixed.mask[i], box)
            resized = tv.resize(donor, [y1 - y0, x1 - x0], antialias=True)
            expected[:, y0:y1, x0:x1] = resized if fill == "donor" else donor[:, y0:y1, x0:x1]
        torch.testing.assert_close(mixed.images[i], expected)


def test_control_regions_need_no_gradient_and_lie_anywhere_or_in_the_middle() -> None:
    net, images = Net(), torch.rand(5000, 3, 16, 16)
    for region in ("random", "center"):
        mixer = GradMix(region=region, lam_range=(0.75, 0.75))
        with mixer.observe(net) as activations:
            pass
        mixed = mixer(images, None, activations)
        assert mixed.boxes is not None
        assert not mixed.attribution.any()
        assert not mixed.flat.any()
        assert mixed.layers == ()
        if region == "center":
            assert mixed.boxes.unique(dim=0).tolist() == [[4, 4, 12, 12]]
            continue
        assert (mixed.boxes[:, 2:] - mixed.boxes[:, :2] == 8).all()
        places = mixed.boxes[:, 1] * 9 + mixed.boxes[:, 0]
        assert chisquare(places.bincount(minlength=81).numpy()).pvalue > 0.001


def test_ties_in_a_mask_are_broken_at_random() -> None:
    masks = gradmix.top_mask(torch.zeros(500, 6, 6), 9, torch.Generator().manual_seed(0))
    assert (masks.flatten(1).sum(1) == 9).all()
    assert (masks.float().mean(0) - 0.25).abs().max() < 0.1


def test_noise_has_the_moments_of_each_channel() -> None:
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.5, 1, 2]).view(3, 1, 1), torch.tensor([-1.0, 0, 3]).view(3, 1, 1)
    images = torch.randn(64, 3, 20, 20) * scale + shift
    noise = gradmix.noise_like(images)
    torch.testing.assert_close(noise.mean((0, 2, 3)), images.mean((0, 2, 3)), atol=0.05, rtol=0)
    torch.testing.assert_close(noise.std((0, 2, 3)), images.std((0, 2, 3)), atol=0, rtol=0.02)
    deviation = images.std((0, 2, 3), correction=0).view(3, 1, 1)
    assert ((noise - images.mean((0, 2, 3)).view(3, 1, 1)).abs() <= 3**0.5 * deviation + 1e-4).all()


def test_the_kept_fraction_is_uniform_in_its_range() -> None:
    mixer = GradMix(region="center", generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, 200, 200)
    kept = torch.stack([mixer(image, None, {}).lam for _ in range(2000)])
    assert 0.49 < kept.min() < 0.51
    assert 0.89 < kept.max() < 0.91
    counts = ((kept - 0.5) / 0.4 * 8).long().clamp(0, 7).bincount(minlength=8)
    assert chisquare(counts.numpy()).pvalue > 0.001


@given(
    count=st.integers(1, 5),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    region=st.sampled_from(["peak", "mask", "random", "center"]),
    fill=st.sampled_from(["donor", "crop", "noise"]),
    lam=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=150)
def test_pixels_come_from_where_they_should(
    count: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    region: str,
    fill: str,
    lam: float,
    seed: int,
) -> None:
    draws = torch.Generator().manual_seed(seed)
    height, width = 4 * size[0], 4 * size[1]
    images, donors = torch.rand(2, count, 3, height, width, generator=draws).to(dtype)
    images = images.contiguous(memory_format=memory_format)
    donors = donors.contiguous(memory_format=memory_format) + 2  # no pixel is in both
    activation = torch.randn(count, 4, *size, generator=draws).requires_grad_()

    def once() -> MixedViews:
        generator = torch.Generator().manual_seed(seed)
        mixer = GradMix(["layer"], region, fill, lam_range=(lam, lam), generator=generator)
        return mixer(images, activation.square().sum(), {"layer": [activation]}, donors)

    state = torch.get_rng_state()
    mixed, again = once(), once()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mixed.images, again.images)
    inside = mixed.mask[:, None].expand_as(images)
    area = mixed.mask.sum((1, 2))
    assert (area == area[0]).all()
    assert mixed.lam.item() == pytest.approx(1 - area[0].item() / (height * width), abs=1e-6)
    assert abs(mixed.lam.item() - lam) < 2 / min(height, width)
    assert mixed.images.dtype == dtype
    assert mixed.images.is_contiguous(memory_format=memory_format)
    assert torch.equal(mixed.images[~inside], images[~inside])
    if fill == "noise":
        assert mixed.donor_index is None
        assert mixed.images.isfinite().all()
        return
    assert mixed.donor_index is not None
    assert (mixed.images[inside] > 1.5).all()
    assert sorted(mixed.donor_index.tolist()) == list(range(count))
    assert count == 1 or (mixed.donor_index != torch.arange(count)).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("layers", "layer3"), ("layers", []), ("region", "disk"), ("fill", "mean"), ("target", "up")]
    + [("lam_range", value) for value in [(0.9, 0.5), (0, 0.5), (0.5, 1), (float("nan"), 0.5)]],
)
def test_invalid_arguments_raise(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        GradMix(**{argument: value})


def test_attribute_and_place_can_be_overridden() -> None:
    class TopLeft(GradMix):
        """An oracle: it knows where to look."""

        def attribute(self, images: Tensor, loss: Tensor | None, activations: object) -> Tensor:
            maps = torch.zeros(len(images), *images.shape[2:])
            maps[:, 0, 0] = 1
            return maps

    images = torch.rand(3, 3, 16, 16)
    boxes = TopLeft(lam_range=(0.75, 0.75))(images, None, {}).boxes
    assert boxes is not None
    assert boxes.tolist() == [[0, 0, 8, 8]] * 3


# Other people's loops


class Head(nn.Module):
    """Somebody else's model: features, then a projection."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, SimCLRProjectionHead(features, 64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))


@pytest.mark.parametrize(
    ("name", "layers", "criterion"),
    [("vit", ["blocks.9"], VICRegLoss()), ("resnet", ["layer2", "layer3"], BarlowTwinsLoss())],
)
def test_trains_in_somebody_elses_loop(name: str, layers: list[str], criterion: nn.Module) -> None:
    torch.manual_seed(0)
    if name == "vit":
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
        model = Head(vit, 192)
    else:
        model = Head(torchvision.models.resnet18(num_classes=64), 64)
    mixer = GradMix(layers=layers)
    x0 = torch.rand(8, 3, 64, 64)
    x1 = x0 + 0.1 * torch.randn_like(x0)
    with mixer.observe(model.backbone) as activations:
        z0, z1 = model(x0), model(x1)
        loss = criterion(z0, z1)
    mixed = mixer(x0, loss, activations, donors=x1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert mixed.attribution.amax((1, 2)).tolist() == [1] * 8
    (loss + mixed.lam * criterion(model(mixed.images), z1)).backward()
    moved = [bool(p.grad is not None and p.grad.any()) for p in model.parameters()]
    assert sum(moved) / len(moved) > 0.95


def test_the_readmes_loop_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?from ssl_gradmix import GradMix.*?)```", readme, re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["mixed"], MixedViews)
