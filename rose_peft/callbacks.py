"""TrainerCallback: the statistics of ROSE in whatever the Trainer reports to."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import RoseInactiveError
from .selector import RoseSelector, find_selector


class RoseCallback(TrainerCallback):
    """
    Adds ROSE's figures to the Trainer's logs, and fails a training without ROSE.

    The Trainer puts reporters (TensorBoard, W&B ...) before the callbacks that it is given, so figures of one from
    `callbacks=[RoseCallback()]` reach its history only; `RoseCallback.add_to(trainer)` puts it before them. The state
    of ROSE needs no callback: it lies in the optimizer's state and is saved and restored with it.

    Raises:
        RoseInactiveError: At the start if ROSE is not attached to the model; at the end if it never acted.
    """

    def __init__(self) -> None:
        self._selector: RoseSelector | None = None
        self._acted_before = 0
        self._global_step_before = 0
        self._is_first = False

    @classmethod
    def add_to(cls, trainer: Trainer) -> RoseCallback:
        """Make a callback and put it before the reporters of a Trainer.

        Args:
            trainer: One that has not started to train.
        """
        callback = cls()
        callback._is_first = True
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the selector of the model to train."""
        self._selector = find_selector(model) if model is not None else None
        if self._selector is None:
            raise RoseInactiveError(
                "RoseCallback: ROSE is not attached to the model; use get_peft_model(model, ROSEConfig(...)) or "
                "attach_rose(model, config), or leave the callback out."
            )
        reporters = getattr(args, "report_to", None) or []
        if reporters and not self._is_first:
            warnings.warn(
                f"report_to={reporters}: these come before callbacks=[RoseCallback()] and do not get its figures; use "
                "RoseCallback.add_to(trainer) instead.",
                stacklevel=2,
            )
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:  # what the Trainer has resumed from; its first step would be late for a plan
            self._selector.restore(getattr(optimizer, "optimizer", optimizer))
        self._acted_before = self._selector.steps_taken
        self._global_step_before = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the logs, before any reporter sees them, and to the Trainer's own history."""
        if self._selector is not None and logs is not None and "loss" in logs:
            figures = self.figures(self._selector)
            logs.update(figures)
            if state.log_history:  # a copy of the logs, made before the callbacks are called
                state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fail loudly if no step was masked."""
        taken = state.global_step - self._global_step_before
        if self._selector is None or taken <= 0:
            return
        if self._selector.steps_taken == self._acted_before:
            raise RoseInactiveError(
                f"the Trainer took {taken} steps, and ROSE acted in none of them: the optimizer does "
                "not hold the model's units. Let the Trainer make the optimizer, or make it after get_peft_model."
            )

    @staticmethod
    def figures(selector: RoseSelector) -> dict[str, float]:
        """The figures that are logged.

        Args:
            selector: From `get_selector(model)`.
        """
        statistics = selector.statistics()
        return {
            "rose/kept_share": statistics.kept_share,
            "rose/kept_weight_share": statistics.kept_weight_share,
            "rose/last_kept_share": statistics.last_kept_share,
            "rose/last_kept_weight_share": statistics.last_kept_weight_share,
            "rose/frozen_units": float(len(statistics.frozen_units())),
            "rose/skipped_risk_passes": float(statistics.skipped_risk_passes),
        }
