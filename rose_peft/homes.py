"""The optimizers in whose parameter groups the states lie, each under a key of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from .engines.seam import Group
from .errors import UnsupportedOptimizerError
from .norms import IndexedTensors
from .optimizers import owned_groups, whole_groups
from .state import STATE_KEY, SelectionState


class Homes:
    """
    Where the states of one model's adapters lie.

    Args:
        model: The base model, whose class is part of the keys.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owner = type(model).__name__
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # By adapter: the optimizer that its state came into last.
        self._latest: dict[str, tuple[weakref.ref[Optimizer], SelectionState]] = {}
        # Those that have had momenta: only of them their lack tells anything.
        self._stateful: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, object]:
        return {"_owner": self._owner}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._optimizers, self._latest, self._stateful = weakref.WeakSet(), {}, weakref.WeakSet()

    @staticmethod
    def has_saved(optimizer: Optimizer) -> bool:
        """Whether an optimizer holds any state of ROSE.

        Args:
            optimizer: As made or as loaded.
        """
        return any(STATE_KEY in group for group in whole_groups(optimizer))

    def adopt(
        self,
        adapter: str,
        state: SelectionState,
        parameters: IndexedTensors,
        optimizer: Optimizer,
        groups: dict[int, Group],
    ) -> None:
        """Let a state lie in the group of the first unit that the optimizer holds.

        The key names model, adapter and the place of that unit in the optimizer: two models of one class may share it.

        Args:
            adapter: Name of the adapter.
            state: Its state.
            parameters: (unit index, parameter) of the adapter.
            optimizer: Who holds them, or some of them.
            groups: Its groups by the identity of their parameters, in its order.

        Raises:
            RoseError: If a checkpoint has put there what is not this adapter's.
        """
        places = {identity: place for place, identity in enumerate(groups)}
        for _, param in parameters:
            if id(param) in groups:
                for group in whole_groups(optimizer):  # it may have lain elsewhere, before earlier units thawed
                    if group is not groups[id(param)]:
                        state.leave(group)
                state.adopt(groups[id(param)], f"{self._owner}.{adapter}@{places[id(param)]}")
                self._optimizers.add(optimizer)
                self._latest[adapter] = weakref.ref(optimizer), state
                return

    def follow(self) -> None:
        """Let states start anew whose optimizer was put back to before its first step, as learning rate finders do."""
        for adapter, (reference, state) in list(self._latest.items()):
            optimizer = reference()
            if optimizer is None:
                continue
            if optimizer.state:
                self._stateful.add(optimizer)
            elif optimizer in self._stateful and not self.has_saved(optimizer):
                state.start_anew()
                del self._latest[adapter]

    def leave(self, states: Iterable[SelectionState]) -> None:
        """Take states out of all optimizers, so that nobody takes them for a checkpoint's.

        Args:
            states: Those of the model.
        """
        self._latest.clear()
        groups = [group for optimizer in list(self._optimizers) for group in whole_groups(optimizer)]
        for state in states:
            for group in groups:
                state.leave(group)

    def refuse_spread(self, optimizer: Optimizer, held: set[int], missing: set[int]) -> None:
        """Refuse units that are spread over two optimizers: they could not be ranked together.

        Args:
            optimizer: Who is about to step.
            held: Identities of the adapter's parameters that it holds.
            missing: Identities of those that train and that it does not hold.

        Raises:
            UnsupportedOptimizerError: Naming both.
        """
        for other in list(self._optimizers) if missing else ():
            theirs = owned_groups(other).keys()
            if other is not optimizer and missing & theirs and not held & theirs:
                raise UnsupportedOptimizerError(
                    f"the units are spread over two optimizers ({type(other).__name__} and "
                    f"{type(optimizer).__name__}), so they cannot be ranked together; put them into one, in several "
                    "parameter groups if need be."
                )
