"""The subcommands, from their command lines to their files, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rose_peft.robustness.command_line import COMMANDS, main
from rose_peft.robustness.command_line.arguments import RunArguments
from rose_peft.robustness.results import load_result
from tests.helpers.victims import REPOSITORY, need_textattack, nltk_folder, tiny_bert


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_to_run_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m rose_peft.robustness {name} " in " ".join(text.split())
    assert "--output_dir" in text


def test_noise_script(model: Path, sst2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(tmp_path / "out")]
    assert main(["noise", *command, "--kinds", "typos", "casing", "--rates", "0.5", "--method", "plain"]) == 0
    result = load_result(tmp_path / "out" / "noise.result.json")
    assert (result.method, result.task) == ("plain", "sst2")
    assert [(row.measure, row.part, row.rate) for row in result.rows] == [
        ("clean_accuracy", "", None),
        ("noise_accuracy", "typos", 0.5),
        ("noise_accuracy", "casing", 0.5),
        ("robust_accuracy", "AdvGLUE", None),
    ]
    changed = result.config["words_changed"]
    assert [(entry["kind"], entry["rate"]) for entry in changed] == [("typos", 0.5), ("casing", 0.5)]
    assert all(0 < entry["share"] < 1 for entry in changed)
    assert (tmp_path / "out" / "noise.png").stat().st_size > 1000
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("noise typos accuracy at 0.5"))
    assert line.endswith(f"{changed[0]['share']:.1%} of words changed")
    assert main(["noise", *command, "--kinds", "smudges"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: kind='smudges' is unknown")


def test_noise_script_goes_on_without_adv_glue(model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(sst2 / "adv_glue")
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(tmp_path / "out")]
    assert main(["noise", *command, "--kinds", "typos", "--rates", "0.5"]) == 0
    result = load_result(tmp_path / "out" / "noise.result.json")
    assert [row.measure for row in result.rows] == ["clean_accuracy", "noise_accuracy"]
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
    assert main(["landscape", *command, "--dimensions", str(dimensions)]) == 0
    surfaces = json.loads((tmp_path / "out" / "surfaces.json").read_text())
    assert list(surfaces) == ["plain", "with LoRA"]
    for name, surface in surfaces.items():
        result = load_result(tmp_path / "out" / name / "sharpness.result.json")
        centre = surface["losses"][1] if dimensions == 1 else surface["losses"][1][1]
        assert result.get("loss").value == pytest.approx(centre, rel=1e-5)
        assert result.get("worst_loss_increase").value > 0
        assert result.get("hessian_trace").n == 2
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
        assert main([name, *command]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error


def test_a_folder_without_a_model_is_one_line(sst2: Path, tmp_path: Path, capsys) -> None:
    command = ["--models", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--task", "sst2"]
    assert main(["landscape", *command, "--data_dir", str(sst2)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"model='{tmp_path}' cannot be loaded as a sequence classifier" in error


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "report"])
def test_an_unknown_option_is_one_line(name: str, capsys) -> None:
    needed = ["--models" if name == "landscape" else "--model", "x", "--output_dir", "x"]
    with pytest.raises(SystemExit) as stopped:
        main([name, *needed, "--batchsize", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: '--batchsize' is no option (did you mean --batch_size?); --help lists all options.\n"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dimensions", "3"), "dimensions=3: must be 1 or 2"),
        (("--points", "4"), "points=4: must be odd"),
        (("--radius", "0"), "radius=0.0: must be positive"),
        (("--epsilon", "0"), "epsilon=0.0: must be positive"),
        (("--ascent_steps", "0"), "ascent_steps=0: must be at least 1"),
        (("--probes", "-1"), "probes=-1: must be at least 0"),
    ],
)
def test_what_a_landscape_cannot_measure_is_said_before_the_data_are_read(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys
) -> None:
    command = ["--models", "x", "--task", "sst2", "--data_dir", "absent", "--output_dir", str(tmp_path / "out")]
    assert main(["landscape", *command, *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunArguments, "check", full)
    for name in ("noise", "attack", "consistency"):
        assert main([name, "--model", "x", "--output_dir", "x"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: the disk is full") and line.count("\n") == 1


def test_one_model_that_is_missing_costs_the_others_nothing(model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    command = ["--models", f"gone={tmp_path / 'gone'}", f"good={model}", "--output_dir", str(tmp_path / "out")]
    command += ["--task", "sst2", "--data_dir", str(sst2), "--points", "3", "--probes", "0", "--ascent_steps", "1"]
    assert main(["landscape", *command, "--dimensions", "1"]) == 2
    lack = f"model='{tmp_path / 'gone'}' cannot be loaded as a sequence classifier: there is no such folder; pass"
    assert f"error: gone: {lack}" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "out" / "surfaces.json").read_text())) == ["good"]
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000


def test_a_landscape_belongs_to_the_seed_of_its_folder(model: Path, sst2: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "plain" / "seed3")
    command = ["--models", f"plain={tmp_path / 'plain' / 'seed3'}", "--output_dir", str(tmp_path / "out")]
    command += ["--task", "sst2", "--data_dir", str(sst2), "--points", "3", "--probes", "0", "--ascent_steps", "1"]
    assert main(["landscape", *command, "--dimensions", "1"]) == 0
    found = load_result(tmp_path / "out" / "plain" / "sharpness.result.json")
    assert found.seed == 3 and found.config["dtype"] == "float32" and found.config["max_length"] == 48


def test_consistency_reads_what_the_others_read(model: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.csv"
    file.write_text('text\na fine film\n""\ndull\n')
    command = ["--model", str(model), "--output_dir", str(tmp_path / "out"), "--changes", "typos"]
    table = ["--data_file", str(file), "--text_columns", "text"]
    assert main(["consistency", *command, *table]) == 2
    assert "example 1 is (nan,), not texts" in capsys.readouterr().err
    assert main(["consistency", *command, *table, "--task", "sst2"]) == 2
    assert "pass exactly one of them" in capsys.readouterr().err
    file.write_text("text\na fine film\ndull\n")
    assert main(["consistency", *command, *table]) == 0
    config = load_result(tmp_path / "out" / "consistency.result.json").config
    assert config["max_length"] == 48 and config["dtype"] == "float32" and config["texts"] == 2


@pytest.mark.parametrize("option", [["--bf16"], ["--max_length", "20"], ["--allow_downloads"]])
def test_speed_refuses_what_it_cannot_heed(option: list[str], model: Path, sst2: Path, capsys) -> None:
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--speed", *option]
    assert main(["attack", *command]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option[0][2:]}=")


def test_recipes_are_listed_without_textattack(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--list_recipes"]) == 0
    text = capsys.readouterr().out
    assert "pwws (Ren et al. 2019" in text and "needs NLTK's list of stop words" in text


def test_attack_script_survives_a_kill(model: Path, sst2: Path, tmp_path: Path) -> None:
    need_textattack()
    environment = {**os.environ, "NLTK_DATA": nltk_folder(), "PYTHONPATH": str(REPOSITORY)}

    def command(folder: str) -> list[str]:
        options = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2)]
        recipes = ["--recipes", "deepwordbug", "textfooler"]
        return [
            sys.executable,
            "-m",
            "rose_peft.robustness",
            "attack",
            *options,
            *recipes,
            "--output_dir",
            str(tmp_path / folder),
        ]

    records = tmp_path / "killed" / "records" / "deepwordbug.jsonl"
    process = subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL)
    while not (records.exists() and records.read_bytes().count(b"\n") > 2) and process.poll() is None:
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


def test_further_robust_files_are_measured_by_name(model: Path, sst2: Path, tmp_path: Path, capsys) -> None:
    command = ["noise", "--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--kinds", "typos"]
    command += ["--rates", "0.5", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "turned.csv").write_text("sentence,label\nthe story was good,0\nit is great,0\n")
    files = [f"turned={tmp_path / 'turned.csv'}", "again=adv_glue/adv_sst2/validation.parquet"]
    assert main([*command, "--robust_files", *files]) == 0
    result = load_result(tmp_path / "out" / "noise.result.json")
    right = result.get("robust_accuracy", "AdvGLUE")
    assert result.get("robust_accuracy", "again") == right and right.n == 12
    assert result.get("robust_accuracy", "turned").n == 2
    for files, message in (
        (["turned.csv"], "robust_files='turned.csv': write name=path"),
        ([f"a={tmp_path}/no.csv"], "no such file"),
        (["a=x", "a=y"], "two are called 'a'"),
    ):
        assert main([*command, "--robust_files", *files]) == 2
        assert message in capsys.readouterr().err


def test_consistency_needs_no_labels(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "texts.csv").write_text("sentence\n" + "the story was good\na dull film\nit is great\n" * 4)
    command = ["consistency", "--model", str(model), "--data_file", str(tmp_path / "texts.csv")]
    command += ["--text_columns", "sentence", "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--changes", "dropout", "typos", "--rate", "0.5"]) == 0
    result = load_result(tmp_path / "out" / "consistency.result.json")
    assert result.get("flipped_share", "dropout").n == result.get("divergence", "typos", 0.5).n == 12
    assert result.get("divergence", "dropout").value > 0 and result.method == tmp_path.name
    for more, message in ((("--changes", "smudges"), "change='smudges'"), (("--rate", "2"), "rate=2.0")):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_run_folder_is_a_model_and_names_it(model: Path, sst2: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "moved")
    run = tmp_path / "runs" / "my run"
    run.mkdir(parents=True)
    (tmp_path / "moved").rename(run / "model")
    for number, place in enumerate((run, run / "model")):
        out = tmp_path / str(number)
        command = ["noise", "--model", str(place), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(out)]
        assert main([*command, "--kinds", "typos", "--rates", "0.5"]) == 0
        found = load_result(out / "noise.result.json")
        assert (found.method, found.seed) == ("my run", 0)
    seeded = run / "seed3"
    (run / "model").rename(tmp_path / "again")
    seeded.mkdir()
    (tmp_path / "again").rename(seeded / "model")
    for number, more in enumerate(([], ["--training_seed", "5"])):
        out = tmp_path / f"seeded{number}"
        command = ["consistency", "--model", str(seeded), "--task", "sst2", "--data_dir", str(sst2)]
        assert main([*command, "--output_dir", str(out), "--changes", "typos", *more]) == 0
        found = load_result(out / "consistency.result.json")
        assert (found.method, found.seed) == ("my run", 5 if more else 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output_dir", "FILE"], "cannot be written"),
        (["--seed", "-1"], "seed=-1: must lie between 0"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used here"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
        (["--model", "EMPTY"], "the folder holds nothing"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_long_runs(
    more: list[str], message: str, model: Path, sst2: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"FILE": str(tmp_path / "file"), "EMPTY": str(tmp_path / "empty")}
    command = ["--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--output_dir", str(tmp_path / "out")]
    command += [places.get(part, part) for part in more]
    for name in ("noise", "attack", "consistency"):
        assert main([name, *command]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and message in line


def test_a_random_head_is_named(model: Path, sst2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads((model / "config.json").read_text())
    command = ["noise", "--model", str(model), "--task", "sst2", "--data_dir", str(sst2), "--kinds", "typos"]
    command += ["--rates", "0.5", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0 and "random" not in caplog.text
    (model / "config.json").write_text(json.dumps({**content, "architectures": ["BertModel"]}))
    assert main(command) == 0
    assert f"model='{model}' has no classification head: a random one is evaluated" in caplog.text


def test_a_blank_label_is_named_with_its_row(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "blank.csv").write_text("text,label\ngood,1\nbad,0\nodd,\n")
    command = ["noise", "--model", str(model), "--data_file", str(tmp_path / "blank.csv"), "--text_columns", "text"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert "1 of 3 examples have no label (blank, or a negative number), the first in row 2" in capsys.readouterr().err
