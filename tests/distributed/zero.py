"""Trains under DeepSpeed ZeRO and, with the same data, under DDP; every cell in one process group.

torchrun --nproc_per_node 2 tests/distributed/zero.py OUTPUT [PATTERN|slow]
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, get_selector
from tests.distributed.cells import Cell
from tests.distributed.worker import RANK, draw_as_where_calls_gather, micro_batch
from tests.helpers.tiny import tiny_bert
from tests.helpers.traffic import Counted

STEPS, SIZE = 5, 4
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class ZeroCell:
    """One way to train; `refusal` is what ROSE's error must say."""

    stage: int
    precision: str = "float32"
    strategy: str = "ensemble"
    risk_pass: str = "paired"
    accumulation: int = 1
    clip: float = 0.0
    groups: int = 2
    adapter: str = ""
    overflow_at: int = -1
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    optimizer: str = "AdamW"
    refusal: str = ""

    @property
    def name(self) -> str:
        """Unique name, for files and test ids."""
        settings = f"x{self.accumulation}-clip{self.clip:g}-groups{self.groups}{self.adapter}"
        extra = "".join(f"-{key}" for key in (*self.zero, *self.more, self.optimizer))
        return f"zero{self.stage}-{self.precision}-{self.strategy}-{self.risk_pass}-{settings}{extra}"

    @property
    def row(self) -> Cell:
        """Where it stands in the table."""
        extra = next(iter((*self.zero, *self.more)), "") if self.stage < 3 else ""
        loop = extra or self.adapter or ("one group" if self.groups == 1 else "DeepSpeed")
        return Cell(f"zero{self.stage}", loop, self.precision, self.strategy, self.refusal, "", self.risk_pass)

    @property
    def compared(self) -> bool:
        """Whether DDP with the same precision gives the same but for rounding.

        Stage 3 has a linear layer of its own; its other rounding moves rankings in bf16, not in float32.
        """
        return self.precision != "fp16" and not self.refusal and (self.stage < 3 or self.precision == "float32")


# DeepSpeedCPUAdam is another extension to be compiled, which takes minutes.
SLOW = [
    ZeroCell(2, accumulation=2, clip=0.5, zero=OFFLOAD, optimizer="DeepSpeedCPUAdam"),
    ZeroCell(2, "bf16", "second_order", zero=OFFLOAD, optimizer="DeepSpeedCPUAdam"),
]
CELLS = [
    ZeroCell(1, strategy="first_order", accumulation=2, clip=0.5),
    ZeroCell(2, strategy="first_order", risk_pass="sampled", accumulation=2, clip=0.5),
    ZeroCell(1, strategy="second_order", clip=0.5),
    ZeroCell(2, strategy="second_order", accumulation=2, clip=0.5),
    ZeroCell(2, strategy="second_order", groups=1),
    ZeroCell(1, risk_pass="sampled", accumulation=2, clip=0.5),
    ZeroCell(2, accumulation=2, clip=0.5),
    ZeroCell(2, adapter="lora", groups=1, clip=0.5),
    ZeroCell(2, risk_pass="sampled"),
    ZeroCell(2, accumulation=2, clip=0.5, zero=OFFLOAD, more={"zero_force_ds_cpu_optimizer": False}),
    ZeroCell(2, zero={"round_robin_gradients": True}, refusal="round_robin"),
    ZeroCell(1, "bf16", "first_order"),
    ZeroCell(2, "bf16", "second_order"),
    ZeroCell(2, "bf16", risk_pass="sampled"),
    ZeroCell(1, "bf16", "second_order", more=FP32_GRADIENTS),  # BF16_Optimizer
    ZeroCell(2, "bf16", "second_order", accumulation=2, more=FP32_GRADIENTS),
    ZeroCell(2, "fp16", clip=0.5, overflow_at=2),
    ZeroCell(1, "fp16", risk_pass="sampled", accumulation=2, overflow_at=2),
    ZeroCell(3, strategy="second_order", clip=0.5, zero={"stage3_param_persistence_threshold": 0}),
    ZeroCell(3, strategy="first_order", risk_pass="sampled", zero={"stage3_param_persistence_threshold": 0}),
    ZeroCell(3, "bf16", risk_pass="sampled", zero={"stage3_param_persistence_threshold": 0}),
    ZeroCell(3, refusal="ZeRO stage 2"),
    ZeroCell(0, refusal="ZeRO stage 0"),
    ZeroCell(0, "bf16", "second_order", refusal="ZeRO stage 0"),
    ZeroCell(2, "float32", "second_order", zero={"elastic_checkpoint": True}, refusal="elastic"),
]


def build(cell: ZeroCell) -> nn.Module:
    """The same tiny model on every rank."""
    model = tiny_bert(num_labels=3, hidden_size=32, intermediate_size=64, vocab_size=50, attn_implementation="sdpa")
    base = LoraConfig(r=4, target_modules=["query", "value"]) if cell.adapter else None
    often = {"risk_interval": 2} if cell.risk_pass == "sampled" else {}
    config = ROSEConfig(
        task_type="SEQ_CLS", strategy=cell.strategy, risk_pass=cell.risk_pass, base_config=base, **often
    )
    return get_peft_model(model, config).to(DTYPES[cell.precision])


