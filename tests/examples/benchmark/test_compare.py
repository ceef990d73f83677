"""examples.benchmark.compare as a user runs it: a grid killed half way and resumed, the search, failing cells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rose_peft.robustness import DivergedModelError, Estimate, RobustnessError, Row, load_result
from rose_peft.robustness.results import find

ROOT = Path(__file__).parents[3]
pytest.importorskip("datasets")
from examples.benchmark import compare, measure  # noqa: E402
from examples.benchmark.grid import Evaluation, Grid, read_grid  # noqa: E402
from examples.training import run  # noqa: E402
from examples.training.arguments import DivergedError, InputError  # noqa: E402

ATTACKED = find_spec("textattack") is not None and "NLTK_DATA" in os.environ


def content(inputs: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A grid of two methods and two seeds that takes seconds."""
    return {
        "title": "Tiny",
        "seeds": [0, 1],
        "tasks": {"sst2": {"max_train_samples": 64}},
        "common": {"model_name_or_path": inputs["model"], "epochs": 2, "batch_size": 16, "max_length": 32},
        "search": {"learning_rate": ["1e-3", 3e-3]},
        "methods": {"plain": {"strategy": "none"}, "ROSE": {"strategy": "ensemble"}},
        "evaluation": {
            "noise_rates": [0.3],
            "noise_kinds": ["typos"],
            "recipes": ["deepwordbug"] if ATTACKED else [],
            "attack_examples": 3,
            "sharpness_examples": 8,
            "ascent_steps": 1,
            "probes": 1,
        },
        "cost_rounds": 2,
        **changes,
    }


def options(inputs: dict[str, str], folder: Path, grid: dict[str, Any], *more: str) -> list[str]:
    """Write the grid and return the command line for it."""
    folder.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    places = {"grid": "grid.yaml", "output_dir": "out", "runs_dir": "runs"}
    line = [part for name, place in places.items() for part in (f"--{name}", str(folder / place))]
    return [*line, "--data_dir", inputs["data"], *more]


def figures(folder: Path) -> dict[str, Any]:
    """Everything that a grid found: file -> rows, or the search."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "out").rglob("*.json")):
        name = str(file.relative_to(folder / "out"))
        if file.name == "search.json":
            found[name] = json.loads(file.read_text())
        elif file.name != "cost.result.json":
            found[name] = load_result(file).rows
    return found


# Runs a comparison whose process dies as a machine would lose it: at the first checkpoint after a file is there.
DYING = """
import os, signal, sys
from examples.benchmark import compare
from examples.training import run

save, sign = run._save, sys.argv[1]

def save_and_die(*arguments):
    save(*arguments)
    if os.path.exists(sign):
        os.kill(os.getpid(), signal.SIGKILL)

