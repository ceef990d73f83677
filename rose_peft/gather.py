"""Fetching what the masks of a step are made of: one reduction over processes, one transfer from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .average import RiskFigures
from .decision import Gathered, risk_squares
from .distributed import Processes
from .norms import IndexedTensors, is_sharded, square_norms_per_unit, wide_dtype
from .scores import Facts, Scores, Stepping, ranking_dtype
from .standing import Standing
from .steered import Steered


@torch.no_grad()  # gradients have graphs where users ask for them (create_graph=True)
def gather(
    steered: Steered,
    stepping: Sequence[Stepping],
    scores: Scores,
    processes: Processes,
    loss_scale: float,
    steps: int,
    splits: bool = False,
) -> Gathered:
    """Fetch norms and risk figures, and let the watchdog look at them.

    Args:
        steered: The adapter.
        stepping: Its parameters with a gradient.
        scores: What units are ranked by.
        processes: Who trains the model.
        loss_scale: Scale that the gradients still carry.
        steps: Optimizer steps begun in this process, this one included.
        splits: Whether tensors of units are pieces that do not show it.

    Raises:
        RoseInactiveError: If the risk passes say nothing, or if there were none.
        UnsupportedOptimizerError: If a score needs a momentum and there is none to read.
        RankMismatchError: If other processes stand at another point of the training.
    """
    config, units, window = steered.config, len(steered.units), steered.window
    device = stepping[0].param.device
    # Zeros that zero_grad(set_to_none=False) left on what no longer trains are no gradients.
    pairs = [(entry.index, entry.part.holder) for entry in stepping if entry.param.requires_grad]
    first = list(scores.first_order.tensors(stepping)) if config.needs_risk_pass else []
    second = list(scores.second_order.tensors(stepping)) if config.needs_momentum else []
    sums = None
    bypassed = config.needs_risk_pass and bool(pairs) and steered.watchdog.is_bypassed(window.calls, pairs)
    if config.risk_is_due(int(steered.state.steps)):
        sums = window.sums(device, wide_dtype(device), bypassed)
    elif bypassed:
        raise steered.watchdog.bypass_error()
    standing = Standing(steps, window.calls, steered.state.units, steered.state.last_mask)
    sums, norms = _fetch(sums, [*first, *second], standing, device, processes, splits)
    risk = window.figures(sums) if sums is not None else None
    _check(steered, risk, pairs)
    squares, average = risk_squares(config, steered.state.average, risk)
    ungraded = torch.ones(units, dtype=torch.bool, device="cpu")
    ungraded[[entry.index for entry in stepping]] = False
    planned = steered.plan.ranking if steered.plan is not None else None
    if planned is not None:
        ungraded &= planned.mask > 0  # units that the plan froze have no gradient by our own doing
    facts = Facts(
        units=steered.state.units,
        sizes=steered.state.sizes.double(),
        stepping=stepping,
        steps=int(steered.state.steps),
        risk=squares,
        loss_scale=loss_scale,
        dtype=ranking_dtype(stepping[0].param),
    )
    last = steered.state.first_mask.clone()
    return Gathered(facts, norms[: len(first)], norms[len(first) :], risk, ungraded, last, average, planned)


def _check(steered: Steered, risk: RiskFigures | None, stepping: IndexedTensors) -> None:
    """Let the watchdog look at what the risk passes said and reached."""
    steered.watchdog.check_risk(risk)
    if stepping and not steered.window.is_empty:
        steered.watchdog.check_reached(steered.window.reached, stepping)


def _fetch(
    risk_sums: Tensor | None,
    lists: Sequence[IndexedTensors],
    standing: Standing,
    device: torch.device,
    processes: Processes,
    splits: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Fetch risk sums, which every process has a part of, and norms per unit, whole or of shards, together."""
    units = len(standing.units)
    sums = [square_norms_per_unit(tensors, units, device) for tensors in lists]
    sharded = [index for index, tensors in enumerate(lists) if splits or is_sharded(tensors)]
    whole = [index for index in range(len(lists)) if index not in sharded]
    if risk_sums is None and not lists:
        return None, []
    risk_sums = torch.zeros(0, dtype=wide_dtype(device), device=device) if risk_sums is None else risk_sums
    # Even where nothing is to be added up: gradients and momenta are equal only while all processes are in step.
    reduced = processes.sum(torch.cat([risk_sums, *(sums[index] for index in sharded)]), standing)
    values = torch.cat([reduced, *(sums[index] for index in whole)]).cpu().double()
    values = processes.checked(values, standing, device)
    fetched, *squares = values.split([len(risk_sums), *([units] * len(lists))])
    norms = dict(zip([*sharded, *whole], squares, strict=True))
    return fetched if len(fetched) else None, [norms[index].sqrt() for index in range(len(lists))]
