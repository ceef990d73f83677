"""Trains four steps under ZeRO-2, saving after two; then goes on from there with all things made anew.

torchrun --nproc_per_node 2 tests/distributed/resume_zero.py accelerate|trainer paired|sampled|second_order OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from rose_peft import ROSEConfig, get_selector
from tests.distributed.worker import RANK, micro_batch
from tests.helpers.tiny import tiny_bert

STEPS, SIZE = 4, 4
CONFIG = {
    "train_micro_batch_size_per_gpu": SIZE,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "steps_per_print": 10**9,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "paired": {},
    "sampled": {"risk_pass": "sampled", "risk_interval": 2},
    "second_order": {"strategy": "second_order"},
}


def build(settings: str) -> nn.Module:
    """The same model on every rank; its initial weights are no clue, since a resumed run loads others."""
    config = ROSEConfig(task_type="SEQ_CLS", **SETTINGS[settings])
    return get_peft_model(tiny_bert(num_labels=3, vocab_size=50), config)


def accelerate(model: nn.Module, folder: Path, resume: bool) -> None:
    """The loop of Accelerate's documentation."""
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(CONFIG)))
    matrices = [param for param in model.parameters() if param.requires_grad and param.dim() > 1]
    rest = [param for param in model.parameters() if param.requires_grad and param.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
    network, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(str(folder / "state"))
    for step in range(2 if resume else 0, STEPS):
        torch.manual_seed(10 * step + RANK)
        accelerator.backward(network(**micro_batch(step, RANK, SIZE)).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and not resume:
            accelerator.save_state(str(folder / "state"))


def trainer(model: nn.Module, folder: Path, resume: bool) -> None:
    """transformers.Trainer, which saves random states too."""
    data = [micro_batch(index, 0, 1) for index in range(STEPS * SIZE * 2)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=dict(CONFIG),
        use_cpu=True,
        per_device_train_batch_size=SIZE,
        max_steps=STEPS,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{name: tensor[0] for name, tensor in row.items()} for row in data]
    loop = Trainer(model=model, args=arguments, train_dataset=rows)
    loop.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2") if resume else None)


def main() -> None:
    """Write {weights, statistics} of both runs."""
    route, settings, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for name in ("whole", "resumed"):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        torch.manual_seed(0)
        model = build(settings)
        {"accelerate": accelerate, "trainer": trainer}[route](model, folder, name == "resumed")
        weights = {key: param.detach() for key, param in model.named_parameters() if param.requires_grad}
        torch.save(
            {"weights": weights, "statistics": get_selector(model).statistics().as_dict()}, folder / f"{name}.{RANK}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