run._save = save_and_die
compare.main(sys.argv[2:])
"""


def test_a_grid_killed_half_way_and_resumed_equals_one_in_one_piece(inputs: dict[str, str], tmp_path: Path) -> None:
    grid = content(inputs)
    assert compare.main(options(inputs, tmp_path / "whole", grid)) == 0
    line = options(inputs, tmp_path / "broken", grid)
    out = tmp_path / "broken" / "out" / "sst2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # In the search; after half of the cells, in the training of the next one.
    for sign in (out / "plain" / "search.json", out / "ROSE" / "seed0.result.json"):
        process = subprocess.run(
            [sys.executable, "-c", DYING, str(sign), *line], env=environment, capture_output=True, text=True
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert sign.exists() and not (out / "ROSE" / "seed1.result.json").exists()
    assert list((tmp_path / "broken" / "runs").rglob("checkpoints"))
    before = (out / "ROSE" / "seed0.result.json").read_bytes()
    assert compare.main(line) == 0
    assert (out / "ROSE" / "seed0.result.json").read_bytes() == before
    found, whole = figures(tmp_path / "broken"), figures(tmp_path / "whole")
    assert found == whole
    cells = {f"sst2/{method}/seed{seed}.result.json" for method in ("plain", "ROSE") for seed in (0, 1)}
    assert set(found) == cells | {f"sst2/{method}/search.json" for method in ("plain", "ROSE")}
    wanted = {"clean_accuracy", "robust_accuracy", "noise_accuracy", "worst_loss_increase"}
    wanted |= {"accuracy_under_attack"} if ATTACKED else set()
    assert all(wanted <= {row.measure for row in found[cell]} for cell in cells)
    page = (tmp_path / "broken" / "out" / "report.md").read_text()
    assert "| plain (2 seeds) |" in page and "| ROSE (2 seeds) |" in page and "time of a step, x plain" in page
    assert "](sst2/ROSE/masks.png)" in page


def test_what_is_done_is_not_done_again(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = content(inputs, seeds=[0], search={}, cost_rounds=0)
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    assert not list((tmp_path / "g" / "runs").rglob("checkpoints"))
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(compare, "measure", None)
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0


def test_a_run_stays_good_when_a_default_changes_that_has_no_effect_in_it(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {5e-5: 0.6})
    line = options(inputs, tmp_path / "g", content(inputs, seeds=[0], search={}, cost_rounds=0))
    assert compare.main(line) == 0
    monkeypatch.setattr(run, "train", None)
    for method in ("plain", "ROSE"):
        file = tmp_path / "g" / "runs" / "sst2" / method / "seed0" / "results.json"
        old = json.loads(file.read_text())
        old["config"] |= {"gamma": 0.3, "risk_smoothing": 0.8}  # nothing to a paired pass, nor to plain training
        file.write_text(json.dumps(old))
        (tmp_path / "g" / "out" / "sst2" / method / "seed0.result.json").unlink()
    assert compare.main(line) == 1
    error = capsys.readouterr().err
    assert "sst2, ROSE, seed 0: gamma=0.5, but the run in" in error and "plain" not in error


def read_grid_of(grid: dict[str, Any], folder: Path) -> Grid:
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return read_grid(folder / "grid.yaml")


def arguments_of(folder: Path) -> compare.CompareArguments:
    return compare.CompareArguments(grid="", output_dir=str(folder / "out"), runs_dir=str(folder / "runs"))


class Fake:
    """Stands in for training and measuring: clean accuracies by learning rate, and a record of what was trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clean: dict[float, float]) -> None:
        self.clean = clean
        self.trained: list[tuple[str, int, float]] = []
        monkeypatch.setattr(run, "train", self.train)
        monkeypatch.setattr(run, "load_text", lambda args: None)
        monkeypatch.setattr(compare, "measure", self.measure)

    def train(self, args: Any, text: None) -> None:
        self.trained.append((args.strategy, args.seed, args.learning_rate))
        folder = Path(args.output_dir)
        (folder / "model").mkdir(parents=True)
        best = {"epoch": 1, "clean": {"accuracy": self.clean[args.learning_rate]}}
        options = {name: value for name, value in vars(args).items() if name not in run.NOT_DEFINING}
        known = {"best": best, "history": [], "steps": 1, "device": "cpu", "rose": None, "config": options}
        known["versions"] = {"rose-peft commit": "abc1234"}
        (folder / "results.json").write_text(json.dumps(known))

    def measure(self, model_dir: Path, *arguments: Any) -> tuple[list[Row], dict[str, str]]:
        return [Row("clean_accuracy", Estimate(0.5, 10))], {}


def test_the_search_keeps_the_best_by_clean_accuracy_for_every_seed(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.8, 1e-2: 0.7})
    grid = content(inputs, search={"learning_rate": [1e-3, 3e-3, 1e-2]}, cost_rounds=0)
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    assert [entry for entry in fake.trained if entry[0] == "none"] == [
        ("none", 0, 1e-3),
        ("none", 0, 3e-3),
        ("none", 0, 1e-2),
        ("none", 1, 3e-3),
    ]
    chosen = load_result(tmp_path / "g" / "out" / "sst2" / "ROSE" / "seed1.result.json").config
    assert chosen["searched"] == {"learning_rate": 3e-3} and chosen["options"]["learning_rate"] == 3e-3


def test_a_setting_that_diverges_does_not_win_and_the_search_goes_on(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.5})

    def train(args: Any, text: None) -> None:
        if args.learning_rate == 1e-3 or args.strategy == "none":
            raise DivergedError("training diverged")
        Fake.train(fake, args, text)

    monkeypatch.setattr(run, "train", train)
    line = options(inputs, tmp_path / "g", content(inputs, seeds=[0], cost_rounds=0))
    assert compare.main(line) == 1
    found = figures(tmp_path / "g")
    assert [entry["clean"] for entry in found["sst2/ROSE/search.json"]] == [None, 0.5]
    assert load_result(tmp_path / "g/out/sst2/ROSE/seed0.result.json").config["searched"] == {"learning_rate": 3e-3}
    errors = capsys.readouterr().err
    assert "sst2, plain, seed 0: training diverged with every setting of the search; lower its learning" in errors
    monkeypatch.setattr(run, "train", None)
    assert compare.main(line) == 1  # what diverged is not trained again