def optimizer_of(model: nn.Module, cell: ZeroCell, cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Decay for matrices and none for the rest, as the Trainer has it; units lie in both groups."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if cell.groups == 1:
        return cls(trained, lr=1e-2, weight_decay=0.01)
    matrices = [param for param in trained if param.dim() > 1]
    rest = [param for param in trained if param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return cls(groups, lr=1e-2)


class Watch:
    """Notes masks, bytes, and whether frozen units, and they alone, stayed the same to the last bit."""

    def __init__(self, model: nn.Module, cell: ZeroCell) -> None:
        self.model, self.selector, self.cell = model, get_selector(model), cell
        self.masks: list[Tensor] = []
        self.wrong: list[str] = []
        self.sent = Counted()
        self.patch = self.sent.in_place()

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which parameters are whole."""
        if self.cell.stage != 3 or not any(hasattr(param, "ds_id") for param in self.model.parameters()):
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))

    def weights(self) -> dict[str, Tensor]:
        """What trains, whole."""
        with self.whole():
            return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def unit_weights(self) -> list[list[Tensor]]:
        """The same by unit."""
        with self.whole():
            return [[param.detach().clone() for param in unit.parameters()] for unit in self.selector.units]

    def step(self, step: int, before: list[list[Tensor]]) -> None:
        """Look at a step that has been taken, or skipped."""
        if int(self.selector.state.steps) == len(self.masks):
            return
        mask = self.selector.state.last_mask.clone()
        self.masks.append(mask)
        for unit, share, old, new in zip(self.selector.units, mask, before, self.unit_weights(), strict=True):
            same = [torch.equal(one, two) for one, two in zip(old, new, strict=True)]
            if (share == 0 and not all(same)) or (share > 0 and self.cell.precision == "float32" and all(same)):
                self.wrong.append(f"step {step}: {unit.name} has mask {float(share)}, same={same}")

    def result(self) -> dict[str, Any]:
        """What came of it."""
        return {
            "masks": torch.stack(self.masks),
            "wrong": self.wrong,
            "traffic": self.sent.bytes,
            "units": len(self.selector.units),
            "vectors": len(self.selector.state.owners),
            "weights": self.weights(),
            "statistics": self.selector.statistics().as_dict(),
        }


def micro_batches(cell: ZeroCell, step: int) -> list[dict[str, Tensor]]:
    """This rank's."""
    return [micro_batch(step, 2 * index + RANK, SIZE) for index in range(cell.accumulation)]


def draw(step: int, index: int) -> None:
    """Dropout depends on step, micro-batch and rank alone."""
    torch.manual_seed(1000 * step + 10 * index + RANK)


def under_zero(cell: ZeroCell) -> dict[str, Any]:
    """Train under DeepSpeed."""
    import deepspeed

    model = build(cell)
    config = {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": cell.clip,
        "zero_optimization": {"stage": cell.stage, **cell.zero},
        "steps_per_print": 10**9,
        **cell.more,
    }
    if cell.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if cell.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    cls = deepspeed.ops.adam.DeepSpeedCPUAdam if cell.optimizer == "DeepSpeedCPUAdam" else torch.optim.AdamW
    optimizer = optimizer_of(model, cell, cls)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    watch = Watch(model, cell)
    with watch.patch:
        for step in range(STEPS):
            before = watch.unit_weights()
            for index, batch in enumerate(micro_batches(cell, step)):
                draw(step, index)
                loss = engine(**batch).loss
                engine.backward(loss * float("inf") if step == cell.overflow_at else loss)
                engine.step()
            watch.step(step, before)
    return watch.result()


class InHalf(nn.Module):
    """
    Computes in bf16 with weights kept in float32, as DeepSpeed does.

    Args:
        model: In float32.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        weights = {name: param.bfloat16() for name, param in self.model.named_parameters()}
        return functional_call(self.model, weights, kwargs=batch)


def reduced_in_half(state, bucket):  # DDP compares annotations, which are strings here
    """A hook for DDP that averages gradients in bf16; torch's own is for GPUs only."""
    half = (bucket.buffer() / dist.get_world_size()).bfloat16()
    future: Any = dist.all_reduce(half, async_op=True).get_future()
    return future.then(lambda done: done.value()[0].float())


def under_ddp(cell: ZeroCell) -> dict[str, Any]:
    """Train under DDP; in half precision with gradients that are reduced in it."""
    model = build(cell).float()
    network = DistributedDataParallel(model if cell.precision == "float32" else InHalf(model))
    if cell.precision == "bf16":
        network.register_comm_hook(None, reduced_in_half)
    optimizer = optimizer_of(model, cell, torch.optim.AdamW)
    watch = Watch(model, cell)
    with watch.patch:
        for step in range(STEPS):
            before = watch.unit_weights()
            batches = micro_batches(cell, step)
            for index, batch in enumerate(batches):
                draw(step, index)
                with nullcontext() if index == len(batches) - 1 else network.no_sync():
                    (network(**batch).loss / len(batches)).backward()
            if cell.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cell.clip)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(step, before)
    return watch.result()


def allow_fp16() -> None:
    """DeepSpeed trains in fp16 on a CPU, though it says that it cannot."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: list(DTYPES.values())


def main() -> None:
    """Run the cells, and write the result of each as it ends."""
    output, pattern = Path(sys.argv[1]), (sys.argv[2:] or ["*"])[0]
    import deepspeed

    draw_as_where_calls_gather()
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    allow_fp16()
    for cell in SLOW if pattern == "slow" else CELLS:
        if pattern != "slow" and not fnmatch(cell.name, pattern):
            continue
        result: dict[str, Any] = {"error": ""}
        try:
            result |= under_zero(cell)
            if cell.compared:
                result["reference"] = under_ddp(cell)
        except Exception as error:
            result |= {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        torch.save(result, output / f"{cell.name}.{RANK}")
    dist.barrier()  # a rank that leaves early can keep gloo from shutting down in the other
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
