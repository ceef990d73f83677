"""A grid of methods, tasks and seeds, read from YAML and checked before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from examples.training.arguments import InputError, TrainArguments, reason
from examples.training.presets import with_preset
from rose_peft import RoseConfigError
from rose_peft.robustness import RECIPES, TASKS
from rose_peft.robustness.attacks.recipes import PRESETS
from rose_peft.robustness.consistency import DROPOUT
from rose_peft.robustness.noise import KINDS

TRAIN_TYPES = {option.name: str(option.type) for option in dataclasses.fields(TrainArguments)}
# What the grid itself decides.
RESERVED = {"data_dir", "seed", "output_dir", "resume", "overwrite"}
# What tasks alone decide.
DATA = {"task", "train_file", "validation_file"}
# An entry of a task or method that is no option of train.py: the task or method whose search it goes by.
SETTINGS_OF = "settings_of"
ENTRIES = "entries of its own"
GRID_KINDS: dict[str, tuple[type, str]] = {
    "seeds": (list, "a list"),
    "tasks": (dict, ENTRIES),
    "methods": (dict, ENTRIES),
    "common": (dict, ENTRIES),
    "search": (dict, ENTRIES),
    "evaluation": (dict, ENTRIES),
    "title": (str, "a text"),
    "baseline": (str, "the name of a method"),
    "cost_rounds": (int, "a number"),
    "matmul_precision": (str, "a text"),
}
MATMUL_PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every trained model; the same for all, whatever trained it.

    Args:
        batch_size: Texts per forward pass.
        max_length: Longest input in tokens; None for the training's. Texts may be longer than those of the training.
        bf16: Run under bfloat16 autocast.
        noise_rates: Shares of words to hit; empty leaves noise out.
        noise_kinds: Kinds of noise; empty takes all.
        recipes: TextAttack recipes and presets; empty leaves attacks out.
        attack_examples: Size of the sample that is attacked.
        query_budget: Model queries per attacked example; None for no limit.
        consistency_changes: What predictions should not change under, see `consistency`; empty leaves it out.
        sharpness_examples: Size of the sample for the sharpness; 0 leaves it out.
        epsilon: Relative radius of the ball of the worst loss.
        ascent_steps: Steps of the search for the worst loss.
        probes: Random probes of the Hessian's trace; 0 leaves it out.
        seed: Seed of samples, noise, attacks and directions.
    """

    batch_size: int = 64
    max_length: int | None = None
    bf16: bool = False
    noise_rates: list[float] = field(default_factory=lambda: [0.1, 0.3])
    noise_kinds: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=lambda: ["deepwordbug", "pwws"])
    attack_examples: int = 200
    query_budget: int | None = None
    consistency_changes: list[str] = field(default_factory=list)
    sharpness_examples: int = 128
    epsilon: float = 0.005
    ascent_steps: int = 10
    probes: int = 16
    seed: int = 0


EVALUATION_TYPES = {setting.name: str(setting.type) for setting in dataclasses.fields(Evaluation)}
EVALUATION_BOUNDS = {
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "max_length": (lambda value: value >= 8, "at least 8; leave it out for the training's"),
    "noise_rates": (lambda value: 0 < value <= 1, "numbers above 0 and at most 1"),
    "attack_examples": (lambda value: value >= 1, "at least 1; leave recipes empty for no attack"),
    "query_budget": (lambda value: value >= 2, "at least 2"),
    "sharpness_examples": (lambda value: value >= 0, "at least 0; 0 leaves the sharpness out"),
    "epsilon": (lambda value: value > 0, "above 0"),
    "ascent_steps": (lambda value: value >= 1, "at least 1"),
    "probes": (lambda value: value >= 0, "at least 0; 0 leaves the trace out"),
}


