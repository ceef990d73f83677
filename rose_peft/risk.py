"""The risk side of a step: the second stochastic pass, and norms of the divergence gradient since the last step."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .aside import attributes_kept, without_hooks
from .average import RiskFigures
from .divergence import logits_divergence
from .errors import RoseInactiveError, UnsupportedEngineError, UnsupportedModelError
from .inputs import by_name
from .norms import IndexedTensors, add_per_unit, local_part, norms_of, squares
from .outputs import asking_for_logits, is_causal, logits_of, loss_of, tensors_of, with_loss

# What a window adds up besides norms and gradients: all that `RiskFigures` has after them, in that order.
COUNTS = len(fields(RiskFigures)) - 2


@dataclass(frozen=True)
class Call:
    """One forward call of the user's, and how to make another of the same module.

    Args:
        module: The module that was called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        caches: The caches among them as they were before the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caches: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments by their names, as far as these are known."""
        return by_name(self.module, self.args, self.kwargs)

    def again(self, **changed: Any) -> Any:
        """Call the module once more, past its hooks.

        Args:
            **changed: Keyword arguments that take the place of the user's.
        """
        named = {**self.kwargs, **self.caches, **changed}
        return self.module.forward(*map(_copied, self.args), **{name: _copied(value) for name, value in named.items()})


def _copied(value: Any) -> Any:
    """A copy of labels and the like: some models write into them (`clamp_`), and the user's graph needs them."""
    return value.clone() if isinstance(value, Tensor) and not value.is_floating_point() else value


