"""Trains an encoder with the labels of known classes, by supervised contrast, SimCLR and GradMix views.

accelerate launch recipes/supcon_gradmix.py trains on six of the ten digits, a few minutes on a laptop;
python eval/osr.py runs/supcon --feature projector then tells the other four apart.
accelerate launch recipes/supcon_gradmix.py --data.name folder --data.root IMAGES --backbone.name resnet18_small trains
on all classes of your images; --data.open_set and --data.classes say which are known. --extra_view augmented is the
control, a plain third view; --extra_view none goes without. --init runs/simclr starts from the weights of another run,
as GradMix's authors train in two stages.

The same command again resumes an unfinished run. What ran is written to config.yaml in the run folder; --config reads
it.
"""

import sys
from collections.abc import Sequence

from ssl_gradmix import command_line
from ssl_gradmix.settings import SupConSettings

SPLIT_OF_DIGITS = "random:6:0"
"""Where no other is asked for: without unknown classes there is nothing to recognize."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.recipe_parser(SupConSettings, __doc__, recipe="supcon")
    parser.add_argument(
        "--init",
        type=str | None,
        default=None,
        help="Run to start from: its backbone, and its projector where that is of the same shape.",
    )
    settings, plain = command_line.read(parser, argv)
    if settings.data.name == "digits" and settings.data.classes is None and settings.data.open_set is None:
        plain["data"]["open_set"] = settings.data.open_set = SPLIT_OF_DIGITS

    # These take seconds to import: after parsing, so that --help is quick.
    import torch

    from ssl_gradmix import backbones, methods
    from ssl_gradmix.data.open_set import load_labeled
    from ssl_gradmix.evaluation.encoders import start_from
    from ssl_gradmix.run_folder import RunFolder
    from ssl_gradmix.training.loop import Trainer, check_images
    from ssl_gradmix.training.processes import create_accelerator, precision

    if settings.training.accumulate > 1 and not settings.method.allow_fewer_negatives:
        raise ValueError(
            "training.accumulate: in SupCon each micro-batch would contrast with itself alone, another loss than that "
            "of the whole batch; if this is meant, pass --method.allow_fewer_negatives true"
        )
    plain["training"]["precision"] = settings.training.precision = precision(settings.training)
    folder = RunFolder(settings.run)
    folder.check(plain, settings.overwrite)
    accelerator = create_accelerator(settings.training, settings.expect_processes, folder.trackers)
    with accelerator.main_process_first(), accelerator.local_main_process_first():  # one process a machine downloads
        images = load_labeled(settings.data, settings.method.label_fraction, settings.training.seed)

    torch.manual_seed(settings.training.seed)
    backbone = backbones.create(
        settings.backbone.name, settings.backbone.pretrained, **(settings.backbone.kwargs or {})
    )
    gradmix = settings.gradmix if settings.extra_view == "gradmix" else None
    method = methods.create(settings.method, backbone, gradmix)
    if settings.init is not None:
        start_from(method, settings.init)
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
