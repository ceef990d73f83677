"""Compare methods over tasks and seeds: a grid in a YAML file, its runs, their measurements, one report.

    python -m examples.benchmark.compare --grid examples/benchmark/grids/evidence.yaml --data_dir DATA \
        --output_dir examples/benchmark/results/minilm

It runs what is missing and skips what is done, so it can be killed at any moment, started again, and continued on
another machine that has the output folder. First the settings of `search` are tried with the first seed and the best
by clean accuracy is kept for each method; then every method is trained with every seed, and the best epoch by clean
accuracy is measured. Something that fails is named at the end and the rest goes on.

The output folder gets one small JSON file per run and the report; models and checkpoints lie in the runs folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import DataCollatorWithPadding
from transformers.utils import logging

from examples.training.arguments import DivergedError, InputError, TrainArguments, reason
from examples.training.data import load_text
from examples.training.model import build_model
from examples.training.run import make_optimizer, tokenize, train_once
from rose_peft import RoseError
from rose_peft.robustness import (
    Result,
    ResultFileError,
    RobustnessError,
    Row,
    load_result,
    write_report,
)
from rose_peft.robustness.command_line.parser import Parser
from rose_peft.robustness.report.page import find_results
from rose_peft.robustness.results import SUFFIX, write_json

from .grid import Candidate, Grid, read_grid
from .measure import measure
from .objectives import make_objective
from .timing import Step, relative_cost, time_in_turn

EXPECTED = (InputError, RoseError, RobustnessError)


@dataclass
class CompareArguments:
    """Run a grid of methods, tasks and seeds, and report."""

    grid: str = field(metadata={"help": "The grid, a YAML file; examples/benchmark/grids/ has some."})
    output_dir: str = field(metadata={"help": "Folder of the results and the report."})
    runs_dir: str = field(default="runs/compare", metadata={"help": "Folder of models and checkpoints."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local data, as for train.py."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Only these tasks of the grid."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Only these methods of the grid."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Only these seeds of the grid."})
    as_html: bool = field(default=False, metadata={"help": "Write the report as HTML too."})


class Comparison:
    """
    One call of the script: goes through the grid and writes down what it finds.

    Args:
        grid: The grid.
        args: Options.
    """

    def __init__(self, grid: Grid, args: CompareArguments) -> None:
        self.grid = grid
        self.args = args
        self.failures: list[str] = []
        self.tasks = _chosen("tasks", args.tasks, list(grid.tasks))
        self.methods = _chosen("methods", args.methods, list(grid.methods))
        self.seeds = _chosen("seeds", args.seeds, grid.seeds)

    def run(self) -> None:
        """Run every cell that is missing: seed by seed, so that what is there at any time can be compared."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.grid.matmul_precision)
        try:
            self._run()
        finally:
            torch.set_float32_matmul_precision(before)

    def _run(self) -> None:
        for task in self.tasks:
            for seed in self.seeds:
                for method in self.methods:
                    with self._named(f"{task}, {method}, seed {seed}"):
                        self._cell(task, method, seed)
            for method in self.methods if self.grid.cost_rounds else []:
                with self._named(f"{task}, {method}, cost"):
                    self._cost(task, method)

    @contextmanager
    def _named(self, part: str) -> Iterator[None]:
        """Write down what goes wrong in a part of the grid, and go on."""
        try:
            yield
        except Exception as error:  # out of memory, a full disk, a bug of ours: the other parts may still work
            kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
            self.failures.append(f"{part}: {kind}{reason(error)}")
            print(f"failed: {self.failures[-1]}", file=sys.stderr)

    def _place(self, task: str, method: str) -> Path:
        return Path(self.args.output_dir) / task / method

    def _folder(self, candidate: Candidate) -> Path:
        return Path(self.args.runs_dir) / candidate.task / candidate.method / candidate.name

    def _cell(self, task: str, method: str, seed: int) -> None:
        file = self._place(task, method) / f"seed{seed}{SUFFIX}"
        winner = self._search(task, method)
        (candidate,) = [c for c in self.grid.candidates(task, method, seed) if c.searched == winner]
        config = self._config(candidate)
        if file.exists():
            _same(file, load_result(file).config, config)
            return
        print(f"{task}, {method}, seed {seed}: {candidate.name}", flush=True)
        trained = self._trained(candidate)
        folder = self._folder(candidate)
        max_length = self.grid.evaluation.max_length or trained["config"]["max_length"]
        rows, unavailable = measure(
            folder / "model",
            candidate.options.get("task", task),
            self.args.data_dir,
            max_length,
            self.grid.evaluation,
            folder / "attacks",
            candidate.options.get("robust_files", ()),
            candidate.options.get("validation_file"),
        )
        best = trained["best"]
        result = Result(
            method=method,
            task=task,
            seed=seed,
            rows=rows,
            config={
                **config,
                "epoch": best["epoch"],
                "steps": trained["steps"],
                "history": trained["history"],
                "device": trained["device"],
                "products": _products(),
                "trained_with": trained["versions"],
                "kept_share": (trained["rose"] or {}).get("kept_share"),
                "unavailable": unavailable,
            },
        )
        if trained["rose"] is not None and seed == self.grid.seeds[0]:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "masks.png", file.parent / "masks.png")
            result.images["masks of each unit over the steps"] = "masks.png"
        result.save(file)

    def results(self) -> list[Path]:
        """The files of the output folder that are results of this grid; others are named, and left where they are."""
        found = []
        for file in find_results([self.args.output_dir]):
            try:
                if self._check(file):
                    found.append(file)
                else:
                    print(f"not in the report: {file} is of no method and task of this grid", file=sys.stderr)
            except (InputError, ResultFileError) as error:
                if not any(str(error) in failure for failure in self.failures):
                    self.failures.append(f"{file.relative_to(self.args.output_dir)}: {error}")
        return found

    def _check(self, file: Path) -> bool:
        """Whether a file is of a cell of this grid; refuses it where its settings are others."""
        found = load_result(file)
        if found.task not in self.grid.tasks or found.method not in self.grid.methods:
            return False
        if file.name == f"cost{SUFFIX}":
            _same(file, found.config, self._cost_config(found.task, found.method))
            return True
        candidates = self.grid.candidates(found.task, found.method, found.seed)
        (winner, *others) = candidates
        if others:
            tried = _read_list(self._search_file(found.task, found.method))
            if not {str(each.searched) for each in candidates} <= {str(entry["searched"]) for entry in tried}:
                raise InputError("the search of its method has not ended, so other settings may win.")
            winner = _best(tried, candidates)
        _same(file, found.config, self._config(winner))
        return True

    def _search_file(self, task: str, method: str) -> Path:
        return self._place(*self.grid.decided_by(task, method)) / "search.json"

    def _config(self, candidate: Candidate) -> dict[str, Any]:
        """Settings of a cell, by which its result is known again."""
        evaluation = dataclasses.asdict(self.grid.evaluation)
        return {"options": candidate.options, "searched": candidate.searched, "evaluation": evaluation}

    def _cost_config(self, task: str, method: str) -> dict[str, Any]:
        ours, baseline = (self.grid.candidates(task, m, self.grid.seeds[0])[0] for m in (method, self.grid.baseline))
        return {"options": ours.options, "baseline": baseline.options, "rounds": {"rounds": self.grid.cost_rounds}}

    def _search(self, task: str, method: str) -> dict[str, Any]:
        """Settings of highest clean accuracy with the first seed; each try is written down as soon as it is known."""
        task, method = self.grid.decided_by(task, method)
        candidates = self.grid.candidates(task, method, self.grid.seeds[0])
        if len(candidates) == 1:
            return candidates[0].searched
        file = self._search_file(task, method)
        tried: list[dict[str, Any]] = _read_list(file)
        for candidate in candidates:
            known = [entry for entry in tried if entry["searched"] == candidate.searched]
            if known:
                _same(file, {"options": known[0]["options"]}, {"options": candidate.options})
                continue
            print(f"{task}, {method}, search: {candidate.name}", flush=True)
            clean = None
            try:
                clean = self._trained(candidate)["best"]["clean"]["accuracy"]
            except DivergedError as error:  # a try like any other, which does not win
                print(f"{task}, {method}, search: {candidate.name}: {error}", file=sys.stderr)
            entry = {"searched": candidate.searched, "options": candidate.options, "clean": clean}
            tried.append({**entry, "products": _products()})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, tried)
        return _best(tried, candidates).searched

    def _trained(self, candidate: Candidate) -> dict[str, Any]:
        args = candidate.arguments(self._folder(candidate), self.args.data_dir)
        # Robust files are measured of the best epoch alone; after each epoch they would take as long as the training.
        return train_once(dataclasses.replace(args, robust_files=[]))

    def _cost(self, task: str, method: str) -> None:
        """Time steps of a method and of the baseline in turn on the same batch."""
        file = self._place(task, method) / f"cost{SUFFIX}"
        ours, baseline = (self.grid.candidates(task, m, self.grid.seeds[0])[0] for m in (method, self.grid.baseline))
        config = self._cost_config(task, method)
        if file.exists():
            _same(file, load_result(file).config, config)
            return
        print(f"{task}, {method}: cost per step", flush=True)
        ways = {
            name: partial(stepper, one.arguments(self._folder(one), self.args.data_dir))
            for name, one in (("baseline", baseline), ("method", ours))
        }
        seconds = time_in_turn(ways, self.grid.cost_rounds)
        cost = Row("step_time", relative_cost(seconds["method"], seconds["baseline"]), self.grid.baseline)
        Result(method=method, task=task, seed=self.grid.seeds[0], rows=[cost], config=config).save(file)


