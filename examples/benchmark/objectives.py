"""What a training step minimises: the plain loss, or one of the baselines that ROSE is compared with.

An objective runs the forward and backward passes of one micro-batch and returns its loss. Each goes with plain
training and with ROSE, whose hooks act on every forward pass of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F

from examples.training.arguments import TrainArguments

Batch = dict[str, Tensor]
Backward = Callable[[Tensor], None]
Objective = Callable[[nn.Module, Batch, Backward], Tensor]


def make_objective(args: TrainArguments) -> Objective:
    """Make the objective that the options name."""
    return {
        "cross_entropy": cross_entropy,
        "two_pass": RDrop(alpha=0.0),
        "r_drop": RDrop(args.r_drop_alpha),
        "fgm": FGM(args.fgm_epsilon),
    }[args.objective]


def cross_entropy(model: nn.Module, batch: Batch, backward: Backward) -> Tensor:
    """The loss that the model computes."""
    loss = model(**batch).loss
    backward(loss)
    return loss.detach()


@dataclass(frozen=True)
class RDrop:
    """R-Drop (Liang et al. 2021): mean loss of two dropout passes, and the divergence between them.

    With `alpha` 0 only the mean over two passes is left, which is what first-order ROSE adds besides its mask.

    Args:
        alpha: Weight of the symmetric Kullback-Leibler divergence, averaged over examples.
    """

    alpha: float

    def __call__(self, model: nn.Module, batch: Batch, backward: Backward) -> Tensor:
        """Run both passes as one batch of twice the size."""
        output = model(**{name: torch.cat([value, value]) for name, value in batch.items()})
        one, two = F.log_softmax(output.logits.float(), dim=-1).chunk(2)
        divergence = ((one.exp() - two.exp()) * (one - two)).sum(dim=-1).mean() / 2
        loss = output.loss + self.alpha * divergence if self.alpha else output.loss
        backward(loss)
        return loss.detach()


@dataclass(frozen=True)
class FGM:
    """Fast gradient method (Miyato et al. 2017): the plain loss, and the loss where embeddings moved against it.

    Args:
        epsilon: Length of the shift of all embeddings of one example together.
    """

    epsilon: float

    def __call__(self, model: nn.Module, batch: Batch, backward: Backward) -> Tensor:
        """Run a pass, shift the word embeddings of each example along their gradient, and run another."""
        shift: Tensor | None = None

        def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal shift
            if shift is None:
                shift = torch.zeros_like(output).requires_grad_()  # its gradient is that of the embeddings
            return output + shift

        embeddings = extract_model_from_parallel(model).get_input_embeddings()
        with embeddings.register_forward_hook(move):
            loss = model(**batch).loss
            backward(loss)
            assert shift is not None and shift.grad is not None
            gradient = shift.grad.float()
            length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            shift = (self.epsilon * gradient / length[:, None, None]).to(shift.dtype)
            backward(model(**batch).loss)
        return loss.detach()
