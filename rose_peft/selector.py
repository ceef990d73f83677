"""RoseSelector: the hooks on model and optimizer that compute the masks of each step, and their bookkeeping."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import distributed, selection
from .config import ROSEConfig
from .divergence import loss_of, output_divergence, with_loss
from .dropout import TrainingDropout, dropout_modules
from .errors import (
    AlreadyAttachedError,
    RoseInactiveError,
    UnsupportedEngineError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)
from .statistics import RoseStatistics, SelectionState
from .units import Unit, find_units
from .update import MaskedStep, momentum_of, momentum_rule, owned_groups, square_norms, wide_dtype

_SELECTOR = "_rose_selector"
STATE_KEY = "rose"

# Steps of other optimizers that may pass while gradients of ours wait, before that is taken for an engine that hides
# the parameters it steps.
FOREIGN_STEPS = 20
# Optimizer steps in a row whose risk passes say nothing (not finite, or both outputs equal although there is dropout).
IDLE_STEPS = 50
# The risk scale keeps half-precision divergence gradients from flushing to zero. It is there for every dtype, because
# a hook cannot see an autocast around `forward` alone (as Accelerate makes it); powers of two cost no precision.
MAX_RISK_SCALE = 2.0**24
RISK_SCALE_GROWTH_STEPS = 200

_live: weakref.WeakSet[RoseSelector] = weakref.WeakSet()
_optimizer_hooks: list[Any] = []


class RoseSelector:
    """
    Steers one model's training: at each optimizer step it computes the masks and lets them act.

    Args:
        host: Module whose forward call is observed.
        model: Base model, whose parameter names are the unit names.
        config: The settings.

    Raises:
        AlreadyAttachedError: If the model has a selector.
        TargetModulesError: If there is nothing to mask.
    """

    def __init__(self, host: nn.Module, model: nn.Module, config: ROSEConfig) -> None:
        for selector in list(_live):
            if selector.model is model:
                selector.detach_if_unloaded()
        if any(_SELECTOR in module.__dict__ for module in (host, model)):
            raise AlreadyAttachedError(
                "ROSE is already attached to this model; call detach_rose(model) before attaching it again."
            )
        self.host: nn.Module = host
        self.model: nn.Module = model
        self.config = config
        self.units: list[Unit] = find_units(model, config)
        self.state = SelectionState([unit.name for unit in self.units])
        self._outgrown: list[dict[str, Any]] = []
        self._adapters = self._adapter_signature()
        self._witness = self._first_tuner_layer()
        self._in_risk_pass = False
        self._pending: tuple[torch.optim.Optimizer, MaskedStep] | None = None
        self._pending_masks: tuple[Tensor, Tensor] | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._stepped_gradient = _GradientMark()
        self._foreign_gradient = _GradientMark()
        self._new_pass = False
        self._called = False
        self._shards: dict[int, Tensor] = {}
        self._foreign_steps = 0
        self._idle_steps = 0
        self._clear_window()
        self._dropout: TrainingDropout | None = None
        if config.dropout is not None:
            self._dropout = TrainingDropout(model, config.dropout, self._target_modules())
        self._engine_checked = False
        self._handles: list[Any] = []
        # PeftModel without a task type calls the model, with one the tuner, whose forward goes past the hooks of the
        # model (peft 0.18) or not (0.21): both have hooks, and the outer one rests where the inner one acted.
        self._inner_acted = False
        for module in [host] if host is model else [host, model]:
            self._handles.append(module.register_forward_pre_hook(self._before_forward))
            if self.needs_risk_pass:
                self._handles.append(module.register_forward_hook(self._after_forward, with_kwargs=True))
        host.__dict__[_SELECTOR] = self
        _track(self)

    @property
    def needs_risk_pass(self) -> bool:
        """Whether the strategy looks at the dropout divergence."""
        return self.config.strategy != "second_order"

    def statistics(self) -> RoseStatistics:
        """What ROSE did so far; cheap, asks no device."""
        return self.state.statistics()

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the state saved in an optimizer now; without this call its next step does so.

        Args:
            optimizer: One that holds the units, as loaded; with no state of ROSE in it nothing happens.
        """
        groups = owned_groups(optimizer)
        for _, param in self._parameters():
            if STATE_KEY in groups.get(id(param), {}):
                self._adopt_state(groups[id(param)])
                return

    def detach(self) -> None:
        """Take every hook off and put the model's own dropout back."""
        for handle in self._handles:
            handle.remove()
        if self._dropout is not None:
            self._dropout.undo()
        if self._pending is not None:
            self._pending[1].give_back()
            self._pending = None
        self.host.__dict__.pop(_SELECTOR, None)
        _untrack(self)

    def hand_over(self, config: ROSEConfig) -> RoseSelector:
        """Go on with other settings, as for another adapter: a new selector, whose statistics start anew.

        Args:
            config: The settings.

        Returns:
            The new selector; it knows the state that this one may have left in an optimizer as outgrown.
        """
        self.detach()
        successor = type(self)(self.host, self.model, config)
        successor._outgrown = [*self._outgrown, self.state.values]
        return successor

    def detach_if_unloaded(self) -> bool:
        """Detach where the adapter was merged or unloaded: other methods' tuners do not tell us."""
        if self._witness is None:
            return False
        name, layer = self._witness
        try:
            unloaded = self.model.get_submodule(name) is not layer
        except AttributeError:
            unloaded = True
        unloaded = unloaded and not any(module is layer for module in self.model.modules())  # it may have moved
        if unloaded:
            self.detach()
        return unloaded

    def _first_tuner_layer(self) -> tuple[str, nn.Module] | None:
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                return name, module
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model must be steered like the original.
        self.__dict__.update(state)
        _track(self)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_stepped_gradient": _GradientMark(), "_foreign_gradient": _GradientMark(), "_shards": {}}
        return {**self.__dict__, "_pending": None, "_optimizer": None, **fresh}

    # Units ----------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Find the units anew, as after an adapter was added or deleted; what is known of old ones is kept."""
        self._adapters = self._adapter_signature()
        # After the last adapter was deleted there is nothing to steer, and the steps of other models are none of ours.
        self.units = find_units(self.model, self.config) if self._adapters else []
        self._witness = self._first_tuner_layer()
        names = [unit.name for unit in self.units]
        if names != self.state.units:
            self._outgrown.append(self.state.values)
            self.state = SelectionState(names)
            self.state.continue_from(self._outgrown[-1])
        self._clear_window()

    def _adapter_signature(self) -> tuple[tuple[str, int], ...]:
        configs = getattr(self.model, "peft_config", None)
        return tuple((name, id(config)) for name, config in configs.items()) if isinstance(configs, dict) else ()

    def _parameters(self) -> list[tuple[int, Tensor]]:
        """(unit index, tensor) of everything that trains now."""
        if self.detach_if_unloaded():
            return []
        if self._adapters != self._adapter_signature():
            self.refresh()
        return [(index, param) for index, unit in enumerate(self.units) for param in unit.parameters()]

    def _target_modules(self) -> Iterator[nn.Module]:
        # Norm weights are units too, but dropout belongs in front of the matrices.
        owners = {
            id(module): module
            for unit in self.units
            for module, name in unit.slots
            if any(param.dim() > 1 for param in [module._parameters[name]] if param is not None)
        }
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                if any(id(module) in owners for module in layer.modules()):
                    yield layer
            elif id(layer) in owners and not isinstance(layer, (nn.ModuleDict, nn.ParameterDict)):
                yield layer

    # The forward side: risk passes ----------------------------------------------------------------------------------

    def _clear_window(self) -> None:
        """Forget the risk passes since the last optimizer step."""
        self._square_sum: Tensor | None = None
        self._counts: Tensor | None = None  # finite passes, skipped passes, passes with equal outputs
        self._reached: set[int] = set()
        self._backward_seen = False

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self.host:
            self._inner_acted = False
        if not module.training:
            return
        self._called = True
        if not self._engine_checked or getattr(module, "_is_replica", False):
            self._parameters()  # finds the units anew where adapters have changed
            distributed.check_engine(module, [tensor for unit in self.units for tensor in unit.tensors()])
            self._engine_checked = True
        # Under FSDP2 the graph hangs on the unsharded parameters; a shard put back in their place before the risk
        # pass would leave its gradient nothing to reach.
        if self.needs_risk_pass and self._watch_shards(self._parameters()):
            distributed.keep_unsharded_after_forward(self.model)

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._in_risk_pass or not module.training or not torch.is_grad_enabled():
            return None
        if module is self.host and self._inner_acted:
            return None
        self._inner_acted = module is not self.host
        parameters = self._parameters()
        if not parameters:
            return None
        if any(isinstance(param, DTensor) for _, param in parameters):
            raise UnsupportedEngineError(
                f"strategy={self.config.strategy!r} needs whole parameters inside the forward call, and this engine "
                "shows shards only. Use FSDP2 (fully_shard) or DDP, or strategy='second_order'."
            )
        self._forget_discarded_window(parameters)
        # TRL's trainers ask for log-probabilities and no logits, so the first pass says nothing: two more do.
        fused = bool(kwargs.get("fused_lm_head"))
        if fused:
            kwargs = {**kwargs, "fused_lm_head": False}
        with self._risk_pass():
            first = module.forward(*args, **kwargs) if fused else output
            second = module.forward(*args, **kwargs)
        config = getattr(self.model, "config", None)
        value, equal = output_divergence(
            first, second, kwargs, getattr(config, "problem_type", None), self._is_causal()
        )
        if not value.requires_grad:
            raise UnsupportedModelError(
                "the logits do not depend on any trainable parameter, so the dropout divergence has no gradient; "
                "compute them with gradients, or use strategy='second_order'."
            )
        self._accumulate_risk(parameters, value, equal)
        self._watch_backward(output)
        losses = loss_of(output), loss_of(second)
        if losses[0] is not None and losses[1] is not None:
            return with_loss(output, (losses[0] + losses[1]) / 2)
        return None

    @contextmanager
    def _risk_pass(self) -> Iterator[None]:
        self._in_risk_pass = True
        try:
            yield
        finally:
            self._in_risk_pass = False

    def _is_causal(self) -> bool:
        if self.config.task_type is not None:
            return self.config.task_type == "CAUSAL_LM"
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def _watch_backward(self, output: Any) -> None:
        def seen(grad: Tensor) -> None:
            self._backward_seen = self._backward_seen or not self._shards

        # Not only the loss: with label smoothing or distillation users make their own from the logits.
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(seen)

    def _watch_shards(self, parameters: list[tuple[int, Tensor]]) -> bool:
        """Note when gradients arrive on shards, and return whether there are any.

        A backward pass that FSDP2 does not reduce (while accumulating) leaves its gradients where nobody can see them,
        but also where nobody can throw them away.
        """

        def seen(param: Tensor) -> None:
            self._backward_seen = True

        shards = [param for _, param in parameters if isinstance(param, DTensor)]
        for param in shards:
            if id(param) not in self._shards:
                self._shards[id(param)] = param
                self._handles.append(param.register_post_accumulate_grad_hook(seen))
        return bool(shards)

    def _forget_discarded_window(self, parameters: list[tuple[int, Tensor]]) -> None:
        """Drop risk passes whose gradients were thrown away, as after an overflow under a GradScaler."""
        if self._square_sum is None or self._counts is None or not self._backward_seen:
            return
        # Gradients lie on the shards, which the modules do not show now.
        holders = self._shards.values() or [param for _, param in parameters]
        gradients = [param.grad for param in holders if param.grad is not None]
        if not gradients:
            self._clear_window()
        else:  # zero_grad(set_to_none=False) leaves zeros; asking the device for a Python answer would stall it
            alive = square_norms(_local(gradients)).sum() != 0
            self._square_sum = self._square_sum * alive
            self._counts = self._counts * alive

    def _accumulate_risk(self, parameters: list[tuple[int, Tensor]], value: Tensor, equal: Tensor) -> None:
        scale = float(self.state.risk_scale)
        gradients = torch.autograd.grad(
            value * scale, [param for _, param in parameters], retain_graph=True, allow_unused=True
        )
        found = [(index, grad) for (index, _), grad in zip(parameters, gradients, strict=True) if grad is not None]
        self._reached |= {index for index, _ in found}
        self._new_pass = True
        if not found:
            raise RoseInactiveError(
                "the gradient of the dropout divergence reaches no unit. With gradient checkpointing pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}; else check that the units are part of the "
                "forward call."
            )
        device = found[0][1].device
        square_sums = self._per_unit(found, device) / scale**2
        finite = torch.isfinite(square_sums.sum())
        counts = torch.stack([finite, ~finite, equal.to(device)]).to(square_sums.dtype)
        square_sums = torch.where(finite, square_sums, torch.zeros_like(square_sums))
        self._square_sum = square_sums if self._square_sum is None else self._square_sum + square_sums
        self._counts = counts if self._counts is None else self._counts + counts

    def _per_unit(self, tensors: list[tuple[int, Tensor]], device: torch.device) -> Tensor:
        """Sum squared norms per unit in a fixed order: [U] in the device's `wide_dtype`."""
        square = square_norms(_local([tensor for _, tensor in tensors]))
        rows: list[list[int]] = [[] for _ in self.units]
        for position, (index, _) in enumerate(tensors):
            rows[index].append(position)
        width = max(len(row) for row in rows)
        padded = torch.tensor([row + [len(tensors)] * (width - len(row)) for row in rows])
        padded = padded.to(square.device, non_blocking=True)
        # Gathered and added along rows: unlike index_add, that is the same to the last bit on every run and rank.
        return torch.cat([square, square.new_zeros(1)])[padded].sum(dim=1).to(device)

    # The optimizer side: masks --------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the masks of this step and blend the gradients; does nothing for an optimizer that holds no unit."""
        if self._pending is not None:  # the last step raised
            self._pending[1].give_back()
            self._pending = None
        groups = owned_groups(optimizer)
        parameters = self._parameters()
        owned = [(index, param) for index, param in parameters if id(param) in groups]
        if not owned:
            self._notice_foreign_step(optimizer, parameters)
            return
        self._check_optimizer(optimizer, args, kwargs, len(owned) < len(parameters))
        self._adopt_state(groups[id(owned[0][1])])
        stepping = [(index, param) for index, param in owned if param.grad is not None]
        if not stepping or self._makes_state(optimizer):
            return
        if self.needs_risk_pass:
            self._watch_shards(owned)
        loss_scale = _loss_scale(optimizer)
        if loss_scale is None:  # an overflow step: the optimizer will not move anything either
            self._clear_window()
            return
        masks = self._masks(optimizer, groups, stepping, loss_scale)
        names = [unit.name for unit in self.units]
        distributed.check_equal_on_ranks(names, masks, stepping[0][1].device)
        self._stepped_gradient.put(stepping)
        step = MaskedStep(optimizer)
        shares, rests = masks.tolist(), (1 - masks).tolist()
        try:
            for index, param in stepping:
                rule = momentum_rule(optimizer, groups[id(param)])
                step.blend(param, shares[index], rests[index], rule, loss_scale)
        except UnsupportedOptimizerError:
            step.give_back()
            raise
        self._pending = (optimizer, step)
        stepped = torch.zeros(len(self.units), dtype=torch.bool)
        stepped[[index for index, _ in stepping]] = True
        self._pending_masks = masks, stepped

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish masked units and count the step."""
        if self._pending is None or self._pending[0] is not optimizer or self._pending_masks is None:
            return
        self._pending[1].finish()
        self._pending = None
        self.state.record(*self._pending_masks)
        self._clear_window()

    def _makes_state(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this step is none: torch.distributed.checkpoint takes one to have a state that it can load into."""
        fresh = not self._called and self._square_sum is None and not optimizer.state
        return fresh and all(float(group["lr"]) == 0 for group in optimizer.param_groups)

    def _check_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], partial: bool
    ) -> None:
        # The first positional argument of the patched step is the optimizer itself.
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise UnsupportedOptimizerError(
                "optimizer.step(closure) makes the gradients inside the step, after the masks are due. Compute loss "
                "and gradients first and call optimizer.step() without a closure."
            )
        last = self._optimizer() if self._optimizer is not None else None
        if partial and last is not None and last is not optimizer:
            mine = {id(param) for unit in self.units for param in unit.parameters()}
            if not mine & owned_groups(optimizer).keys() & owned_groups(last).keys():
                raise UnsupportedOptimizerError(
                    f"the units are spread over two optimizers ({type(last).__name__} and "
                    f"{type(optimizer).__name__}), so they cannot be ranked together; put them into one, in several "
                    "parameter groups if need be."
                )
        self._optimizer = weakref.ref(optimizer)
        self._foreign_steps = 0

    def _notice_foreign_step(self, optimizer: torch.optim.Optimizer, parameters: list[tuple[int, Tensor]]) -> None:
        # A model that is left alone while another one is trained may keep gradients and a window for ever: only what
        # is new since the last such step says that this one is being trained.
        new_pass, self._new_pass = self._new_pass, False
        if not new_pass and self._foreign_gradient.matches(parameters):
            return
        self._foreign_gradient.put(parameters)
        self._foreign_steps += 1
        if self._foreign_steps > FOREIGN_STEPS:
            raise RoseInactiveError(
                f"{type(optimizer).__name__} has stepped {self._foreign_steps} times while the units were trained, "
                "and holds none of them: ROSE has had no effect. Make the optimizer from model.parameters() after "
                "get_peft_model; DeepSpeed hides its parameters, use DDP or FSDP2."
            )

    def _adopt_state(self, group: dict[str, Any]) -> None:
        """Keep the state in the optimizer's parameter group, and take over one that was loaded with the optimizer."""
        saved = group.get(STATE_KEY)
        if saved is self.state.values:
            return
        if saved is not None and not any(saved is values for values in self._outgrown):
            self.state.load(saved)
        group[STATE_KEY] = self.state.values

    def _masks(
        self,
        optimizer: torch.optim.Optimizer,
        groups: dict[int, dict[str, Any]],
        stepping: list[tuple[int, Tensor]],
        loss_scale: float,
    ) -> Tensor:
        """Masks of this step, float32 [U] on the CPU: one transfer from the device, then arithmetic on U numbers."""
        dtype = torch.float64 if stepping[0][1].dtype == torch.float64 else torch.float32
        without_gradient = torch.ones(len(self.units), dtype=torch.bool)
        without_gradient[[index for index, _ in stepping]] = False
        first = second = torch.ones(len(self.units))
        if self.needs_risk_pass:
            first = self._first_order_mask(stepping, without_gradient, dtype)
        if self.config.strategy != "first_order":
            second = self._second_order_mask(optimizer, groups, stepping, without_gradient, dtype, loss_scale)
        if int(self.state.steps) < self.config.warmup_steps:
            return torch.ones(len(self.units))
        if self.config.strategy == "ensemble":
            return selection.mix(first, second, self.config.gamma)
        return first if self.needs_risk_pass else second

    def _first_order_mask(
        self, stepping: list[tuple[int, Tensor]], without_gradient: Tensor, dtype: torch.dtype
    ) -> Tensor:
        device = stepping[0][1].device
        if self._square_sum is None or self._counts is None:
            sums = torch.zeros(len(self.units) + 3, dtype=wide_dtype(device), device=device)
        else:
            sums = torch.cat([self._square_sum, self._counts]).to(device)
            self._check_risk_reached(stepping)
        sums = distributed.sum_over_ranks(sums).cpu().double()
        square_sum, (finite, skipped, equal) = sums[:-3], sums[-3:].tolist()
        # Stepping twice with the same gradients is the user's right. New gradients without a training pass through
        # the hook mean that it is bypassed.
        if finite + skipped == 0 and not self._stepped_gradient.matches(stepping):
            raise RoseInactiveError(
                "optimizer.step() has new gradients, but no training pass went through the model since the last step: "
                "call the model that get_peft_model returned, in train mode and with gradients on, or use "
                "strategy='second_order'."
            )
        self._notice_idle_step(finite, skipped, equal)
        if finite > 0:
            scores = self.first_order_scores(square_sum, finite).to(dtype)
            # A unit that took no part in any risk pass (an expert without tokens) has nothing to be ranked by.
            mask, thresholds = selection.quantile_band(
                scores, self.config.lower_quantile, self.config.upper_quantile, without_gradient | (square_sum == 0)
            )
            self.state.first_scores.copy_(scores)
            self.state.first_thresholds.copy_(thresholds)
            self.state.first_mask.copy_(mask)
        return self.state.first_mask.clone()

    def _second_order_mask(
        self,
        optimizer: torch.optim.Optimizer,
        groups: dict[int, dict[str, Any]],
        stepping: list[tuple[int, Tensor]],
        without_gradient: Tensor,
        dtype: torch.dtype,
        loss_scale: float,
    ) -> Tensor:
        fresh = torch.ones(len(self.units), dtype=torch.float64)
        tensors: list[tuple[int, Tensor, Tensor | None]] = []
        for index, param in stepping:
            group = groups[id(param)]
            rule = momentum_rule(optimizer, group)
            if rule is None:
                raise _no_momentum(optimizer, group, self.config.strategy)
            fresh[index] = rule.fresh
            if param.grad is not None:
                tensors.append((index, param.grad, momentum_of(optimizer, param, rule)))
        if all(momentum is None for _, _, momentum in tensors):  # the first step: nothing to compare with
            return torch.ones(len(self.units))
        scores, incomparable = self.second_order_scores(tensors, fresh.to(dtype), loss_scale)
        mask, thresholds = selection.quantile_band(
            scores, self.config.lower_quantile, self.config.upper_quantile, without_gradient | incomparable
        )
        self.state.second_scores.copy_(scores)
        self.state.second_thresholds.copy_(thresholds)
        return mask

    # The scores: here experiments put others in their place ----------------------------------------------------------

    def first_order_scores(self, square_sum: Tensor, passes: float) -> Tensor:
        """Score each unit by the gradient of its dropout divergence.

        Args:
            square_sum: Squared norms summed over the risk passes of all ranks, float64 [U].
            passes: Number of risk passes, at least 1.

        Returns:
            float64 [U].
        """
        return selection.root_mean_square(square_sum, torch.tensor(passes, dtype=torch.float64))

    def second_order_scores(
        self, tensors: list[tuple[int, Tensor, Tensor | None]], fresh: Tensor, loss_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Score each unit by its gradient against its momentum.

        Args:
            tensors: (unit index, gradient, momentum before the step or None) of each parameter.
            fresh: Factor with which each unit's gradient enters its momentum, float [U].
            loss_scale: Scale that the gradients still carry.

        Returns:
            Scores in the dtype of `fresh` [U], and the units without momentum to compare with, bool [U].
        """
        gradients = [(index, grad) for index, grad, _ in tensors]
        momenta = [(index, momentum) for index, _, momentum in tensors if momentum is not None]
        grad_norms, momentum_norms = self.unit_norms(gradients, momenta)
        scores = selection.second_order_scores(
            (grad_norms / loss_scale).to(fresh.dtype), momentum_norms.to(fresh.dtype), fresh
        )
        return scores, momentum_norms == 0

    def unit_norms(self, *lists: list[tuple[int, Tensor]]) -> tuple[Tensor, ...]:
        """Norms per unit of several lists of tensors, with one transfer from the device.

        Args:
            lists: (unit index, tensor) each; whole tensors, or shards of which every rank has its part.

        Returns:
            float64 [U] on the CPU for each list, zero for units without tensors.
        """
        device = lists[0][0][1].device
        sums = torch.cat([self._per_unit(tensors, device) for tensors in lists])
        if isinstance(lists[0][0][1], DTensor):  # shards of one tensor add up to its norm
            sums = distributed.sum_over_ranks(sums)
        return sums.cpu().double().sqrt().chunk(len(lists))

    def _check_risk_reached(self, stepping: list[tuple[int, Tensor]]) -> None:
        unreached = {index for index, _ in stepping} - self._reached
        if 2 * len(unreached) >= len({index for index, _ in stepping}):
            raise RoseInactiveError(
                f"{len(unreached)} of {len(self.units)} units have a gradient of the loss but none of the dropout "
                f"divergence (first: {self.units[min(unreached)].name!r}). With gradient checkpointing pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def _notice_idle_step(self, finite: float, skipped: float, equal: float) -> None:
        self.state.skipped.add_(int(skipped))
        if skipped:
            self.state.risk_scale.div_(2).clamp_(min=1.0)
        elif int(self.state.steps) % RISK_SCALE_GROWTH_STEPS == RISK_SCALE_GROWTH_STEPS - 1:
            self.state.risk_scale.mul_(2).clamp_(max=MAX_RISK_SCALE)
        passes = finite + skipped
        if passes == 0:
            return
        idle = skipped == passes or equal == passes
        self._idle_steps = self._idle_steps + 1 if idle else 0
        if equal == passes and not any(getattr(m, a) > 0 and m.training for m, a in dropout_modules(self.host)):
            raise RoseInactiveError(
                f"dropout={self.config.dropout} and the model has no active dropout: both passes gave the same "
                f"output, so there is no divergence to rank by. Set ROSEConfig(dropout=0.1), or dropout in the "
                "model's own config, or use strategy='second_order'."
            )
        if self._idle_steps > IDLE_STEPS:
            why = "their gradient was not finite" if skipped == passes else "both passes gave the same output"
            raise RoseInactiveError(
                f"the risk passes of the last {self._idle_steps} steps said nothing: {why}. Lower the learning rate, "
                "use bf16 instead of fp16, or raise dropout in ROSEConfig."
            )


class _GradientMark:
    """Remembers a gradient, to tell later whether there is a new one."""

    def __init__(self) -> None:
        self._grad: weakref.ref[Tensor] | None = None
        self._version = 0

    @staticmethod
    def _first(parameters: list[tuple[int, Tensor]]) -> Tensor | None:
        return next((param.grad for _, param in parameters if param.grad is not None), None)

    def put(self, parameters: list[tuple[int, Tensor]]) -> None:
        grad = self._first(parameters)
        self._grad = weakref.ref(grad) if grad is not None else None
        self._version = grad._version if grad is not None else 0

    def matches(self, parameters: list[tuple[int, Tensor]]) -> bool:
        grad = self._first(parameters)
        known = self._grad() if self._grad is not None else None
        return grad is known and (grad is None or grad._version == self._version)


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if hasattr(output, "values") and not isinstance(output, Tensor) else output
    return [output] if isinstance(output, Tensor) else [value for value in values if isinstance(value, Tensor)]


def _loss_scale(optimizer: torch.optim.Optimizer) -> float | None:
    """Scale that gradients still carry (fused optimizers unscale inside the step), or None in an overflow step."""
    found = getattr(optimizer, "found_inf", None)
    if isinstance(found, Tensor) and float(found) > 0:
        return None
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return 1.0
    return float(scale) if isinstance(scale, Tensor) else float(scale.get_scale())


def _no_momentum(optimizer: torch.optim.Optimizer, group: dict[str, Any], strategy: str) -> UnsupportedOptimizerError:
    setting = "momentum=0" if group.get("momentum") == 0 else "no momentum of gradients"
    return UnsupportedOptimizerError(
        f"strategy={strategy!r} compares gradients with the optimizer's momentum, but {type(optimizer).__name__} has "
        f"{setting}. Use torch.optim.AdamW, SGD with momentum > 0 and dampening < 1, or strategy='first_order'."
    )


# One pair of global optimizer hooks serves all selectors: users do not pass their optimizer, and AcceleratedOptimizer
# has no hook lists of its own.
def _before_any_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for selector in list(_live):
        selector.before_step(optimizer, args, kwargs)


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for selector in list(_live):
        selector.after_step(optimizer)


def _track(selector: RoseSelector) -> None:
    _live.add(selector)
    if not _optimizer_hooks:
        _optimizer_hooks.append(register_optimizer_step_pre_hook(_before_any_step))
        _optimizer_hooks.append(register_optimizer_step_post_hook(_after_any_step))


def _untrack(selector: RoseSelector) -> None:
    _live.discard(selector)
    if not _live:
        while _optimizer_hooks:
            _optimizer_hooks.pop().remove()


def find_selector(model: nn.Module) -> RoseSelector | None:
    """The selector attached to a model or to a module inside it (PeftModel, DDP and compiled models included)."""
    for module in model.modules():
        selector = module.__dict__.get(_SELECTOR)
        if selector is not None:
            return selector
    return None
