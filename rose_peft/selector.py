"""RoseSelector, the conductor: at each optimizer step it gathers, decides, applies and records."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import masks
from .config import ROSEConfig
from .distributed import Processes, check_engine, keep_unsharded_after_forward
from .dropout import TrainingDropout, has_dropout_up_to
from .errors import AlreadyAttachedError, UnsupportedEngineError, UnsupportedOptimizerError
from .hooks import ForwardHooks, observers, unwatch_steps, watch_steps
from .inputs import cache_before
from .norms import is_sharded, square_norms_per_unit, wide_dtype
from .optimizers import loss_scale, owned_groups, readable_rule, refuse_closure
from .risk import COUNTS, Call, Head, RiskWindow, ShardWatch, hidden_states_are_equal, paired_pass
from .scores import Facts, Scores, Stepping
from .state import STATE_KEY, Decision, RiskFigures, RoseStatistics, SelectionState
from .units import LiveUnits, Unit
from .update import Masked, MaskedStep
from .watchdog import Watchdog

_SELECTOR = "_rose_selector"


@dataclass
class Steered:
    """What belongs to one adapter: its settings, its units, and one of each thing that goes on with it."""

    name: str
    config: ROSEConfig
    units: list[Unit]
    state: SelectionState
    window: RiskWindow
    watchdog: Watchdog


@dataclass(frozen=True)
class Gathered:
    """What a step is decided by, on the CPU."""

    facts: Facts
    first_norms: Sequence[Tensor]
    second_norms: Sequence[Tensor]
    risk: RiskFigures | None
    ungraded: Tensor  # units without a gradient in this step, bool [U]


@dataclass
class Flight:
    """One step of one optimizer, between its hooks."""

    optimizer: weakref.ref[torch.optim.Optimizer]
    step: MaskedStep
    decisions: list[tuple[Steered, Decision, list[tuple[int, Tensor]]]]
    parameters: set[int]
    stepped: bool = False


class RoseSelector:
    """
    Steers one model's training: at each optimizer step it computes the masks and lets them act.

    Args:
        host: Module whose forward call is observed.
        model: Base model, whose parameter names are the unit names.
        config: The settings.
        scores: What units are ranked by; None for ROSE's own scores.
        process_group: The processes that train this model; None for those of the engine around it (DDP, FSDP2).

    Raises:
        AlreadyAttachedError: If the model, a part of it or a whole around it has a selector.
        TargetModulesError: If there is nothing to mask.
    """

    def __init__(
        self,
        host: nn.Module,
        model: nn.Module,
        config: ROSEConfig,
        scores: Scores | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _refuse_overlap(host, model)
        self.host, self.model = host, model
        self.scores = scores if scores is not None else Scores()
        self.processes = Processes(process_group)
        self.live = LiveUnits(model, config)
        self._steered: dict[str, Steered] = {}
        self._current = ""
        self._flights: dict[int, Flight] = {}
        self._homes: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._in_risk_pass = False
        self._called = False
        self._engine_checked = False
        self._caches: dict[str, Any] = {}
        self._update_steered()
        self._dropout: TrainingDropout | None = None
        if config.dropout is not None:
            self._dropout = TrainingDropout(model, config.dropout, self.live.dropout_targets())
        self._hidden_states_checked = False
        self._shards = ShardWatch(self._note_backward)
        self._hooks = ForwardHooks(host, model, self._before_forward, self._after_forward, self._settle)
        host.__dict__[_SELECTOR] = self
        watch_steps(self)

    # What users ask -------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Steered:
        """The adapter that trains now, or the last one that did."""
        self._follow()
        training = self.live.training()
        if training and self._current not in training:
            self._current = training[0]
        if self._current in self._steered:
            return self._steered[self._current]
        return next(iter(self._steered.values()), None) or _nothing(self.host)

    @property
    def config(self) -> ROSEConfig:
        """Settings of the adapter that trains now."""
        return self.current.config

    @property
    def state(self) -> SelectionState:
        """State of the adapter that trains now."""
        return self.current.state

    @property
    def units(self) -> list[Unit]:
        """Units of the adapter that trains now."""
        return self.current.units

    def statistics(self) -> RoseStatistics:
        """What ROSE did so far to the adapter that trains now; cheap, asks no device."""
        return self.state.statistics()

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the state saved in an optimizer now; without this call its next step does so.

        Args:
            optimizer: One that holds the units, as loaded; with no state of ROSE in it nothing happens.
        """
        self._follow()
        groups = owned_groups(optimizer)
        if any(STATE_KEY in group for group in groups.values()):
            for steered in self._steered.values():
                self._adopt(steered, optimizer, groups)

    def detach(self) -> None:
        """Take every hook off, put the model's own dropout back, and take the state out of the optimizers."""
        self._settle()
        self._hooks.remove()
        self._shards.close()
        if self._dropout is not None:
            self._dropout.undo()
        for optimizer in list(self._homes):
            for group in optimizer.param_groups:
                for steered in self._steered.values():
                    steered.state.leave(group)
        self.host.__dict__.pop(_SELECTOR, None)
        unwatch_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model must be steered like the original.
        self.__dict__.update(state)
        self._flights = {}
        self._homes = weakref.WeakSet()
        self._shards = ShardWatch(self._note_backward)
        for steered in self._steered.values():
            steered.watchdog.follow(self.host)
        watch_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flights": None, "_homes": None, "_shards": None, "_caches": {}}

    # Following the model --------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Keep up with adapters that come and go, and with layers that are rebuilt."""
        if self.live.unloaded():
            self.detach()
            self._steered = {}
        elif self.live.refresh():
            self._update_steered()

    def _training(self) -> list[Steered]:
        return [self._steered[name] for name in self.live.training() if name in self._steered]

    def _update_steered(self) -> None:
        steered = {}
        for name, units in self.live.by_adapter.items():
            known, config = self._steered.get(name), self.live.config_of(name)
            names = [unit.name for unit in units]
            if known is not None and known.state.units == names and known.config is config:
                known.units = units
                steered[name] = known
            elif units:
                sizes = [unit.size() for unit in units]
                state = SelectionState(names, sizes)
                if known is not None and known.config is config:
                    state.continue_from(known.state.values)
                watchdog = Watchdog(self.host, names, config.dropout)
                steered[name] = Steered(name, config, units, state, RiskWindow(len(units)), watchdog)
        self._steered = steered

    def _adopt(self, steered: Steered, optimizer: torch.optim.Optimizer, groups: dict[int, dict[str, Any]]) -> None:
        """Let the state lie in the group of the first unit that the optimizer holds, under a key of its own."""
        places = {identity: place for place, identity in enumerate(groups)}
        for _, param in self.live.all_parameters(steered.name):
            if id(param) in groups:
                key = f"{type(self.model).__name__}.{steered.name}@{places[id(param)]}"
                steered.state.adopt(groups[id(param)], key)
                self._homes.add(optimizer)
                return

    # The forward side: risk passes ----------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        if self._in_risk_pass or not torch.is_grad_enabled():
            return
        self._settle()
        self._follow()
        training = self._training()
        if not training:
            return
        if not module.training:
            for steered in training:
                steered.watchdog.eval_pass()
            return
        self._called = True
        shown = [tensor for steered in training for unit in steered.units for tensor in unit.tensors()]
        if not self._engine_checked or getattr(module, "_is_replica", False):
            check_engine(module, shown)
            self._engine_checked = True
        self.processes.find(self.host, shown)
        parameters = {steered.name: self.live.parameters(steered.name) for steered in training}
        for steered in training:
            steered.watchdog.training_pass(parameters[steered.name])
        if any(steered.config.needs_risk_pass for steered in training):
            # Under FSDP2 the graph hangs on the unsharded parameters; a shard put back in their place before the risk
            # pass would leave its gradient nothing to reach.
            if self._shards.watch([pair for pairs in parameters.values() for pair in pairs]):
                keep_unsharded_after_forward(self.model)
            self._caches = cache_before(kwargs)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._in_risk_pass or not module.training or not torch.is_grad_enabled():
            return None
        given = output
        call = Call(module, args, kwargs, self._caches)
        self._caches = {}
        for steered in self._training():
            if steered.config.needs_risk_pass:
                output = self._risk_pass(steered, call, output)
            steered.window.calls += 1
        return None if output is given else output

    def _risk_pass(self, steered: Steered, call: Call, output: Any) -> Any:
        parameters = self.live.parameters(steered.name)
        if any(isinstance(param, DTensor) for _, param in parameters):
            raise UnsupportedEngineError(
                f"strategy={steered.config.strategy!r} needs whole parameters inside the forward call, and this "
                "engine shows shards only. Use FSDP2 (fully_shard) or DDP, or strategy='second_order'."
            )
        window = steered.window
        window.forget_discarded(list(self._shards.shards.values()) or [param for _, param in parameters])
        head = Head(self.model, steered.config.task_type, getattr(steered.config, "head", None))
        with self._own_passes():
            value, equal, output = paired_pass(call, output, head)
            self._check_hidden_states(call)
        window.add(parameters, value, equal, float(steered.state.risk_scale))
        if not self._shards.shards:
            window.watch_backward(output)
        return output

    @contextmanager
    def _own_passes(self) -> Iterator[None]:
        """Keep the hooks still during passes of our own."""
        self._in_risk_pass = True
        try:
            yield
        finally:
            self._in_risk_pass = False

    def _check_hidden_states(self, call: Call) -> None:
        """Say once where dropout changes the logits and no hidden state of the units: the ranking sees the head's."""
        if self._hidden_states_checked:
            return
        self._hidden_states_checked = True
        last = self.live.last_module()
        if last is not None and not has_dropout_up_to(self.model, last) and hidden_states_are_equal(call, last):
            warnings.warn(
                f"dropout={self.config.dropout}: the hidden states of both passes are equal, so units are ranked by "
                "what the dropout in the head alone does. Set ROSEConfig(dropout=0.1) to have dropout in front of the "
                "units, or use strategy='second_order'.",
                stacklevel=2,
            )

    def _note_backward(self) -> None:
        for steered in self._steered.values():
            steered.window.note_backward()

    # The optimizer side: gather, decide, apply, record --------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the masks of this step and let them act; does nothing for an optimizer that holds no unit."""
        self._settle(optimizer)
        self._follow()
        groups = owned_groups(optimizer)
        held = {
            name: [(index, param) for index, param in self.live.all_parameters(name) if id(param) in groups]
            for name in self._steered
        }
        held = {name: parameters for name, parameters in held.items() if parameters}
        if not held:
            for steered in self._training():
                steered.watchdog.foreign_step(optimizer, self.live.parameters(steered.name))
            return
        refuse_closure(args, kwargs)
        for name in held:
            self._refuse_other_optimizers(name, optimizer, groups)
            self._adopt(self._steered[name], optimizer, groups)
        stepping = {
            name: [
                Stepping(index, param, optimizer, groups[id(param)])
                for index, param in pairs
                if param.grad is not None
            ]
            for name, pairs in held.items()
        }
        stepping = {name: entries for name, entries in stepping.items() if entries}
        if not stepping or self._makes_state(optimizer):
            return
        scale = loss_scale(optimizer)
        if scale is None:  # an overflow step: the optimizer will not move anything either
            for name in stepping:
                self._steered[name].window.forget()
            return
        decisions = []
        masked: list[Masked] = []
        for name, entries in stepping.items():
            steered = self._steered[name]
            decision = self.decide(steered, self.gather(steered, entries, scale))
            self.processes.check_equal(steered.state.units, decision.masks, entries[0].param.device)
            masked += _masked(decision.masks, entries)
            decisions.append((steered, decision, [(entry.index, entry.param) for entry in entries]))
        step = MaskedStep(optimizer, masked, scale)
        parameters = {id(entry.param) for entries in stepping.values() for entry in entries}
        self._flights[id(optimizer)] = Flight(weakref.ref(optimizer), step, decisions, parameters)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish masked units and record the step."""
        flight = self._flights.get(id(optimizer))
        if flight is None or flight.optimizer() is not optimizer:
            return
        flight.stepped = True
        self._land(flight)
        del self._flights[id(optimizer)]

    def gather(self, steered: Steered, stepping: Sequence[Stepping], scale: float) -> Gathered:
        """Fetch what the masks are made of: one reduction over processes, one transfer from the device.

        Args:
            steered: The adapter.
            stepping: Its parameters with a gradient.
            scale: Scale that the gradients still carry.

        Raises:
            RoseInactiveError: If the risk passes say nothing, or if there were none.
        """
        config, units = steered.config, len(steered.units)
        device = stepping[0].param.device
        dtype = wide_dtype(device)
        pairs = [(entry.index, entry.param) for entry in stepping]
        lists: list[Sequence[tuple[int, Tensor]]] = []
        if config.needs_risk_pass:
            lists += self.scores.first_order.tensors(stepping)
        first = len(lists)
        if config.needs_momentum:
            lists += self.scores.second_order.tensors(stepping)
        sums = [square_norms_per_unit(tensors, units, device) for tensors in lists]
        sharded = [is_sharded(tensors) for tensors in lists]
        # What each process has a part of comes first, so that one all-reduce adds all of it up.
        order = sorted(range(len(lists)), key=lambda index: not sharded[index])
        shared = [sums[index] for index in order if sharded[index]]
        if config.needs_risk_pass:
            bypassed = steered.watchdog.is_bypassed(steered.window.calls, pairs)
            shared.append(steered.window.sums(device, dtype, bypassed))
        self.processes.find(self.host, [param for _, param in pairs])
        self.processes.warn_if_alone()
        whole = [self.processes.sum(torch.cat(shared))] if shared else []
        values = torch.cat([*whole, *(sums[index] for index in order if not sharded[index])]).cpu().double()
        norms: list[Tensor] = [torch.empty(0)] * len(lists)
        for index in [index for index in order if sharded[index]]:
            norms[index], values = values[:units].sqrt(), values[units:]
        risk = None
        if config.needs_risk_pass:
            risk, values = RiskWindow.figures(values[: units + COUNTS]), values[units + COUNTS :]
        for index in [index for index in order if not sharded[index]]:
            norms[index], values = values[:units].sqrt(), values[units:]
        if risk is not None:
            steered.watchdog.check_risk(risk)
            if not steered.window.is_empty:
                steered.watchdog.check_reached(steered.window.reached, pairs)
        ungraded = torch.ones(units, dtype=torch.bool)
        ungraded[[entry.index for entry in stepping]] = False
        facts = Facts(
            units=steered.state.units,
            sizes=steered.state.sizes.double(),
            stepping=stepping,
            steps=int(steered.state.steps),
            risk=risk.square_sum / risk.finite if risk is not None and risk.finite else None,
            loss_scale=scale,
            dtype=torch.float64 if stepping[0].param.dtype == torch.float64 else torch.float32,
        )
        return Gathered(facts, norms[:first], norms[first:], risk, ungraded)

    def decide(self, steered: Steered, gathered: Gathered) -> Decision:
        """Make the masks of a step out of what was gathered; changes nothing.

        Args:
            steered: The adapter.
            gathered: What `gather` found.
        """
        config, facts = steered.config, gathered.facts
        band = config.lower_quantile, config.upper_quantile
        first_mask = second_mask = first = second = None
        if config.needs_risk_pass:
            if facts.risk is not None:
                scores, unranked = self.scores.first_order.score(gathered.first_norms, facts)
                first = masks.rank(scores, unranked | gathered.ungraded, *band)
            # Without a finite pass the last mask stays.
            first_mask = first.mask if first is not None else steered.state.first_mask.clone()
        if config.needs_momentum:
            scores, unranked = self.scores.second_order.score(gathered.second_norms, facts)
            unranked = unranked | gathered.ungraded
            if not bool(unranked.all()):  # else it is the first step: there is nothing to compare with
                second = masks.rank(scores, unranked, *band)
            second_mask = second.mask if second is not None else torch.ones(len(steered.units))
        mask = masks.decide(first_mask, second_mask, config.gamma)
        if facts.steps < config.warmup_steps:
            mask = torch.ones_like(mask)
        return Decision(mask, ~gathered.ungraded, first, second, gathered.risk)

    def _land(self, flight: Flight) -> None:
        """Finish a step that the optimizer has taken, and record it."""
        flight.step.finish()
        while flight.decisions:
            steered, decision, parameters = flight.decisions[0]
            steered.state.record(decision)
            flight.decisions.pop(0)
            steered.window.forget()
            steered.watchdog.stepped(parameters)
            self._current = steered.name

    def _settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Deal with steps that were interrupted: finish one that the optimizer has taken, undo one that it has not.

        Args:
            optimizer: Whose step; None for all but those that other optimizers are in the middle of.
        """
        for identity, flight in list(self._flights.items()):
            if optimizer is not None and identity != id(optimizer):
                continue
            if flight.stepped:
                self._land(flight)
            else:
                flight.step.give_back()
            self._flights.pop(identity, None)

    # What is refused ------------------------------------------------------------------------------------------------

    def _makes_state(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this step is none: torch.distributed.checkpoint takes one to have a state that it can load into."""
        unused = not self._called and all(steered.window.is_empty for steered in self._steered.values())
        fresh = unused and not optimizer.state
        return fresh and all(float(group["lr"]) == 0 for group in optimizer.param_groups)

    def _refuse_other_optimizers(
        self, name: str, optimizer: torch.optim.Optimizer, groups: dict[int, dict[str, Any]]
    ) -> None:
        """Refuse units that another optimizer steps too, or in part: they could not be ranked together."""
        mine = {id(param) for _, param in self.live.all_parameters(name)}
        held = mine & groups.keys()
        for flight in self._flights.values():
            other = flight.optimizer()
            if other is not None and held & flight.parameters:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} steps units inside the step of {type(other).__name__}, which holds "
                    "them as well, so one mask would act twice. Give each unit to one optimizer."
                )
        training = {id(param) for _, param in self.live.parameters(name)}
        missing = training - groups.keys()
        for other in list(self._homes):
            theirs = owned_groups(other).keys()
            if other is not optimizer and missing & theirs and not held & theirs:
                raise UnsupportedOptimizerError(
                    f"the units are spread over two optimizers ({type(other).__name__} and "
                    f"{type(optimizer).__name__}), so they cannot be ranked together; put them into one, in several "
                    "parameter groups if need be."
                )


def _masked(mask: Tensor, stepping: Sequence[Stepping]) -> list[Masked]:
    shares, rests = mask.tolist(), (1 - mask).tolist()
    return [
        Masked(
            entry.param,
            entry.group,
            shares[entry.index],
            rests[entry.index],
            readable_rule(entry.optimizer, entry.group, entry.param),
        )
        for entry in stepping
        if shares[entry.index] < 1
    ]


def _nothing(host: nn.Module) -> Steered:
    """What there is to see of a model without any adapter."""
    return Steered("", ROSEConfig(), [], SelectionState([]), RiskWindow(0), Watchdog(host, [], None))


def _refuse_overlap(host: nn.Module, model: nn.Module) -> None:
    """Refuse a model of which a selector steers the whole, a part, or a whole around it.

    Raises:
        AlreadyAttachedError: If there is one.
    """
    for observer in observers():
        if isinstance(observer, RoseSelector):
            observer._follow()
            same = observer.model is model or observer.host is host
            inside = any(module is model for module in observer.model.modules())
            around = any(module is observer.model for module in model.modules())
            if _SELECTOR in observer.host.__dict__ and (same or inside or around):
                raise AlreadyAttachedError(
                    f"ROSE is already attached to this {type(observer.model).__name__}"
                    f"{'' if same else ' (a part of the other model)'}; call detach_rose(model) before attaching it "
                    "again."
                )


def find_selector(model: nn.Module) -> RoseSelector | None:
    """The selector attached to a model or to a module inside it (PeftModel, DDP and compiled models included)."""
    for module in model.modules():
        selector = module.__dict__.get(_SELECTOR)
        if selector is not None:
            return selector
    return None
