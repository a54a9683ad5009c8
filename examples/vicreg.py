"""VICReg with lightly's loss and GradMix's third view.

    python examples/vicreg.py

Both embeddings of the pair have gradients, and the mixed view's loss reaches the second one, so
GradMix gets the loss and there is one backward pass. Prints both losses, one line per epoch.
"""

from __future__ import annotations

import timm
import torch
from digits import Digits
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix


def main(epochs: int = 5) -> None:
    torch.manual_seed(0)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model("test_resnet", num_classes=0)
    head = VICRegProjectionHead(encoder.num_features, 256, 256)
    criterion = VICRegLoss()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer2"])

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
