"""The short scripts run from beginning to end, leave what they say, and stay short."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import AutoPeftModelForSequenceClassification, PeftConfig

from rose_peft.robustness import load_result

ROOT = Path(__file__).parents[2]
pytest.importorskip("datasets")

from examples import accelerate_loop, evaluate, plain_loop, trainer_lora  # noqa: E402

SCRIPTS = ("plain_loop", "trainer_lora", "accelerate_loop", "sft_trl", "qlora", "evaluate")
NEEDS = {"sft_trl": "trl", "qlora": "bitsandbytes"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_how_to_run_it(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    file = ROOT / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 80
    done = subprocess.run([sys.executable, str(file), "--help"], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"examples/{name}.py" in done.stdout


@pytest.mark.parametrize(("script", "kind"), [(plain_loop, "ROSE"), (trainer_lora, "LORA"), (accelerate_loop, "ROSE")])
def test_a_loop_trains_and_leaves_an_adapter_that_loads(script, kind: str, inputs, tmp_path: Path) -> None:
    command = ["--model", inputs["model"], "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    accuracy = script.main(command)
    assert 0.3 < accuracy <= 1
    assert PeftConfig.from_pretrained(tmp_path / "run").peft_type == kind
    AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=2)


@pytest.mark.parametrize(("name", "package"), [("sft_trl", "trl"), ("qlora", "bitsandbytes")])
def test_a_language_model_is_tuned(name: str, package: str, tmp_path: Path, inputs) -> None:
    pytest.importorskip(package)
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.eos_token = "[SEP]"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = importlib.import_module(f"examples.{name}")
    loss = script.main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run"), "--max_steps", "3"])
    assert 0 < loss < 10
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_evaluating_writes_a_result(inputs, tmp_path: Path) -> None:
    result = evaluate.main([inputs["model"], "--output_dir", str(tmp_path)])
    assert load_result(tmp_path / "evaluate.result.json") == result
    assert result.get("clean_accuracy").n == result.get("robust_accuracy", "turned cue").n == 240
    assert result.get("flipped_share", "dropout").n == 240
