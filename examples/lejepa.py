"""LeJEPA with multi-crop, with lightly's loss and GradMix's third view.

    python examples/lejepa.py

There is no teacher and no state. The first global crop is mixed, and pulled towards the other one.
All embeddings have gradients, so GradMix gets the loss and there is one backward pass. Prints both
losses, one line per epoch.
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from digits import Digits
from lightly.loss import LeJEPALoss
from lightly.models.modules.heads import LeJEPAProjectionHead
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
    head = LeJEPAProjectionHead(encoder.num_features, 128, 32)
    criterion = LeJEPALoss(sigreg_num_vectors=256)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    gradmix = GradMix(layers=["layer2"])

    for epoch in range(epochs):
        losses = []
        for crops in loader:
            with gradmix.observe(encoder) as activations:
                z0, z1 = head(encoder(crops[0])), head(encoder(crops[1]))
            small = torch.stack([head(encoder(crop)) for crop in crops[2:]])
            pair = criterion(local_proj=small, global_proj=torch.stack([z0, z1]))
            mixed = gradmix(crops[0], pair, activations, donors=crops[1])
            z2 = head(encoder(mixed.images))
            third = criterion(local_proj=z2[None], global_proj=z1[None])

            optimizer.zero_grad()
            (pair + mixed.lam * third).backward()
            optimizer.step()
            losses.append([pair.item(), third.item()])
        mean = torch.tensor(losses).mean(0)
        print(f"epoch {epoch + 1}: loss of the crops {mean[0]:.3f}, of mixed views {mean[1]:.3f}")


if __name__ == "__main__":
    main()
