"""The experiments: planted stamps, parts of a training, cells, differences and pages."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel
from torch import nn
from torchvision.transforms.v2.functional import resize

from experiments import page, parts, rows, run
from experiments.stamps import (
    RandBits,
    StampedViews,
    Stamps,
    Strip,
    Tags,
    TwoStamps,
    identify,
)
from experiments.variants import VARIANTS, Cell, Grid, recipe_options
from ssl_gradmix import SimCLR, backbones, cli
from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.methods import METHODS

HOW = (Augmentation(), 32, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
IMAGES = torch.randint(256, (60, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def inside(box):
    mask = torch.zeros(32, 32, dtype=torch.bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def views(kind, images=IMAGES, **options):
    torch.manual_seed(0)
    return kind(*HOW, **options)(images, 2)


@pytest.mark.parametrize("place", ["anywhere", "corner", "everywhere"])
@pytest.mark.parametrize("side", [2, 3, 4])
def test_stamps_are_their_bits_in_cells_of_two_pixels(side, place):
    codes, expected = identify(IMAGES), IMAGES.clone()
    room, period = 33 - 2 * side, 4 * side if place == "everywhere" else 1000
    for image, (bits, x, y) in zip(expected, codes.tolist(), strict=True):
        corners = {"anywhere": (x % room, y % room), "everywhere": (0, 0)}
        left, top = corners.get(place, (room - 1, room - 1))
        for i in range(top, 32):
            for j in range(left, 32):
                row, column = (i - top) % period, (j - left) % period
                if max(row, column) < 2 * side:
                    image[:, i, j] = 255 * (bits >> (row // 2 * side + column // 2) & 1)
    assert Stamps(side**2, place).plant(IMAGES, codes).equal(expected)


DIGITS = ["111101101101111", "010110010010111", "111001111100111", "111001111001111"]
DIGITS += ["101101111001001", "111100111001111", "111100111101111", "111001001001001"]
DIGITS += ["111101111101111", "111101111001111"]


def test_tags_are_numbers_along_the_top_edge_of_images_as_large_as_views():
    tags, codes = Tags(23, before=True), identify(IMAGES)
    large = resize(IMAGES, [64, 64])
    planted = tags.plant(large, codes)
    assert planted[:, :, 8:].equal(large[:, :, 8:])
    for image, (bits, _, _) in zip(planted, codes.tolist(), strict=True):
        rows = ["0" * 29]  # a cell between digits, and a row above and below
        for i in range(5):
            of_digits = (DIGITS[int(d)][3 * i : 3 * i + 3] for d in f"{bits % 2**23:07d}")
            rows.append("0" + "".join(f"{row}0" for row in of_digits))
        rows.append("0" * 29)
        for y, x in itertools.product(range(8), range(64)):
            cell = rows[int((y + 0.5) * 7 / 8)][int((x + 0.5) * 29 / 64)]
            assert (image[:, y, x] == 255 * int(cell)).all()
    assert tags.boxes(codes, (64, 64))[5].tolist() == [0, 0, 64, 8]
    how = (Augmentation(), 64, *HOW[2:])
    torch.manual_seed(0)
    found = StampedViews(*how, stamps=tags)(IMAGES, 2)
    torch.manual_seed(0)
    assert all(map(torch.equal, found, Views(*how)(planted, 2)))


def test_strips_are_cells_of_half_opacity():
    strip, codes = Strip(10, strength=0.5), identify(IMAGES)
    planted, expected = strip.plant(IMAGES.float(), codes), IMAGES.float()
    assert strip.boxes(codes, (32, 32))[7].tolist() == [1, 13, 31, 18]
    for image, (bits, _, _) in zip(expected, codes.tolist(), strict=True):
        for i in range(10):
            part = image[:, 13:18, 1 + 3 * i : 4 + 3 * i]
            part += (255 * (bits >> i & 1) - part) / 2
    torch.testing.assert_close(planted, expected)
    assert (strip.plant(IMAGES, codes) - planted).abs().max() <= 0.5


def test_two_stamps_have_different_bits_in_opposite_corners():
    codes, two = identify(IMAGES), TwoStamps(9, "corner").plant(IMAGES, identify(IMAGES))
    assert two[:, :, 6:].equal(Stamps(9, "corner").plant(IMAGES, codes)[:, :, 6:])
    assert two[:, :, :6, 6:].equal(IMAGES[:, :, :6, 6:])
    read = two[:, 0, 1:6:2, 1:6:2].flatten(1).flip(1).long() / 255 @ 2.0 ** torch.arange(9)
    assert read.tolist() == [bits >> 9 & 511 for bits in codes[:, 0].tolist()]


def test_random_bits_are_channels_that_may_be_missing():
    codes, view = identify(IMAGES), torch.randn(60, 3, 32, 32)
    planted = RandBits(6).plant(view, codes)
    bits = [[bits >> i & 1 for i in range(6)] for bits in codes[:, 0].tolist()]
    assert planted[:, :3].equal(view)
    assert planted[:, 3:].equal(torch.tensor(bits)[:, :, None, None].expand(60, 6, 32, 32).float())
    model = backbones.create("resnet10_tiny_randbits", bits=6).eval()
    zeros = torch.cat([view, torch.zeros(60, 6, 32, 32)], 1)
    with torch.no_grad():
        assert model(view).equal(model(zeros))
        assert not model(view).equal(model(planted))


def test_hard_views_train_on_the_pair_with_the_largest_loss():
    pairs = [*itertools.combinations(range(4), 2)]
    method = parts.HardViews(nn.Flatten(), 4, temperature=0.3)
    method.projector = nn.Identity()
    given = [*torch.randn(4, 6, 4, 1, 1, generator=torch.Generator().manual_seed(0))]
    z = nn.functional.normalize(torch.stack(given).flatten(2), dim=2)

    def loss(a, b, n):
        others = torch.cat([z[a], z[b]])
        total = 0
        for own, partner in ((n, n + 6), (n + 6, n)):
            similar = (others @ others[own] / 0.3).exp()
            total -= (similar[partner] / (similar.sum() - similar[own])).log() / 2
        return total

    hardest = [max(pairs, key=lambda pair, n=n: loss(*pair, n)) for n in range(6)]
    chosen = [torch.stack([given[pair[i]][n] for n, pair in enumerate(hardest)]) for i in (0, 1)]
    found, metrics = method(given)
    plain = SimCLR(nn.Flatten(), 4, temperature=0.3)
    plain.projector = nn.Identity()
    assert found.item() == pytest.approx(plain(chosen)[0].item(), rel=1e-5)
    assert len({*hardest}) > 2
    assert "loss_mixed" not in metrics


def test_views_of_an_image_bear_its_stamp_and_nothing_else_changes():
    stamps = Stamps(9)
    plain, stamped = views(Views), views(StampedViews, stamps=stamps)
    for i, mask in enumerate(map(inside, stamps.latest.tolist())):
        assert stamped[0][i][:, mask].equal(stamped[1][i][:, mask])
        for view in range(2):
            assert stamped[view][i][:, ~mask].equal(plain[view][i][:, ~mask])
    assert identify(IMAGES)[3:5].equal(identify(IMAGES[3:5]))
    before = Stamps(4, before=True)
    expected = views(Views, before.plant(IMAGES, identify(IMAGES)))
    assert all(map(torch.equal, views(StampedViews, list(IMAGES), stamps=before), expected))


@pytest.mark.parametrize("oracle", [True, False])
def test_hits_are_the_fraction_of_the_stamps_in_the_boxes(oracle):
    stamps, settings = Stamps(9), {"layers": ["0"], "lam_range": (0.85, 0.85)}
    gradmix = parts.OnTheStamp(stamps=stamps, **settings) if oracle else parts.Anywhere(**settings)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method = parts.logging_hits(SimCLR, stamps)(backbone, 4, gradmix=gradmix)
    _, metrics = method(views(StampedViews, stamps=stamps))
    both = zip(map(inside, stamps.latest.tolist()), map(inside, method.boxes.tolist()), strict=True)
    hits = [(stamp & box).sum().item() / 36 for stamp, box in both]
    assert metrics["hit"].item() == pytest.approx(np.mean(hits), abs=1e-6)
    assert (min(hits) == 1) == oracle


def test_losses_of_mixed_views_are_their_sums():
    torch.manual_seed(0)
    u, z0, z1 = nn.functional.normalize(torch.randn(3, 5, 4), dim=2)
    lam, donor = 0.8, torch.tensor([2, 3, 4, 0, 1])

    def contrast(positives):
        similar = (torch.cat([u, positives]) @ torch.cat([u, positives]).T / 0.3).exp()
        terms = [similar[i, (i + 5) % 10] / (similar[i].sum() - similar[i, i]) for i in range(10)]
        return -torch.stack(terms).log().mean()

    similar = (z1 @ torch.cat([z0, z1, u]).T / 0.3).exp()
    terms = [similar[i, 10 + i] / (similar[i, :10].sum() - similar[i, 5 + i]) for i in range(5)]
    attracted = -torch.stack(terms).log().mean()
    positive = contrast(z1) + (1 - lam) / lam * contrast(z1[donor])
    mixed = SimpleNamespace(donor_index=donor, lam=torch.tensor(lam))
    for part, expected in ((parts.DonorPositive, positive), (parts.Attract, attracted)):
        found = part(nn.Flatten(), 4, temperature=0.3).third_loss(u, (z0, z1), (), mixed)
        torch.testing.assert_close(found, expected)


def differences(measure, data, plain, gradmix):
    """Differences of `gradmix` to `plain`, whose values are given by seed, and the verdict."""
    columns = {"plain": pd.Series(plain), "gradmix": pd.Series(gradmix)}
    frame = pd.concat(columns, names=["variant", "seed"]).rename("value").reset_index()
    found = rows.differences(frame.assign(measure=measure, data=data), "plain")
    *numbers, verdict = found.loc[measure, "gradmix"]
    return numbers, verdict


def test_differences_agree_with_scipy():
    plain, gradmix = {0: 0.50, 1: 0.51, 2: 0.50, 4: 0.1}, {0: 0.51, 1: 0.55, 2: 0.5, 5: 1}
    expected = ttest_rel([0.51, 0.55, 0.50], [0.50, 0.51, 0.50]).confidence_interval(0.95)
    found, verdict = differences("linear", "all", plain, gradmix)
    assert found == pytest.approx([0.05 / 3, *expected, 3])
    assert verdict == "open"
    gradmix = {0: 0.01, 4: 0.03, 1: 0.05, 5: 0.07, 2: 0.02}  # seeds s and s + 4 share a trial
    found, _ = differences("osr_auroc", "known", dict.fromkeys(gradmix, 0.0), gradmix)
    expected = ttest_1samp([0.02, 0.06, 0.02], 0).confidence_interval(0.95)
    assert found == pytest.approx([0.1 / 3, *expected, 5])
    assert differences("linear", "all", {0: 0, 1: 0}, {0: 0.2, 1: 0.21})[1] == "better"


def test_pages_follow_from_the_rows(tmp_path, capsys):
    folder = shutil.copytree(rows.RESULTS, tmp_path / "results")
    page.main(folder)
    for name in ("evidence.md", "shortcuts.md"):
        assert (folder / name).read_text() == (rows.RESULTS / name).read_text()
    text = (rows.RESULTS.parent / "EVIDENCE.md").read_text().splitlines()
    tables = {line for line in text if line.startswith("|")}
    assert tables <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "gradmix-max-mean"])
def test_recipes_accept_every_variant(variant, tmp_path):
    grid = Grid("tiny", tmp_path, 20, 1, 10, "resnet10_tiny", 0, (), tmp_path, 1)
    method = "supcon" if variant in ("supervised-only", "gradmix-labels") else "simclr"
    options = recipe_options(Cell(method, variant, "known", 1), grid)
    config = cli.read(cli.recipe_parser(METHODS[method], method, ""), options)
    assert config.extra_view == VARIANTS[variant]["extra_view"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kind"),
    [("oracle", "stamps-9"), ("hard-views", "stamps-0"), ("gradmix", "randbit-4")],
)
def test_a_cell_leaves_its_rows_and_is_not_run_again(variant, kind, tmp_path):
    digits = load(Data(), "train").subset(range(800))
    for i, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = tmp_path / "data" / ("train", "test")[i % 2] / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    folders = [f"--{name}={tmp_path / name}" for name in ("data", "cache", "results")]
    options = f"--images 200 --epochs 4 --batch 50 --seeds 0 --variants {variant} --kinds {kind}"
    for _ in range(2):
        run.main([*folders, *options.split(), "--", "--augmentation.min_scale=1"])
    found = rows.read(tmp_path / "results" / "shortcuts.jsonl").set_index("measure").value
    kinds = {"stamps", *(["hit"] if variant == "oracle" else [])}
    kinds |= {"reliance"} if "stamps" in kind else set()
    expected = {name for name, each in rows.MEASURES.items() if each.kind in kinds}
    assert sorted(found.index) == sorted(expected - {"unstamped_corruption_error"})
    assert found.get("hit", 1) > 0.9


def test_ifm_lowers_the_positive_cosine_and_raises_the_others():
    z = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    cosines, total = (z @ z.T).double(), 0.0
    for eps in (0.0, 0.1):
        for i in range(6):
            partner = (i + 3) % 6
            shifted = [cosines[i, k] + (-eps if k == partner else eps) for k in range(6)]
            others = sum((shifted[k] / 0.2).exp() for k in range(6) if k != i)
            total -= float(((shifted[partner] / 0.2).exp() / others).log()) / 6 / 2
    method = parts.IFM(nn.Identity(), 4, temperature=0.2)
    assert method.pair_loss((z[:3], z[3:]), ()).item() == pytest.approx(total, rel=1e-5)


def test_random_patches_are_whole_and_cover_the_fraction():
    mixer = parts.RandomPatches(region="mask", fill="crop", lam_range=(0.75, 0.75))
    mask = mixer(IMAGES.float(), None, {}).mask
    patches = mask.view(60, 8, 4, 8, 4).transpose(2, 3).flatten(3)
    assert (patches.all(3) | ~patches.any(3)).all()
    assert (mask.flatten(1).sum(1) == 256).all()


def test_blanked_stamps_have_the_mean_color():
    stamps = Stamps(9, "corner")
    (view, _), plain = views(StampedViews, stamps=stamps, blank=True), views(Views)[0]
    mask = inside(stamps.latest[0].tolist())
    assert not view[:, :, mask].any()
    assert view[:, :, ~mask].equal(plain[:, :, ~mask])