def test_a_cell_that_fails_is_named_and_the_others_run(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, {5e-5: 0.6})

    def measure(model_dir: Path, *arguments: Any) -> Any:
        if model_dir.parent.parent.name == "ROSE" and model_dir.parent.name == "seed0":
            raise RobustnessError("no luck today")
        return Fake.measure(fake, model_dir, *arguments)

    monkeypatch.setattr(compare, "measure", measure)
    line = options(inputs, tmp_path / "g", content(inputs, search={}, cost_rounds=0))
    assert compare.main(line) == 1
    assert "not in the report: sst2, ROSE, seed 0: no luck today" in capsys.readouterr().err
    assert set(figures(tmp_path / "g")) == {
        "sst2/plain/seed0.result.json",
        "sst2/plain/seed1.result.json",
        "sst2/ROSE/seed1.result.json",
    }
    trained = len(fake.trained)
    monkeypatch.setattr(compare, "measure", fake.measure)
    assert compare.main(line) == 0  # what failed is tried again, from the model that is there
    assert len(fake.trained) == trained and "sst2/ROSE/seed0.result.json" in figures(tmp_path / "g")


@pytest.mark.parametrize(
    ("precision", "fraction_bits", "products"),
    [("medium", 7, "bfloat16"), ("medium", 10, "tf32"), ("medium", 23, "float32"), (None, 23, "float32")],
)
def test_the_grid_says_how_float32_is_multiplied_and_each_result_what_the_machine_made_of_it(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str | None,
    fraction_bits: int,
    products: str,
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.8})
    seen = []

    def train(args: Any, text: None) -> None:
        seen.append(torch.get_float32_matmul_precision())
        fake.train(args, text)

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        a, b = ((part.view(torch.int32) >> 23 - fraction_bits << 23 - fraction_bits) for part in (left, right))
        return a.view(torch.float32) @ b.view(torch.float32)

    monkeypatch.setattr(torch, "mm", multiply)
    grid = content(inputs, seeds=[0], cost_rounds=0, **({} if precision is None else {"matmul_precision": precision}))
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    assert set(seen) == {precision or "highest"} and torch.get_float32_matmul_precision() == "highest"
    (result,) = (tmp_path / "g" / "out" / "sst2" / "plain").glob("*.result.json")
    assert load_result(result).config["products"] == products
    assert load_result(result).config["trained_with"] == {"rose-peft commit": "abc1234"}
    tried = json.loads((result.parent / "search.json").read_text())
    assert [entry["products"] for entry in tried] == [products, products]


def test_results_of_other_settings_are_not_mixed_in(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {1e-3: 0.6, 2e-3: 0.6})
    grid = content(inputs, search={}, cost_rounds=0)
    grid["common"]["learning_rate"] = 1e-3
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    kept = figures(tmp_path / "g")
    grid["common"]["learning_rate"] = 2e-3
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 2
    assert "learning_rate=0.001 in" in capsys.readouterr().err
    grid["common"]["learning_rate"] = 1e-3
    grid["evaluation"]["noise_rates"] = [0.5]
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 2
    assert "noise_rates=[0.3] in" in capsys.readouterr().err
    assert figures(tmp_path / "g") == kept


def test_refused_results_are_not_reported(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.5, 1e-2: 0.7})
    grid = content(inputs, search={"learning_rate": [1e-3, 3e-3]}, cost_rounds=0)
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    page = tmp_path / "g" / "out" / "report.md"
    assert "4 runs: 2 methods, 1 task, seeds 0, 1." in page.read_text()
    grid["search"] = {"learning_rate": [1e-3, 3e-3, 1e-2]}  # one more, and it wins
    grid["seeds"] = [0, 1, 2, 3]
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 1
    assert "4 runs: 2 methods, 1 task, seeds 2, 3." in page.read_text()
    assert "not in the report: sst2, plain, seed 0: " in capsys.readouterr().err
    del grid["methods"]["ROSE"]
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 1
    assert "2 runs: 1 method, 1 task, seeds 2, 3." in page.read_text()
    assert "ROSE/seed2.result.json is of no method" in capsys.readouterr().err