@dataclass(frozen=True)
class Candidate:
    """One setting of one method on one task with one seed: a training run.

    Args:
        task: Name of the task in the grid.
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
        place = {"seed": self.seed, "output_dir": str(folder), "data_dir": data_dir}
        (args,) = HfArgumentParser(TrainArguments).parse_dict({"task": self.task, **self.options, **place})
        args.check()
        return args


@dataclass(frozen=True)
class Grid:
    """Everything a grid file says.

    Args:
        title: Title of the report.
        baseline: Method that the others are compared with.
        seeds: Training seeds.
        tasks: Task -> options of train.py for it. Other data than GLUE's have a name of their own, `train_file` and
            `validation_file`, and as `task` the one of GLUE that has their columns and labels. One with `settings_of`
            searches nothing: each method has the settings there that it found on the task of that name.
        methods: Method -> its options, with `search` for settings of its own to try. One with `settings_of` searches
            nothing: it has the settings that the method of that name found.
        common: Options of train.py for all.
        search: Option -> values to try, on the first seed, by clean accuracy alone.
        evaluation: What is measured.
        cost_rounds: Steps of each method that are timed in turn; 0 leaves the cost out. An interval takes two cycles
            of 8, see timing.py.
        matmul_precision: Of float32 matrix products, see `torch.set_float32_matmul_precision`.
    """

    seeds: list[int]
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    title: str = "Comparison"
    baseline: str = "plain"
    common: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    cost_rounds: int = 24
    matmul_precision: str = "highest"

    def candidates(self, task: str, method: str, seed: int) -> list[Candidate]:
        """Every setting that the search tries for a method on a task."""
        own = {name: value for name, value in self.methods[method].items() if name not in ("search", SETTINGS_OF)}
        of_task = {name: value for name, value in self.tasks[task].items() if name != SETTINGS_OF}
        options = with_preset({**self.common, **of_task, **own})
        space = self.space(method)
        rows = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        searched = [_typed(row, TRAIN_TYPES) for row in rows]
        fixed = _typed(options, TRAIN_TYPES)
        return [Candidate(task, method, seed, {**fixed, **row}, row) for row in searched]

    def space(self, method: str) -> dict[str, list[Any]]:
        """What the search tries for a method, or for the one whose settings it has: its own, or else the grid's."""
        method = self.methods[method].get(SETTINGS_OF, method)
        return self.methods[method].get("search", self.search)

    def decided_by(self, task: str, method: str) -> tuple[str, str]:
        """The task and method whose search decides about the settings of a cell: others where it says so."""
        return self.tasks[task].get(SETTINGS_OF, task), self.methods[method].get(SETTINGS_OF, method)

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
    _known(content, GRID_KINDS, "grid")
    for name, (kind, words) in GRID_KINDS.items():
        required = name in ("seeds", "tasks", "methods")
        value = content.get(name, None if required else kind())
        if not isinstance(value, kind) or (required and not value):
            raise InputError(f"grid: {name}={value!r} must be {words}.")
    for name in ("tasks", "methods"):
        content[name] = {key: value or {} for key, value in content[name].items()}
        for key, value in content[name].items():
            if not isinstance(key, str) or not isinstance(value, dict):
                raise InputError(f"grid: {key!r} in {name} must be a name with options, not {value!r}.")
    settings = content.pop("evaluation", {})
    _known(settings, EVALUATION_TYPES, "evaluation")
    grid = Grid(**content, evaluation=Evaluation(**_typed(settings, EVALUATION_TYPES)))
    _check(grid)
    return grid


