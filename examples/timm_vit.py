"""A vision transformer of timm, read at its class token, with GradMix's third view.

    python examples/timm_vit.py

The observed layer is the last block but one: of the last block, the loss reads the class token
alone, and has no gradient at the patches. Prints both losses, one line per epoch.
"""

from __future__ import annotations

import timm
import torch
from digits import Digits
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix


def main(epochs: int = 3) -> None:
    torch.manual_seed(0)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,  # 8x8 patches
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=0,
    )
    head = SimCLRProjectionHead(encoder.num_features, 128, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    gradmix = GradMix(layers=["blocks.2"])

    for epoch in range(epochs):
        losses = []
        for x0, x1 in loader:
            with gradmix.observe(encoder) as activations:
                z0, z1 = head(encoder(x0)), head(encoder(x1))
                pair = criterion(z0, z1)
            mixed = gradmix(x0, pair, activations, donors=x1)
            third = criterion(head(encoder(mixed.images)), z1)

            optimizer.zero_grad()
            (pair + mixed.lam * third).backward()
            optimizer.step()
            losses.append([pair.item(), third.item()])
        mean = torch.tensor(losses).mean(0)
        print(f"epoch {epoch + 1}: loss of the pair {mean[0]:.3f}, of mixed views {mean[1]:.3f}")


if __name__ == "__main__":
    main()
