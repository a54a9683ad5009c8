"""DINO with multi-crop, with lightly's parts and GradMix's third view.

    python examples/dino.py

The first global crop is mixed, and compared with the teacher's output for the other global crop
alone. Targets have no gradient, so attribution is free: `loss.backward()` comes first. The
criterion keeps a center, which must not move for the mixed view: it gets a copy from before the
step. Prints both losses, one line per epoch.
"""

from __future__ import annotations

import copy

import numpy as np
import timm
import torch
from digits import Digits
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform
from torch.utils.data import DataLoader

from ssl_gradmix import GradMix


def main(epochs: int = 4) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # lightly's solarization draws from NumPy
    transform = DINOTransform(
        global_crop_size=32,
        global_crop_scale=(0.5, 1),
        local_crop_size=16,
        local_crop_scale=(0.25, 0.5),
        n_local_views=2,
        hf_prob=0,
        gaussian_blur=(0, 0, 0),
    )
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    encoder = timm.create_model("test_resnet", num_classes=0)
    sizes = (encoder.num_features, 128, 64, 512)
    head = DINOProjectionHead(*sizes, batch_norm=True)  # without, so short a training collapses
    teacher, teacher_head = copy.deepcopy(encoder), DINOProjectionHead(*sizes, batch_norm=True)
    teacher_head.load_state_dict(head.state_dict())
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    criterion = DINOLoss(output_dim=512)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer2"])

    for epoch in range(epochs):
        losses = []
        for crops in loader:
            update_momentum(encoder, teacher, 0.99)
            update_momentum(head, teacher_head, 0.99)
            unchanged = copy.deepcopy(criterion)  # its center has not moved
            targets = [teacher_head(teacher(crop)) for crop in crops[:2]]

            optimizer.zero_grad()
            with gradmix.observe(encoder) as activations:  # of the first crop
                first = head(encoder(crops[0]))
            others = [head(encoder(crop)) for crop in crops[1:]]
            pair = criterion(targets, [first, *others], epoch=epoch)
            pair.backward()
            mixed = gradmix(crops[0], None, activations, donors=crops[1])
            student = head(encoder(mixed.images))
            third = unchanged(targets, [student], epoch=epoch)  # skips the target of its own crop
            (mixed.lam * third).backward()
            optimizer.step()
            losses.append([pair.item(), third.item()])
        mean = torch.tensor(losses).mean(0)
        print(f"epoch {epoch + 1}: loss of the pair {mean[0]:.3f}, of mixed views {mean[1]:.3f}")


if __name__ == "__main__":
    main()
