"""Find a shortcut, see it, and train without it.

    python examples/find_a_shortcut.py

Every digit bears a stamp, nine black and white pixels that tell it from all other digits. SimCLR is
trained with a plain third view, and again with the adaptive one. For both it prints how much of the
agreement between two views hangs on a tenth of the image, and the accuracy of a linear probe on
digits without stamps. What each encoder looks at is drawn to shortcut.png. In about a minute of a
core, the probe rises from 79% to 83%, and the tenth carries 45% of the agreement in place of 70%.
"""

from __future__ import annotations

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import ssl_gradmix.backbones  # noqa: F401  # resnet10_tiny, for timm
from ssl_gradmix import GradMix
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.evaluation.reliance import Reliance, measure

PROBED = 1200  # images that the probe is trained on; the others test it

gray, labels = load_digits().images, load_digits().target
small = torch.from_numpy(gray * 255 / 16).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
images = small.repeat_interleave(2, 2).repeat_interleave(2, 3)  # (1797, 3, 16, 16)
make_views = Views(Augmentation(flip=0), 16, mean=[0.5] * 3, std=[0.5] * 3)


def draw_stamps() -> Tensor:
    """(N, 1, 16, 16): a code of 3x3 pixels at a place of the image's own, NaN elsewhere."""
    stamps = torch.full((len(images), 1, 16, 16), torch.nan)
    for stamp in stamps[:, 0]:
        y, x = torch.randint(16 - 3, (2,)).tolist()
        stamp[y : y + 3, x : x + 3] = torch.randint(2, (3, 3)) * 2.0 - 1
    return stamps


def stamped_views(chosen: Tensor, stamps: Tensor, count: int) -> list[Tensor]:
    views = make_views(images[chosen], count)
    return [torch.where(stamps[chosen].isnan(), view, stamps[chosen]) for view in views]


def train(stamps: Tensor, adaptive: Adaptive | None, epochs: int) -> nn.Sequential:
    encoder = timm.create_model("resnet10_tiny", num_classes=0)
    head = SimCLRProjectionHead(encoder.num_features, 128, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer3"], lam_range=(0.8, 0.9))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(256)[:-1]:
            x0, x1, third = stamped_views(chosen, stamps, 3)
            with gradmix.observe(encoder) as activations:
                z0, z1 = head(encoder(x0)), head(encoder(x1))
                loss = criterion(z0, z1)
            kept: float | Tensor = 1.0
            if adaptive is not None:
                mixed = gradmix(x0, loss, activations, donors=x1)
                third, kept = adaptive.choose(mixed, third)
            z2 = head(encoder(third))
            if adaptive is not None:
                adaptive.update(z0, z1, z2)
            optimizer.zero_grad()
            (loss + kept * criterion(z2, z1)).backward()
            optimizer.step()
    return nn.Sequential(encoder, head).eval()


@torch.no_grad()
def probe(encoder: nn.Module) -> float:
    """Accuracy of a linear classifier on frozen features of digits without stamps."""
    features = encoder(images / 127.5 - 1).numpy()
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    classifier = LogisticRegression(C=0.1, max_iter=500)
    classifier.fit(features[:PROBED], labels[:PROBED])
    return classifier.score(features[PROBED:], labels[PROBED:])


def draw(found: dict[str, Reliance]) -> None:
    """Stamped views, each encoder's attribution, and the box that is replaced."""
    figure = Figure(figsize=(8, 2.1 * len(found)), layout="constrained")
    for row, (name, each) in zip(figure.subplots(len(found), 6), found.items(), strict=True):
        row[0].set_title(name, loc="left")
        for axes, image, map_, box in zip(
            row, each.images, each.attribution, each.boxes.tolist(), strict=False
        ):
            axes.imshow((image.permute(1, 2, 0) + 1) / 2)
            axes.imshow(map_, cmap="inferno", alpha=0.5)
            size = box[2] - box[0], box[3] - box[1]
            axes.add_patch(Rectangle((box[0] - 0.5, box[1] - 0.5), *size, fill=False, ec="cyan"))
            axes.axis("off")
    figure.savefig("shortcut.png", dpi=120)


def main(epochs: int = 10) -> None:
    torch.manual_seed(0)
    stamps, found = draw_stamps(), {}
    for name, adaptive in (("plain third view", None), ("adaptive third view", Adaptive())):
        model = train(stamps, adaptive, epochs)
        (reliance,) = measure(
            model, [stamped_views(torch.arange(256), stamps, 2)], ["layer3"], backbone=model[0]
        )
        lost, at_random = (reliance.by_image(p).mean().item() for p in ("attributed", "random"))
        print(
            f"{name}: linear probe {probe(model[0]):.1%}; without the tenth of the image that it "
            f"looks at, views lose {lost:.0%} of their agreement (a random tenth: {at_random:.0%})"
        )
        found[name] = reliance
    draw(found)


if __name__ == "__main__":
    main()
