"""Loading a classifier and its tokenizer from a folder or the hub, adapter or whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ModelError
from .seeding import generators_kept

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_classifier(
    name_or_path: str | os.PathLike[str],
    num_labels: int,
    *,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """Load a sequence classifier and its tokenizer.

    Args:
        name_or_path: Folder or hub name of a whole model, or of a PEFT adapter, whose base model is then loaded too.
        num_labels: Number of classes.
        tokenizer: Folder or hub name of the tokenizer; None for the model's (an adapter's base model's) own.
        device: Where to put the model.
        dtype: Precision of the weights: float32, bfloat16 or float16.
        seed: Seed of a classification head that the folder does not contain.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ModelError: If there is no such model, or it is no classifier.
    """
    from transformers import AutoTokenizer

    if dtype not in PRECISIONS:
        raise ModelError(f"dtype={dtype!r}: must be one of {', '.join(PRECISIONS)}.")
    name = os.fspath(name_or_path)
    options: dict[str, Any] = {"num_labels": num_labels, "dtype": PRECISIONS[dtype]}
    try:
        with generators_kept():
            torch.manual_seed(seed)
            model = _load_model(name, options)
        words = AutoTokenizer.from_pretrained(tokenizer or _tokenizer_source(name))
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"model={name!r} cannot be loaded as a sequence classifier ({first})") from error
    return model.to(device).eval(), words


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _load_model(name: str, options: dict[str, Any]) -> nn.Module:
    if _is_adapter(name):
        from peft import AutoPeftModelForSequenceClassification

        return AutoPeftModelForSequenceClassification.from_pretrained(name, **options)
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(name, **options)


def _tokenizer_source(name: str) -> str:
    """Return where the tokenizer is: an adapter's folder may leave it to the base model."""
    if not _is_adapter(name) or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        return name
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)
