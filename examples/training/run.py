"""One training run: a plain Accelerate loop in which nothing but the model's config tells that ROSE is on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, get_scheduler

from examples.benchmark.objectives import make_objective
from rose_peft import RoseError, get_selector, plot_masks, update_model_card
from rose_peft.robustness.results import installed_versions, write_json

from .arguments import DivergedError, InputError, TrainArguments, reason
from .checkpoint import NOTE, Checkpoints, keep_model, open_run, whole_file
from .data import TextData, load_text
from .evaluation import accuracy
from .model import build_model

SCHEMA_VERSION = 1
# Where a run lies and how it is started does not define it.
NOT_DEFINING = ("output_dir", "resume", "overwrite", "save_steps")
SPAN_BATCHES = 32


class EpochSampler(Sampler[int]):
    """
    A permutation that depends on seed and epoch alone, so that a resumed run sees the same order.

    Args:
        lengths: Length of each example in tokens.
        seed: Seed of the run.
        batch_size: Group examples of similar length into batches of this size; None does not group.
    """

    def __init__(self, lengths: list[int], seed: int, batch_size: int | None = None) -> None:
        self.lengths, self.seed, self.batch_size, self.epoch = lengths, seed, batch_size, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return iter(order if self.batch_size is None else self._grouped(order, self.batch_size, generator))

    def _grouped(self, order: list[int], size: int, generator: torch.Generator) -> list[int]:
        """Sort by length inside spans of many batches, so that batches differ from epoch to epoch, and mix batches."""
        span = SPAN_BATCHES * size
        parts = [sorted(order[at : at + span], key=self.lengths.__getitem__) for at in range(0, len(order), span)]
        rows = [row for part in parts for row in part]
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        mixed = torch.randperm(len(rows) // size, generator=generator).tolist()
        whole = [row for number in mixed for row in batches[number]]
        return whole + rows[len(whole) :]  # a smaller batch stays last, or it would shift all after it

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class Progress:
    """Where a run is, and what it found so far; saved with its checkpoints.

    Args:
        epoch: Complete epochs.
        batch: Micro-batches of the present epoch.
        step: Optimizer steps.
        loss_sum: Sum of the losses of the present epoch's micro-batches, on the main process.
        seconds: Time spent in training, without evaluating and saving.
        history: Figures of each complete epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Values to save."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take saved values over."""
        for name, value in state.items():
            setattr(self, name, value)

    def kept(self, keep: str) -> dict[str, Any]:
        """The epoch whose model is kept: the last, or the first of those with the highest clean accuracy."""
        return self.history[-1] if keep == "last" else max(self.history, key=lambda entry: entry["clean"]["accuracy"])


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Turn text into token ids, unpadded, with labels."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
        return {**tokens, "labels": rows["label"]}

    return data.map(encode, batched=True, remove_columns=data.column_names, keep_in_memory=True)


def make_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for _, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    groups = [group for group in groups if group["params"]]
    # Fused as the Trainer's: on a CPU the step of MiniLM takes a seventh of the time that it takes otherwise.
    return torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, fused=True)