def _check(grid: Grid) -> None:
    of_tasks = TRAIN_TYPES.keys() - RESERVED
    free = of_tasks - DATA
    _known(grid.common, free, "common")
    for kind, names in (("task", grid.tasks), ("method", grid.methods)):
        for name in names:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise InputError(
                    f"grid: {kind} {name!r} names a folder; begin with a letter and use letters, digits and _ . + - "
                    "only."
                )
    for name, options in grid.tasks.items():
        _known([options.get("task", name)], TASKS, "tasks")
        _known(options, of_tasks | {SETTINGS_OF}, name)
        _check_settings_of(name, grid.tasks, "task")
        if "task" in options and "train_file" not in options:
            raise InputError(f"grid: task={options['task']!r} of {name!r} goes with a train_file and validation_file.")
    for name, options in grid.methods.items():
        _known(options, free | {"search", SETTINGS_OF}, name)
        _check_settings_of(name, grid.methods, "method")
        if {"search", SETTINGS_OF} <= options.keys():
            raise InputError(f"grid: method {name!r} has a search and settings_of; leave one out.")
        _check_search(grid.space(name), free, options, name)
    if grid.baseline not in grid.methods:
        raise InputError(f"grid: baseline={grid.baseline!r} is no method; choose one of {', '.join(grid.methods)}.")
    if not all(type(seed) is int for seed in grid.seeds) or len(set(grid.seeds)) != len(grid.seeds):
        raise InputError(f"grid: seeds={grid.seeds!r} must be different integers.")
    if grid.cost_rounds < 0 or grid.cost_rounds == 1:
        raise InputError(f"grid: cost_rounds={grid.cost_rounds} must be 0, or at least 2.")
    if grid.matmul_precision not in MATMUL_PRECISIONS:
        raise InputError(
            f"grid: matmul_precision={grid.matmul_precision!r} is unknown; choose from {', '.join(MATMUL_PRECISIONS)}."
        )
    _check_evaluation(grid.evaluation)
    tried = {method: _tries(grid.space(method)) for method in grid.methods}
    for method, count in tried.items():
        if count != tried[grid.baseline]:
            raise InputError(
                f"grid: method {method!r} searches {count} settings and the baseline {tried[grid.baseline]}, upper "
                "quantiles not counted; a fair comparison gives each method the same number."
            )
    for candidate in grid.all_candidates():
        try:
            own = set(grid.methods[candidate.method]) | set(candidate.searched)
            candidate.arguments(Path("unused"), None).refuse_without_effect(own)
        except (ValueError, TypeError, RoseConfigError) as error:
            raise InputError(f"grid: {candidate.task}, {candidate.method}: {reason(error)}") from error


def _check_settings_of(name: str, entries: dict[str, dict[str, Any]], kind: str) -> None:
    searching = [other for other, own in entries.items() if SETTINGS_OF not in own]
    source = entries[name].get(SETTINGS_OF)
    if SETTINGS_OF in entries[name] and source not in searching:
        names = ", ".join(searching) or "another one"
        raise InputError(f"grid: settings_of={source!r} of {name!r} is no {kind} that searches; name {names}.")


def _tries(space: dict[str, list[Any]]) -> int:
    """Count what a method tries, but for the quantile, which methods without masks have not."""
    return math.prod(len(values) for name, values in space.items() if name != "upper_quantile")


def _check_search(space: Any, free: Collection[str], options: dict[str, Any], method: str) -> None:
    if not isinstance(space, dict):
        raise InputError(f"grid: search={space!r} of {method!r} must be options with lists of values.")
    _known(space, free, f"search of {method!r}")
    for name, values in space.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
            raise InputError(f"grid: {name}={values!r} in search of {method!r} must be a list of different values.")
        if name in options:
            raise InputError(
                f"grid: {name} of {method!r} is {options[name]!r} and searched too; leave one out "
                "(search: {} searches nothing)."
            )


def _check_evaluation(settings: Evaluation) -> None:
    _known(settings.noise_kinds, KINDS, "noise_kinds")
    _known(settings.consistency_changes, [DROPOUT, *KINDS], "consistency_changes")
    _known(settings.recipes, [*RECIPES, *PRESETS], "recipes")
    for name, (holds, words) in EVALUATION_BOUNDS.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not holds(number):
                raise InputError(f"grid: {name}={value!r} must be {words}.")


def _typed(options: dict[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Check the types of options, which no command line has read; YAML takes 1e-4 for a text (it wants a point)."""
    typed = {}
    for name, value in options.items():
        kind, _, optional = types[name].partition(" | ")
        inner = kind.removeprefix("list[").removesuffix("]")
        parts = [_number(part, inner) for part in value] if kind != inner and isinstance(value, list) else None
        typed[name] = _number(value, kind) if parts is None else parts
        fits = type(typed[name]).__name__ == kind if kind == inner else parts is not None
        if not (fits and all(type(part).__name__ == inner for part in parts or [])) and not (
            value is None and optional
        ):
            raise InputError(f"grid: {name}={value!r} must be of type {types[name]}.")
    return typed


def _number(value: Any, kind: str) -> Any:
    with suppress(TypeError, ValueError):
        return float(value) if kind == "float" and not isinstance(value, bool) else value
    return value


def _known(entries: Iterable[str], known: Collection[str], place: str) -> None:
    for name in entries:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise InputError(f"grid: {name!r} is unknown in {place}; {hint}")
