"""RoseCallback, with the Trainer's own state objects and without its loop."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from rose_peft import RoseCallback, RoseInactiveError, attach_rose, detach_rose
from tests.helpers.steps import adamw, config, train_step
from tests.helpers.tiny import tiny_bert


def begin(model, global_step: int = 0) -> tuple[RoseCallback, TrainerState]:
    """Call the callback through the Trainer's own handler."""
    callback, state = RoseCallback(), TrainerState(global_step=global_step)
    CallbackHandler([callback], model, None, None, None).on_train_begin(None, state, TrainerControl())
    return callback, state


def end(callback: RoseCallback, state: TrainerState) -> None:
    callback.on_train_end(None, state, TrainerControl())


def test_figures_are_added_to_training_logs_only():
    model = tiny_bert()
    selector = attach_rose(model, config())
    optimizer = adamw(model)
    callback, state = begin(model)
    for step in range(2):
        train_step(model, optimizer, step)
    logs = {"loss": 1.0}
    callback.on_log(None, state, TrainerControl(), logs=logs)
    statistics = selector.statistics()
    assert logs == {
        "loss": 1.0,
        "rose/kept_share": statistics.kept_share,
        "rose/kept_weight_share": statistics.kept_weight_share,
        "rose/last_kept_share": statistics.last_kept_share,
        "rose/last_kept_weight_share": statistics.last_kept_weight_share,
        "rose/frozen_units": len(statistics.frozen_units()),
        "rose/skipped_risk_passes": 0.0,
    }
    evaluation = {"eval_loss": 1.0}
    callback.on_log(None, state, TrainerControl(), logs=evaluation)
    assert evaluation == {"eval_loss": 1.0}
    state.global_step = 2
    end(callback, state)


def test_a_training_without_rose_fails():
    model = tiny_bert()
    with pytest.raises(RoseInactiveError, match="not attached"):
        begin(model)
    attach_rose(model, config())
    callback, state = begin(model)
    state.global_step = 5
    with pytest.raises(RoseInactiveError, match="5 steps"):
        end(callback, state)
    detach_rose(model)


def test_a_resumed_training_with_nothing_left_to_do_is_no_failure():
    model = tiny_bert()
    attach_rose(model, config())
    callback, state = begin(model, global_step=10)
    end(callback, state)


@pytest.mark.parametrize("acts", [True, False])
def test_a_resumed_training_is_judged_by_its_own_steps(acts):
    model = tiny_bert()
    attach_rose(model, config())
    optimizer = adamw(model)
    train_step(model, optimizer, 0)  # before
    callback, state = begin(model, global_step=1)
    state.global_step = 2
    if acts:
        train_step(model, optimizer, 1)
        end(callback, state)
    else:
        with pytest.raises(RoseInactiveError, match="1 steps"):
            end(callback, state)
