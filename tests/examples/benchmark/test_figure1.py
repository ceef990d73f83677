"""examples.benchmark.figure1 as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.task import tiny_task

pytest.importorskip("datasets")
from examples.benchmark import figure1
from examples.training import run


def test_four_panels_in_one_command_and_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tiny_task(tmp_path)
    line = ["--task", "sst2", "--data_dir", inputs["data"], "--model_name_or_path", inputs["model"]]
    line += [
        "--output_dir",
        str(tmp_path / "out"),
        "--epochs",
        "1",
        "--overfit_samples",
        "16",
        "--overfit_epochs",
        "40",
    ]
    line += [
        "--points",
        "3",
        "--num_examples",
        "8",
        "--probes",
        "1",
        "--learning_rate",
        "1e-3",
        "--max_length",
        "32",
        "--seed",
        "3",
    ]
    assert figure1.main(line) == 0
    surfaces = json.loads((tmp_path / "out" / "landscape" / "surfaces.json").read_text())
    assert list(surfaces) == ["before fine-tuning", "overfitted", "plain", "ROSE (ensemble)"]
    picture = tmp_path / "out" / "landscape" / "landscape.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The overfitted model is the last one of many epochs on few examples.
    overfitted, plain = (
        json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in ("overfitted", "plain")
    )
    assert overfitted["best"]["epoch"] == 40 and overfitted["config"]["max_train_samples"] == 16
    assert plain["best"]["epoch"] == 1 and plain["config"]["max_train_samples"] is None
    monkeypatch.setattr(run, "train", None)
    picture.unlink()
    assert figure1.main(line) == 0 and picture.exists()
    assert figure1.main([*line, "--learning_rate", "2e-3"]) == 2
    assert "learning_rate=0.002, but the run in" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "landscape" / "plain" / "sharpness.result.json").read_text())["seed"] == 3
    for wrong in (("--strategy", "none"), ("--overwrite",), ("--train_file", "x.csv")):
        assert figure1.main([*line, *wrong]) == 2
