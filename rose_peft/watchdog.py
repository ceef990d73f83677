"""Errors and warnings where the training of an adapter goes past ROSE, or its risk passes say nothing."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .average import RiskFigures
from .dropout import dropout_modules, drops_layers
from .errors import RoseInactiveError
from .norms import IndexedTensors, local_part

# Training passes without a masked step from which on it is watched whether the weights change all the same.
QUIET_PASSES = 16
# Changes since then that are taken for a training that goes past ROSE; weights that are swapped and put back do not
# count.
BYPASSED_STEPS = 4
# Steps of an optimizer that holds frozen tensors of the model only, while units wait for theirs.
FROZEN_STEPS = 20
# Training passes, and steps of optimizers that hold no unit, without a masked step.
STRAY_STEPS = 50
# Optimizer steps in a row whose risk passes say nothing: none is finite, or both outputs are equal although there is
# dropout; of the latter the steps between two sampled passes count too.
IDLE_STEPS = 50
# Steps in a row whose risk passes reach too few units, of a model that leaves out layers by chance.
MISSED_WINDOWS = 16


class Watchdog:
    """
    Sees whether the training of one adapter goes past ROSE, and raises where it does.

    Args:
        host: The module whose forward call is observed.
        units: Unit names.
        dropout: `ROSEConfig.dropout`, for the message.
    """

    def __init__(self, host: nn.Module, units: Sequence[str], dropout: float | None) -> None:
        self._host = weakref.ref(host)
        self._units = units
        self._dropout = dropout
        self._eval_passes = 0
        self._quiet_passes = 0
        self._bypassed = 0
        self._anchor: list[Tensor] | None = None
        self._previous: list[Tensor] | None = None
        self._frozen_steps = 0
        self._stray_steps = 0
        self._idle_steps = 0
        self._equal = False
        self._missed = 0
        # Until risk passes have differed once, it is worth its price to compare them to the last bit.
        self.passes_differed = False
        self._stepped = _GradientMark()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_host": None, "_stepped": _GradientMark()}

    def follow(self, host: nn.Module) -> None:
        """Belong to a copied model."""
        self._host = weakref.ref(host)

    # Weights that change without us ---------------------------------------------------------------------------------

    def eval_pass(self) -> None:
        """Note a pass with gradients in eval mode, which says nothing about dropout."""
        self._eval_passes += 1

    def training_pass(self, parameters: IndexedTensors) -> None:
        """Look at the weights before a training pass where there was no masked step for long.

        Values are compared, not version counters, which `param.data` goes past.

        Args:
            parameters: (unit index, parameter) of everything that trains.

        Raises:
            RoseInactiveError: If they change from pass to pass and no masked step does it.
        """
        self._quiet_passes += 1
        if self._quiet_passes <= QUIET_PASSES:
            return
        now = _sample(parameters)
        if self._anchor is None or self._previous is None or not _comparable(now, self._anchor):
            self._anchor = self._previous = now
            return
        if _same(now, self._anchor):
            self._bypassed = 0
        elif not _same(now, self._previous):
            self._bypassed += 1
        self._previous = now
        if self._bypassed >= BYPASSED_STEPS:
            raise RoseInactiveError(
                f"the weights of units change from one training pass to the next, and none of the last "
                f"{self._quiet_passes} passes was followed by a step that ROSE could mask: something else than a "
                "torch optimizer that holds them updates them. Make the optimizer from model.parameters() after "
                "get_peft_model, and call optimizer.step() itself: updates by hand, in a step() that was replaced or "
                "during the backward pass go past ROSE. Engines that step copies of the weights (apex, FSDP1) are "
                "not supported: use DDP or FSDP2."
            )

    def stepped(self, parameters: IndexedTensors) -> None:
        """Note a masked step.

        Args:
            parameters: (unit index, parameter) of those that were stepped.
        """
        self._stepped.put(parameters)
        self._quiet_passes = self._bypassed = self._frozen_steps = self._stray_steps = self._eval_passes = 0
        self._anchor = self._previous = None

    def foreign_step(self, optimizer: torch.optim.Optimizer, parameters: IndexedTensors) -> None:
        """Look at a step of an optimizer that holds no unit while units have gradients.

        One that holds other models, perturbations or the head may be right, so after a while it is only said. One that
        holds nothing of this model but what does not train was made before the adapter was.

        Args:
            optimizer: Who steps.
            parameters: (unit index, parameter) of everything that trains.

        Raises:
            RoseInactiveError: If that goes on without a masked step.
        """
        host = self._host()
        if host is None or all(param.grad is None for _, param in parameters):
            return
        own = {id(param): param for param in host.parameters()}
        held = [own[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if not held or any(param.requires_grad for param in held):
            self._warn_of_stray_steps(optimizer)
            return
        self._frozen_steps += 1
        if self._frozen_steps > FROZEN_STEPS:
            raise RoseInactiveError(
                f"{type(optimizer).__name__} has stepped {self._frozen_steps} times while the units have gradients, "
                f"and holds none of them: of this model it has {len(held)} tensors, all frozen. Make the optimizer "
                "from model.parameters() after get_peft_model."
            )

    def _warn_of_stray_steps(self, optimizer: torch.optim.Optimizer) -> None:
        self._stray_steps += 1
        if self._stray_steps == STRAY_STEPS and self._quiet_passes >= STRAY_STEPS:
            warnings.warn(
                f"no optimizer that holds units has stepped in {self._quiet_passes} training passes which gave them "
                f"gradients, but {type(optimizer).__name__} has, {STRAY_STEPS} times: they do not train, and ROSE "
                "masks nothing. Make the optimizer anew from model.parameters() after get_peft_model, or set "
                "requires_grad_(False) on what shall not train now.",
                stacklevel=2,
            )

    # Risk passes that say nothing -----------------------------------------------------------------------------------

    def is_bypassed(self, calls: int, stepping: IndexedTensors) -> bool:
        """Whether the gradients of this step come from passes that went past the hook.

        Args:
            calls: Training passes through the hook since the last step.
            stepping: (unit index, parameter) with a gradient.
        """
        # Stepping twice with the same gradients is the user's right, and zeros, which zero_grad(set_to_none=False)
        # leaves on an adapter that rests, come from no pass.
        return not calls and not self._stepped.matches(stepping) and any(_may_train(param) for _, param in stepping)

    def check_reached(self, reached: set[int], stepping: IndexedTensors) -> None:
        """Refuse risk passes that reach too few of the units that train.

        Args:
            reached: Units with a gradient of the divergence.
            stepping: (unit index, parameter) with a gradient of the loss.

        Raises:
            RoseInactiveError: If half of them or more are missing.
        """
        trained = {index for index, _ in stepping}
        # Experts that no token of a small pass, or of this process, went to have fellows that some went to.
        kinds = {_kind(self._units[index]) for index in reached}
        unreached = [index for index in trained - reached if _kind(self._units[index]) not in kinds]
        if 2 * len(unreached) >= len(trained):  # zeros that zero_grad(set_to_none=False) left are asked for only here
            trained = {index for index, param in stepping if _may_train(param)}
            unreached = [index for index in unreached if index in trained]
        missing = bool(unreached) and 2 * len(unreached) >= len(trained)
        self._missed = self._missed + 1 if missing else 0
        if missing and not self._is_by_chance():
            raise RoseInactiveError(
                f"{len(unreached)} of {len(self._units)} units have a gradient of the loss but none of the dropout "
                f"divergence (first: {self._units[min(unreached)]!r}). With gradient checkpointing pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def _is_by_chance(self) -> bool:
        """Whether layers may have been left out of this pass, and will be in another one."""
        host = self._host()
        return self._missed <= MISSED_WINDOWS and host is not None and any(map(drops_layers, host.modules()))

    def check_risk(self, risk: RiskFigures | None) -> None:
        """Refuse risk passes that say nothing: no dropout at once, anything else after a while.

        Args:
            risk: What the passes of this step said; None where none was due.

        Raises:
            RoseInactiveError: Naming the cause.
        """
        if risk is not None and risk.bypassed:
            raise self.bypass_error()
        if risk is None or risk.passes == 0:
            self._idle_steps += self._equal
        else:
            self._equal = risk.equal == risk.passes
            idle = self._equal or risk.skipped == risk.passes
            self._idle_steps = self._idle_steps + 1 if idle else 0
            self.passes_differed |= risk.finite > risk.equal
            if self._equal:
                self._check_dropout()
        if self._idle_steps > IDLE_STEPS:
            why = "their gradient was not finite. Lower the learning rate, or use bf16 instead of fp16."
            if self._equal:
                why = (
                    "both passes gave the same output, though the model has dropout. Raise dropout in ROSEConfig; "
                    "where the model makes no use of it (some keep a number that they never read), use "
                    "strategy='second_order'."
                )
            raise RoseInactiveError(f"the risk passes of the last {self._idle_steps} steps said nothing: {why}")

    def bypass_error(self) -> RoseInactiveError:
        """The error for gradients from calls that went past the hook."""
        start = "optimizer.step() has new gradients, but no training pass went through the model since the last step: "
        if self._eval_passes:
            return RoseInactiveError(
                f"{start}it was called in eval mode, which is what from_pretrained returns. Call model.train() before "
                "training, or use strategy='second_order'."
            )
        return RoseInactiveError(
            f"{start}call the model that get_peft_model returned (itself, not its forward()), in train mode and with "
            "gradients on, or use strategy='second_order'."
        )

    def _check_dropout(self) -> None:
        host = self._host()
        found = [] if host is None else [m for m, attribute in dropout_modules(host) if getattr(m, attribute) > 0]
        if any(module.training for module in found):
            return
        if found:
            raise RoseInactiveError(
                f"the model's {len(found)} dropout modules are in eval mode, so both passes gave the same output and "
                "there is no divergence to rank by. Call model.train() before training."
            )
        raise RoseInactiveError(
            f"dropout={self._dropout} and the model has no active dropout: both passes gave the same "
            f"output, so there is no divergence to rank by. Set ROSEConfig(dropout=0.1), or dropout in the "
            "model's own config, or use strategy='second_order'."
        )


def _kind(unit: str) -> str:
    """The name of a unit without its numbers but that of its block: what the experts of one block have in common."""
    parts = unit.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join("*" if place in numbers[1:] else part for place, part in enumerate(parts))


class _GradientMark:
    """Remembers a gradient, to tell later whether there is a new one."""

    def __init__(self) -> None:
        self._grad: weakref.ref[Tensor] | None = None
        self._version = 0

    @staticmethod
    def _first(parameters: IndexedTensors) -> Tensor | None:
        return next((param.grad for _, param in parameters if param.grad is not None), None)

    def put(self, parameters: IndexedTensors) -> None:
        grad = self._first(parameters)
        self._grad = weakref.ref(grad) if grad is not None else None
        self._version = grad._version if grad is not None else 0

    def matches(self, parameters: IndexedTensors) -> bool:
        grad = self._first(parameters)
        known = self._grad() if self._grad is not None else None
        return grad is known and (grad is None or grad._version == self._version)


def _may_train(param: Tensor) -> bool:
    """Whether a parameter has a gradient that is not all zeros, or one that cannot be seen here."""
    return param.grad is None or bool(local_part(param.grad).any())


def _sample(parameters: IndexedTensors, tensors: int = 8, elements: int = 16) -> list[Tensor]:
    """A few elements of a few parameters, spread over the units."""
    stride = max(1, len(parameters) // tensors)
    chosen = [param for _, param in parameters[::stride]]
    # What FSDP2 shows is sometimes a shard and sometimes whole; only the like can be compared.
    shards = torch.tensor([isinstance(param, DTensor) for param in chosen], device="cpu")
    return [shards, *(local_part(param.detach()).flatten()[:elements].clone() for param in chosen)]


def _comparable(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    alike = [(t.shape, t.dtype, t.device) for t in one] == [(t.shape, t.dtype, t.device) for t in other]
    return alike and torch.equal(one[0], other[0])


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return _comparable(one, other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
