"""Loss landscapes of several models side by side, and how sharp their minima are.

    python -m rose_peft.robustness landscape --task sst2 --data_dir DATA --output_dir runs/landscape \
        --models "before fine-tuning=roberta-base" overfitted=runs/overfitted plain=runs/plain ROSE=runs/rose

One panel per model, all on one scale: the loss on a plane of filter-normalised random directions (Li et al. 2018),
from the same random draw for all. Writes landscape.png, NAME/sharpness.result.json per model (for the report) and
surfaces.json with the losses. With --dimensions 1 all models share one diagram.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..data import Examples
from ..directions import Scope
from ..errors import RobustnessError
from ..landscape import (
    Surface,
    check_ball,
    check_grid,
    classification_batches,
    classification_loss,
    loss_surface,
    measure_sharpness,
)
from ..loading import model_seed
from ..plotting import plot_surfaces
from ..predict import Predictor
from ..results import SUFFIX, Result, write_json
from .arguments import DataArguments, RunArguments, fail, named, parse


@dataclass
class LandscapeArguments:
    """What to measure."""

    models: list[str] = field(metadata={"help": "Models as NAME=FOLDER or NAME=HUB_NAME, in the order of the panels."})
    output_dir: str = field(metadata={"help": "Folder for everything that is written."})
    num_examples: int = field(default=128, metadata={"help": "Size of the random sample; 0 takes all examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample and of the directions."})
    dimensions: int = field(default=2, metadata={"help": "1 for a line, 2 for a plane."})
    radius: float = field(default=1.0, metadata={"help": "Largest step; at 1 each filter moves by its own length."})
    points: int = field(default=21, metadata={"help": "Points along each direction, odd."})
    scope: Scope = field(
        default="used", metadata={"help": "'used' moves all weights in use, 'trainable' those that are trained."}
    )
    ceiling: float | None = field(default=None, metadata={"help": "Highest loss told apart in the picture."})
    epsilon: float = field(default=0.005, metadata={"help": "Radius of the ball of the worst loss, over the norm."})
    ascent_steps: int = field(default=10, metadata={"help": "Steps of the search for the worst loss."})
    training_seed: int | None = field(
        default=None,
        metadata={"help": "Seed that the models were trained with. Default: N of a folder seedN, else 0."},
    )
    probes: int = field(default=16, metadata={"help": "Random probes of the Hessian's trace; 0 leaves it out."})


def measure(
    name: str, path: str, examples: Examples, args: LandscapeArguments, data: DataArguments, run: RunArguments
) -> Surface:
    """Measure one model and write its result file."""
    model, tokenizer = run.load(path, data.classes(examples))
    predictor = Predictor.for_examples(model, tokenizer, examples, **run.options())
    rows = measure_sharpness(
        predictor,
        examples,
        epsilon=args.epsilon,
        ascent_steps=args.ascent_steps,
        probes=args.probes,
        seed=args.seed,
        scope=args.scope,
        progress=True,
    )
    Result(
        method=name,
        task=data.task or examples.name,
        seed=(model_seed(path) or 0) if args.training_seed is None else args.training_seed,
        rows=rows,
        config={
            **dataclasses.asdict(args),
            "data": examples.fingerprint(),
            "model": path,
            **run.written(model, tokenizer),
        },
    ).save(Path(args.output_dir) / name / f"sharpness{SUFFIX}")
    print(f"{name}: " + ", ".join(f"{row.title} {row.estimate}" for row in rows))
    return loss_surface(
        model,
        classification_batches(predictor, examples),
        classification_loss(predictor),
        dimensions=args.dimensions,
        radius=args.radius,
        points=args.points,
        seed=args.seed,
        scope=args.scope,
        progress=True,
    )


def main(argv: list[str]) -> int:
    """Run, and return the exit code."""
    args, data, run = parse((LandscapeArguments, DataArguments, RunArguments), "landscape", __doc__, argv)
    folder = Path(args.output_dir)
    surfaces: dict[str, Surface] = {}
    code = 0
    try:
        check_grid(args.dimensions, args.radius, args.points)
        check_ball(args.epsilon, args.ascent_steps)
        if args.probes < 0:
            raise RobustnessError(f"probes={args.probes}: must be at least 0, which leaves the trace out.")
        run.check(folder, args.seed)
        models = named(args.models)
        examples = data.load().sample(args.num_examples or None, args.seed)
    except RobustnessError as error:
        return fail(error)
    for name, path in models.items():
        try:
            surfaces[name] = measure(name, path, examples, args, data, run)
        except RobustnessError as error:
            code = fail(RobustnessError(f"{name}: {error}"))
            continue
        # After each model, so that a run that is stopped has left something.
        write_json(folder / "surfaces.json", {key: dataclasses.asdict(value) for key, value in surfaces.items()})
    if surfaces:
        title = f"Loss landscape, {data.task or 'own data'}"
        try:
            plot_surfaces(surfaces, folder / "landscape.png", title, args.ceiling)
        except RobustnessError as error:
            return fail(error)
        print(f"\nlandscape.png, surfaces.json and a sharpness.result.json per model: {folder}")
    return code
