"""Where ROSE hangs on modules and optimizers; what it does there is the business of whoever hangs there."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepObserver(Protocol):
    """Is told of every step of every torch optimizer, and decides itself whether it is concerned."""

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Act after all other pre-hooks of the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Act before all other post-hooks of the step."""

    def settle(self, optimizer: Optimizer) -> None:
        """Put right what a step that raised has left, before its optimizer is saved or loaded."""


# In order of their attachment, which is the same on all processes: observers may reduce over them.
_observers: dict[int, weakref.ref[Any]] = {}
_numbers = itertools.count()
_lock = threading.Lock()
_global_handles: list[Any] = []
# The two hooks on an optimizer whose step is running. One that raises leaves them behind until its next step.
_step_handles: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()


def observers() -> list[StepObserver]:
    """Who is told of steps, in the order of attachment."""
    with _lock:
        found = [reference() for reference in _observers.values()]
    return [observer for observer in found if observer is not None]


def watch_steps(observer: StepObserver) -> None:
    """Tell an observer of all steps from now on, for as long as it lives.

    Args:
        observer: Held weakly.
    """
    number = next(_numbers)

    def gone(_: Any) -> None:
        _forget(number)

    with _lock:
        _observers[number] = weakref.ref(observer, gone)
        if not _global_handles:
            # Users do not pass their optimizer, and AcceleratedOptimizer has no hook lists of its own.
            _global_handles.append(register_optimizer_step_pre_hook(_step_begins))
            _global_handles.append(register_optimizer_step_post_hook(_step_ends))


def unwatch_steps(observer: StepObserver) -> None:
    """Tell an observer no more.

    Args:
        observer: One that may be watching.
    """
    with _lock:
        numbers = [number for number, reference in _observers.items() if reference() is observer]
    for number in numbers:
        _forget(number)


def _forget(number: int) -> None:
    _observers.pop(number, None)
    if not _observers:
        while _global_handles:
            _global_handles.pop().remove()


@torch.compiler.disable  # users compile their optimizer's step, and a traced hook acts on nothing
def _step_begins(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take the last place among the optimizer's own pre-hooks and the first among its post-hooks, for this step.

    torch calls an optimizer's own hooks after the global pre-hooks and before the global post-hooks, while the user's
    pre-hooks (a clip, say) must come before the masks and his post-hooks (an average of weights) must see frozen units
    unmoved.
    """
    _take_off(optimizer)
    before = optimizer.register_step_pre_hook(_before_step)
    after = optimizer.register_step_post_hook(_after_step)
    post_hooks: Any = optimizer._optimizer_step_post_hooks
    post_hooks.move_to_end(after.id, last=False)
    saving = optimizer.register_state_dict_pre_hook(_settle)
    loading = optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: _settle(optimizer))
    _step_handles[optimizer] = [before, after, saving, loading]
    optimizer.__dict__["zero_grad"] = _SettlingZeroGrad(optimizer)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for observer in observers():
        observer.before_step(optimizer, args, kwargs)


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for observer in observers():
        observer.after_step(optimizer)


class _SettlingZeroGrad:
    """
    Stands for an optimizer's `zero_grad` during a step: where that raises, what it left out has gradients as well.

    Args:
        optimizer: About to step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._before = optimizer.__dict__.get("zero_grad")  # of the instance alone, as users may replace it
        self.__wrapped__ = self._before or type(optimizer).zero_grad  # Accelerate asks for the signature

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        _settle(optimizer)
        if self._before is not None:
            self._before(*args, **kwargs)
        else:
            type(optimizer).zero_grad(optimizer, *args, **kwargs)

    def remove(self, optimizer: Optimizer) -> None:
        """Give an optimizer its own back.

        Args:
            optimizer: The one that this stands in.
        """
        del optimizer.__dict__["zero_grad"]
        if self._before is not None:
            optimizer.__dict__["zero_grad"] = self._before


def _settle(optimizer: Optimizer) -> None:
    if is_stepping(optimizer):
        return  # some let go of the gradients themselves, before they have moved everything
    for observer in observers():
        observer.settle(optimizer)


# What torch puts around every optimizer's `step`.
_STEP: CodeType = cast(Any, Optimizer.profile_hook_step)(lambda optimizer: None).__code__


def is_stepping(optimizer: Optimizer, elsewhere: bool = False) -> bool:
    """Whether an optimizer is in the middle of its step, rather than after one that raised.

    Args:
        optimizer: The optimizer.
        elsewhere: Whether to look at the other threads only.
    """
    mine = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = None if elsewhere and thread == mine else top
        while frame is not None:
            if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
                return True
            frame = frame.f_back
    return False


@torch.compiler.disable
def _step_ends(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _take_off(optimizer)


def _take_off(optimizer: Optimizer) -> None:
    for handle in _step_handles.pop(optimizer, []):
        handle.remove()
    stand_in = optimizer.__dict__.get("zero_grad")
    if isinstance(stand_in, _SettlingZeroGrad):
        stand_in.remove(optimizer)


class ForwardHooks:
    """
    Hooks on a module, and on one inside it through which calls may go instead.

    PeftModel without a task type calls the model, with one the tuner, whose forward goes past the hooks of the model
    (peft 0.18) or not (0.21): both have hooks, and the outer one rests where the inner one acted.

    Args:
        host: The outer module.
        inner: The inner module; may be the same.
        before: Called with (module, keyword arguments) before a forward call.
        after: Called with (module, arguments, keyword arguments, output) after it; returns the output to go on with.
        ending: Called when a forward call ends, with an error too.
        saving: Called before a state dict is made or loaded.
    """

    def __init__(
        self,
        host: nn.Module,
        inner: nn.Module,
        before: Callable[[nn.Module, dict[str, Any]], None],
        after: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any],
        ending: Callable[[], None],
        saving: Callable[[], None],
    ) -> None:
        self._host = host
        self._before = before
        self._after = after
        self._ending = ending
        self._saving = saving
        self._inner_acted = False
        self._handles = []
        for module in [host] if host is inner else [host, inner]:
            self._handles.append(module.register_forward_pre_hook(self._pre_hook, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._hook, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._ended, always_call=True))
        self._handles.append(inner.register_state_dict_pre_hook(self._saved_or_loaded))
        self._handles.append(inner.register_load_state_dict_pre_hook(self._saved_or_loaded))

    @torch.compiler.disable
    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._host:
            self._inner_acted = False
        self._before(module, kwargs)

    @torch.compiler.disable
    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module is self._host and self._inner_acted:
            return None
        self._inner_acted = module is not self._host
        return self._after(module, args, kwargs, output)

    @torch.compiler.disable
    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._ending()

    def _saved_or_loaded(self, module: nn.Module, *args: Any) -> None:
        self._saving()

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