def test_of_equal_settings_the_first_in_the_grid_is_kept_whichever_was_tried_first(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.6})
    for rates in ([3e-3], [3e-3, 1e-3]):
        grid = content(inputs, search={"learning_rate": rates}, cost_rounds=0)
        compare.Comparison(read_grid_of(grid, tmp_path), arguments_of(tmp_path))._search("sst2", "plain")
    grid = content(inputs, search={"learning_rate": [1e-3, 3e-3]}, cost_rounds=0)
    found = compare.Comparison(read_grid_of(grid, tmp_path), arguments_of(tmp_path))._search("sst2", "plain")
    assert found == {"learning_rate": 1e-3}


def test_texts_may_be_longer_in_the_evaluation_than_in_the_training(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, {5e-5: 0.6})
    lengths = []

    def measure(model_dir: Path, task: str, data_dir: str, max_length: int, *arguments: Any) -> Any:
        lengths.append(max_length)
        return fake.measure(model_dir)

    monkeypatch.setattr(compare, "measure", measure)
    for place, changes in (("own", {"max_length": 384}), ("training", {})):
        grid = content(inputs, search={}, cost_rounds=0, seeds=[0], methods={"plain": {"strategy": "none"}})
        grid["evaluation"] |= changes
        assert compare.main(options(inputs, tmp_path / place, grid)) == 0
    assert lengths == [384, 32]


