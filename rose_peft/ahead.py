"""Masks that are known before the forward call, so that frozen units need no gradient in that step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import masks
from .config import ROSEConfig
from .distributed import Processes
from .errors import RoseConfigError, UnsupportedEngineError
from .masks import Ranking
from .norms import IndexedTensors
from .scores import Facts, Scores, ranking_dtype
from .state import SelectionState


@dataclass
class Plan:
    """The mask of a step that has not begun, and the parameters that build no gradient in it.

    Args:
        ranking: What the mask follows from.
        held_back: Parameters of units with mask 0, whose `requires_grad` is off while a graph is built, and at no
            other time: users read it to see what trains, and set it.
        off: Those of them for which it is off now.
    """

    ranking: Ranking
    held_back: Sequence[Tensor]
    off: list[Tensor] = field(default_factory=list)

    def hold_back(self) -> None:
        """Let the parameters build no gradient, but for those that the user has frozen."""
        training = [param for param in self.held_back if param.requires_grad]
        self.off += training
        for param in training:
            param.requires_grad_(False)

    def release(self) -> None:
        """Let them build gradients again."""
        for param in self.off:
            param.requires_grad_(True)
        self.off = []


def plan(config: ROSEConfig, scores: Scores, state: SelectionState, parameters: IndexedTensors) -> Plan | None:
    """Plan the next step from the risk passes before it, or return None where there were none or it is warm-up.

    Args:
        config: The settings.
        scores: What units are ranked by.
        state: What is known.
        parameters: (unit index, parameter) of everything that trains.

    Raises:
        RoseConfigError: If the first-order score needs norms that are not known before the step.
    """
    squares = state.average.squares()
    if squares is None or int(state.steps) < config.warmup_steps:
        return None
    if scores.first_order.tensors(()):
        raise RoseConfigError(
            f"skip_frozen_gradients=True needs a score that follows from the risk passes alone, and "
            f"{type(scores.first_order).__name__} asks for norms of the step; leave the option out."
        )
    dtype = ranking_dtype(parameters[0][1])
    facts = Facts(state.units, state.sizes.double(), (), int(state.steps), squares, 1.0, dtype)
    values, unscored = scores.first_order.score((), facts)
    ungraded = torch.ones(len(state.units), dtype=torch.bool, device="cpu")
    ungraded[[index for index, _ in parameters]] = False
    ranking = masks.rank(values, unscored, ungraded, config.lower_quantile, config.upper_quantile)
    frozen = {index for index, mask in enumerate(ranking.mask.tolist()) if mask == 0}
    if frozen.issuperset(index for index, _ in parameters):
        frozen = set()  # over an adapter nothing else trains, and a loss without a graph has no backward pass
    return Plan(ranking, [param for index, param in parameters if index in frozen])


def check_can_skip(host: nn.Module, processes: Processes, splits: bool) -> None:
    """Refuse to leave gradients out where something counts on every one of them.

    Args:
        host: The module whose forward call is observed.
        processes: Who trains the model.
        splits: Whether the engine steps pieces of parameters.

    Raises:
        UnsupportedEngineError: Naming what it is.
    """
    if processes.groups or splits:
        what = "the reducers of DDP, FSDP2 and ZeRO wait for the gradient of every parameter"
    elif _is_compiled(host):
        what = "a compiled model is compiled anew for every mask"
    else:
        return
    raise UnsupportedEngineError(
        f"skip_frozen_gradients=True does not work here: {what}. Leave it out: units are chosen by the same scores, "
        "one step later."
    )


def _is_compiled(host: nn.Module) -> bool:
    """Whether a module is compiled, wholly or in part, or called by what `torch.compile` made of it or of a whole."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded where nothing is compiled, and slow to load
    if dynamo is None:
        return False
    for module in host.modules():
        if isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            return True
    # What is around a module is not to be seen from it, but for the frames of the call.
    frame = inspect.currentframe()
    while frame is not None:
        calls = frame.f_code is nn.Module._wrapped_call_impl.__code__
        if calls and isinstance(frame.f_locals.get("self"), dynamo.OptimizedModule):
            return True
        frame = frame.f_back
    return False
