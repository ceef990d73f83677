"""What belongs to one adapter and goes on with it, while adapters and layers come and go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .ahead import Plan
from .config import ROSEConfig
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
            state = SelectionState(names, [unit.size() for unit in units])
            if before is not None and same:
                state.continue_from(before.state.values)
            watchdog = Watchdog(host, names, config.dropout)
            found[name] = Steered(name, config, units, state, RiskWindow(len(units)), watchdog)
    return found


def nothing(host: nn.Module) -> Steered:
    """What there is to see of a model without any adapter.

    Args:
        host: The module whose forward call is observed.
    """
    return Steered("", ROSEConfig(), [], SelectionState([]), RiskWindow(0), Watchdog(host, [], None))