def test_a_truncated_result_is_named_and_kept(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {5e-5: 0.6})
    line = options(inputs, tmp_path / "g", content(inputs, search={}, cost_rounds=0))
    assert compare.main(line) == 0
    file = tmp_path / "g" / "out" / "sst2" / "ROSE" / "seed0.result.json"
    file.write_bytes(file.read_bytes()[:60])
    assert compare.main(line) == 1
    assert "seed0.result.json: is truncated or no result file" in capsys.readouterr().err
    assert len(file.read_bytes()) == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds=[] must be a list"),
        ({"seeds": [0, 0]}, "seeds=[0, 0] must be different"),
        ({"surprise": 1}, "'surprise' is unknown in grid"),
        ({"baseline": "plane"}, "baseline='plane' is no method"),
        ({"tasks": {"sst3": None}}, "'sst3' is unknown in tasks; did you mean sst2?"),
        ({"tasks": {"mine": {"task": "sst3"}}}, "'sst3' is unknown in tasks; did you mean sst2?"),
        ({"tasks": {"mine": {"task": "sst2"}}}, "task='sst2' of 'mine' goes with a train_file and validation_file"),
        ({"tasks": {"sst2": {"train_file": "x.csv"}}}, "train_file and validation_file go together"),
        ({"tasks": {"../x": {"task": "sst2"}}}, "task '../x' names a folder"),
        ({"common": {"train_file": "x.csv"}}, "'train_file' is unknown in common"),
        ({"methods": {"plain": {"strategy": "none", "task": "rte"}}}, "'task' is unknown in plain"),
        ({"methods": {"plain": {"preset": "ensemble/sst2"}}}, "preset='ensemble/sst2' is unknown"),
        ({"evaluation": {"consistency_changes": ["sleep"]}}, "'sleep' is unknown in consistency_changes"),
        ({"common": {"epoch": 3}}, "'epoch' is unknown in common; did you mean epochs?"),
        ({"common": {"seed": 3}}, "'seed' is unknown in common"),
        ({"methods": {"plain": {"strategy": "nome"}}}, "sst2, plain: strategy='nome' is unknown"),
        ({"methods": {"plain": {"variant": "random"}}}, "variant='random' does not go with strategy='ensemble'"),
        ({"methods": {"plain": {"objective": "sam"}}}, "objective='sam' is unknown"),
        ({"common": {"learning_rate": "fast"}}, "learning_rate='fast' must be of type float"),
        ({"common": {"epochs": "three"}}, "epochs='three' must be of type int"),
        ({"common": {"epochs": None}}, "epochs=None must be of type int"),
        (
            {"methods": {"plain": {"strategy": "none"}, "x": {"search": {"learning_rate": [1e-3]}}}},
            "method 'x' searches 1 settings and the baseline 2",
        ),
        (
            {
                "methods": {
                    "plain": {"strategy": "none"},
                    "x": {"search": {"learning_rate": [1e-3, 2e-3], "gamma": [0.1, 0.9]}},
                }
            },
            "method 'x' searches 4 settings and the baseline 2",
        ),
        ({"common": {"learning_rate": 7e-5}}, None),
        ({"tasks": {"sst2": {"settings_of": "rte"}}}, "settings_of='rte' of 'sst2' is no task that searches"),
        ({"tasks": {"sst2": {"settings_of": ["sst2"]}}}, "settings_of=['sst2'] of 'sst2' is no task"),
        ({"tasks": {"sst2": {"settings_of": "sst2"}}}, "settings_of='sst2' of 'sst2' is no task that searches"),
        (
            {"tasks": {"sst2": {"settings_of": "rte"}, "rte": {"settings_of": "qnli"}, "qnli": {}}},
            "settings_of='rte' of 'sst2' is no task that searches; name qnli.",
        ),
        (
            {"methods": {"plain": {}, "x": {"settings_of": "plan"}}},
            "settings_of='plan' of 'x' is no method that searches; name plain.",
        ),
        (
            {"methods": {"plain": {}, "x": {"settings_of": "plain", "search": {"learning_rate": [1e-3, 3e-3]}}}},
            "method 'x' has a search and settings_of; leave one out",
        ),
        (
            {"methods": {"plain": {"strategy": "none", "learning_rate": 7e-5}}},
            "learning_rate of 'plain' is 7e-05 and searched too",
        ),
        ({"search": {"learning_rate": 5e-5}}, "learning_rate=5e-05 in search of 'plain' must be a list"),
        ({"search": {"learning_rate": [5e-5, 5e-5]}}, "must be a list of different values"),
        ({"search": {"seed": [0, 1]}}, "'seed' is unknown in search of 'plain'"),
        ({"methods": {"plain": {"search": {"gama": [0.1]}}}}, "'gama' is unknown in search of 'plain'"),
        ({"methods": {"plain": {"search": None}}}, "search=None of 'plain' must be options"),
        ({"methods": {"../plain": None}}, "method '../plain' names a folder"),
        ({"methods": {1: None}}, "1 in methods must be a name"),
        ({"methods": {"plain": 3}}, "'plain' in methods must be a name with options"),
        ({"cost_rounds": 1}, "cost_rounds=1 must be 0, or at least 2"),
        ({"cost_rounds": "x"}, "cost_rounds='x' must be a number"),
        ({"matmul_precision": "low"}, "matmul_precision='low' is unknown; choose from highest, high, medium"),
        ({"evaluation": {"noise_rates": 0.3}}, "noise_rates=0.3 must be of type list[float]"),
        ({"evaluation": {"noise_rates": [30]}}, "noise_rates=[30.0] must be numbers above 0 and at most 1"),
        ({"evaluation": {"attack_examples": "many"}}, "attack_examples='many' must be of type int"),
        ({"evaluation": {"probes": -1}}, "probes=-1 must be at least 0"),
        ({"evaluation": {"noise_kinds": ["typo"]}}, "'typo' is unknown in noise_kinds; did you mean typos?"),
        ({"evaluation": {"recipes": ["pwss"]}}, "'pwss' is unknown in recipes; did you mean pwws?"),
        ({"evaluation": {"probe": 1}}, "'probe' is unknown in evaluation; did you mean probes?"),
    ],
)
def test_a_bad_grid_is_one_line_before_anything_runs(
    inputs: dict[str, str],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = {**content(inputs), **changes}
    if message is None:  # the search goes before what is common to all
        options(inputs, tmp_path / "g", grid)
        assert (
            read_grid(tmp_path / "g" / "grid.yaml").candidates("sst2", "plain", 0)[0].options["learning_rate"] == 1e-3
        )
        return
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "g" / "out").exists() and not (tmp_path / "g" / "runs").exists()


@pytest.mark.parametrize("text", ["", "- 1", "seeds: [", None])
def test_a_grid_that_is_none_is_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(InputError, match="grid"):
        read_grid(tmp_path / "grid.yaml")


