"""The training loops of users: plain PyTorch, Accelerate, Trainer, Lightning and TRL, over the same model and data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from rose_peft import ROSEConfig, attach_rose, detach_rose
from tests.helpers.tiny import SIZES, tiny_bert

STEPS, ACCUMULATION, SIZE = 5, 2, 4
RATE, DECAY, CLIP = 1e-2, 0.1, 1.0
TRAINER = {
    "max_steps": STEPS,
    "per_device_train_batch_size": SIZE,
    "gradient_accumulation_steps": ACCUMULATION,
    "optim": "adamw_torch",
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "max_grad_norm": CLIP,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


class InOrder(IterableDataset):
    """Loops may shuffle a list; a stream comes as it is."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS * ACCUMULATION * SIZE):
            ids = torch.randint(3, SIZES["vocab_size"], (8,), generator=generator)
            yield {"input_ids": ids, "labels": (ids[0] > ids[1]).long()}


def loader() -> DataLoader:
    return DataLoader(InOrder(), batch_size=SIZE)


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW in the two parameter groups that the Trainer makes, and its schedule."""
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    exempt = {name for name in trained if "bias" in name or "norm" in name.lower()}
    groups = [
        {"params": [param for name, param in trained.items() if name not in exempt], "weight_decay": DECAY},
        {"params": [param for name, param in trained.items() if name in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    return optimizer, get_linear_schedule_with_warmup(optimizer, 0, STEPS)


def risk_fields(risk_pass: str) -> dict[str, Any]:
    """Sampled passes at every second step: a training of a few steps has steps with and without."""
    return {"risk_pass": risk_pass, **({"risk_interval": 2} if risk_pass == "sampled" else {})}


def classifier(strategy: str | None = "ensemble", lora: bool = False, risk_pass: str = "paired") -> nn.Module:
    """A tiny PEFT model; without a strategy ROSE is taken off again."""
    inner = LoraConfig(r=4, target_modules=["query", "value", "dense"]) if lora else None
    base = tiny_bert(num_labels=2)
    # BERT takes keywords for its loss and ignores them: the Trainer of transformers 5 leaves the division to it.
    base.accepts_loss_kwargs = False
    fields = {"task_type": "SEQ_CLS", "base_config": inner, "upper_quantile": 0.6, **risk_fields(risk_pass)}
    model = get_peft_model(base, ROSEConfig(strategy=strategy or "ensemble", **fields))
    if strategy is None:
        detach_rose(model)
    return model


def plain_loop(model: nn.Module, folder: Path) -> None:
    model.train()
    optimizer, scheduler = optimizer_of(model)
    for number, batch in enumerate(loader(), start=1):
        (model(**batch).loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def accelerate_loop(model: nn.Module, folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model.train()
    model, data, optimizer, scheduler = accelerator.prepare(model, loader(), *optimizer_of(model))
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def trainer_loop(model: nn.Module, folder: Path) -> None:
    arguments = TrainingArguments(output_dir=str(folder), **TRAINER)
    Trainer(model=model, args=arguments, train_dataset=InOrder()).train()


def lightning_loop(model: nn.Module, folder: Path, manual: bool = True) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.automatic_optimization = not manual

        def configure_optimizers(self) -> Any:
            optimizer, self.scheduler = optimizer_of(self.model)
            return optimizer

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
            loss = self.model(**batch).loss
            if not manual:
                return loss
            # Lightning's own optimizer passes a closure to every step, even where the user passes none.
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(loss / ACCUMULATION)
            if (index + 1) % ACCUMULATION == 0:
                nn.utils.clip_grad_norm_(self.parameters(), CLIP)
                optimizer.step()
                self.scheduler.step()
                optimizer.zero_grad()
            return None

    model.train()
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    trainer.fit(Module(), loader())


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0, eos_token_id=1)).train()


def next_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens as labels, but for the first, which nothing predicts: Trainers do not agree on counting it."""
    labels = batch["input_ids"].clone()
    labels[..., 0] = -100
    return {"input_ids": batch["input_ids"], "labels": labels}


def causal(strategy: str = "ensemble", lora: bool = True, risk_pass: str = "paired") -> nn.Module:
    """Over LoRA, or a plain model trained in place: TRL refuses tuner layers on the language model head."""
    inner = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]) if lora else None
    fields = {"task_type": "CAUSAL_LM", "base_config": inner, "upper_quantile": 0.6, **risk_fields(risk_pass)}
    config = ROSEConfig(strategy=strategy, dropout=0.1, **fields)
    model = tiny_llama()
    if lora:
        return get_peft_model(model, config)
    attach_rose(model, config)
    return model


def sft_trainer(model: nn.Module, folder: Path, peft_config: Any = None, **options: Any) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    words = {str(index): index for index in range(SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="2")), pad_token="0", eos_token="1"
    )
    arguments = trl.SFTConfig(output_dir=str(folder), **TRAINER, **options)
    data = Dataset.from_list([{key: row[key].tolist() for key in row} for row in map(next_tokens, InOrder())])
    return trl.SFTTrainer(model, arguments, None, data.to_iterable_dataset(), None, tokenizer, peft_config=peft_config)


PLAIN_SFT = {"bf16": False, "gradient_checkpointing": False}


def sft_loop(model: nn.Module, folder: Path) -> None:
    sft_trainer(model, folder, **PLAIN_SFT).train()


def fused_sft() -> bool:
    """Whether TRL asks for log-probabilities; its releases for Python 3.10 take the loss in chunks."""
    return hasattr(pytest.importorskip("trl.trainer.utils", reason="TRL is not installed"), "add_fused_lm_head")


def plain_sft_loop(model: nn.Module, folder: Path) -> None:
    sft_trainer(model, folder, **PLAIN_SFT)  # gives the model the head that computes log-probabilities without logits
    optimizer, scheduler = optimizer_of(model)
    for number, batch in enumerate(loader(), start=1):
        batch = next_tokens(batch)
        batch["attention_mask"] = torch.ones_like(batch["labels"])
        items = ACCUMULATION * (batch["labels"] != -100).sum()
        if fused_sft():
            (-model(**batch, fused_lm_head=True).log_probs.sum() / items).backward()
        else:
            model(**batch, num_items_in_batch=items).loss.backward()
        if number % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