def stepper(args: TrainArguments) -> Step:
    """Make a function that takes a step as `train` does, on one batch.

    Args:
        args: Checked options.
    """
    text = load_text(args)
    model, tokenizer = build_model(args, text.labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer, objective = make_optimizer(model, args), make_objective(args)
    rows = tokenize(text.train.select(range(min(args.batch_size, len(text.train)))), tokenizer, args.max_length)
    batch = {name: value.to(device) for name, value in DataCollatorWithPadding(tokenizer)(list(rows)).items()}
    forward = model.forward
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(args.mixed_precision))

    def autocast_forward(*inputs: Any, **named: Any) -> Any:
        # Around the forward pass alone, as Accelerate does it.
        with torch.autocast(device, precision, enabled=precision is not None):
            return forward(*inputs, **named)

    model.forward = autocast_forward

    def step() -> None:
        objective(model, batch, lambda loss: loss.backward())
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _products() -> str:
    """Name the type in which float32 matrices are multiplied here, by what is left of a number.

    The machine decides what "medium" is, and of two with the same instructions only one may use them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    number = torch.full((256, 256), 1 + 2**-9 + 2**-14, device=device)
    left = torch.mm(number, torch.eye(256, device=device))[0, 0].item()
    return {1.0: "bfloat16", 1 + 2**-9: "tf32"}.get(left, "float32")


def _best(tried: list[dict[str, Any]], candidates: list[Candidate]) -> Candidate:
    """The candidate of highest clean accuracy; of equal ones the first in the grid, whichever was tried first.

    Raises:
        InputError: If training diverged with each of them.
    """
    clean = {str(entry["searched"]): entry["clean"] for entry in tried}
    learnt = [candidate for candidate in candidates if clean[str(candidate.searched)] is not None]
    if not learnt:
        raise InputError("training diverged with every setting of the search; lower its learning rates.")
    return max(learnt, key=lambda candidate: clean[str(candidate.searched)])


def _chosen(option: str, asked: list[Any], there: list[Any]) -> list[Any]:
    for value in asked:
        if value not in there:
            raise InputError(f"{option}={value!r} is not in the grid; choose from {', '.join(map(str, there))}.")
    return [value for value in there if not asked or value in asked]


def _same(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix results of different settings in one comparison."""
    for part, settings in wanted.items():
        have = found.get(part) or {}
        for name in {**have, **settings}:
            # An empty list asks for nothing, as results do that are older than the setting.
            if have.get(name) != settings.get(name) and (have.get(name), settings.get(name)) != (None, []):
                raise InputError(
                    f"{name}={have.get(name)!r} in {file}, but the grid says {settings.get(name)!r}; delete the file "
                    "to make it anew, or pass another --output_dir and --runs_dir."
                )


def _read_list(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is truncated or no JSON ({reason(error)}); delete it to search anew.") from error


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit code: 0, 1 if something of the grid failed, 2 if nothing could be done."""
    (args,) = Parser(CompareArguments, description=__doc__).read(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        grid = read_grid(Path(args.grid))
        comparison = Comparison(grid, args)
        comparison.run()
        files = comparison.results()
        for line in comparison.failures:
            print(f"not in the report: {line}", file=sys.stderr)
        report = write_report(
            files,
            args.output_dir,
            baseline=grid.baseline,
            order=list(grid.methods),
            title=grid.title,
            as_html=args.as_html,
        )
    except (InputError, ResultFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in report.problems:
        print(f"report: {line}", file=sys.stderr)
    print(f"\n{report.runs} runs: {report.page}")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
