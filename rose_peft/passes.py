"""What happens around a forward call of the model: engines are checked, risk passes made, weights watched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .ahead import check_can_skip, plan
from .aside import aside
from .distributed import Processes
from .dropout import has_dropout_up_to
from .engines.finding import EngineFinder
from .errors import RoseError, UnsupportedEngineError
from .inputs import cache_before
from .norms import IndexedTensors
from .outputs import tensors_of
from .risk import Call, Head, hidden_states_are_equal, paired_pass
from .sampled import Sample, sampled_pass, take_all, take_sample
from .scores import Scores
from .steered import Steered
from .units import LiveUnits


class Passes:
    """
    The forward side of a selector.

    Args:
        host: The module whose forward call is observed.
        live: The units of the model.
        processes: Who trains it.
        training: Gives the adapters that train now.
        scores: Gives what units are ranked by.
    """

    def __init__(
        self,
        host: nn.Module,
        live: LiveUnits,
        processes: Processes,
        training: Callable[[], list[Steered]],
        scores: Callable[[], Scores],
    ) -> None:
        self.finder = EngineFinder(host, live.model, self._note_backward)
        self._live = live
        self._processes = processes
        self._training = training
        self._scores = scores
        self.ours = False
        self._hidden_states_checked = False
        self._whole_warned = False
        self._caches: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_caches": {}}

    def close(self) -> None:
        """Take off what the engine has put on the model."""
        self.finder.engine.close()

    def before(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """Look at the model before a call.

        Args:
            module: Who is called.
            kwargs: Keyword arguments of the call.

        Raises:
            UnsupportedEngineError: If the engine hides what ROSE needs to see.
            RoseInactiveError: If the weights change without ROSE.
        """
        if module is self.finder.host:
            self._release_what_was_interrupted()
        if not torch.is_grad_enabled():
            return
        training = self._training()
        if not training:
            # FSDP1 takes parameters away, as merging does; only that is refused.
            units = [unit for units in self._live.by_adapter.values() for unit in units] + self._live.lost()
            self.finder.check(module, [tensor for unit in units for tensor in unit.tensors()])
            if module.training:
                self._live.refuse_lost()
            return
        if not module.training:
            for steered in training:
                steered.watchdog.eval_pass()
            return
        shown = [tensor for steered in training for unit in steered.units for tensor in unit.tensors()]
        paired = any(_is_paired(steered) for steered in training)
        self.finder.before_forward(module, shown, paired)
        self._processes.follow(self.finder.engine.process_groups)
        parameters = {steered.name: self._live.parameters(steered.name) for steered in training}
        for steered in training:
            steered.watchdog.training_pass(parameters[steered.name])
        for steered in training:
            if steered.config.skip_frozen_gradients:
                self._plan(steered, parameters[steered.name])
        if paired:
            self._caches = cache_before(kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Make the risk passes of a call.

        Args:
            module: Who was called.
            args: Positional arguments.
            kwargs: Keyword arguments.
            output: What it returned.

        Returns:
            The output with the mean loss of both passes, or None to leave it as it is.
        """
        if self.ours or not module.training or not torch.is_grad_enabled():
            return None
        given = output
        call = Call(module, args, kwargs, self._caches)
        self._caches = {}
        training = self._training()
        for steered in training:
            if steered.config.risk_is_due(int(steered.state.steps)):
                head = Head(self._live.model, steered.config.task_type, steered.config.head)
                if _is_paired(steered):
                    output = self._paired(steered, call, head, output)
                else:
                    self._sampled(steered, call, head, output)
            steered.window.calls += 1
            if steered.plan is not None:
                self._hold_back_in_backward(steered, output)
        return None if output is given else output

    def ended(self) -> None:
        """Let go of what was held back for a call: its graph is built, or will not be."""
        for steered in [] if self.ours else self._training():
            if steered.plan is not None:
                steered.plan.release()

    def _release_what_was_interrupted(self) -> None:
        """Let go of what is still held back: torch runs no hook where a KeyboardInterrupt ends a call."""
        for steered in self._training():
            if steered.plan is not None and steered.plan.off:
                steered.plan.release()
                warnings.warn(
                    "the last pass was interrupted while frozen units were held back, so until now requires_grad was "
                    "off for them: an optimizer that was made since then from what requires gradients lacks them. "
                    "Make it from model.parameters().",
                    stacklevel=2,
                )

    def stepped_without(self, optimizer: Optimizer) -> None:
        """Look at a step of an optimizer that holds no unit: its engine may hide them, or it misses them.

        Args:
            optimizer: About to step.

        Raises:
            UnsupportedEngineError: If the engine steps what no optimizer shows.
            RoseInactiveError: If the optimizer holds only what does not train, step after step.
        """
        for steered in self._training():
            parameters = self._live.parameters(steered.name)
            # A model that was refused once may still be about while another trains, whose steps are none of its own.
            if not self.finder.refused or steered.window.calls:
                try:
                    self.finder.before_step([param for _, param in parameters])
                except UnsupportedEngineError:
                    steered.window.forget()
                    raise
            steered.watchdog.foreign_step(optimizer, parameters)

    def _plan(self, steered: Steered, parameters: IndexedTensors) -> None:
        check_can_skip(self.finder.host, self._processes, self.finder.engine.splits)
        if steered.plan is None:
            steered.plan = plan(steered.config, self._scores(), steered.state, parameters)
        if steered.plan is not None:
            steered.plan.hold_back()

    def _paired(self, steered: Steered, call: Call, head: Head, output: Any) -> Any:
        parameters = self._live.parameters(steered.name)
        tensors = [param for _, param in parameters]
        engine, window = self.finder.engine, steered.window
        engine.require_whole(tensors)
        discarded = engine.discarded()
        if discarded:
            window.forget()
        elif discarded is None:
            window.forget_discarded(engine.gradient_holders(tensors))
        with self.own():
            value, equal, output = paired_pass(call, output, head)
            self._check_hidden_states(call, steered)
        window.add(parameters, value, equal, float(steered.state.risk_scale))
        if not engine.sees_backward:
            window.watch_backward(output)
        return output

    def _sampled(self, steered: Steered, call: Call, head: Head, output: Any) -> None:
        if steered.plan is not None:
            steered.plan.release()  # the risk of frozen units must be seen, or they would stay frozen
        fraction, engine = steered.config.risk_fraction, self.finder.engine
        sample = take_sample(call, output, head, fraction, at_once=not engine.gathers)
        try:
            self._small(steered, sample, head)
        except Exception as error:  # whatever the model says to inputs whose rows only seemed to be rows
            # Where shards are gathered all processes must call alike.
            if sample.whole or engine.gathers or isinstance(error, RoseError | torch.OutOfMemoryError):
                raise
            self._warn_of_whole(error)
            self._small(steered, take_all(call, output), head)
        if steered.plan is not None:
            steered.plan.hold_back()

    def _small(self, steered: Steered, sample: Sample, head: Head) -> None:
        with self.own(), aside(sample.call.module), self.finder.engine.whole_parameters():
            sampled_pass(
                sample,
                head,
                steered.window,
                # Under FSDP2 the modules show whole parameters during the pass only.
                lambda: self._live.parameters(steered.name),
                scale=float(steered.state.risk_scale),
                exact=not steered.watchdog.passes_differed,
            )
            self._check_hidden_states(sample.call, steered)

    def _warn_of_whole(self, error: Exception) -> None:
        if not self._whole_warned:
            self._whole_warned = True
            why = next(iter(str(error).splitlines()), "")[:200]
            warnings.warn(
                f"the model does not take some rows of its batch ({type(error).__name__}: {why}), so sampled risk "
                "passes take the whole batch where that happens (`whole_risk_passes` counts them).",
                stacklevel=2,
            )

    @staticmethod
    def _hold_back_in_backward(steered: Steered, output: Any) -> None:
        """Keep to the plan in a backward pass, where checkpointed blocks are computed again."""
        planned = steered.plan

        def begins(_: Tensor) -> None:
            if planned is not None and steered.plan is planned:
                planned.hold_back()
                torch.autograd.Variable._execution_engine.queue_callback(planned.release)

        for tensor in tensors_of(output):
            if tensor.grad_fn is not None:  # a parameter that the model returns would keep the hook for ever
                tensor.register_hook(begins)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Keep the hooks still during passes of our own."""
        self.ours = True
        try:
            yield
        finally:
            self.ours = False

    def _check_hidden_states(self, call: Call, steered: Steered) -> None:
        """Say once where dropout changes the logits and no hidden state of the units: the ranking sees the head's."""
        if self._hidden_states_checked:
            return
        self._hidden_states_checked = True
        last = self._live.last_module()
        if last is not None and not has_dropout_up_to(self._live.model, last) and hidden_states_are_equal(call, last):
            warnings.warn(
                f"dropout={steered.config.dropout}: the hidden states of both passes are equal, so units are ranked "
                "by what the dropout in the head alone does. Set ROSEConfig(dropout=0.1) to have dropout in front of "
                "the units, or use strategy='second_order'.",
                stacklevel=2,
            )

    def _note_backward(self) -> None:
        for steered in self._training():
            steered.window.note_backward()


def _is_paired(steered: Steered) -> bool:
    return steered.config.needs_risk_pass and steered.config.risk_pass == "paired"
