"""One of several processes that share a process group and nothing else, or that share it for one model.

`python -m tests.helpers.independent WAY OUTPUT` with RANK and WORLD_SIZE as torchrun sets them. WAY: "alone" (a model
each), "given" (one model, gradients averaged by hand), "ddp" (ranks 0 and 1 under DDP in a group of their own, the
others alone). Rank r writes its masks, one row per step, to OUTPUT.masks.r.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, attach_rose
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted, unit_weights

STEPS = 4


def micro_batch(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
    """The part-th micro-batch of a step; its data and its dropout depend on both numbers."""
    torch.manual_seed(1000 * step + part)
    return batch(model, seed=10 * step + part)


def train(
    model: nn.Module,
    parts: list[int],
    steps: int = STEPS,
    group: dist.ProcessGroup | None = None,
    ddp: dist.ProcessGroup | None = None,
) -> Tensor:
    """Train on those parts of every step.

    Args:
        model: A tiny BERT.
        parts: Micro-batches of this process.
        steps: Number of steps.
        group: Processes that train this model by averaging gradients by hand.
        ddp: Processes that train this model under DDP.

    Returns:
        Masks, [steps, units].
    """
    given = {} if group is None else {"process_group": group}
    selector = attach_rose(model, ROSEConfig(strategy="first_order", upper_quantile=0.5), **given)
    called = model if ddp is None else DistributedDataParallel(model, process_group=ddp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    masks = []
    for step in range(steps):
        for part in parts:
            (called(**micro_batch(model, step, part)).loss / len(parts)).backward()
        if group is not None:
            for param in model.parameters():
                if param.grad is not None:
                    dist.all_reduce(param.grad, group=group)
                    param.grad /= dist.get_world_size(group)
        before = unit_weights(selector)
        optimizer.step()
        optimizer.zero_grad()
        assert_masks_acted(selector, before)
        masks.append(selector.state.last_mask.clone())
    assert selector.statistics().steps == steps
    return torch.stack(masks)


def main() -> None:
    way, output = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Processes that wait for one another where they should not are to end soon.
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    if way == "alone":  # one takes more steps than the other
        masks = train(tiny_bert(seed=rank), [rank], STEPS + rank)
    elif way == "given":
        masks = train(tiny_bert(), [rank], group=dist.group.WORLD)
    else:
        pair = dist.new_group([0, 1])
        masks = train(tiny_bert(), [rank], ddp=pair) if rank < 2 else train(tiny_bert(seed=rank), [rank], STEPS + 1)
    torch.save(masks, f"{output}.masks.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    assert world > 1


if __name__ == "__main__":
    main()
