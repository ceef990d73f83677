"""What a model returned: its logits and loss, what the logits mean, and which positions count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError

HeadKind = Literal["softmax", "multi_label", "regression"]
IGNORED_LABEL = -100


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returned."""
    return getattr(model, "_orig_mod", model)


def is_causal(model: nn.Module, task_type: Any = None, head: str | None = None) -> bool:
    """Whether the logits at position t predict the label at t + 1.

    Args:
        model: The base model, compiled or not.
        task_type: PEFT's task type, which decides where it is given.
        head: `ROSEConfig.head`, which decides before everything else.
    """
    if head is not None:
        return head == "causal"
    if task_type is not None:
        return bool(task_type == "CAUSAL_LM")
    model = unwrapped(model)
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    # Vision-language decoders are named for generation, as encoder-decoders are.
    decoder_only = getattr(getattr(model, "config", None), "is_encoder_decoder", None) is False
    return decoder_only and name.endswith("ForConditionalGeneration")


def logits_of(output: Any, model: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Find the logits in what a model returned.

    Args:
        output: A `ModelOutput` or mapping with `logits` (or `start_logits` and `end_logits`), a tuple in the order of
            transformers (loss first where there is one), or the logits themselves.
        model: Who returned it; the order of transformers is taken for granted only for its models.

    Returns:
        One tensor, or start and end logits for question answering.

    Raises:
        UnsupportedModelError: If there are none, or if it cannot be told which tensor they are.
    """
    kind = type(output).__name__
    if isinstance(output, Tensor) and output.dim() > 0:
        return (output,)
    if isinstance(output, Mapping):
        for keys in (("logits",), ("start_logits", "end_logits")):
            if all(isinstance(output.get(key), Tensor) for key in keys):
                return tuple(output[key] for key in keys)
        lack = "but no logits"
        if output.get("logits") is not None:
            lack = f"whose logits are a {type(output['logits']).__name__}, not a tensor"
        raise UnsupportedModelError(
            f"The model returned {kind} with {', '.join(map(str, output))}, {lack}, so the outputs of two passes "
            "cannot be compared. Use a model with a head that gives one tensor, or strategy='second_order'."
        )
    if isinstance(output, tuple):
        tensors = [item for item in output if isinstance(item, Tensor) and item.dim() > 0]
        has_loss = isinstance(output[0], Tensor) and output[0].dim() == 0 if output else False
        ordered = model is None or has_loss or isinstance(unwrapped(model), PreTrainedModel)
        if _is_of_spans(model) and [tensor.dim() for tensor in tensors[:2]] == [2, 2]:
            return tensors[0], tensors[1]  # start and end
        if len(tensors) == 1 or (tensors and ordered):
            return (tensors[0],)
        if tensors:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UnsupportedModelError(
                f"The model returned a tuple of {len(tensors)} tensors ({shapes}), and nothing tells which are the "
                "logits. Return a mapping with `logits`, or use strategy='second_order'."
            )
    scalar = " (a scalar: its loss?)" if isinstance(output, Tensor) else ""
    raise UnsupportedModelError(
        f"The model returned {kind}{scalar}, in which no logits were found, so the outputs of two passes "
        "cannot be compared. Return a ModelOutput with `logits`, or use strategy='second_order'."
    )


def _is_of_spans(model: nn.Module | None) -> bool:
    return model is not None and type(unwrapped(model)).__name__.endswith("ForQuestionAnswering")


def asking_for_logits(output: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a model with once more to get the logits that it left out of an output, for its loss needs none.

    TRL's trainers ask for log-probabilities, or take the loss in chunks; Liger's kernels fuse it with the head.

    Args:
        output: What the model returned.
        kwargs: Keyword arguments of that call.

    Returns:
        Keyword arguments in the place of those of that call; none where the output has logits.
    """
    if kwargs.get("fused_lm_head"):
        return {"fused_lm_head": False}
    if getattr(output, "logits", output) is None and loss_of(output) is not None:
        return {name: None for name in ("labels", "shift_labels") if kwargs.get(name) is not None}
    return {}


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a model returned, or None where it computed none."""
    if isinstance(output, tuple):
        place = _place_of_loss(output)
        return None if place is None else output[place]
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def _place_of_loss(output: tuple[Any, ...]) -> int | None:
    """Where the loss stands in a tuple: in front, as in transformers, or wherever the only scalar is."""
    scalars = [place for place, item in enumerate(output) if isinstance(item, Tensor) and item.dim() == 0]
    return scalars[0] if len(scalars) == 1 or (scalars and scalars[0] == 0) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return the output with its loss replaced; mappings are changed in place, tuples are rebuilt."""
    if isinstance(output, tuple):
        place = _place_of_loss(output)
        values = tuple(loss if index == place else item for index, item in enumerate(output))
        return type(output)(*values) if hasattr(output, "_fields") else values  # a named tuple stays one
    output["loss"] = loss
    return output


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in the first level of what a model returned."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]


def class_dimension(logits: Tensor) -> int:
    """Where the classes lie: in the last dimension, or in the second one of logits per pixel, as torch has it.

    Args:
        logits: [..., C], or [B, C, H, W] and more.
    """
    return 1 if logits.dim() > 3 else -1


def classes_second(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of more than three dimensions with their classes in the second one, where they were in the last.

    Images have them in the second one, pairs of tokens and several choices of a text in the last.

    Args:
        logits: [B, C, H, W] and more, or [B, ..., C].
        inputs: Arguments of the forward call by name; the shape of `labels` tells, else whether there is text.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != logits.dim() - 1:
        last = inputs.get("input_ids") is not None and inputs.get("pixel_values") is None
    else:
        last = labels.shape == logits.shape[:-1] and labels.shape != logits.shape[:1] + logits.shape[2:]
    return logits.movedim(-1, 1) if logits.dim() > 3 and last else logits


def head_kind(logits: Tensor, problem_type: str | None, head: str | None = None) -> HeadKind:
    """Tell what logits mean: as the user says, by the `problem_type` of transformers, else by the number of outputs.

    Args:
        logits: [..., C], [B, C, H, W] of models that label pixels, or [B] of models that give one number per example.
        problem_type: `model.config.problem_type`, which transformers sets itself once it has seen labels.
        head: `ROSEConfig.head`.
    """
    if head is not None:
        kinds: dict[str, HeadKind] = {"regression": "regression", "multi_label": "multi_label"}
        return kinds.get(head, "softmax")
    # One number per example, [B, 1] or squeezed to [B]: a softmax over the latter would compare examples.
    one = logits.shape[class_dimension(logits)] == 1
    if problem_type == "regression" or logits.dim() == 1 or (one and logits.dim() <= 3):
        return "regression"
    if problem_type == "multi_label_classification" or one:  # one number per pixel: whether it is part of something
        return "multi_label"
    return "softmax"


def counted_positions(logits: Tensor, inputs: Mapping[str, Any], causal: bool) -> Tensor | None:
    """Which positions of token-level logits count: those with a label, or without labels those that are no padding.

    Args:
        logits: [B, T, C].
        inputs: Arguments of the forward call by name; `labels`, `decoder_attention_mask` and, where the decoder has
            no inputs of its own, `attention_mask` count, as far as `logits_to_keep` goes.
        causal: Whether the logits at position t predict the label at t + 1.

    Returns:
        bool [B, T], or None where the logits are not per token or nothing tells.
    """
    found = []
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        counted = labels != IGNORED_LABEL
        if causal:
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
        found.append(counted)
    # Beside a decoder's own inputs the other mask is the encoder's, whose length may be the same by chance.
    own = any(inputs.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds", "attention_mask"))
    masks = [inputs.get("decoder_attention_mask" if own else "attention_mask")]
    found += [mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2]
    kept = inputs.get("logits_to_keep")
    for counted in found if logits.dim() == 3 else ():
        if isinstance(kept, int):
            counted = counted[:, -kept:] if kept else counted
        elif kept is not None:
            counted = counted[:, torch.as_tensor(kept, device=counted.device)]
        if counted.shape == logits.shape[:2]:
            return counted.to(logits.device)
    return None
