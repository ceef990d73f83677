"""Real Trainer runs: figures reach the reporters, and resumed equals uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from rose_peft import RoseCallback, ROSEConfig, get_selector
from tests.tiny import tiny_bert


def rows(count: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (count, 8), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]


def run(output: Path, base: str = "full", resume: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    base_config = LoraConfig(r=4, target_modules=["query", "value"]) if base == "lora" else None
    model = get_peft_model(tiny_bert(num_labels=2), ROSEConfig(task_type="SEQ_CLS", base_config=base_config))
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 2, "learning_rate": 1e-2, "report_to": []} | options
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[RoseCallback()])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("base", ["full", "lora"])
def test_resumed_equals_uninterrupted(base: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", base)
    resumed = run(tmp_path / "resumed", base, resume=tmp_path / "whole" / "checkpoint-4")
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    statistics = [get_selector(trainer.model).statistics() for trainer in (whole, resumed)]
    assert statistics[0].steps == 8 and 0 < statistics[0].kept_share < 1
    assert str(statistics[0].as_dict()) == str(statistics[1].as_dict())  # as text: NaN equals itself


def test_figures_reach_the_history_and_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # transformers 5 takes the folder from the environment, transformers 4 from the argument
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = run(tmp_path / "run", report_to=["tensorboard"])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(0 < entry["rose/last_kept_share"] <= 1 and 0 < entry["rose/kept_share"] <= 1 for entry in logged)
    events = next(iter(tmp_path.rglob("events.out.tfevents*")))
    accumulator = event_accumulator.EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if "kept_share" in tag]
    assert len(tags) == 2, accumulator.Tags()["scalars"]
    assert len(accumulator.Scalars(tags[0])) == 4


def test_label_smoothing_trains(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", label_smoothing_factor=0.1)
    assert get_selector(trainer.model).statistics().steps == 8
