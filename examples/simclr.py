"""lightly's SimCLR with GradMix's third view.

    python examples/simclr.py

Prints the loss of the two views and that of the mixed view, one line per epoch.
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


def main(epochs: int = 5) -> None:
    torch.manual_seed(0)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model("test_resnet", num_classes=0)  # timm's smallest ResNet
    head = SimCLRProjectionHead(encoder.num_features, 128, 64)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer2"])  # a 4x4 map at 32 px; at 224 px, layer3 or layer4

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
