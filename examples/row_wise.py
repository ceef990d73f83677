"""An experiment: rows of weight matrices as units, so that parts of a tensor can be frozen. Full fine-tuning, Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rose_peft import UnsupportedOptimizerError, selection
from rose_peft.distributed import world_size
from rose_peft.selector import RoseSelector
from rose_peft.update import owned_groups


def _rows(tensor: Tensor) -> Tensor:
    """A matrix with one row per thing that is masked: the rows of a matrix, or a vector as a whole."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[None]


@dataclass
class _Saved:
    param: Tensor
    grad: Tensor
    weights: Tensor
    momentum: Tensor | None
    mask: Tensor


class RowWise(RoseSelector):
    """Ranks and masks the rows of all units together; its statistics give the mean over the rows of a unit."""

    def _accumulate_risk(self, parameters: list[tuple[int, Tensor]], value: Tensor, equal: Tensor) -> None:
        tensors = [param for _, param in parameters]
        gradients = torch.autograd.grad(value, tensors, retain_graph=True)
        norms = torch.cat([_rows(grad).float().square().sum(dim=1) for grad in gradients])
        self._square_sum = norms if self._square_sum is None else self._square_sum + norms

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mask the rows of this step, as the base class does whole units."""
        parameters = self._parameters()
        mine = {id(param) for group in optimizer.param_groups for param in group["params"]}
        stepping = [param for _, param in parameters if id(param) in mine and param.grad is not None]
        if not stepping:
            return
        whole = isinstance(optimizer, torch.optim.AdamW) and len(stepping) == len(self.units)
        if not whole or world_size() > 1:
            raise UnsupportedOptimizerError(
                "variant='row_wise' is for full fine-tuning with torch.optim.AdamW in one process."
            )
        self._adopt_state(owned_groups(optimizer)[id(stepping[0])])
        counts = [len(_rows(param)) for param in stepping]
        masks = self._row_masks(optimizer, stepping, sum(counts)).split(counts)
        self._rows_saved = []
        for param, mask in zip(stepping, masks, strict=True):
            assert param.grad is not None
            share = mask.to(param)[:, None]
            momentum = optimizer.state.get(param, {}).get("exp_avg")
            still = torch.zeros_like(param) if momentum is None else momentum
            blended = share * _rows(param.grad) + (1 - share) * _rows(still)
            kept = momentum.clone() if momentum is not None else None
            self._rows_saved.append(_Saved(param, param.grad, param.detach().clone(), kept, share))
            param.grad = blended.view_as(param)
        shares = torch.stack([mask.mean() for mask in masks]).cpu()
        self._pending_masks = shares, torch.ones(len(self.units), dtype=torch.bool)
        self._pending_rows = optimizer

    def _row_masks(self, optimizer: torch.optim.Optimizer, stepping: list[Tensor], count: int) -> Tensor:
        band = self.config.lower_quantile, self.config.upper_quantile
        first = second = torch.ones(count, device=stepping[0].device)
        if self.needs_risk_pass and self._square_sum is not None:
            first, _ = selection.quantile_band(self._square_sum.sqrt(), *band)
        momenta = [optimizer.state.get(param, {}).get("exp_avg") for param in stepping]
        if self.config.strategy != "first_order" and all(momentum is not None for momentum in momenta):
            norms = [
                torch.cat([_rows(tensor).float().norm(dim=1) for tensor in tensors])
                for tensors in ([param.grad for param in stepping], momenta)
            ]
            fresh = torch.full_like(norms[0], 1 - optimizer.param_groups[0]["betas"][0])
            scores = selection.second_order_scores(norms[0], norms[1], fresh)
            second, _ = selection.quantile_band(scores, *band, norms[1] == 0)
        if int(self.state.steps) < self.config.warmup_steps:
            return torch.ones_like(first)
        if self.config.strategy == "ensemble":
            return selection.mix(first, second, self.config.gamma)
        return first if self.needs_risk_pass else second

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what a row's mask holds back."""
        if getattr(self, "_pending_rows", None) is not optimizer or self._pending_masks is None:
            return
        for saved in self._rows_saved:
            share = saved.mask.view(-1, *[1] * (saved.param.dim() - 1)) if saved.param.dim() > 1 else saved.mask[0]
            saved.param.copy_(torch.lerp(saved.weights, saved.param, share.expand_as(saved.param)))
            momentum = optimizer.state[saved.param]["exp_avg"]
            before = torch.zeros_like(momentum) if saved.momentum is None else saved.momentum
            momentum.copy_(torch.where(share == 0, before, momentum))
            saved.param.grad = saved.grad
        self._pending_rows = None
        self.state.record(*self._pending_masks)
        self._clear_window()