def test_each_run_has_its_own_precision(inputs: dict[str, str], tmp_path: Path) -> None:
    grid = content(inputs, seeds=[0], search={}, cost_rounds=0)
    grid["methods"] = {
        "plain": {"strategy": "none", "mixed_precision": "bf16"},
        "exact": {"strategy": "none", "mixed_precision": "no"},
        "unsaid": {"strategy": "none"},
    }
    grid["evaluation"] = {"noise_rates": [], "recipes": [], "sharpness_examples": 0}
    line = options(inputs, tmp_path / "g", grid)
    assert compare.main(line) == 0
    precisions, losses = {}, {}
    for method in grid["methods"]:
        (file,) = (tmp_path / "g" / "runs" / "sst2" / method).rglob("results.json")
        results = json.loads(file.read_text())
        precisions[method] = results["config"]["mixed_precision"]
        losses[method] = results["history"][-1]["loss"]
    assert precisions == {"plain": "bf16", "exact": "no", "unsaid": "no"}
    assert losses["exact"] == losses["unsaid"] != losses["plain"]


def test_a_step_is_timed_in_the_precision_of_training(inputs: dict[str, str], tmp_path: Path) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        grid = content(inputs, search={})
        grid["common"]["mixed_precision"] = precision
        line = options(inputs, tmp_path / "g", grid)
        (args,) = compare.Parser(compare.CompareArguments).read(line)
        comparison = compare.Comparison(read_grid(tmp_path / "g" / "grid.yaml"), args)
        seen = []
        with torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(output.dtype) if isinstance(module, torch.nn.Linear) else None  # noqa: B023
        ):
            candidate = comparison.grid.candidates("sst2", "ROSE", 0)[0]
            compare.stepper(candidate.arguments(tmp_path / "unused", inputs["data"]))()
        assert set(seen) == {dtype}


def test_costs_of_other_settings_are_not_mixed_in_and_count_as_no_run(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {5e-5: 0.6})
    monkeypatch.setattr(compare, "time_in_turn", lambda ways, rounds: {way: [1.0] * rounds for way in ways})
    grid = content(inputs, search={}, cost_rounds=2)
    assert compare.main(options(inputs, tmp_path / "g", grid, "--seeds", "1")) == 0
    page = (tmp_path / "g" / "out" / "report.md").read_text()
    assert "2 runs: 2 methods" in page and "| ROSE (1 seed) |" in page and "seeds 1." in page
    grid["methods"]["ROSE"]["gamma"] = 0.1
    assert compare.main(options(inputs, tmp_path / "g", grid, "--seeds", "0")) == 1
    assert "ROSE, cost: gamma=None in" in capsys.readouterr().err


def test_any_error_is_named_and_the_others_run(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, {5e-5: 0.6})

    def train(args: Any, text: None) -> None:
        if args.strategy == "none":
            raise MemoryError("no more")
        fake.train(args, text)

    monkeypatch.setattr(run, "train", train)
    assert compare.main(options(inputs, tmp_path / "g", content(inputs, search={}, cost_rounds=0))) == 1
    assert "sst2, plain, seed 1: MemoryError: no more" in capsys.readouterr().err
    assert set(figures(tmp_path / "g")) == {"sst2/ROSE/seed0.result.json", "sst2/ROSE/seed1.result.json"}


