"""The example scripts, from their command lines to their files, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest

from rose_peft.robustness.results import load_result

from .conftest import REPOSITORY, need_textattack, nltk_folder, tiny_bert


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", REPOSITORY / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # HfArgumentParser looks dataclasses up in their module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tokenizer: Any, tmp_path: Path) -> Path:
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path / "model"
    tiny_bert(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    """Folder with a few sentences in the layout of GLUE and AdvGLUE."""
    rows = [("the story was good", 1), ("a dull film", 0), ("it is great", 1), ("very boring plot", 0)] * 3
    table = pandas.DataFrame(rows, columns=["sentence", "label"])
    for folder in ("glue/sst2", "adv_glue/adv_sst2"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        table.to_parquet(tmp_path / "data" / folder / "validation.parquet")
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["attack", "landscape", "noise"])
def test_help_says_how_to_run_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"python examples/{name}.py" in " ".join(text.split())
    assert "--batch_size" in text


def test_noise_script(model: Path, sst2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(tmp_path / "out")]
    assert script("noise").main([*command, "--kinds", "typos", "casing", "--rates", "0.5", "--method", "plain"]) == 0
    result = load_result(tmp_path / "out" / "noise.json")
    assert (result.method, result.task) == ("plain", "sst2")
    wanted = {"clean/accuracy", "adv_glue/accuracy", "noise/typos@0.5/accuracy", "noise/mean/accuracy"}
    assert wanted <= set(result.figures)
    assert set(result.config["words_changed"]) == {"typos@0.5", "casing@0.5"}
    assert all(0 < share < 1 for share in result.config["words_changed"].values())
    assert (tmp_path / "out" / "noise.png").stat().st_size > 1000
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("noise/typos@0.5/accuracy"))
    assert line.endswith(f"{result.config['words_changed']['typos@0.5']:.1%} of words changed")
    assert script("noise").main([*command, "--kinds", "smudges"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: kind='smudges' is unknown")


def test_noise_script_goes_on_without_adv_glue(model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(sst2 / "adv_glue")
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(tmp_path / "out")]
    assert script("noise").main([*command, "--kinds", "typos", "--rates", "0.5"]) == 0
    result = load_result(tmp_path / "out" / "noise.json")
    assert "noise/typos@0.5/accuracy" in result.figures and "adv_glue/accuracy" not in result.figures
    assert "holds none of validation.parquet" in result.config["unavailable"]["AdvGLUE"]
    assert f"AdvGLUE is not measured: {result.config['unavailable']['AdvGLUE']}" in capsys.readouterr().err


@pytest.mark.parametrize("dimensions", [1, 2])
def test_landscape_script(model: Path, sst2: Path, tokenizer: Any, tmp_path: Path, dimensions: int) -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(
        tiny_bert(tokenizer), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    )
    lora.peft_config["default"].base_model_name_or_path = str(model)
    lora.save_pretrained(tmp_path / "lora")
    command = ["--models", f"plain={model}", f"with LoRA={tmp_path / 'lora'}", "--output_dir", str(tmp_path / "out")]
    command += ["--task", "sst2", "--data_dir", str(sst2), "--points", "3", "--probes", "2", "--ascent_steps", "2"]
    assert script("landscape").main([*command, "--dimensions", str(dimensions)]) == 0
    surfaces = json.loads((tmp_path / "out" / "surfaces.json").read_text())
    assert list(surfaces) == ["plain", "with LoRA"]
    for name, surface in surfaces.items():
        figures = load_result(tmp_path / "out" / name / "sharpness.json").figures
        centre = surface["losses"][1] if dimensions == 1 else surface["losses"][1][1]
        assert figures["landscape/loss"].value == pytest.approx(centre, rel=1e-5)
        assert figures["landscape/worst_loss_increase"].value > 0
        assert figures["landscape/hessian_trace"].n == 2
    # The adapter was loaded with its weights: its loss is not the base model's.
    assert surfaces["plain"]["losses"] != surfaces["with LoRA"]["losses"]
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst2", "--data_dir", "absent"], "holds none of validation.parquet"),
        (["--task", "sst3"], "task='sst3' is unknown"),
        ([], "pass exactly one of them"),
        (["--data_file", "x.csv"], "needs --text_columns"),
        (["--task", "sst2", "--text_columns", "a"], "a task knows its own"),
        (["--task", "sst2", "--dtype", "int3", "--data_dir", "DATA"], "dtype='int3'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(sst2) if argument == "DATA" else argument for argument in arguments]
    command = ["--model", str(model), "--output_dir", str(tmp_path / "out"), *arguments]
    for name in ("attack", "noise"):
        assert script(name).main(command) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error


def test_a_folder_without_a_model_is_one_line(sst2: Path, tmp_path: Path, capsys) -> None:
    command = ["--models", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--task", "sst2"]
    assert script("landscape").main([*command, "--data_dir", str(sst2)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"model='{tmp_path}' cannot be loaded as a sequence classifier" in error


def test_one_model_that_is_missing_costs_the_others_nothing(model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    command = ["--models", f"gone={tmp_path / 'gone'}", f"good={model}", "--output_dir", str(tmp_path / "out")]
    command += ["--task", "sst2", "--data_dir", str(sst2), "--points", "3", "--probes", "0", "--ascent_steps", "1"]
    assert script("landscape").main([*command, "--dimensions", "1"]) == 2
    assert f"error: gone: model='{tmp_path / 'gone'}' cannot be loaded" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "out" / "surfaces.json").read_text())) == ["good"]
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000


@pytest.mark.parametrize("option", [["--bf16"], ["--max_length", "20"], ["--allow_downloads"]])
def test_speed_refuses_what_it_cannot_heed(option: list[str], model: Path, sst2: Path, capsys) -> None:
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--speed", *option]
    assert script("attack").main(command) == 2
    assert capsys.readouterr().err.startswith(f"error: {option[0][2:]}=")


def test_recipes_are_listed_without_textattack(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("attack").main(["--list_recipes"]) == 0
    text = capsys.readouterr().out
    assert "pwws (Ren et al. 2019" in text and "needs NLTK's list of stop words" in text


def test_attack_script_survives_a_kill(model: Path, sst2: Path, tmp_path: Path) -> None:
    need_textattack()
    environment = {**os.environ, "NLTK_DATA": nltk_folder(), "PYTHONPATH": str(REPOSITORY)}

    def command(folder: str) -> list[str]:
        options = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2)]
        recipes = ["--recipes", "deepwordbug", "textfooler"]
        program = str(REPOSITORY / "examples" / "attack.py")
        return [sys.executable, program, *options, *recipes, "--output_dir", str(tmp_path / folder)]

    records = tmp_path / "killed" / "records" / "deepwordbug.jsonl"
    process = subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (records.exists() and records.read_bytes().count(b"\n") > 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in ("killed", "whole"):
        done = subprocess.run(command(folder), env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "recipe textfooler does not run: needs " in done.stderr
        assert "deepwordbug" in done.stdout
    assert records.read_text() == (tmp_path / "whole" / "records" / "deepwordbug.jsonl").read_text()
    assert len(records.read_text().splitlines()) == 13
