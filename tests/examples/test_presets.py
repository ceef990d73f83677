"""The published settings by name: what they hold, what overrides them, and what they look like in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.task import options

pytest.importorskip("datasets")
from examples import train
from examples.training.arguments import TrainArguments, TrainParser
from examples.training.presets import PRESETS, with_preset

# Three cells of the authors' table, one of each strategy: learning rate and upper quantile.
KNOWN = {
    "first_order/rte/roberta-large": (1e-5, 0.8),
    "second_order/qqp/roberta-base": (1e-4, 0.6),
    "ensemble/sst2/roberta-base": (5e-5, 0.4),
}


def test_there_is_one_for_each_strategy_task_and_model() -> None:
    assert len(PRESETS) == 3 * 4 * 2
    for name, settings in PRESETS.items():
        assert name.split("/")[0] == settings["strategy"]
        assert (settings["epochs"], settings["batch_size"], settings["warmup_ratio"]) == (10, 32, 0.0)
    for name, pair in KNOWN.items():
        assert (PRESETS[name]["learning_rate"], PRESETS[name]["upper_quantile"]) == pair


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_run_that_can_be_made(name: str) -> None:
    args = TrainArguments(**with_preset({"preset": name, "task": "sst2"}))
    args.check()
    args.refuse_without_effect(args.given())
    config = args.rose_config()
    assert config is not None and config.upper_quantile == PRESETS[name]["upper_quantile"]


def test_they_are_the_table_of_the_documentation() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (tasks,) = (row[1:] for row in rows if "QNLI" in row)
    found = {}
    for name, *cells in (row for row in rows if "RoBERTa" in row[0]):
        strategy, model = name.split(",")
        strategy = strategy.split("(")[0].strip().replace(" ", "_")
        for task, cell in zip(tasks, cells, strict=True):
            pair = tuple(map(float, cell.split("/")))
            found[f"{strategy}/{task.lower().replace('-', '')}/{model.strip().lower()}"] = pair
    assert found == {name: (one["learning_rate"], one["upper_quantile"]) for name, one in PRESETS.items()}


def test_options_given_go_first_even_where_they_are_the_default() -> None:
    plain = TrainArguments()
    given = ["--task", "sst2", "--preset", "first_order/rte/roberta-base", "--epochs", str(plain.epochs)]
    args = TrainParser().parse([*given, "--upper_quantile", "0.5"])
    assert (args.epochs, args.upper_quantile, args.learning_rate) == (plain.epochs, 0.5, 4e-5)
    assert PRESETS[str(args.preset)]["epochs"] != plain.epochs


def test_a_preset_needs_data_and_is_noted_with_the_run(inputs: dict[str, str], tmp_path: Path, capsys) -> None:
    name = "second_order/sst2/roberta-base"
    assert train.main(["--preset", name, "--output_dir", str(tmp_path / "demo")]) == 2
    assert "has no effect without --task" in capsys.readouterr().err
    assert train.main(options(inputs, tmp_path / "run", "--preset", name, "--max_length", "32")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "second_order"
    config = results["config"]
    assert config["preset"] == name and config["upper_quantile"] == 0.3 and config["learning_rate"] == 1e-3
