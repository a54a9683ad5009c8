"""Maps against naive loops, `pytorch-grad-cam`, and encoders of many kinds."""

from __future__ import annotations

import gc

import pytest
import pytorch_grad_cam as cam
import timm
import torch
from torch import nn

from ssl_gradmix.attribution import attribute, layercam, observe, spatial


class Net(nn.Module):
    """Two stages and a head, small enough for loops."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def naive_smooth(values: torch.Tensor) -> torch.Tensor:
    """Weights 1, 2, 1 down and across, over (h, w); beyond the border lies what is before it."""
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


def naive(activation: torch.Tensor, gradient: torch.Tensor, method: str) -> torch.Tensor:
    count, channels, height, width = activation.shape
    maps = torch.zeros(count, height, width)
    for n in range(count):
        for c in range(channels):
            weight = gradient[n, c].mean()
            smoothed = naive_smooth(gradient[n, c])
            for y in range(height):
                for x in range(width):
                    if method == "layercam":
                        maps[n, y, x] += activation[n, c, y, x] * max(0.0, smoothed[y, x].item())
                    else:
                        maps[n, y, x] += activation[n, c, y, x] * weight
    return maps if method == "layercam" else maps.clamp_min(0)


def stretch(each: torch.Tensor) -> torch.Tensor:
    low, high = each.min(), each.max()
    return (each - low) / (high - low) if high > low else torch.zeros_like(each)


def naive_maps(layers: list[tuple[torch.Tensor, torch.Tensor]], size: tuple[int, int], method: str) -> torch.Tensor:
    """Per image: each layer's map stretched, resized, summed, stretched again."""
    images = []
    for n in range(len(layers[0][0])):
        total = torch.zeros(size)
        for activation, gradient in layers:
            small = stretch(naive(activation[n : n + 1], gradient[n : n + 1], method)[0])
            total += nn.functional.interpolate(small[None, None], size, mode="bilinear")[0, 0]
        images.append(stretch(total))
    return torch.stack(images)


