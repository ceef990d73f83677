"""Steps between their two hooks: one at most of each optimizer, and what becomes of one that never ends."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch.optim import Optimizer

from .decision import Decision
from .engines.seam import Turn
from .errors import UnsupportedOptimizerError
from .hooks import is_stepping
from .momentum_begins import Beginning, require_momentum
from .norms import IndexedTensors
from .optimizers import owned_groups
from .state import Record
from .steered import Steered
from .update import Masked, MaskedStep


@dataclass
class Flight:
    """One step of one optimizer, which an engine may make in several calls.

    Args:
        optimizer: Whose.
        masked: The parameters whose update is held back.
        loss_scale: Scale that the gradients still carry.
        decisions: For each adapter in it the decision, and (unit index, holder of a parameter) of what is stepped.
        beginning: What must have a momentum afterwards, and which.
        step: What acts on the call that runs now.
        turn: Which call that is.
        stepped: Whether the optimizer has taken it.
        record: What is about to be written down of the first of the decisions.
    """

    optimizer: weakref.ref[Optimizer]
    masked: list[Masked]
    loss_scale: float
    decisions: list[tuple[Steered, Decision, IndexedTensors]]
    beginning: Beginning = field(default_factory=Beginning)
    step: MaskedStep | None = None
    turn: Turn = field(default_factory=Turn)
    stepped: bool = False
    record: Record | None = None

    def holds(self, parameters: set[int]) -> bool:
        """Whether the step is about any of these parameters.

        Args:
            parameters: Their identities.
        """
        return any(id(param) in parameters for _, _, pairs in self.decisions for _, param in pairs)

    def begin(self, optimizer: Optimizer, turn: Turn) -> None:
        """Let the masks act on one call.

        Args:
            optimizer: The one whose step this is.
            turn: Which of its calls begins.
        """
        moved = owned_groups(optimizer)
        masked = [item for item in self.masked if id(item.part.holder) in moved]
        moving = [param for _, _, pairs in self.decisions for _, param in pairs if id(param) in moved]
        self.turn, self.stepped = turn, False
        self.step = MaskedStep(optimizer)
        self.step.begin(masked, moving, self.loss_scale)

    def land(self) -> None:
        """Finish the call, and record the step after the last; going on after an interruption does nothing twice."""
        self.stepped = True
        if self.step is not None:
            self.step.finish()
        if not self.turn.last:
            self.step = None
            return
        while self.decisions:
            steered, decision, parameters = self.decisions[0]
            if self.record is None:
                self.record = steered.state.after(decision, steered.config.risk_period)
            steered.state.put(self.record)
            steered.window.forget()
            steered.drop_plan()
            steered.watchdog.stepped(parameters)
            self.decisions, self.record = self.decisions[1:], None


class Flights:
    """The steps that are under way, by optimizer."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}

    def start(self, flight: Flight, optimizer: Optimizer, turn: Turn) -> None:
        """Note a step that begins, and let the masks act on its first call.

        Args:
            flight: The step.
            optimizer: Whose.
            turn: Which of its calls begins.
        """
        # Known before anything is changed, so that whatever interrupts can be undone.
        self._flights[id(optimizer)] = flight
        try:
            flight.begin(optimizer, turn)
        except BaseException:
            self.settle(optimizer)
            raise

    def go_on(self, optimizer: Optimizer, turn: Turn) -> None:
        """Let the masks act on a further call of a step, if it is one of ours.

        Args:
            optimizer: Whose.
            turn: Which of its calls begins.
        """
        flight = self._flights.get(id(optimizer))
        if flight is not None and flight.optimizer() is optimizer:
            flight.begin(optimizer, turn)

    def land(self, optimizer: Optimizer) -> str | None:
        """Finish the call that an optimizer has taken, if it is one of ours.

        Args:
            optimizer: Whose.

        Returns:
            Name of the last adapter in it, after the last call of the step.

        Raises:
            UnsupportedOptimizerError: If the optimizer has stepped and keeps a momentum where it cannot be read.
        """
        flight = self._flights.get(id(optimizer))
        if flight is None or flight.optimizer() is not optimizer:
            return None
        name = flight.decisions[-1][0].name
        flight.land()
        if not flight.turn.last:
            return None
        del self._flights[id(optimizer)]
        require_momentum(flight.beginning)
        return name

    def settle(self, optimizer: Optimizer | None = None) -> None:
        """Deal with steps that were interrupted: finish one that its optimizer has taken, undo one that it has not.

        Args:
            optimizer: Whose; None for all, where no optimizer can be in the middle of a step.
        """
        for identity, flight in list(self._flights.items()):
            if optimizer is not None and identity != id(optimizer):
                continue
            stepping = flight.optimizer()
            if stepping is not None and is_stepping(stepping, elsewhere=True):
                continue  # this thread only looks at the model, to evaluate or to save it
            if flight.stepped or (flight.step is not None and flight.turn.last and flight.step.taken()):
                flight.land()
            elif flight.step is not None:
                flight.step.undo()
            self._flights.pop(identity, None)

    def refuse_nested(self, optimizer: Optimizer, parameters: set[int]) -> None:
        """Refuse a step of units inside another optimizer's step of the same ones.

        Args:
            optimizer: Whose step begins.
            parameters: Identities of what it is about to step.

        Raises:
            UnsupportedOptimizerError: Naming both.
        """
        for flight in self._flights.values():
            other = flight.optimizer()
            if other is not None and flight.holds(parameters):
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} steps units inside the step of {type(other).__name__}, which holds "
                    "them as well, so one mask would act twice. Give each unit to one optimizer."
                )
