"""What ROSE did so far: the state that lies in the optimizer and survives a checkpoint, and the statistics of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .average import RiskAverage, RiskFigures, owners_of
from .decision import Decision
from .errors import RoseError

# Key in a parameter group, and the version of what lies there.
STATE_KEY = "rose"
VERSION = 3
HISTORY_LENGTH = 1024
# A unit whose mean mask stays below this has hardly moved.
FROZEN_SHARE = 0.05


@dataclass(frozen=True)
class UnitStatistics:
    """One unit.

    Args:
        kept_share: Mean of its mask over the steps in which it had a gradient, in [0, 1].
        last_mask: Its mask in the last step.
        first_order_score: Its last first-order score; NaN before there is one.
        second_order_score: Its last second-order score; NaN before there is one.
        weights: Number of weights in it.
    """

    kept_share: float
    last_mask: float
    first_order_score: float
    second_order_score: float
    weights: int


@dataclass(frozen=True)
class RoseStatistics:
    """What ROSE did so far.

    Args:
        steps: Optimizer steps taken.
        kept_share: Mean of all masks over all steps, in [0, 1]; NaN before the first step.
        kept_weight_share: The same with each unit counted by its weights: the share of the updates of masked weights
            that went in.
        last_kept_share: Mean of the masks in the last step.
        last_kept_weight_share: The same by weights.
        skipped_risk_passes: Risk passes left out because their gradient was not finite.
        whole_risk_passes: Sampled risk passes that took the whole batch, because its rows cannot be taken apart.
        first_order_thresholds: (low, high) in the last step.
        second_order_thresholds: (low, high) in the last step.
        units: Per unit name.
    """

    steps: int
    kept_share: float
    kept_weight_share: float
    last_kept_share: float
    last_kept_weight_share: float
    skipped_risk_passes: int
    whole_risk_passes: int
    first_order_thresholds: tuple[float, float]
    second_order_thresholds: tuple[float, float]
    units: dict[str, UnitStatistics]

    def frozen_units(self, below: float = FROZEN_SHARE) -> dict[str, float]:
        """Name the units that have hardly moved, with their kept shares, the most frozen first.

        Args:
            below: A unit counts whose mean mask lies below this.
        """
        shares = {name: unit.kept_share for name, unit in self.units.items() if unit.kept_share < below}
        return dict(sorted(shares.items(), key=lambda item: item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, ready for strict JSON: None stands for what is not known yet."""
        return _json(dataclasses.asdict(self))


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The risk scale keeps half-precision divergence gradients from flushing to zero. It is there for every dtype, because
# a hook cannot see an autocast around `forward` alone (as Accelerate makes it); powers of two cost no precision.
FIRST_RISK_SCALE = 2.0**16
MAX_RISK_SCALE = 2.0**24
RISK_SCALE_GROWTH_STEPS = 200


@dataclass(frozen=True)
class Record:
    """New values of a state, and the one row of the history that changes.

    Args:
        values: By name.
        row: Which row of the history.
        masks: What it becomes, float32 [U].
    """

    values: dict[str, Tensor]
    row: int
    masks: Tensor


