"""What a training step costs under each strategy, relative to plain fine-tuning, measured side by side in one run.

    python -m examples.benchmark.cost
    python -m examples.benchmark.cost --model_name_or_path roberta-base --device cuda --rounds 50

Every round takes one step of each way in turn on the same batch, so that a machine that gets slower hits all alike;
the table gives the median over rounds of the ratio to the plain step of the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from examples.training.arguments import InputError
from examples.training.model import embedded_encoder
from rose_peft import ROSEConfig

WAYS = ("plain", "second_order", "first_order", "ensemble", "lora", "lora + ensemble")


@dataclass
class CostArguments:
    """What to measure."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of an encoder; None for the embedded MiniLM."}
    )
    device: str = field(default="cpu", metadata={"help": "Device, such as cpu or cuda."})
    batch_size: int = field(default=16, metadata={"help": "Examples per step."})
    length: int = field(default=32, metadata={"help": "Tokens per example."})
    rounds: int = field(default=12, metadata={"help": "Rounds that count; two more go before them."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and dropout."})


def build(way: str, name: str) -> nn.Module:
    """Build the model for one way of training."""
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    if way == "plain":
        return model
    if way == "lora":
        return get_peft_model(model, lora)
    if way == "lora + ensemble":
        return get_peft_model(model, ROSEConfig(task_type="SEQ_CLS", base_config=lora))
    return get_peft_model(model, ROSEConfig(task_type="SEQ_CLS", strategy=way))  # type: ignore[arg-type]


def time_in_turn(
    steps: Mapping[str, Callable[[], None]], rounds: int, before_round: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Take steps of all ways in turn, so that a machine that gets slower hits all alike.

    Args:
        steps: Name of each way -> a function that takes one of its steps.
        rounds: Rounds that count; two more go before them.
        before_round: Called before each round.

    Returns:
        Seconds of each way's step in each round.
    """
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for round_ in range(-2, rounds):
        before_round()
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 0:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles (low, median, high) of each way's time over the baseline's of the same round."""
    found = {}
    for way, times in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times, seconds[baseline], strict=True)], n=4)
        found[way] = (low, middle, high)
    return found


def main() -> None:
    """Measure and print the table."""
    (args,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    try:
        name = args.model_name_or_path or embedded_encoder()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    batch: dict[str, torch.Tensor] = {}

    def stepper(way: str) -> Callable[[], None]:
        model = build(way, name).to(args.device).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-5)

        def step() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def new_batch() -> None:
        ids = torch.randint(1000, 20000, (args.batch_size, args.length), device=args.device)
        batch.update(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0] % 2)

    seconds = time_in_turn({way: stepper(way) for way in WAYS}, args.rounds, new_batch)
    print(f"{'way':18s} {'ms/step':>9s} {'x plain':>8s}   (quartiles of the ratio)")
    for way, (low, middle, high) in ratios(seconds, "plain").items():
        print(f"{way:18s} {1e3 * statistics.median(seconds[way]):9.1f} {middle:8.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