@pytest.mark.parametrize("method", ["layercam", "gradcam"])
@pytest.mark.parametrize("target", ["agreement", "loss"])
@pytest.mark.parametrize("layers", [["stage"], ["stem", "stage"]])
def test_equals_a_loop_over_images_and_channels(method: str, target: str, layers: list[str]) -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(3, 3, 12, 16)
    with observe(net, layers) as observed:
        loss = net(images).square().sum(1).mean()
    maps = attribute(loss, observed, (12, 16), attribution=method, target=target)
    gradients = torch.autograd.grad(loss, [observed[name][0] for name in layers])
    sign = 1 if target == "loss" else -1
    pairs = [(observed[name][0].detach(), sign * gradient) for name, gradient in zip(layers, gradients, strict=True)]
    torch.testing.assert_close(maps, naive_maps(pairs, (12, 16), method))
    if method == "layercam":  # Grad-CAM's outer relu may leave nothing
        assert maps.amax((1, 2)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", ["layercam", "gradcam"])
def test_equals_pytorch_grad_cam(method: str) -> None:
    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(4, 3, 16, 16)
    with observe(net, ["stage"]) as observed:
        # Image by image the gradient of a sum is that of its own term, as pytorch-grad-cam takes it.
        loss = net(images)[:, 2].sum()
    ours = attribute(loss, observed, (8, 8), attribution=method, target="loss")
    targets = [cam.utils.model_targets.ClassifierOutputTarget(2)] * 4
    with {"layercam": cam.LayerCAM, "gradcam": cam.GradCAM}[method](net, [net.stage]) as extractor:
        extractor(images, targets)
        kept = extractor.activations_and_grads
        theirs = extractor.get_cam_image(
            images, net.stage, targets, kept.activations[0].numpy(), kept.gradients[0].numpy(), False
        )
    theirs = torch.from_numpy(theirs).clamp_min(0)
    torch.testing.assert_close(ours, torch.stack([stretch(each) for each in theirs]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "kernel", "stride"), [((8, 8), 1, 2), ((6, 10), 2, 2), ((7, 9), 1, 2)])
def test_a_stride_leaves_no_pattern(size: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    activation = torch.ones(1, 3, *size, requires_grad=True)
    downsample = nn.Conv2d(3, 4, kernel, stride, bias=False)
    gradient = torch.autograd.grad(downsample(activation).sum(), activation)[0]
    assert gradient.std((2, 3)).min() > 0.05  # it alternates though the image is flat
    maps = layercam(activation.detach(), gradient)
    torch.testing.assert_close(maps, maps.mean().expand_as(maps))


def test_maps_of_one_line_are_not_smoothed() -> None:
    torch.manual_seed(0)
    activation, weight = torch.rand(2, 3, 1, 6, requires_grad=True), torch.rand(3, 1, 6)
    maps = attribute((activation * weight).sum(), {"layer": [activation]}, (1, 6), target="loss")
    expected = (activation.detach() * weight).sum(1)
    torch.testing.assert_close(maps, torch.stack([stretch(each) for each in expected]))


def test_takes_the_first_images_over_several_passes() -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(6, 3, 8, 8)
    with observe(net, ["stage"]) as whole:
        loss = net(images).square().sum()
    with observe(net, ["stage"]) as parts:
        split = net(images[:2]).square().sum() + net(images[2:4]).square().sum() + net(images[4:]).square().sum()
    assert len(parts["stage"]) == 3
    torch.testing.assert_close(attribute(split, parts, (8, 8), count=3), attribute(loss, whole, (8, 8))[:3])


def test_leaves_gradients_training_flag_buffers_and_hooks_alone() -> None:
    net = timm.create_model("resnet18", num_classes=0)
    net.layer1.eval()
    training = [module.training for module in net.modules()]
    with observe(net, ["layer2", "layer3"]) as observed:
        loss = net(torch.randn(2, 3, 64, 64)).square().mean()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    attribute(loss, observed, (64, 64))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net.modules()] == training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert all(not module._forward_hooks for module in net.modules())
    loss.backward()  # the graph is still there


def test_hooks_are_gone_after_an_exception() -> None:
    net = Net()
    with pytest.raises(ZeroDivisionError, match="division"), observe(net, ["stage"]):
        1 / 0  # noqa: B018
    assert not net.stage._forward_hooks


def test_compiled_encoders_are_observed_whether_compiled_before_or_not() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with observe(net, ["stage"]) as observed:
        loss = net(images).square().mean()
    expected = attribute(loss, observed, (8, 8))
    compiled = torch.compile(net, backend="aot_eager")
    compiled(images)
    for _ in range(2):
        with observe(compiled, ["stage"]) as observed:
            loss = compiled(images).square().mean()
        torch.testing.assert_close(attribute(loss, observed, (8, 8)), expected)
    net.stage = torch.compile(net.stage, backend="aot_eager")
    net(images)
    with observe(net, ["stage"]) as observed:
        loss = net(images).square().mean()
    torch.testing.assert_close(attribute(loss, observed, (8, 8)), expected)


class SingleUse(torch.autograd.Function):
    """Refuses to go backwards where its graph is kept, as torch's compiled graphs with donated buffers do."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")


def test_a_compiled_stage_that_allows_a_single_backward_pass_is_named_with_the_way_out() -> None:
    net = Net()
    with observe(net, ["stage"]) as observed:
        loss = SingleUse.apply(net(torch.randn(2, 3, 8, 8))).square().mean()
    with pytest.raises(ValueError, match=r"set torch._functorch.config.donated_buffer = False before"):
        attribute(loss, observed, (8, 8))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 4, 6), (2, 8, 4, 6)),  # convolutional
        ((2, 4, 6, 8), (2, 8, 4, 6)),  # channels last, as Swin gives them
        ((2, 24, 8), (2, 8, 4, 6)),  # tokens
        ((2, 25, 8), (2, 8, 4, 6)),  # with a class token
        ((2, 29, 8), (2, 8, 4, 6)),  # and four registers
    ],
)
def test_reads_maps_and_tokens(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert spatial("layer", torch.zeros(shape), (64, 96)).shape == expected
    tokens = torch.arange(1 + 6).float().view(1, 7, 1)  # class token 0, then 1 to 6 row by row
    assert spatial("blocks.0", tokens, (32, 48))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_half_precision_does_not_underflow() -> None:
    torch.manual_seed(0)
    activation = torch.rand(2, 4, 6, 6)
    half = activation.half().requires_grad_()
    full = half.detach().float().requires_grad_()
    weight = torch.randn(2, 4, 6, 6)
    # Gradients of about 3e-8, half of float16's smallest number.
    tiny = attribute((half.float() * weight).mean() * 1e-5, {"layer": [half]}, (6, 6))
    torch.testing.assert_close(tiny, attribute((full * weight).mean(), {"layer": [full]}, (6, 6)), atol=0.05, rtol=0)


def test_float32_outputs_behind_which_half_precision_lies_do_not_underflow() -> None:
    activation = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    through_half = ((activation.half() * weight.half()).float() * 1e-5).mean()
    expected = attribute((activation * weight).mean(), {"layer": [activation]}, (6, 6))
    torch.testing.assert_close(attribute(through_half, {"layer": [activation]}, (6, 6)), expected, atol=0.05, rtol=0)


def test_a_map_is_the_same_inside_autocast_and_outside() -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(4, 3, 8, 8)
    with observe(net, ["stem"]) as observed, torch.autocast("cpu", torch.bfloat16):
        embeddings = net(images).float()
        with torch.autocast("cpu", enabled=False):
            loss = (embeddings @ embeddings.T).logsumexp(1).mean()
        inside = attribute(loss, observed, (8, 8))
    assert torch.equal(inside, attribute(loss, observed, (8, 8)))


def test_a_layer_that_no_gradient_reaches_is_refused_beside_one_that_it_reaches() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    net.stem.requires_grad_(False)
    with observe(net, ["stem", "stage"]) as observed:
        loss = net(images).square().mean()
    with pytest.raises(ValueError, match=r"layers: no gradient reaches 'stem': it is frozen, or the loss does not"):
        attribute(loss, observed, (8, 8))
    assert attribute(loss, {"stage": observed["stage"]}, (8, 8)).amax() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_map_that_is_not_finite_is_flat_and_the_others_are_not(bad: float) -> None:
    activation = torch.rand(3, 2, 4, 4, requires_grad=True)

    def spoiled(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        maps = activation.sum(1)
        maps[0, 2, 3] = maps[1] = bad  # one place, and all
        return maps

    maps = attribute(activation.sum(), {"layer": [activation]}, (8, 8), attribution=spoiled)
    assert not maps[:2].any()
    assert maps[2].amax() == 1


@pytest.mark.parametrize("rounding", [0, 1e-7])
def test_a_flat_map_is_zero_and_rounding_makes_none(rounding: float) -> None:
    activation = torch.full((1, 3, 4, 4), 0.7)
    activation[0, 0, 1, 2] += rounding
    activation.requires_grad_()
    assert not attribute(activation.sum(), {"layer": [activation]}, (8, 8), target="loss").any()


def test_refuses_what_cannot_be_attributed() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(KeyError, match=r"no layer 'stge'; near names are stage"), observe(net, ["stge"]):
        pass
    with observe(net, ["stage", "head"]) as observed:
        output = net(images)
    with pytest.raises(ValueError, match=r"'head' has no spatial extent \(output \(2, 5\)"):
        attribute(output.mean(), observed, (8, 8))
    del observed["head"]
    for loss, options, message in (
        (output, {}, r"loss must be a scalar, got shape \(2, 5\)"),
        (net(images).mean(), {}, r"loss does not depend on the observed layers stage; compute it from what"),
        (output.mean(), {"count": 3}, "images: 3 given, but layer 'stage' was observed for 2 only"),
        (output.mean(), {"attribution": "cam"}, "attribution must be one of layercam, gradcam or a function"),
        (output.mean(), {"target": "up"}, "target must be 'agreement' or 'loss', got 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(loss, observed, (8, 8), **options)


class Odd(nn.Module):
    """Layers that cannot be read off: one is changed in place, one runs twice, one cuts images up, one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.twice, self.cut = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()
        self.idle = nn.Sequential(nn.Identity(), nn.Identity())
        self.pair = type("Pair", (nn.Module,), {"forward": lambda self, x: (x + 0, "weights")})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.act(self.conv(x))))
        x = self.cut(x.unflatten(3, (2, 4)).permute(0, 3, 1, 2, 4).flatten(0, 1))
        return self.pair(x.unflatten(0, (-1, 2)).mean(1))[0].mean((2, 3))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv", "layers: an in-place operation behind 'conv' has changed what it gave; name 'act' instead"),
        ("twice", "layers: 'twice' gave 4 outputs for 2 images, as it runs more than once"),
        ("cut", "layers: 'cut' gave 4 outputs for 2 images"),
        ("idle", "layers: 'idle' did not run inside `observe`, or gave no tensor; a checkpointed .* try idle.1"),
        ("act", None),
        ("pair", None),  # the first of a tuple
    ],
)
def test_a_layer_whose_outputs_are_not_the_images_is_refused_with_the_way_out(layer: str, message: str | None) -> None:
    net, images = Odd(), torch.rand(2, 3, 8, 8)
    with observe(net, [layer]) as observed:
        loss = net(images).square().mean() + net(images).square().mean()
    if message is None:
        assert attribute(loss, observed, (8, 8), count=2, target="loss").amax() > 0
    else:
        with pytest.raises(ValueError, match=message):
            attribute(loss, observed, (8, 8), count=2)


def test_what_is_observed_lets_go_of_the_encoder() -> None:
    net = Net()
    with observe(net, ["stage"]) as observed:
        net(torch.rand(2, 3, 8, 8))
    assert observed.encoder() is net
    del net
    gc.collect()
    assert observed.encoder() is None
