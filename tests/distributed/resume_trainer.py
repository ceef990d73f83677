"""Trains with the Trainer, a checkpoint after every step; goes on from the last whole one.

python tests/distributed/resume_trainer.py OUTPUT STEPS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from rose_peft import RoseCallback, ROSEConfig, get_selector
from tests.helpers.tiny import rows, tiny_bert

WORLD = int(os.environ.get("WORLD_SIZE", 1))


def whole(checkpoint: Path) -> bool:
    """Whether all processes have written their part; the Trainer gives the folder its name before that."""
    states = [f"rng_state_{rank}.pth" for rank in range(WORLD)] if WORLD > 1 else ["rng_state.pth"]
    try:
        for name in states:
            torch.load(checkpoint / name, weights_only=False)
        json.loads((checkpoint / "trainer_state.json").read_text())
    except Exception:
        return False
    return True


def main() -> None:
    """Train, and write {weights, statistics}."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    last = next((str(path) for path in found if whole(path)), None)
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(num_labels=2), ROSEConfig(task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=1,
        save_total_limit=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        seed=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[RoseCallback()])
    trainer.train(resume_from_checkpoint=last)
    if trainer.args.process_index == 0:
        weights = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
        torch.save({"weights": weights, "statistics": get_selector(model).statistics().as_dict()}, folder / "end")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