def test_what_cannot_be_measured_is_named_in_the_report_and_the_rest_is_kept(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = content(inputs, seeds=[0], search={}, cost_rounds=0, methods={"plain": {"strategy": "none"}})
    grid["evaluation"] |= {"recipes": ["bae"], "sharpness_examples": 0}
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    found = load_result(tmp_path / "g" / "out" / "sst2" / "plain" / "seed0.result.json")
    assert found.get("noise_accuracy", "typos", 0.3) and not any(row.part == "bae" for row in found.rows)
    assert list(found.config["unavailable"]) == ["attacks"]
    assert "attacks was not measured: " in (tmp_path / "g" / "out" / "report.md").read_text()
    assert "attacks was not measured: " in capsys.readouterr().err


def test_data_without_adv_glue_cost_the_other_figures_nothing(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(inputs["data"]) / "glue", tmp_path / "data" / "glue")
    grid = content(inputs, seeds=[0], search={}, cost_rounds=0, methods={"plain": {"strategy": "none"}})
    grid["evaluation"] |= {"recipes": [], "sharpness_examples": 0}
    there = {**inputs, "data": str(tmp_path / "data")}
    assert compare.main(options(there, tmp_path / "g", grid)) == 0
    found = load_result(tmp_path / "g" / "out" / "sst2" / "plain" / "seed0.result.json")
    assert {"clean_accuracy", "noise_accuracy"} == {row.measure for row in found.rows}
    assert "holds none of validation.parquet" in found.config["unavailable"]["AdvGLUE"]
    assert "AdvGLUE was not measured: " in capsys.readouterr().err


def test_a_diverged_model_has_no_figures(inputs: dict[str, str], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(inputs["model"], num_labels=2)
    model.classifier.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(inputs["model"]).save_pretrained(tmp_path / "model")
    settings = Evaluation(recipes=[], noise_rates=[], sharpness_examples=0)
    with pytest.raises(DivergedModelError, match="scores that are not finite"):
        measure.measure(tmp_path / "model", "sst2", inputs["data"], 32, settings, tmp_path / "attacks")


@pytest.mark.skipif(not ATTACKED, reason="needs TextAttack and the stop words (NLTK_DATA)")
def test_the_way_out_that_is_named_works(inputs: dict[str, str], tmp_path: Path) -> None:
    grid = content(inputs, seeds=[0], search={}, cost_rounds=0, methods={"plain": {"strategy": "none"}})
    grid["evaluation"] |= {"noise_rates": [], "sharpness_examples": 0}
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    grid["evaluation"]["attack_examples"] = 2
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 2  # nothing is left to report
    (tmp_path / "g" / "out" / "sst2" / "plain" / "seed0.result.json").unlink()
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    found = figures(tmp_path / "g")["sst2/plain/seed0.result.json"]
    assert find(found, "accuracy_under_attack", "deepwordbug").n == 2


def test_only_what_is_asked_for_runs(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {5e-5: 0.6})
    grid = content(inputs, search={}, cost_rounds=0)
    assert compare.main(options(inputs, tmp_path / "g", grid, "--methods", "plain", "--seeds", "1")) == 0
    assert set(figures(tmp_path / "g")) == {"sst2/plain/seed1.result.json"}
    assert compare.main(options(inputs, tmp_path / "g", grid, "--methods", "rose")) == 2
    assert "methods='rose' is not in the grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "benchmark" / "grids").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_grids_of_the_project_are_sound(path: Path) -> None:
    assert read_grid(path).baseline == "plain"


def test_masked_methods_may_search_their_quantile_at_each_learning_rate(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.8})
    space = {"learning_rate": [1e-3, 3e-3], "upper_quantile": [0.4, 0.7]}
    methods = {"plain": {"strategy": "none"}, "ROSE": {"strategy": "ensemble", "search": space}}
    assert compare.main(options(inputs, tmp_path / "g", content(inputs, methods=methods, cost_rounds=0))) == 0
    assert [entry[0] for entry in fake.trained].count("ensemble") == 5  # four tries, and the second seed
    chosen = load_result(tmp_path / "g" / "out" / "sst2" / "ROSE" / "seed1.result.json").config["searched"]
    assert chosen == {"learning_rate": 3e-3, "upper_quantile": 0.4}


def test_a_task_may_have_the_settings_that_another_one_found(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.8})
    glue = Path(inputs["data"]) / "glue" / "sst2"
    files = {f"{name}_file": str(glue / f"{name}.parquet") for name in ("train", "validation")}
    other = {"task": "sst2", **files, "settings_of": "sst2"}
    grid = content(inputs, tasks={"other": other, "sst2": {}}, cost_rounds=0, seeds=[0])
    grid["methods"] = {"plain": {"strategy": "none"}}
    line = options(inputs, tmp_path / "g", grid)
    assert compare.main([*line, "--tasks", "other"]) == 0
    # Two tries on sst2 that its own cell has no need to repeat, and the winner on the other task.
    assert fake.trained == [("none", 0, 1e-3), ("none", 0, 3e-3), ("none", 0, 3e-3)]
    out = tmp_path / "g" / "out"
    assert load_result(out / "other" / "plain" / "seed0.result.json").config["searched"] == {"learning_rate": 3e-3}
    assert not (out / "other" / "plain" / "search.json").exists()
    assert compare.main(line) == 0 and len(fake.trained) == 3
    assert "2 runs: 1 method, 2 tasks" in (out / "report.md").read_text()
    search = out / "sst2" / "plain" / "search.json"
    tried = json.loads(search.read_text())
    search.write_text(json.dumps([{**entry, "clean": 1 - entry["clean"]} for entry in tried]))
    assert compare.main([*line, "--tasks", "other"]) == 2  # its result is of settings that won no longer
    assert "learning_rate=0.003 in" in capsys.readouterr().err


