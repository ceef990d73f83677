"""Every file of accelerate_configs/ starts examples/train.py on CPUs, with all its settings that a CPU can follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from tests.distributed.processes import ROOT
from tests.helpers.task import options

pytestmark = pytest.mark.distributed
CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))


def launched(config: str) -> tuple[dict[str, str], int]:
    """What `accelerate launch` would tell its processes (as environment variables), and how many there are."""
    file = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, "train.py"])
    args, _, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # which of them a file for DeepSpeed would repeat
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        several = config.startswith("multi_gpu")
        environment = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    kept = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return kept, int(args.num_processes)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_starts(config: str, inputs: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ROSE_CHECK_RANKS": "1"}
    if "deepspeed" in config:
        fixed = request.getfixturevalue("deepspeed_environment")
    told, processes = launched(config)
    assert processes == (2 if config.startswith("multi") else 1)
    script = [str(ROOT / "examples" / "train.py"), *options(inputs, tmp_path / "run", "--epochs", "1")]
    if told.get("ACCELERATE_USE_FSDP") == "true":
        told["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BertLayer"  # the tiny model is a BERT
        script.insert(0, str(Path(__file__).with_name("as_gpus.py")))
    elif "deepspeed" not in config:
        told["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *script]
    environment = {**os.environ, **fixed, **told, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *script], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["processes"] == processes and results["steps"] == 6 // processes
    # On a CPU Accelerate enters no fp16 autocast, though it calls it by that name.
    precision = {"cpu": "no", "multi_cpu": "no", "single_gpu_fp16": "fp16"}.get(config, "bf16")
    assert results["config"]["mixed_precision"] == precision
    assert 0 < results["rose"]["kept_share"] < 1
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
