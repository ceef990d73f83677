"""Every cell of the table in one process group, each with a fresh model.

torchrun --nproc_per_node 2 tests/distributed/table.py OUTPUT [PATTERN]
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
import warnings
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.utils import logging

from rose_peft import get_selector
from rose_peft.selector import RoseSelector
from tests.distributed.cells import CELLS, Cell
from tests.distributed.loops import build, train
from tests.distributed.worker import RANK, WORLD, draw_as_where_calls_gather
from tests.helpers.traffic import Counted


class Watch:
    """Sees each optimizer step: its masks, and whether just the frozen units stayed the same to the last bit."""

    def __init__(self, selector: RoseSelector) -> None:
        self.selector = selector
        self.masks: list[Tensor] = []
        self.wrong: list[str] = []
        self.sharded = False
        self._before: list[list[Tensor]] = []
        self._handles = [register_optimizer_step_pre_hook(self.before), register_optimizer_step_post_hook(self.after)]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _weights(self) -> list[list[Tensor]]:
        units = [unit.parameters() for unit in self.selector.units]
        self.sharded = any(isinstance(param, DTensor) for unit in units for param in unit)
        return [[p.to_local() if hasattr(p, "to_local") else p for p in unit] for unit in units]

    def before(self, *step: Any) -> None:
        self._before = [[param.detach().clone() for param in unit] for unit in self._weights()]

    def after(self, *step: Any) -> None:
        mask = self.selector.state.last_mask.clone()
        self.masks.append(mask)
        for unit, share, old, new in zip(self.selector.units, mask, self._before, self._weights(), strict=True):
            same = all(torch.equal(one, two) for one, two in zip(old, new, strict=True))
            if same != bool(share == 0):
                self.wrong.append(f"step {len(self.masks)}: {unit.name} has mask {float(share)}, same={same}")


def run(cell: Cell) -> dict[str, Any]:
    """Train one cell and return what came of it."""
    result: dict[str, Any] = {"error": "", "masks": None}
    start = time.perf_counter()
    model = build(cell)
    # The draws depend on the data alone, whatever loop draws in between.
    model.register_forward_pre_hook(
        lambda module, args, kwargs: torch.manual_seed(int(kwargs["input_ids"].sum())) and None, with_kwargs=True
    )
    try:
        sent = Counted()
        with Watch(get_selector(model)) as watch, sent.in_place():
            train(model, cell)
        result["traffic"] = sent.bytes
        result["masks"] = torch.stack(watch.masks)
        result["wrong"] = watch.wrong
        result["sharded"] = watch.sharded
        result["weights"] = {
            name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
            for name, param in model.named_parameters()
            if param.requires_grad
        }
        result["steps"] = get_selector(model).statistics().steps
        result["vectors"] = len(get_selector(model).state.owners)
    except Exception as error:
        result |= {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    result["seconds"] = time.perf_counter() - start
    return result


def main() -> None:
    """Run the cells, and write the result of each as it ends."""
    output, pattern = Path(sys.argv[1]), (sys.argv[2:] or ["*"])[0]
    logging.set_verbosity_error()
    draw_as_where_calls_gather()
    warnings.simplefilter("ignore")
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for cell in CELLS:
        if cell.ranks == WORLD and fnmatch(cell.name, pattern):
            torch.save(run(cell), output / f"{cell.name}.{RANK}")
            gc.collect()
    if WORLD > 1:
        dist.barrier()  # a rank that leaves early can keep gloo from shutting down in the other
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
