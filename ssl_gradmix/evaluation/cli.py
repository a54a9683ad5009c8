"""What the command lines of `eval/` share: what they evaluate, and on which images.

Parsing needs no more than the settings; everything heavy is imported once the arguments are understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import Namespace

from ssl_gradmix import command_line
from ssl_gradmix.settings import Data


@dataclass
class Subject:
    """What is evaluated, and where results go.

    Args:
        encoder: A run folder (`runs/x`), a published timm model (`timm:resnet18.a1_in1k`), or a folder in timm's layout
            (`local-dir:PATH`). A run is evaluated on its own data, classes included, unless --data says otherwise.
            Images are resized to what the encoder was made for, unless --data.size is given.
        feature: What of the encoder is read: `backbone` features, or the embeddings of a run's `projector`, whose
            results go to `projector/` in the folder for results.
        weights: Safetensors file for the architecture `timm:NAME`, in place of the published weights.
        out: Folder for results; a run's is its `eval/`.
        batch_size: Images that the encoder sees at once, on each process.
        cache: Keep features in `features/` of the results' folder, and use those kept there.
    """

    encoder: str
    feature: Literal["backbone", "projector"] = "backbone"
    weights: str | None = None
    out: str | None = None
    batch_size: int = 256
    cache: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def main(evaluate: Callable[..., None], options: type, description: str, argv: Sequence[str] | None = None) -> int:
    """Runs `evaluate(evaluation, options)` from a command line, with an `ssl_gradmix.evaluation.setup.Evaluation`.

    Args:
        evaluate: What to do. It runs on every process; the main one should write results.
        options: Dataclass of the evaluation's own settings; its docstring is their help.
        description: First lines of the help.
        argv: Arguments, those of the process by default.

    Returns:
        The exit status: 0, or 2 with one line on stderr for bad input.
    """
    parser = command_line.Parser(description=description, usage="%(prog)s ENCODER [options]")
    parser.add_argument("--config", action=command_line.ConfigFile, help="YAML file of these options.")
    parser.add_class_arguments(Subject, as_positional=True)
    parser.add_class_arguments(Data, "data")
    # Annotations left as text would have jsonargparse import all that the script imports for type checkers, torch too.
    options.__init__.__annotations__ = get_type_hints(options.__init__)
    parser.add_class_arguments(options)

    def parse_and_evaluate(argv: Sequence[str] | None) -> None:
        given = parser.parse_args(argv, defaults=False)
        evaluation, settings = _resolve(parser, given)
        evaluate(evaluation, _pick(options, settings))

    return command_line.run(parse_and_evaluate, argv)


def _resolve(parser: command_line.Parser, given: Namespace) -> tuple[Any, Namespace]:
    """Fills in what was not given: the data from the run's config, the rest from the defaults."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ssl_gradmix.evaluation.encoders import load_encoder
    from ssl_gradmix.evaluation.results import results_folder
    from ssl_gradmix.evaluation.setup import Evaluation

    wanted = given.get("data", Namespace())
    feature = given.get("feature", Subject.feature)
    encoder = load_encoder(given.encoder, given.get("weights"), wanted.get("size"), feature)
    given["data"] = Namespace(_data(wanted, (encoder.config or {}).get("data", {})) | {"size": encoder.size})
    settings = parser.parse_object(given.as_dict())
    subject = _pick(Subject, settings)
    if subject.out is None and encoder.run is None:
        raise ValueError(f"{encoder.name} is no run, so it has no folder for results: give one with --out")
    out = Path(subject.out) if subject.out is not None else encoder.run / "eval"
    cache = out / "features" if subject.cache else None
    data = Data(**settings.data.as_dict())
    results = results_folder(out, feature)
    # Others wait while one process fits classifiers, which NCCL would take for a failure after ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    return Evaluation(encoder, data, results, subject.batch_size, cache, accelerator), settings


def _pick(options: type, settings: Namespace) -> Any:
    return options(**{field.name: settings[field.name] for field in fields(options)})


def _data(given: Namespace, of_run: dict) -> dict:
    """The run's data settings where the data set is the same, with what was given on the command line instead."""
    given = vars(given)
    if given.get("name", of_run.get("name")) != of_run.get("name"):
        return given
    left_out = {"download"}  # a run, which may be somebody else's, starts none
    if of_run.get("name") == "digits":
        left_out |= {"root"}  # which earlier versions wrote, though digits have none
    if {"classes", "open_set"} & given.keys():
        left_out |= {"classes", "open_set"}
    return {name: value for name, value in of_run.items() if name not in left_out} | given
