"""What belongs to one adapter and goes on with it, while adapters and layers come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .ahead import Plan
from .config import ROSEConfig
from .engines.seam import Group
from .norms import IndexedTensors
from .risk import RiskWindow
from .state import SelectionState
from .units import LiveUnits, Unit
from .watchdog import Watchdog


@dataclass
class Steered:
    """What belongs to one adapter: its settings, its units, and one of each thing that goes on with it."""

    name: str
    config: ROSEConfig
    units: list[Unit]
    state: SelectionState
    window: RiskWindow
    watchdog: Watchdog
    # What is known of the next step before its forward call; with `skip_frozen_gradients` only.
    plan: Plan | None = None

    def drop_plan(self) -> None:
        """Let held back parameters build gradients again."""
        if self.plan is not None:
            self.plan.release()
            self.plan = None


def steer(live: LiveUnits, host: nn.Module, known: dict[str, Steered]) -> dict[str, Steered]:
    """Make what belongs to each adapter of a model, going on with what is known of it.

    An adapter whose settings changed starts anew; one whose units changed keeps what is known of those that stay.

    Args:
        live: The units as they are now.
        host: The module whose forward call is observed.
        known: What there was before.
    """
    found = {}
    for name, units in live.by_adapter.items():
        before, config = known.get(name), live.config_of(name)
        names = [unit.name for unit in units]
        same = before is not None and before.config is config
        if before is not None and same and before.state.units == names:
            before.units = units
            found[name] = before
        elif units:
            sampled = config.needs_risk_pass and config.risk_pass == "sampled"
            vectors = [sampled and unit.is_vector() for unit in units]
            state = SelectionState(names, [unit.size() for unit in units], vectors)
            if before is not None and same:
                state.continue_from(before.state.values)
            watchdog = Watchdog(host, names, config.dropout)
            found[name] = Steered(name, config, units, state, RiskWindow(len(units), state.owners), watchdog)
    return found


class Adapters(Mapping[str, Steered]):
    """
    The adapters of one model that are steered, by name.

    Args:
        live: The units of the model.
        host: The module whose forward call is observed.
    """

    def __init__(self, live: LiveUnits, host: nn.Module) -> None:
        self._live, self._host = live, host
        self._steered = steer(live, host, {})
        self._current = ""

    def __getitem__(self, name: str) -> Steered:
        return self._steered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steered)

    def __len__(self) -> int:
        return len(self._steered)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        for steered in self.values():
            steered.watchdog.follow(self._host)

    @property
    def current(self) -> Steered:
        """The adapter that trains now, or the last one that did; one without units where there is none at all."""
        training = self._live.training()
        if training and self._current not in training:
            self._current = training[0]
        if self._current in self:
            return self[self._current]
        for steered in self.values():
            return steered
        return Steered("", ROSEConfig(), [], SelectionState([]), RiskWindow(0), Watchdog(self._host, [], None))

    def stepped(self, name: str) -> None:
        """Note which adapter has just been stepped.

        Args:
            name: Its name.
        """
        self._current = name

    def training(self) -> list[Steered]:
        """Those that train now; none while they are merged or disabled."""
        return [self[name] for name in self._live.training() if name in self]

    def held(self, groups: dict[int, Group]) -> dict[str, IndexedTensors]:
        """(unit index, parameter) of each adapter that an optimizer holds, of inactive ones too.

        Args:
            groups: Its groups by the identity of their parameters.
        """
        held: dict[str, IndexedTensors] = {}
        for name in self:
            parameters = [pair for pair in self._live.all_parameters(name) if id(pair[1]) in groups]
            if parameters:
                held[name] = parameters
        return held

    def refresh(self) -> None:
        """Find units and adapters anew, going on with what is known of them."""
        self._live.refresh()
        self._steered = steer(self._live, self._host, self._steered)

    def clear(self) -> None:
        """Steer nothing any more."""
        self._steered = {}