class SelectionState:
    """
    Counts and last values per unit of one adapter, on the CPU.

    `values` is a plain dictionary of tensors that is changed in place: it lies in the optimizer's parameter group, so
    whoever saves the optimizer saves it, at its current values.

    Args:
        names: Unit names, U of them.
        sizes: Number of weights of each unit; None for units of one weight each.
        vectors: Whether the gradients of a unit are averaged, [U]; None for no unit.
    """

    # What lies in `values`.
    units: list[str]
    sizes: Tensor  # number of weights of each unit, int64 [U]
    vectors: Tensor  # whether a unit is one vector whose gradients are averaged, bool [U]
    steps: Tensor  # masked optimizer steps, int64
    skipped: Tensor  # risk passes left out because their gradient was not finite, int64
    whole: Tensor  # sampled risk passes that took the whole batch, int64
    mask_sum: Tensor  # sum of a unit's masks over the steps in which it had a gradient, float64 [U]
    unit_steps: Tensor  # number of those steps, int64 [U]
    last_mask: Tensor  # masks of the last step, zero for units without a gradient, float32 [U]
    last_stepped: Tensor  # whether a unit had a gradient in it, bool [U]
    first_mask: Tensor  # the last first-order mask, float32 [U]
    second_mask: Tensor  # the last second-order mask, float32 [U]
    first_scores: Tensor  # the last first-order score of each unit, NaN before there is one, float64 [U]
    second_scores: Tensor  # the last second-order score of each unit, NaN before there is one, float64 [U]
    first_thresholds: Tensor  # (low, high) of the last first-order band, float64 [2]
    second_thresholds: Tensor  # (low, high) of the last second-order band, float64 [2]
    risk_scale: Tensor  # factor on the divergence before its gradient is taken, float64
    history: Tensor  # mean masks over time, float32 [HISTORY_LENGTH, U]
    history_stride: Tensor  # optimizer steps that one row of it stands for, int64
    risk_linear: Tensor  # these three: the fields of `RiskAverage`
    risk_quadratic: Tensor
    risk_gradients: Tensor

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int] | None = None, vectors: Sequence[bool] | None = None
    ) -> None:
        units = len(names)
        nan = float("nan")
        with torch.device("cpu"):  # whatever the default is
            self.values: dict[str, Any] = {
                "version": VERSION,
                "units": list(names),
                "sizes": torch.tensor(list(sizes) if sizes is not None else [1] * units, dtype=torch.int64),
                "vectors": torch.tensor(list(vectors) if vectors is not None else [False] * units, dtype=torch.bool),
                "steps": torch.zeros((), dtype=torch.int64),
                "skipped": torch.zeros((), dtype=torch.int64),
                "whole": torch.zeros((), dtype=torch.int64),
                "mask_sum": torch.zeros(units, dtype=torch.float64),
                "unit_steps": torch.zeros(units, dtype=torch.int64),
                "last_mask": torch.ones(units, dtype=torch.float32),
                "last_stepped": torch.zeros(units, dtype=torch.bool),
                "first_mask": torch.ones(units, dtype=torch.float32),
                "second_mask": torch.ones(units, dtype=torch.float32),
                "first_scores": torch.full((units,), nan, dtype=torch.float64),
                "second_scores": torch.full((units,), nan, dtype=torch.float64),
                "first_thresholds": torch.full((2,), nan, dtype=torch.float64),
                "second_thresholds": torch.full((2,), nan, dtype=torch.float64),
                "risk_scale": torch.full((), FIRST_RISK_SCALE, dtype=torch.float64),
                "history": torch.zeros(HISTORY_LENGTH, units, dtype=torch.float32),
                "history_stride": torch.ones((), dtype=torch.int64),
            }
        self.owners = owners_of(self.vectors, self.sizes)
        average = RiskAverage.empty(units, self.owners)
        self.values |= {
            "risk_linear": average.linear,
            "risk_quadratic": average.quadratic,
            "risk_gradients": average.gradients,
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None

    @classmethod
    def saved(cls, values: dict[str, Any]) -> SelectionState:
        """The state that saved values are of.

        Args:
            values: What `values` held when it was saved.

        Raises:
            RoseError: If they are of another version.
        """
        if int(values.get("version", 0)) != VERSION:
            raise _other_version(values)
        state = cls(values["units"], values["sizes"].tolist(), values["vectors"].tolist())
        state.load(values)
        return state

    # Where it lives -------------------------------------------------------------------------------------------------

    def adopt(self, group: dict[str, Any], key: str) -> None:
        """Lie in an optimizer's parameter group, and take over what a checkpoint has put there under the same key.

        Args:
            group: The parameter group of the first unit that the optimizer holds.
            key: Names model, adapter and the place of that unit in the optimizer.

        Raises:
            RoseError: If what lies there belongs to other units, to another adapter or to another version.
        """
        home = group.get(STATE_KEY)
        if not isinstance(home, dict) or "units" in home:
            if home is not None:
                raise _other_version(home)
            home = group[STATE_KEY] = {}
        saved = home.get(key)
        if saved is self.values:
            return
        for stale in [name for name, values in home.items() if values is self.values]:
            del home[stale]
        if saved is not None:
            self.load(saved)
        else:
            _refuse_another_adapter(home, key)
        home[key] = self.values

    def leave(self, group: dict[str, Any]) -> None:
        """Go out of a parameter group, so that nobody takes it for a checkpoint's.

        Args:
            group: A parameter group that it may lie in.
        """
        home = group.get(STATE_KEY)
        if isinstance(home, dict):
            for key in [key for key, values in home.items() if values is self.values]:
                del home[key]
            if not home:
                del group[STATE_KEY]

    # What is written ------------------------------------------------------------------------------------------------

    def after(self, decision: Decision, risk_period: int) -> Record:
        """What the values are after a step; changes nothing.

        Args:
            decision: What was decided for the step; units without a gradient do not count.
            risk_period: Optimizer steps from one risk pass to the next.
        """
        new: dict[str, Tensor] = {}
        for name, ranking in (("first", decision.first), ("second", decision.second)):
            if ranking is not None:
                last = self.values[f"{name}_scores"]
                new[f"{name}_scores"] = torch.where(ranking.unscored, last, ranking.scores.double())
                new[f"{name}_thresholds"] = ranking.thresholds.double()
                new[f"{name}_mask"] = ranking.mask
        if decision.risk is not None:
            new |= self._after_risk(decision.risk, risk_period)
        if decision.average is not None:
            new["risk_linear"], new["risk_quadratic"] = decision.average.linear, decision.average.quadratic
            new["risk_gradients"] = decision.average.gradients
        masks = torch.where(decision.stepped, decision.masks, torch.zeros_like(decision.masks))
        new["last_mask"], new["last_stepped"] = masks, decision.stepped
        new["mask_sum"] = self.mask_sum + masks
        new["unit_steps"] = self.unit_steps + decision.stepped
        new["steps"] = self.steps + 1
        stride = int(self.history_stride)
        row = int(self.steps) // stride
        if row >= HISTORY_LENGTH:
            # Halve the resolution instead of growing: the picture stays, the memory does not.
            half = HISTORY_LENGTH // 2
            new["history"] = torch.zeros_like(self.history)
            new["history"][:half] = (self.history[0::2] + self.history[1::2]) / 2
            stride *= 2
            new["history_stride"] = torch.full_like(self.history_stride, stride)
            row = int(self.steps) // stride
        return Record(new, row, new.get("history", self.history)[row] + masks / stride)

    def put(self, record: Record) -> None:
        """Write new values down; doing so again after an interruption changes nothing.

        Args:
            record: What `after` made.
        """
        for name, value in record.values.items():
            self.values[name].copy_(value)
        self.history[record.row] = record.masks

    def _after_risk(self, risk: RiskFigures, period: int) -> dict[str, Tensor]:
        new = {"skipped": self.skipped + int(risk.skipped), "whole": self.whole + int(risk.whole)}
        if risk.skipped:
            new["risk_scale"] = (self.risk_scale / 2).clamp(min=1.0)
        elif (int(self.steps) + period) // RISK_SCALE_GROWTH_STEPS > int(self.steps) // RISK_SCALE_GROWTH_STEPS:
            new["risk_scale"] = (self.risk_scale * 2).clamp(max=MAX_RISK_SCALE)
        return new

    def load(self, values: dict[str, Any]) -> None:
        """Take over saved values.

        Args:
            values: What `values` held when it was saved.

        Raises:
            RoseError: If they belong to other units.
        """
        mine, theirs = self.values["units"], list(values.get("units", []))
        if mine != theirs:
            odd = next(iter([*(set(theirs) - set(mine)), *(set(mine) - set(theirs))]), "their order")
            raise RoseError(
                f"the optimizer state holds ROSE state of {len(theirs)} units, this model has {len(mine)} (different: "
                f"{odd}); resume with the config and the model that the checkpoint was made with."
            )
        tensors = {name: value for name, value in self.values.items() if isinstance(value, Tensor)}
        if not torch.equal(values.get("vectors", self.vectors), self.vectors):
            # Saved with the other kind of risk pass: gradients start from nothing.
            del tensors["vectors"], tensors["risk_gradients"]
        if int(values.get("version", 0)) != VERSION:
            raise _other_version(values)
        for name, value in tensors.items():
            if not isinstance(values.get(name), Tensor) or values[name].shape != value.shape:
                raise RoseError(
                    f"the optimizer state holds ROSE state without a fitting {name!r}, so it comes from another "
                    "version of rose_peft; resume with that version."
                )
        for name, value in tensors.items():
            value.copy_(values[name])

    def start_anew(self) -> None:
        """Forget everything, as if no step had been taken."""
        self.load(SelectionState(self.units, self.sizes.tolist(), self.vectors.tolist()).values)

    def continue_from(self, values: dict[str, Any]) -> None:
        """Take over what is known of units of the same names; new ones start from nothing.

        Args:
            values: The `values` of a state with other units.
        """
        old = {name: index for index, name in enumerate(values["units"])}
        mine = [index for index, name in enumerate(self.units) if name in old]
        theirs = [old[self.units[index]] for index in mine]
        for name, value in self.values.items():
            if not isinstance(value, Tensor) or name in ("sizes", "vectors"):
                continue
            if name == "risk_gradients":
                owners = owners_of(values["vectors"], values["sizes"])
                for index, other in zip(mine, theirs, strict=True):
                    here, there = self.owners == index, owners == other
                    if here.sum() == there.sum():
                        value[here] = values[name][there]
                continue
            if value.dim() == 0 or name.endswith("thresholds"):
                value.copy_(values[name])
            elif value.dim() == 1:
                value[mine] = values[name][theirs]
            else:
                value[:, mine] = values[name][:, theirs]

    # What is read ---------------------------------------------------------------------------------------------------

    @property
    def average(self) -> RiskAverage:
        """The average of sampled risk passes."""
        return RiskAverage(self.risk_linear, self.risk_quadratic, self.risk_gradients, self.owners)

    def mask_history(self) -> tuple[Tensor, int]:
        """Mean masks over time.

        Returns:
            float32 [columns, U], and how many steps one column stands for.
        """
        stride, steps = int(self.history_stride), int(self.steps)
        columns = -(-steps // stride)
        history = self.history[:columns].clone()
        if columns and steps % stride:
            history[-1] *= stride / (steps % stride)  # the last column is not full yet
        return history, stride

    def statistics(self) -> RoseStatistics:
        """Read the statistics off; no device is asked."""
        shares = self.mask_sum / self.unit_steps
        sizes = self.sizes.double()
        return RoseStatistics(
            steps=int(self.steps),
            kept_share=float(self.mask_sum.sum() / self.unit_steps.sum()),
            kept_weight_share=float((self.mask_sum * sizes).sum() / (self.unit_steps * sizes).sum()),
            last_kept_share=float(self.last_mask.sum() / self.last_stepped.sum()),
            last_kept_weight_share=float((self.last_mask * sizes).sum() / (self.last_stepped * sizes).sum()),
            skipped_risk_passes=int(self.skipped),
            whole_risk_passes=int(self.whole),
            first_order_thresholds=tuple(self.first_thresholds.tolist()),
            second_order_thresholds=tuple(self.second_thresholds.tolist()),
            units={
                name: UnitStatistics(*values)
                for name, *values in zip(
                    self.units,
                    shares.tolist(),
                    self.last_mask.tolist(),
                    self.first_scores.tolist(),
                    self.second_scores.tolist(),
                    self.sizes.tolist(),
                    strict=True,
                )
            },
        )


def _other_version(values: dict[str, Any]) -> RoseError:
    found = values.get("version", 1)
    return RoseError(
        f"the optimizer state holds ROSE state of version {found}, this rose_peft reads version {VERSION}; resume "
        "with the version of rose_peft that the checkpoint was made with."
    )


def _refuse_another_adapter(home: dict[str, Any], key: str) -> None:
    """Refuse to start anew where a checkpoint has a state for this very place under another model or adapter."""
    owner, _, place = key.rpartition("@")
    for name in home:
        theirs, _, position = name.rpartition("@")
        if position == place and theirs != owner:
            raise RoseError(
                f"the optimizer state holds ROSE state of {theirs!r} where this model has {owner!r}; resume with the "
                "model and the adapter names that the checkpoint was made with."
            )
