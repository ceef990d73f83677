"""Steps between their two hooks: one at most of each optimizer, and what becomes of one that never ends."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch.optim import Optimizer

from .decision import Decision
from .norms import IndexedTensors
from .steered import Steered
from .update import MaskedStep


@dataclass
class Flight:
    """One step of one optimizer.

    Args:
        optimizer: Whose.
        step: What acts on it.
        decisions: For each adapter in it the decision, and (unit index, parameter) of what is stepped.
        stepped: Whether the optimizer has taken the step.
    """

    optimizer: weakref.ref[Optimizer]
    step: MaskedStep
    decisions: list[tuple[Steered, Decision, IndexedTensors]]
    stepped: bool = False

    def holds(self, parameters: set[int]) -> bool:
        """Whether the step is about any of these parameters.

        Args:
            parameters: Their identities.
        """
        return any(id(param) in parameters for _, _, pairs in self.decisions for _, param in pairs)

    def land(self) -> None:
        """Finish the step and record it; going on after an interruption records nothing twice."""
        self.step.finish()
        while self.decisions:
            steered, decision, parameters = self.decisions[0]
            steered.state.record(decision)
            self.decisions.pop(0)
            steered.window.forget()
            steered.drop_plan()
            steered.watchdog.stepped(parameters)


class Flights:
    """The steps that are under way, by optimizer."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}

    def start(self, flight: Flight) -> None:
        """Note a step that begins.

        Args:
            flight: The step.
        """
        optimizer = flight.optimizer()
        self._flights[id(optimizer)] = flight

    def land(self, optimizer: Optimizer) -> str | None:
        """Finish the step that an optimizer has taken, if it is one of ours.

        Args:
            optimizer: Whose.

        Returns:
            Name of the last adapter in it.
        """
        flight = self._flights.get(id(optimizer))
        if flight is None or flight.optimizer() is not optimizer:
            return None
        flight.stepped = True
        name = flight.decisions[-1][0].name
        flight.land()
        del self._flights[id(optimizer)]
        return name

    def settle(self, optimizer: Optimizer | None = None) -> None:
        """Deal with steps that were interrupted: finish one that its optimizer has taken, undo one that it has not.

        Args:
            optimizer: Whose; None for all, where no optimizer can be in the middle of a step.
        """
        for identity, flight in list(self._flights.items()):
            if optimizer is not None and identity != id(optimizer):
                continue
            if flight.stepped:
                flight.land()
            else:
                flight.step.give_back()
            self._flights.pop(identity, None)

    def around(self, parameters: set[int]) -> Optimizer | None:
        """The optimizer whose step is under way and holds any of these parameters.

        Args:
            parameters: Their identities.
        """
        for flight in self._flights.values():
            if flight.holds(parameters):
                return flight.optimizer()
        return None
