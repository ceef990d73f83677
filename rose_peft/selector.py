"""RoseSelector, the conductor: at each optimizer step it gathers, decides, applies and records."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from .attached import SELECTOR, refuse_overlap
from .config import ROSEConfig
from .decision import Decision, Gathered, decide
from .distributed import Processes
from .dropout import TrainingDropout
from .engines.plain import refuse_wrapped
from .engines.seam import Engine, Group
from .engines.zero import refuse_split
from .errors import RoseError
from .flights import Flight, Flights
from .gather import gather
from .homes import Homes
from .hooks import ForwardHooks, unwatch_steps, watch_steps
from .momentum_begins import beginning, without_momentum
from .norms import IndexedTensors
from .optimizers import loss_scale, only_makes_state, refuse_closure
from .passes import Passes
from .scores import Scores, SecondOrder, Stepping
from .state import RoseStatistics, SelectionState
from .steered import Adapters, Steered
from .units import LiveUnits, Unit
from .update import masked_parameters


class RoseSelector:
    """
    Steers one model's training: at each optimizer step it computes the masks and lets them act.

    Args:
        host: Module whose forward call is observed.
        model: Base model, whose parameter names are the unit names.
        config: The settings.
        scores: What units are ranked by; None for ROSE's own scores.
        process_group: The processes that train this model; None for those of the engine around it (DDP, FSDP2,
            ZeRO).

    Raises:
        AlreadyAttachedError: If the model, a part of it or a whole around it has a selector.
        TargetModulesError: If there is nothing to mask.
        UnsupportedEngineError: If DDP is around the model already.
    """

    def __init__(
        self,
        host: nn.Module,
        model: nn.Module,
        config: ROSEConfig,
        scores: Scores | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        refuse_overlap(host, model)
        refuse_wrapped(host)
        self.host, self.model = host, model
        self.scores = scores if scores is not None else Scores()
        self.processes = Processes(process_group)
        self.live = LiveUnits(model, config)
        refuse_split([param for name in self.live.by_adapter for _, param in self.live.all_parameters(name)])
        self.adapters = Adapters(self.live, host)
        # Masked steps in this process; the state's count goes back with a checkpoint.
        self.steps_taken = 0
        # Those it has begun, without a gradient too: where processes differ in them they have gone apart.
        self._steps_begun = 0
        self._homes = Homes(model)
        self._flights = Flights()
        self._dropout: TrainingDropout | None = None
        self.hold_dropout(config.dropout)
        self.passes = Passes(host, self.live, self.processes, self.adapters.training, self._scores)
        self._hooks = ForwardHooks(
            host, model, self._before_forward, self.passes.after, self.passes.ended, self._flights.settle
        )
        host.__dict__[SELECTOR] = self
        watch_steps(self)

    # What users ask -------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Steered:
        """The adapter that trains now, or the last one that did."""
        self.follow()
        return self.adapters.current

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

    def restore(self, optimizer: Optimizer) -> None:
        """Take over the state saved in an optimizer now; without this call its next step does so.

        Args:
            optimizer: One that holds the units, as loaded; with no state of ROSE in it nothing happens.
        """
        self.follow()
        if self._homes.has_saved(optimizer):
            groups = self._engine.groups(optimizer)
            for name, steered in self.adapters.items():
                self._homes.adopt(name, steered.state, self.live.all_parameters(name), optimizer, groups)

    def detach(self) -> None:
        """Take every hook off, put the model's own dropout back, and take the state out of the optimizers."""
        self._flights.settle()
        self._hooks.remove()
        self.passes.close()
        if self._dropout is not None:
            self._dropout.undo()
        for steered in self.adapters.values():
            steered.drop_plan()
        self._homes.leave(steered.state for steered in self.adapters.values())
        self.host.__dict__.pop(SELECTOR, None)
        unwatch_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flights": Flights()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model must be steered like the original.
        self.__dict__.update(state)
        watch_steps(self)

    # The forward side -----------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Keep up with adapters that come and go, and with layers that are rebuilt."""
        if not self.live.changed():
            return
        if self.live.unloaded():
            self.detach()
            self.adapters.clear()
        else:
            self.adapters.refresh()

    @property
    def _engine(self) -> Engine:
        """What is around the model, as far as it has been seen."""
        return self.passes.finder.engine

    def _scores(self) -> Scores:
        return self.scores

    def hold_dropout(self, probability: float | None) -> None:
        """Set the dropout that the adapter that trains asks for, until its next training call says otherwise.

        Args:
            probability: In (0, 1); None puts the model's own back.
        """
        if (None if self._dropout is None else self._dropout.probability) == probability:
            return
        if self._dropout is not None:
            self._dropout.undo()
        targets = self.live.dropout_targets()
        self._dropout = None if probability is None else TrainingDropout(self.model, probability, targets)

    def _before_forward(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        if not self.passes.ours:
            self._flights.settle()
            self.follow()
            training = self.adapters.training() if module.training else []
            self._homes.follow()
            if training:
                self.hold_dropout(training[0].config.dropout)
            self.passes.before(module, kwargs)
            inside = self._engine.optimizer
            if inside is not None and module.training:  # what an engine loads goes past the user's hands
                self.restore(inside)

    # The optimizer side: gather, decide, apply, record --------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the masks of this step and let them act; does nothing for an optimizer that holds no unit."""
        turn = self._engine.turn(optimizer)
        if not turn.first:
            self._flights.go_on(optimizer, turn)
            return
        self._flights.settle(optimizer)
        self.follow()
        groups = self._engine.groups(optimizer)
        held = self.adapters.held(groups)
        if not held:
            self.passes.stepped_without(optimizer)
            return
        refuse_closure(args, kwargs)
        self._steps_begun += 1
        for name, parameters in held.items():
            self._take_home(name, parameters, optimizer, groups)
        stepping = {name: self._stepping(parameters, optimizer, groups) for name, parameters in held.items()}
        stepping = {name: entries for name, entries in stepping.items() if entries}
        unused = all(steered.window.calls == 0 for steered in self.adapters.values())
        if not stepping or (unused and only_makes_state(optimizer)):
            return
        scale = loss_scale(optimizer)
        if scale is None:  # an overflow step: the optimizer will not move anything either
            for name in stepping:
                self.adapters[name].window.forget()
            return
        self.passes.finder.before_step([entry.param for entries in stepping.values() for entry in entries])
        self.processes.follow(self._engine.process_groups)
        self.processes.warn_if_alone()
        decisions: list[tuple[Steered, Decision, IndexedTensors]] = []
        masked, fresh = [], []
        for name, entries in stepping.items():
            steered = self.adapters[name]
            decision = self.decide(steered, self.gather(steered, entries, scale))
            self.processes.check_equal(steered.state.units, decision.masks, entries[0].param.device)
            masked += masked_parameters(decision.masks, entries)
            if decision.unmatched is not None and isinstance(self.scores.second_order, SecondOrder):
                fresh += without_momentum(entries, decision.unmatched & (decision.masks > 0))
            decisions.append((steered, decision, [(entry.index, entry.part.holder) for entry in entries]))
        flight = Flight(weakref.ref(optimizer), masked, scale, decisions, beginning(fresh, scale))
        self._flights.start(flight, optimizer, turn)

    def after_step(self, optimizer: Optimizer) -> None:
        """Finish masked units and record the step."""
        landed = self._flights.land(optimizer)
        if landed is not None:
            self.adapters.stepped(landed)
            self.steps_taken += 1

    def settle(self, optimizer: Optimizer) -> None:
        """Put right what a step of an optimizer has left that raised or was interrupted."""
        self._flights.settle(optimizer)

    def gather(self, steered: Steered, stepping: Sequence[Stepping], scale: float) -> Gathered:
        """Fetch what the masks of one adapter are made of."""
        return gather(steered, stepping, self.scores, self.processes, scale, self._steps_begun, self._engine.splits)

    def decide(self, steered: Steered, gathered: Gathered) -> Decision:
        """Make the masks of one adapter; changes nothing."""
        return decide(steered.config, self.scores, gathered)

    def _take_home(self, name: str, held: IndexedTensors, optimizer: Optimizer, groups: dict[int, Group]) -> None:
        """Let an adapter's state lie in the one optimizer that steps it."""
        mine = {id(param) for _, param in held}
        self._flights.refuse_nested(optimizer, mine)
        missing = {id(param) for _, param in self.live.parameters(name)} - mine
        self._homes.refuse_spread(optimizer, mine, missing)
        self._homes.adopt(name, self.adapters[name].state, held, optimizer, groups)

    def _stepping(self, parameters: IndexedTensors, optimizer: Optimizer, groups: dict[int, Group]) -> list[Stepping]:
        return [
            Stepping(index, param, optimizer, groups[id(param)], self._engine)
            for index, param in parameters
            if self._engine.steps(param)
        ]


def find_selector(model: nn.Module) -> RoseSelector | None:
    """The selector attached to a model or to a module inside it (PeftModel, DDP and compiled models included).

    Args:
        model: The model.

    Raises:
        RoseError: If there are several, as in two towers: what one of them says is not true of the other.
    """
    found = [(name, each.__dict__[SELECTOR]) for name, each in model.named_modules() if SELECTOR in each.__dict__]
    if len(found) > 1:
        names = ", ".join(repr(name) for name, _ in found)
        raise RoseError(
            f"ROSE is attached to {len(found)} parts of this {type(model).__name__} ({names}), each with masks of its "
            "own: ask for one of them, as in get_selector(model.part)."
        )
    return found[0][1] if found else None