def test_a_method_may_have_the_settings_that_another_one_found(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, {1e-3: 0.6, 3e-3: 0.8})
    space = {"learning_rate": [1e-3, 3e-3], "upper_quantile": [0.4, 0.7]}
    methods = {
        "plain": {"strategy": "none"},
        "dear": {"strategy": "first_order", "risk_pass": "paired", "settings_of": "cheap"},
        "cheap": {"strategy": "ensemble", "risk_pass": "sampled", "search": space},
    }
    line = options(inputs, tmp_path / "g", content(inputs, methods=methods, cost_rounds=0, seeds=[0]))
    assert compare.main([*line, "--methods", "dear"]) == 0
    # Four tries of the other method, whose own cell is not asked for, and one run of its own.
    assert [entry[0] for entry in fake.trained] == ["ensemble"] * 4 + ["first_order"]
    out = tmp_path / "g" / "out" / "sst2"
    config = load_result(out / "dear" / "seed0.result.json").config
    assert config["searched"] == {"learning_rate": 3e-3, "upper_quantile": 0.4}
    assert (config["options"]["strategy"], config["options"]["risk_pass"]) == ("first_order", "paired")
    assert (out / "cheap" / "search.json").exists() and not (out / "dear" / "search.json").exists()
    assert compare.main(line) == 0  # the report takes them together
    assert "3 runs: 3 methods" in (tmp_path / "g" / "out" / "report.md").read_text()


def test_a_preset_is_the_ground_that_other_options_stand_on(inputs: dict[str, str], tmp_path: Path) -> None:
    methods = {"plain": {"strategy": "none"}, "ROSE": {"preset": "ensemble/sst2/roberta-base", "gamma": 0.3}}
    options(inputs, tmp_path / "g", content(inputs, methods=methods))
    found = read_grid(tmp_path / "g" / "grid.yaml").candidates("sst2", "ROSE", 0)[0].options
    assert (found["upper_quantile"], found["weight_decay"], found["strategy"]) == (0.4, 0.01, "ensemble")
    assert (found["gamma"], found["epochs"], found["learning_rate"]) == (0.3, 2, 1e-3)  # own, common, searched


def test_a_task_may_bring_its_own_files(inputs: dict[str, str], tmp_path: Path) -> None:
    glue = Path(inputs["data"]) / "glue" / "sst2"
    here = tmp_path / "data"
    here.mkdir()
    for name in ("train", "validation"):
        shutil.copyfile(glue / f"{name}.parquet", here / f"{name}.parquet")
    # Fewer clean examples than the task's own, so that the figure tells which were used.
    table = pandas.read_parquet(here / "validation.parquet")
    table[:20].to_parquet(here / "some.parquet")
    reviews = {"task": "sst2", "train_file": "train.parquet", "validation_file": "some.parquet"}
    reviews |= {"robust_files": ["rest=validation.parquet"], "max_train_samples": 64}
    grid = content(inputs, seeds=[0], search={}, cost_rounds=2, methods={"plain": {"strategy": "none"}})
    grid |= {"tasks": {"reviews": reviews}}
    grid["evaluation"] |= {"recipes": [], "sharpness_examples": 0, "consistency_changes": ["dropout", "typos"]}
    assert compare.main(options({**inputs, "data": str(here)}, tmp_path / "g", grid)) == 0
    found = load_result(tmp_path / "g" / "out" / "reviews" / "plain" / "seed0.result.json")
    assert found.task == "reviews" and found.get("clean_accuracy").n == 20
    assert found.get("robust_accuracy", "rest").n == len(table)
    assert all("rest" not in epoch["robust"] for epoch in found.config["history"])  # of the best epoch alone
    assert found.get("flipped_share", "dropout").n == found.get("flipped_share", "typos", 0.1).n == 20
    assert (tmp_path / "g" / "out" / "reviews" / "plain" / "cost.result.json").exists()


def test_results_older_than_a_setting_that_asks_for_nothing_are_still_good(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Fake(monkeypatch, {5e-5: 0.6})
    grid = content(inputs, search={}, cost_rounds=0)
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    for file in (tmp_path / "g" / "out").rglob("seed*.result.json"):
        old = json.loads(file.read_text())
        assert old["config"]["evaluation"].pop("consistency_changes") == []
        file.write_text(json.dumps(old))
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 0
    grid["evaluation"]["consistency_changes"] = ["dropout"]
    assert compare.main(options(inputs, tmp_path / "g", grid)) == 2
    assert "consistency_changes=None in" in capsys.readouterr().err
