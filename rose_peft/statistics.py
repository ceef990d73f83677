"""What ROSE did so far: the state that survives a checkpoint, and the statistics read from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import RoseError

HISTORY_LENGTH = 1024


@dataclass(frozen=True)
class UnitStatistics:
    """One unit.

    Args:
        kept_share: Mean of its mask over the steps in which it had a gradient, in [0, 1].
        last_mask: Its mask in the last step.
        first_order_score: Its last first-order score; NaN before there is one.
        second_order_score: Its last second-order score; NaN before there is one.
    """

    kept_share: float
    last_mask: float
    first_order_score: float
    second_order_score: float


@dataclass(frozen=True)
class RoseStatistics:
    """What ROSE did so far.

    Args:
        steps: Optimizer steps taken.
        kept_share: Mean of all masks over all steps, in [0, 1]; NaN before the first step.
        last_kept_share: Mean of the masks in the last step.
        skipped_risk_passes: Risk passes left out because their gradient was not finite.
        first_order_thresholds: (low, high) in the last step.
        second_order_thresholds: (low, high) in the last step.
        units: Per unit name.
    """

    steps: int
    kept_share: float
    last_kept_share: float
    skipped_risk_passes: int
    first_order_thresholds: tuple[float, float]
    second_order_thresholds: tuple[float, float]
    units: dict[str, UnitStatistics]

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, ready for JSON."""
        return dataclasses.asdict(self)


class SelectionState:
    """
    Counts and last values per unit, on the CPU.

    `values` is a plain dictionary of tensors that is changed in place: it lies in the optimizer's parameter group, so
    whoever saves the optimizer saves it, at its current values.

    Args:
        names: Unit names, U of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        units = len(names)
        nan = float("nan")
        self.values: dict[str, Any] = {
            "units": list(names),
            "steps": torch.zeros((), dtype=torch.int64),
            "skipped": torch.zeros((), dtype=torch.int64),
            "mask_sum": torch.zeros(units, dtype=torch.float64),
            "unit_steps": torch.zeros(units, dtype=torch.int64),
            "last_mask": torch.ones(units, dtype=torch.float32),
            "last_stepped": torch.zeros(units, dtype=torch.bool),
            "first_mask": torch.ones(units, dtype=torch.float32),
            "first_scores": torch.full((units,), nan, dtype=torch.float64),
            "second_scores": torch.full((units,), nan, dtype=torch.float64),
            "first_thresholds": torch.full((2,), nan, dtype=torch.float64),
            "second_thresholds": torch.full((2,), nan, dtype=torch.float64),
            "risk_scale": torch.full((), 2.0**16, dtype=torch.float64),
            "history": torch.zeros(HISTORY_LENGTH, units, dtype=torch.float32),
            "history_stride": torch.ones((), dtype=torch.int64),
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None

    def record(self, masks: Tensor, stepped: Tensor) -> None:
        """Count one step.

        Args:
            masks: Masks applied in it, float32 [U].
            stepped: Units that had a gradient in it, bool [U]; the others do not count.
        """
        masks = torch.where(stepped, masks, torch.zeros_like(masks))
        self.last_mask.copy_(masks)
        self.last_stepped.copy_(stepped)
        self.mask_sum.add_(masks)
        self.unit_steps.add_(stepped)
        column = int(self.steps) // int(self.history_stride)
        if column >= HISTORY_LENGTH:
            # Halve the resolution instead of growing: the picture stays, the memory does not.
            half = HISTORY_LENGTH // 2
            self.history[:half] = (self.history[0::2] + self.history[1::2]) / 2
            self.history[half:] = 0
            self.history_stride.mul_(2)
            column = int(self.steps) // int(self.history_stride)
        self.history[column] += masks / int(self.history_stride)
        self.steps.add_(1)

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
        for name, value in tensors.items():
            if not isinstance(values.get(name), Tensor) or values[name].shape != value.shape:
                raise RoseError(
                    f"the optimizer state holds ROSE state without a fitting {name!r}, so it comes from another "
                    "version of rose_peft; resume with that version."
                )
        for name, value in tensors.items():
            value.copy_(values[name])

    def continue_from(self, values: dict[str, Any]) -> None:
        """Take over what is known of units of the same names; new ones start from nothing.

        Args:
            values: The `values` of a state with other units.
        """
        old = {name: index for index, name in enumerate(values["units"])}
        mine = [index for index, name in enumerate(self.units) if name in old]
        theirs = [old[self.units[index]] for index in mine]
        for name, value in self.values.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0 or name.endswith("thresholds"):
                value.copy_(values[name])
            elif value.dim() == 1:
                value[mine] = values[name][theirs]
            else:
                value[:, mine] = values[name][:, theirs]

    def statistics(self) -> RoseStatistics:
        """Read the statistics off; no device is asked."""
        shares = self.mask_sum / self.unit_steps
        return RoseStatistics(
            steps=int(self.steps),
            kept_share=float(self.mask_sum.sum() / self.unit_steps.sum()),
            last_kept_share=float(self.last_mask.sum() / self.last_stepped.sum()),
            skipped_risk_passes=int(self.skipped),
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
                    strict=True,
                )
            },
        )