def train(args: TrainArguments, text: TextData) -> dict[str, Any]:
    """Train once, and leave in `output_dir` the best model, the results, the masks and the last checkpoint.

    Args:
        args: Checked options.
        text: Data.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: If an option cannot work.
        DivergedError: If the loss becomes no number.
        RoseError: If ROSE cannot act.
    """
    folder = Path(args.output_dir)
    AcceleratorState._reset_state()  # or a second run in this process would train in the precision of the first
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(even_batches=True),
    )
    set_seed(args.seed)
    model, tokenizer = build_model(args, text.labels)
    options = {name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_DEFINING}
    options |= {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    batches = -(-len(text.train) // (args.batch_size * accelerator.num_processes))
    total = -(-batches // args.gradient_accumulation_steps) * args.epochs
    if args.strategy != "none" and args.rose_warmup_steps >= total:
        raise InputError(
            f"rose_warmup_steps={args.rose_warmup_steps}: the run has {total} steps, so no mask would ever act; "
            "lower it."
        )
    _open_run(accelerator, folder, options, args)

    pad = DataCollatorWithPadding(tokenizer)

    def loader(rows: Dataset, sampler: Sampler[int] | None = None) -> DataLoader:
        # A generator of its own keeps the loader from drawing on the global one, which dropout and resuming rely on.
        return DataLoader(
            rows, args.batch_size, sampler=sampler, collate_fn=pad, generator=torch.Generator().manual_seed(0)
        )

    rows = {
        name: tokenize(data, tokenizer, args.max_length)
        for name, data in (("train", text.train), ("clean", text.validation))
    }
    lengths = [len(ids) for ids in rows["train"]["input_ids"]]
    sampler = EpochSampler(lengths, args.seed, args.batch_size if args.group_by_length else None)
    optimizer = make_optimizer(model, args)
    objective = make_objective(args)
    model, optimizer, train_loader, clean_loader = accelerator.prepare(
        model, optimizer, loader(rows["train"], sampler), loader(rows["clean"])
    )
    robust_loaders = {
        name: accelerator.prepare(loader(tokenize(data, tokenizer, args.max_length)))
        for name, data in text.robust.items()
    }
    scheduler = get_scheduler(args.lr_scheduler, optimizer, round(args.warmup_ratio * total), total)
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress)
    checkpoints = Checkpoints(folder, accelerator)
    newest = checkpoints.newest()
    if args.resume and newest is not None:
        _load(accelerator, newest)

    selector = get_selector(model) if args.strategy != "none" else None
    if selector is not None:
        selector.restore(optimizer)  # a run that is resumed at its end takes no step any more
    if progress.step == 0:
        # The same dropout whatever building the model has drawn, and another one on every process.
        set_seed(args.seed, device_specific=True)
    bar = tqdm(total=total, initial=progress.step, disable=not accelerator.is_main_process, desc=args.strategy)
    with bar:  # closed whatever happens, so that a message stands on a line of its own
        while progress.epoch < args.epochs:
            sampler.epoch = progress.epoch
            model.train()
            batches = accelerator.skip_first_batches(train_loader, progress.batch) if progress.batch else train_loader
            start = time.perf_counter()
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = objective(model, batch, accelerator.backward)
                    if accelerator.sync_gradients and args.max_grad_norm > 0:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                progress.batch += 1
                progress.loss_sum += loss.item()
                if not accelerator.sync_gradients:
                    continue
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                progress.step += 1
                kept = {"kept": f"{selector.statistics().last_kept_share:.0%}"} if selector is not None else {}
                bar.set_postfix(loss=f"{loss.item():.3f}", **kept)
                bar.update()
                if args.save_steps and progress.step % args.save_steps == 0:
                    progress.seconds += time.perf_counter() - start
                    _save(accelerator, checkpoints)
                    start = time.perf_counter()
            progress.seconds += time.perf_counter() - start
            if not math.isfinite(progress.loss_sum):
                raise DivergedError(
                    f"learning_rate={args.learning_rate}: the loss is no number any more after {progress.step} steps: "
                    "training diverged; lower it, or raise --warmup_ratio."
                )
            figures = {"epoch": progress.epoch + 1, "step": progress.step, "loss": progress.loss_sum / progress.batch}
            figures["clean"] = accuracy(model, clean_loader, accelerator)
            figures["robust"] = {name: accuracy(model, one, accelerator) for name, one in robust_loaders.items()}
            progress.history.append(figures)
            progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
            # The checkpoint comes last: a run killed before it does this epoch again, and writes the same once more.
            if progress.kept(args.keep) is figures:
                with checkpoints.write_model(progress.epoch) as aside:
                    _save_model(accelerator, model, tokenizer, aside)
                    if accelerator.is_main_process and selector is not None and args.task is not None:
                        accuracies = {"accuracy": figures["clean"]["accuracy"]}
                        update_model_card(aside, selector.config, "nyu-mll/glue", accuracies)
            _save(accelerator, checkpoints)
            checkpoints.forget_models(progress.kept(args.keep)["epoch"])

    results = {
        "schema_version": SCHEMA_VERSION,
        "method": args.strategy,
        "adapter": args.adapter,
        "task": args.task or ("demo" if args.is_demo else "files"),
        "seed": args.seed,
        "config": options,
        "best": progress.kept(args.keep),
        "history": progress.history,
        "timing": {"train_seconds": progress.seconds, "seconds_per_step": progress.seconds / progress.step},
        "steps": progress.step,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "versions": installed_versions(),
        "rose": selector.statistics().as_dict() if selector is not None else None,
    }
    if accelerator.is_main_process:
        if selector is not None:
            with whole_file(folder / "masks.png") as aside:
                plot_masks(selector).savefig(aside, format="png", dpi=150)
        keep_model(folder, progress.kept(args.keep)["epoch"])
        write_json(folder / "results.json", results)
    accelerator.free_memory()
    return results


def train_once(args: TrainArguments) -> dict[str, Any]:
    """Results of a run: read if it is done, continued if it was begun, else made; its checkpoint is deleted.

    Args:
        args: Checked options.

    Raises:
        InputError: If the run in `output_dir` has other options, or one cannot work.
        RoseError: If ROSE cannot act.
    """
    folder = Path(args.output_dir)
    done = folder / "results.json"
    if not (done.exists() and (folder / "model").is_dir()):
        train(dataclasses.replace(args, resume=(folder / NOTE).exists()), load_text(args))
    results = json.loads(done.read_text(encoding="utf-8"))
    for name, made_with in results["config"].items():
        wanted = getattr(args, name, made_with)
        # Without an option of its own the precision is what accelerate was told, which is known to a run only.
        told = name == "mixed_precision" and wanted is None
        if wanted != made_with and not told and args.has_effect(name):  # a default that changed may mean nothing here
            raise InputError(
                f"{name}={wanted!r}, but the run in {str(folder)!r} was made with {made_with!r}; delete that folder "
                "or pass another."
            )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # three times as large as the model
    return results


def _open_run(accelerator: Accelerator, folder: Path, options: dict[str, Any], args: TrainArguments) -> None:
    """Open the output folder on the main process; what is wrong with it is raised on every process."""
    wrong: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            open_run(folder, options, args.resume, args.overwrite)
        except InputError as error:
            wrong = [str(error)]
    broadcast_object_list(wrong)
    if wrong[0] is not None:
        raise InputError(wrong[0])


def _save(accelerator: Accelerator, checkpoints: Checkpoints) -> None:
    with checkpoints.write() as aside:
        accelerator.save_state(str(aside))


def _load(accelerator: Accelerator, path: Path) -> None:
    try:
        accelerator.load_state(str(path))
    except RoseError:
        raise
    except Exception as error:  # torch, safetensors and json each have their own
        raise InputError(
            f"resume: the checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {reason(error)}); delete "
            "it to start the run anew, or put back a whole copy."
        ) from error


def _save_model(accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:  # where weights are sharded, no other process holds the whole of them
        whole = accelerator.unwrap_model(model)
        whole.save_pretrained(str(path), state_dict=state)
        if isinstance(whole, PeftModel):  # an adapter's own files name neither the classes nor the padding
            whole.get_base_model().config.save_pretrained(str(path))
        tokenizer.save_pretrained(str(path))
