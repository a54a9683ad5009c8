"""Pretrains an encoder with SimCLR and GradMix views.

accelerate launch recipes/simclr_gradmix.py trains on digits, a few minutes on a laptop.
accelerate launch recipes/simclr_gradmix.py --data.name folder --data.root IMAGES --backbone.name resnet18_small trains
on your images. --extra_view augmented is the control, a plain third view; --extra_view none is plain SimCLR.

The same command again resumes an unfinished run. What ran is written to config.yaml in the run folder; --config reads
it.
"""

import sys
from collections.abc import Sequence

from ssl_gradmix import command_line
from ssl_gradmix.settings import SimCLRSettings


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.recipe_parser(SimCLRSettings, __doc__, recipe="simclr")
    settings, plain = command_line.read(parser, argv)

    # These take seconds to import: after parsing, so that --help is quick.
    import torch

    from ssl_gradmix import backbones, methods
    from ssl_gradmix.data.open_set import load_known
    from ssl_gradmix.run_folder import RunFolder
    from ssl_gradmix.training.loop import Trainer, check_images
    from ssl_gradmix.training.processes import create_accelerator, precision

    if settings.training.accumulate > 1 and not settings.method.allow_fewer_negatives:
        raise ValueError(
            "training.accumulate: in SimCLR each micro-batch would contrast with itself alone, another loss than that "
            "of the whole batch; if this is meant, pass --method.allow_fewer_negatives true"
        )
    plain["training"]["precision"] = settings.training.precision = precision(settings.training)
    folder = RunFolder(settings.run)
    folder.check(plain, settings.overwrite)
    accelerator = create_accelerator(settings.training, settings.expect_processes, folder.trackers)
    with accelerator.main_process_first(), accelerator.local_main_process_first():  # one process a machine downloads
        images = load_known(settings.data, "train")

    torch.manual_seed(settings.training.seed)
    backbone = backbones.create(
        settings.backbone.name, settings.backbone.pretrained, **(settings.backbone.kwargs or {})
    )
    gradmix = settings.gradmix if settings.extra_view == "gradmix" else None
    method = methods.create(settings.method, backbone, gradmix)
    layers = check_images(method, settings.data.size, accelerator.device)
    trainer = Trainer(
        method,
        images,
        folder,
        accelerator,
        size=settings.data.size,
        augmentation=settings.augmentation,
        optimizer=settings.optimizer,
        training=settings.training,
        n_views=3 if settings.extra_view == "augmented" else 2,
    )
    if accelerator.is_main_process:
        folder.start(plain, images, settings.overwrite, device=str(accelerator.device), layers=layers)
    accelerator.wait_for_everyone()
    trainer.run()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
