"""Run by torchrun with two processes: what must hold for a method that mixes inside one forward. A line a check."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from support import Stage
from torch import Tensor, nn

from ssl_gradmix import GradMix, mixing
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon

COUNT = 8
LABELS = torch.tensor([0, 1, 2, 0, 1, -1, -1, -1])  # one process has more of them than the other
# The donor of an image must not depend on who its neighbors in the process are, to compare with one process.
mixing.derangement = lambda count, device, generator=None: torch.arange(count, device=device)


def create(kind: type) -> nn.Module:
    torch.manual_seed(0)
    gradmix = GradMix(layers=["stage"], fill="crop", lam_range=(0.7, 0.7))
    # At SupCon's own temperature, 0.05, float32's rounding of the similarities would be ten times as large.
    own = {"temperature": 0.5} if kind is SupCon else {}
    return kind(Stage(), 8, hidden_dim=16, output_dim=6, gradmix=gradmix, **own)


def batch(seed: int) -> list[Tensor]:
    return list(torch.rand(2, COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def gradients(method: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in method.parameters() if parameter.grad is not None]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 4
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def global_batch_gradient(kind: type) -> list[Tensor]:
    method = create(kind).eval()
    method(batch(1), LABELS).total.backward()
    return gradients(method)


def check(kind: type, accelerator: Accelerator, expected: list[Tensor]) -> None:
    share = COUNT // 2
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    own, labels = [view[mine] for view in batch(1)], LABELS[mine]

    method = accelerator.prepare(create(kind))
    method.eval()  # BatchNorm's batch statistics are those of one process on a CPU
    loss = method(own, labels).total
    bare = accelerator.unwrap_model(method)
    assert all(parameter.grad is None for parameter in bare.parameters())
    accelerator.backward(loss)
    close(gradients(bare), expected)
    accelerator.print(kind.__name__, "gradient of two processes equals that of the global batch")

    first, second = ([view[mine] for view in batch(seed)] for seed in (2, 3))
    apart = []
    for micro in (first, second):
        method.zero_grad()
        accelerator.backward(method(micro, labels).total)
        apart.append(gradients(bare))
    method.zero_grad()
    with accelerator.no_sync(method):
        accelerator.backward(method(first, labels).total)
    accelerator.backward(method(second, labels).total)
    close(gradients(bare), [one + two for one, two in zip(*apart, strict=True)])
    accelerator.print(kind.__name__, "gradients accumulate")

    method.train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    for step in range(4):
        optimizer.zero_grad()
        accelerator.backward(method([view[mine] for view in batch(10 + step)], labels).total)
        optimizer.step()
        if hasattr(bare, "update_target"):
            bare.update_target(step, 4)
    assert all(module.training for module in bare.backbone.modules())
    for name, parameter in bare.named_parameters():
        one, two = accelerator.gather(parameter.detach()[None].contiguous())
        assert torch.equal(one, two), name
    accelerator.print(kind.__name__, "parameters stay equal on all processes")


def main() -> None:
    expected = {kind: global_batch_gradient(kind) for kind in (SimCLR, BYOL, SupCon)}  # before there is a process group
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for kind in (SimCLR, BYOL, SupCon):
        check(kind, accelerator, expected[kind])
    accelerator.end_training()


if __name__ == "__main__":
    main()
