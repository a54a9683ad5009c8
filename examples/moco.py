"""MoCo with a memory bank, with lightly's parts and GradMix's third view.

    python examples/moco.py

Keys have no gradient, so attribution is free: `loss.backward()` comes first, and GradMix reads the
maps from what it left in the activations. The criterion keeps a bank of keys. The mixed view gets a
copy from before the step: else the bank would take the same keys twice, and each mixed view would
find its own positive among its negatives. Prints both losses, one line per epoch.
"""

from __future__ import annotations

import copy

import timm
import torch
from digits import Digits
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix


def main(epochs: int = 5) -> None:
    torch.manual_seed(0)
    transform = SimCLRTransform(32, cj_strength=0.5, min_scale=0.3, hf_prob=0, gaussian_blur=0)
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model("test_resnet", num_classes=0)
    head = MoCoProjectionHead(encoder.num_features, 128, 64)
    key_encoder, key_head = copy.deepcopy(encoder), copy.deepcopy(head)
    deactivate_requires_grad(key_encoder)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(512, 64))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer2"])

    for epoch in range(epochs):
        losses = []
        for x0, x1 in loader:
            update_momentum(encoder, key_encoder, 0.99)
            update_momentum(head, key_head, 0.99)
            unchanged = copy.deepcopy(criterion)  # its bank does not hold this step's keys
            keys = key_head(key_encoder(x1))

            optimizer.zero_grad()
            with gradmix.observe(encoder) as activations:
                pair = criterion(head(encoder(x0)), keys)
            pair.backward()
            mixed = gradmix(x0, None, activations, donors=x1)
            third = unchanged(head(encoder(mixed.images)), keys)
            (mixed.lam * third).backward()
            optimizer.step()
            losses.append([pair.item(), third.item()])
        mean = torch.tensor(losses).mean(0)
        print(f"epoch {epoch + 1}: loss of the pair {mean[0]:.3f}, of mixed views {mean[1]:.3f}")


if __name__ == "__main__":
    main()
