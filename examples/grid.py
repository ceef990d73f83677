"""A grid of methods, tasks and seeds, read from YAML and checked before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from arguments import InputError, TrainArguments, reason
from transformers import HfArgumentParser

from rose_peft import RoseConfigError
from rose_peft.robustness import RECIPES, TASKS
from rose_peft.robustness.attack_recipes import PRESETS
from rose_peft.robustness.noise import KINDS

TRAIN_TYPES = {option.name: str(option.type) for option in dataclasses.fields(TrainArguments)}
# What the grid itself decides.
RESERVED = {"task", "data_dir", "seed", "output_dir", "resume", "overwrite"}


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every trained model; the same for all, whatever trained it.

    Args:
        batch_size: Texts per forward pass.
        bf16: Run under bfloat16 autocast.
        noise_rates: Shares of words to hit; empty leaves noise out.
        noise_kinds: Kinds of noise; empty takes all.
        recipes: TextAttack recipes and presets; empty leaves attacks out.
        attack_examples: Size of the sample that is attacked.
        query_budget: Model queries per attacked example; None for no limit.
        sharpness_examples: Size of the sample for the sharpness; 0 leaves it out.
        epsilon: Relative radius of the ball of the worst loss.
        ascent_steps: Steps of the search for the worst loss.
        probes: Random probes of the Hessian's trace; 0 leaves it out.
        seed: Seed of samples, noise, attacks and directions.
    """

    batch_size: int = 64
    bf16: bool = False
    noise_rates: list[float] = field(default_factory=lambda: [0.1, 0.3])
    noise_kinds: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=lambda: ["deepwordbug", "pwws"])
    attack_examples: int = 200
    query_budget: int | None = None
    sharpness_examples: int = 128
    epsilon: float = 0.005
    ascent_steps: int = 10
    probes: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One setting of one method on one task with one seed: a training run.

    Args:
        task: GLUE task.
        method: Name of the method in the grid.
        seed: Training seed.
        options: Options of examples/train.py.
        searched: Those of them that the search tries.
    """

    task: str
    method: str
    seed: int
    options: dict[str, Any]
    searched: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run's folder under method and task."""
        return "_".join([f"seed{self.seed}", *(f"{name}={value}" for name, value in self.searched.items())])

    def arguments(self, folder: Path, data_dir: str | None) -> TrainArguments:
        """Make the options of the run.

        Args:
            folder: Its output folder.
            data_dir: Folder of local data; None for the hub.

        Raises:
            InputError, RoseConfigError: If one cannot work.
        """
        place = {"task": self.task, "seed": self.seed, "output_dir": str(folder), "data_dir": data_dir}
        (args,) = HfArgumentParser(TrainArguments).parse_dict({**self.options, **place})
        args.check()
        return args


@dataclass(frozen=True)
class Grid:
    """Everything a grid file says.

    Args:
        title: Title of the report.
        baseline: Method that the others are compared with.
        seeds: Training seeds.
        tasks: Task -> options of train.py for it.
        methods: Method -> its options, with `search` for settings of its own to try.
        common: Options of train.py for all.
        search: Option -> values to try, on the first seed, by clean accuracy alone.
        evaluation: What is measured.
        cost_rounds: Steps of each method that are timed in turn; 0 leaves the cost out.
    """

    seeds: list[int]
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    title: str = "Comparison"
    baseline: str = "plain"
    common: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    cost_rounds: int = 12

    def candidates(self, task: str, method: str, seed: int) -> list[Candidate]:
        """Every setting that the search tries for a method on a task."""
        own = {name: value for name, value in self.methods[method].items() if name != "search"}
        options = {**self.common, **self.tasks[task], **own}
        space = self.methods[method].get("search", self.search)
        rows = [_typed(dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
        return [Candidate(task, method, seed, {**_typed(options), **row}, row) for row in rows]

    def all_candidates(self) -> Iterator[Candidate]:
        """Every setting of every method on every task, with the first seed."""
        for task, method in itertools.product(self.tasks, self.methods):
            yield from self.candidates(task, method, self.seeds[0])


def read_grid(path: Path) -> Grid:
    """Read a grid file and check every setting in it.

    Raises:
        InputError: Naming the entry, its value and the way out.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"grid={str(path)!r} cannot be read ({reason(error)}); pass a YAML file.") from error
    if not isinstance(content, dict):
        raise InputError(f"grid={str(path)!r} holds no entries; it needs at least seeds, tasks and methods.")
    _known(content, {f.name for f in dataclasses.fields(Grid)}, "grid")
    kinds = {"seeds": list, "tasks": dict, "methods": dict, "common": dict, "search": dict, "evaluation": dict}
    for name, kind in kinds.items():
        value = content.get(name, kind())
        if not isinstance(value, kind) or (name in ("seeds", "tasks", "methods") and not value):
            words = "a list" if kind is list else "entries of its own"
            raise InputError(f"grid: {name}={content.get(name)!r} must be {words}.")
    evaluation = content.pop("evaluation", {})
    _known(evaluation, {f.name for f in dataclasses.fields(Evaluation)}, "evaluation")
    for name in ("tasks", "methods"):
        content[name] = {key: value or {} for key, value in content[name].items()}
    grid = Grid(**content, evaluation=Evaluation(**evaluation))
    _check(grid)
    return grid


def _check(grid: Grid) -> None:
    _known(grid.common, TRAIN_TYPES.keys() - RESERVED, "common")
    _known(grid.search, TRAIN_TYPES.keys() - RESERVED, "search")
    _known(grid.tasks, set(TASKS), "tasks")
    for name, options in {**grid.tasks, **grid.methods}.items():
        _known(options, TRAIN_TYPES.keys() - RESERVED | ({"search"} if name in grid.methods else set()), str(name))
    if grid.baseline not in grid.methods:
        raise InputError(
            f"grid: baseline={grid.baseline!r} is no method of it; choose one of {', '.join(grid.methods)}."
        )
    if not all(isinstance(seed, int) for seed in grid.seeds) or len(set(grid.seeds)) != len(grid.seeds):
        raise InputError(f"grid: seeds={grid.seeds!r} must be different integers.")
    _known(dict.fromkeys(grid.evaluation.noise_kinds), set(KINDS), "noise_kinds")
    _known(dict.fromkeys(grid.evaluation.recipes), {*RECIPES, *PRESETS}, "recipes")
    task = next(iter(grid.tasks))
    tried = {method: len(grid.candidates(task, method, 0)) for method in grid.methods}
    for method, count in tried.items():
        if count != tried[grid.baseline]:
            raise InputError(
                f"grid: method {method!r} searches {count} settings and the baseline {tried[grid.baseline]}; a fair "
                "comparison gives each method the same number."
            )
    for candidate in grid.all_candidates():
        try:
            candidate.arguments(Path("unused"), None)
        except (ValueError, TypeError, RoseConfigError) as error:
            raise InputError(f"grid: {candidate.task}, {candidate.method}: {reason(error)}") from error


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """Check the types of options, which no command line has read; YAML takes 1e-4 for a text (it wants a point)."""
    typed = {}
    for name, value in options.items():
        kind, _, optional = TRAIN_TYPES[name].partition(" | ")
        with suppress(TypeError, ValueError):
            typed[name] = float(value) if kind == "float" and value is not None else value
        if type(typed.get(name)).__name__ != kind and not (value is None and optional):
            raise InputError(f"grid: {name}={value!r} must be of type {TRAIN_TYPES[name]}.")
    return typed


def _known(entries: dict[str, Any], known: set[str], place: str) -> None:
    for name in entries:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise InputError(f"grid: {name!r} is unknown in {place}; {hint}")
