"""A third view that decides for itself, in a loop of your own.

    python examples/adaptive.py

Prints the loss, what mixed views have been losing (about 1 for an encoder that looks everywhere),
and the probability of mixing that follows from it, one line per epoch. On digits much is mixed: all
that there is to see is in a small part of the image.
"""

from __future__ import annotations

import timm
import torch
from digits import Digits
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRViewTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix
from ssl_gradmix.adaptive import Adaptive


def main(epochs: int = 5) -> None:
    torch.manual_seed(0)
    view = SimCLRViewTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    data = Digits(MultiViewTransform([view, view, view]))  # a pair, and a plain third view
    loader = DataLoader(data, batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model("test_resnet", num_classes=0)
    head = SimCLRProjectionHead(encoder.num_features, 128, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix, adaptive = GradMix(layers=["layer2"]), Adaptive()

    for epoch in range(epochs):
        for x0, x1, plain in loader:
            with gradmix.observe(encoder) as activations:
                z0, z1 = head(encoder(x0)), head(encoder(x1))
                pair = criterion(z0, z1)
            mixed = gradmix(x0, pair, activations, donors=x1)
            third, lam = adaptive.choose(mixed, plain)
            z2 = head(encoder(third))
            loss = pair + lam * criterion(z2, z1)
            adaptive.update(z0, z1, z2)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # adaptive.state_dict() belongs into your checkpoint, beside the encoder's.
        reading, probability = adaptive.reading.item(), adaptive.probability.item()
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, reading {reading:.2f}, p {probability:.2f}"
        )


if __name__ == "__main__":
    main()
