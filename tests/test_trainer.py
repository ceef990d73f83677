"""Real Trainer runs: figures reach the reporters, and resumed equals uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rose_peft import RoseCallback, ROSEConfig, RoseInactiveError, get_selector
from rose_peft.selector import RoseSelector
from rose_peft.steered import Steered
from tests.helpers.tiny import SIZES, rows, tiny_bert
from tests.helpers.training import outputs


def run(
    output: Path,
    base: str = "full",
    resume: Path | None = None,
    rose: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    base_config = LoraConfig(r=4, target_modules=["query", "value"]) if base == "lora" else None
    config = ROSEConfig(task_type="SEQ_CLS", base_config=base_config, **(rose or {}))
    model = get_peft_model(tiny_bert(num_labels=2), config)
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
    evaluation = rows(8) if "eval_strategy" in settings else None
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=evaluation)
    RoseCallback.add_to(trainer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize(
    "rose",
    [{}, {"risk_pass": "sampled", "risk_interval": 4}, {"risk_pass": "sampled", "risk_interval": 3}],
    ids=["paired", "sampled", "between sampled passes"],
)
@pytest.mark.parametrize("base", ["full", "lora"])
def test_resumed_equals_uninterrupted(base: str, rose: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", base, rose=rose)
    resumed = run(tmp_path / "resumed", base, resume=tmp_path / "whole" / "checkpoint-4", rose=rose)
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    statistics = [get_selector(trainer.model).statistics() for trainer in (whole, resumed)]
    assert statistics[0].steps == 8 and 0 < statistics[0].kept_share < 1
    assert str(statistics[0].as_dict()) == str(statistics[1].as_dict())  # as text: NaN equals itself
    averages = [get_selector(trainer.model).state.risk_linear for trainer in (whole, resumed)]
    assert torch.equal(*averages) and bool(averages[0].any()) == bool(rose)


@pytest.mark.parametrize("strategy", ["first_order", "ensemble"])
def test_gradient_checkpointing_alone_works_with_sampled_passes(strategy: str, tmp_path: Path) -> None:
    """transformers takes reentrant checkpoints then; the masks are those without any."""
    rose = {"risk_pass": "sampled", "risk_interval": 2, "strategy": strategy}
    trainers = [run(tmp_path / str(on), rose=rose, gradient_checkpointing=on, max_steps=5) for on in (False, True)]
    assert trainers[1].model.get_base_model().is_gradient_checkpointing
    histories = [get_selector(trainer.model).state.mask_history()[0] for trainer in trainers]
    assert torch.equal(*histories) and (histories[0] == 0).any()
    for one, two in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(one, two)


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
    tags = [tag for tag in accumulator.Tags()["scalars"] if "kept" in tag]
    assert len(tags) == 4, accumulator.Tags()["scalars"]
    assert len(accumulator.Scalars(tags[0])) == 4


def test_reporters_that_come_first_are_told_of(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to=[])
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS"))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[RoseCallback()])
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(UserWarning, match=r"tensorboard.*RoseCallback.add_to"):
        trainer.train()


def test_label_smoothing_trains(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", label_smoothing_factor=0.1)
    assert get_selector(trainer.model).statistics().steps == 8


@pytest.mark.parametrize("base", ["full", "lora"])
def test_best_model_is_loaded_at_the_end(base: str, tmp_path: Path) -> None:
    """The rate is far too high, so the first checkpoint is the best: it must be what the model holds at the end."""
    trainer = run(
        tmp_path,
        base,
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=0.3,
        load_best_model_at_end=True,
        lr_scheduler_type="constant",
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]
    best = tmp_path / f"checkpoint-{4 if losses[0] < losses[1] else 8}"
    assert trainer.state.best_model_checkpoint == str(best)
    other = tmp_path / f"checkpoint-{8 if losses[0] < losses[1] else 4}"
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows(8)])}
    held = outputs(trainer.model, inputs)
    loaded, worse = (PeftModel.from_pretrained(tiny_bert(num_labels=2), folder) for folder in (best, other))
    assert torch.equal(outputs(loaded, inputs), held)
    assert not torch.equal(outputs(worse, inputs), held)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_evaluation_is_one_pass_without_masks(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=1)
    assert get_selector(trainer.model).statistics().steps == 8
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 8 and not [name for entry in evaluated for name in entry if name.startswith("rose/")]


def test_the_callback_fails_a_training_without_rose(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    plain = tiny_bert(num_labels=2)
    with pytest.raises(RoseInactiveError, match="not attached"):
        Trainer(model=plain, args=arguments, train_dataset=rows(), callbacks=[RoseCallback()]).train()


def test_the_callback_fails_a_training_in_which_rose_never_acts(tmp_path: Path) -> None:
    """An optimizer made before get_peft_model holds the frozen originals only."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy="no"
    )
    base = tiny_bert(num_labels=2)
    optimizer = torch.optim.AdamW(base.parameters())
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS"))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        callbacks=[RoseCallback()],
        optimizers=(optimizer, None),
    )
    with pytest.raises(RoseInactiveError, match="3 steps, and ROSE acted in none"):
        trainer.train()


def test_accumulated_micro_batches_are_scored_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches a step are two risk passes a step, ranked once."""
    passes = []
    original = RoseSelector.gather

    def spy(self: RoseSelector, steered: Steered, *args: Any) -> Any:
        passes.append(steered.window.calls)
        gathered = original(self, steered, *args)
        assert gathered.risk.finite == 2
        return gathered

    monkeypatch.setattr(RoseSelector, "gather", spy)
    trainer = run(tmp_path)
    assert passes == [2] * 8
    assert get_selector(trainer.model).statistics().steps == 8


@pytest.mark.parametrize("size", [1, 4])
def test_a_causal_model_divides_by_the_items_of_the_whole_batch(size: int, tmp_path: Path) -> None:
    """The Trainer passes `num_items_in_batch` to such models; both passes must divide by it, not by their own."""
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "initializer_range": 0.02})
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, ROSEConfig(task_type="CAUSAL_LM", dropout=0.1))
    data = []
    for index, row in enumerate(rows()):
        labels = row["input_ids"].clone()
        labels[: index % 6] = -100
        data.append({"input_ids": row["input_ids"], "labels": labels})
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((kwargs.get("num_items_in_batch"), (inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Watched(model=model, args=arguments, train_dataset=data, callbacks=[RoseCallback()])
    trainer.train()
    assert all(items is not None for items, _ in seen)
    pairs = zip(seen[0::2], seen[1::2], strict=True)
    assert all(int(first[0]) == int(second[0]) >= int(first[1] + second[1]) for first, second in pairs)
    # At a learning rate of 0 the model stays random: a loss per token is then about the log of the vocabulary, and
    # would be twice or half of it if a pass had divided by other counts.
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(0.7 < loss / torch.log(torch.tensor(float(config.vocab_size))) < 1.6 for loss in logged)