@dataclass(frozen=True)
class Head:
    """What a model's logits mean.

    Args:
        model: The base model.
        task_type: PEFT's task type.
        head: `ROSEConfig.head`.
    """

    model: nn.Module
    task_type: Any
    head: str | None

    def logits(self, output: Any) -> tuple[Tensor, ...]:
        """The logits in an output of the model."""
        return logits_of(output, self.model)

    def divergence(
        self, first: Sequence[Tensor], second: Sequence[Tensor], inputs: dict[str, Any], rounding: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Divergence of two passes' logits, and whether they are equal but for rounding."""
        problem_type = getattr(getattr(self.model, "config", None), "problem_type", None)
        causal = is_causal(self.model, self.task_type, self.head)
        value, equal = logits_divergence(first, second, inputs, problem_type, causal, self.head, rounding)
        if not value.requires_grad:
            raise UnsupportedModelError(
                "the logits do not depend on any trainable parameter, so the dropout divergence has no gradient; "
                "compute them with gradients, or use strategy='second_order'."
            )
        return value, equal


def paired_pass(call: Call, output: Any, head: Head) -> tuple[Tensor, Tensor, Any]:
    """The published risk pass: the whole batch once more, and the divergence of both passes (section 3.2).

    Args:
        call: The user's call.
        output: What it returned.
        head: What the logits mean.

    Returns:
        The divergence, whether both outputs are equal, and the output with the mean loss of both passes in it (the
        output itself where the model computed no loss).
    """
    # Where the first pass left its logits out it says nothing: two more do.
    asking = asking_for_logits(output, call.kwargs)
    first = call.again(**asking) if asking else output
    second = call.again(**asking)
    value, equal = head.divergence(head.logits(first), head.logits(second), call.inputs)
    losses = loss_of(output), loss_of(second)
    if losses[0] is not None and losses[1] is not None:
        output = with_loss(output, (losses[0] + losses[1]) / 2)
    return value, equal, output


def hidden_states_are_equal(call: Call, module: nn.Module) -> bool:
    """Whether two passes give the same output of one module; leaves random state and gradients alone.

    Args:
        call: The user's call.
        module: A module inside the one that is called.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.extend(tensors_of(output)[:1])

    devices = {param.device for param in module.parameters() if param.device.type == "cuda"}
    forked = torch.random.fork_rng(devices=list(devices))
    with forked, torch.no_grad(), attributes_kept(call.module), module.register_forward_hook(keep):
        first = call.again(), len(seen)
        call.again()
    half = first[1]
    return half > 0 and len(seen) == 2 * half and all(map(torch.equal, seen[:half], seen[half:]))


class RiskWindow:
    """
    The risk passes since the last optimizer step: their squared norms per unit, and what became of each.

    Of units that are vectors the gradients are added up too where `owners` asks for them (see `RiskAverage`).

    Everything lies on the device of the parameters until `sums` is fetched with the rest of the step.

    Args:
        units: Number of units U.
        owners: The unit of each weight of the units whose gradients are wanted, int64 [V]; None for no unit.
    """

    def __init__(self, units: int, owners: Tensor | None = None) -> None:
        self._units = units
        self._sizes = {} if owners is None else {int(index): int((owners == index).sum()) for index in owners.unique()}
        self.forget()

    def forget(self) -> None:
        """Forget the passes."""
        self._sums: Tensor | None = None  # squared norms, gradients and counts, all but `bypassed`, the last
        self.reached: set[int] = set()
        self.calls = 0
        self._backward_seen = False

    @property
    def is_empty(self) -> bool:
        """Whether there was no pass."""
        return self._sums is None

    def add(
        self,
        parameters: IndexedTensors,
        value: Tensor,
        equal: Tensor,
        scale: float,
        *,
        share: float = 1.0,
        whole: bool = False,
        retain_graph: bool = True,
    ) -> None:
        """Take the gradient of a divergence and keep its norms.

        Args:
            parameters: (unit index, parameter) of everything that trains.
            value: The divergence, a scalar with a graph.
            equal: Whether both outputs are equal, a bool scalar.
            scale: Factor on the divergence before its gradient is taken.
            share: Share of the batch's rows that the pass took, in (0, 1].
            whole: Whether a sampled pass took the whole batch.
            retain_graph: Whether the user still needs the graph, or a part of it.

        Raises:
            RoseInactiveError: If the gradient reaches no unit.
            UnsupportedEngineError: If the graph does not let itself be asked.
        """
        tensors = [param for _, param in parameters]
        wanted = {id(param): index for index, param in parameters if index in self._sizes}
        with (
            without_hooks(tensor._backward_hooks for tensor in tensors),
            _norms_on_arrival(tensors, wanted) as (norms, kept),
            _typed_errors(),
        ):
            torch.autograd.grad(value * scale, tensors, retain_graph=retain_graph, allow_unused=True)
        # In the order of the parameters, not of their arrival, so that sums are the same every time.
        found = [(index, norms[id(param)]) for index, param in parameters if id(param) in norms]
        if not found:
            raise RoseInactiveError(
                "the gradient of the dropout divergence reaches no unit. With gradient checkpointing pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}; else check that the units are part of the "
                "forward call."
            )
        self.reached |= {index for index, _ in found}
        device = found[0][1].device
        square_sum = add_per_unit(found, self._units, device) / scale**2
        finite = torch.isfinite(square_sum.sum())
        gradients = self._in_order({wanted[param]: gradient for param, gradient in kept.items()}, square_sum) / scale
        said = torch.cat([square_sum, gradients, square_sum.new_full((1,), 1 / share - 1)])
        said = torch.where(finite, said, torch.zeros_like(said))
        counts = torch.stack([finite, ~finite, equal.to(device), torch.full_like(finite, whole)])
        sums = torch.cat([said, counts.to(said.dtype)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _in_order(self, gradients: dict[int, Tensor], like: Tensor) -> Tensor:
        """Gradients by unit, one after the other [V], zeros for those that the pass has not reached."""
        parts = [
            gradients[index].flatten().to(like) if index in gradients else like.new_zeros(size)
            for index, size in self._sizes.items()
        ]
        return torch.cat(parts) if parts else like.new_zeros(0)

    def sums(self, device: torch.device, dtype: torch.dtype, bypassed: bool) -> Tensor:
        """Squared norms per unit, gradients and the counts, [U + V + COUNTS]; zeros without a pass.

        Args:
            device: Where they are wanted.
            dtype: In which dtype.
            bypassed: Whether this process has new gradients from calls that went past the hook.
        """
        ours = torch.full((1,), bypassed, dtype=dtype, device=device)
        if self._sums is None:
            length = self._units + sum(self._sizes.values()) + COUNTS - 1
            return torch.cat([torch.zeros(length, dtype=dtype, device=device), ours])
        return torch.cat([self._sums.to(device, dtype), ours])

    def figures(self, sums: Tensor) -> RiskFigures:
        """Read off what `sums` of all processes add up to.

        Args:
            sums: float64 [U + V + COUNTS] on the CPU.
        """
        return RiskFigures(sums[: self._units], sums[self._units : -COUNTS], *sums[-COUNTS:].tolist())

    # Passes whose gradients were thrown away ------------------------------------------------------------------------

    def watch_backward(self, output: Any) -> None:
        """Note when the user's backward pass runs through an output.

        Not only through the loss: with label smoothing or distillation users make their own from the logits.

        Args:
            output: What the model returned.
        """

        def seen(grad: Tensor) -> None:
            self._backward_seen = True

        for tensor in tensors_of(output):
            if tensor.grad_fn is not None:  # a parameter that the model returns would keep the hook for ever
                tensor.register_hook(seen)

    def note_backward(self) -> None:
        """Note a backward pass that was seen elsewhere, as on shards."""
        self._backward_seen = True

    def forget_discarded(self, holders: Sequence[Tensor]) -> None:
        """Drop passes whose gradients were thrown away, as after an overflow under a GradScaler.

        Args:
            holders: Where the gradients lie: parameters, or their shards.
        """
        if self._sums is None or not self._backward_seen:
            return
        gradients = [param.grad for param in holders if param.grad is not None]
        if not gradients:
            self.forget()
        else:  # zero_grad(set_to_none=False) leaves zeros; asking the device for a Python answer would stall it
            alive = squares(norms_of(map(local_part, gradients))).sum() != 0
            self._sums = self._sums * alive


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Say the way out where torch refuses a gradient."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise UnsupportedEngineError(
                "the model calls torch.utils.checkpoint.checkpoint(..., use_reentrant=True), which hides what is "
                "inside from the gradient of the dropout divergence; pass use_reentrant=False there."
            ) from error
        if "donated buffers" in str(error):
            raise UnsupportedEngineError(
                "the compiled model gives up buffers that the user's own backward pass still needs after the risk "
                "pass. Set torch._functorch.config.donated_buffer = False before the first forward call, or "
                "risk_pass='sampled' in ROSEConfig."
            ) from error
        raise


@contextmanager
def _norms_on_arrival(
    tensors: Sequence[Tensor], wanted: Container[int]
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Take the norm of each gradient as soon as it is known, and let go of it: together they take a model's memory.

    Args:
        tensors: Whose gradients are asked for.
        wanted: ids of those whose gradients are kept too.

    Yields:
        id of a tensor -> norm of its gradient, and id of a wanted one -> its gradient.
    """
    norms: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    handles = []

    def take(tensor: int, gradient: Tensor) -> Tensor:
        (norms[tensor],) = norms_of([local_part(gradient)])
        if tensor in wanted:
            kept[tensor] = gradient
        # Nobody reads what stands in its place; a shard keeps its own, for it cannot be one number everywhere.
        return gradient if isinstance(gradient, DTensor) else norms[tensor].to(gradient.dtype).expand_as(gradient)

    try:
        for key, tensor in {id(tensor): tensor for tensor in tensors}.items():
            handles.append(tensor.register_hook(partial(take, key)))
        yield norms, kept
    finally:
        for handle in handles:
            handle.remove()
