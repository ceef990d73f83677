"""Loading a classifier and its tokenizer from a folder or the hub, adapter or whole model."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ModelError, RobustnessError, first_line
from .predict import text_config
from .seeding import generators_kept

logger = logging.getLogger(__name__)
_MODEL_FILES = ("config.json", "adapter_config.json")
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
        name_or_path: Folder or hub name of a whole model, or of a PEFT adapter, whose base model is then loaded too;
            or the folder of a run of examples/train.py.
        num_labels: Number of classes, for a head that the folder does not contain; a head that it contains keeps its
            own, which `label_order` compares with the data's.
        tokenizer: Folder or hub name of the tokenizer; None for the model's (an adapter's base model's) own.
        device: Where to put the model.
        dtype: Precision of the weights: float32, bfloat16 or float16.
        seed: Seed of a classification head that the folder does not contain.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ModelError: If there is no such model, its files are not whole, or it is no classifier.
    """
    from transformers import AutoTokenizer

    if dtype not in PRECISIONS:
        raise ModelError(f"dtype={dtype!r}: must be one of {', '.join(PRECISIONS)}.")
    name = model_folder(name_or_path)
    lack = folder_lack(name)
    if lack is not None:
        raise ModelError(
            f"model={name!r} cannot be loaded as a sequence classifier: {lack}; pass a model's or an adapter's "
            "folder, or a run of examples/train.py that has ended."
        )
    _check_device(device)
    try:
        with generators_kept():
            torch.manual_seed(seed)
            model = _load_model(name, num_labels, PRECISIONS[dtype])
        words = AutoTokenizer.from_pretrained(tokenizer or _tokenizer_source(name))
        _agree_on_padding(model, words)
    except RobustnessError:
        raise
    except Exception as error:  # an unknown name, a truncated file and an unknown kind of model raise their own each
        raise ModelError(
            f"model={name!r} cannot be loaded as a sequence classifier ({first_line(error)}); pass a name that the "
            "hub has, or the folder of a whole model and its tokenizer."
        ) from error
    return model.to(device).eval(), words


def model_folder(name_or_path: str | os.PathLike[str]) -> str:
    """Return where a model lies: in the folder `model` of a run of examples/train.py, else where it is said to be."""
    path = Path(name_or_path)
    return str(path / "model") if _is_model(path / "model") and not _is_model(path) else os.fspath(name_or_path)


def model_name(name_or_path: str | os.PathLike[str]) -> str:
    """Return what to call a model: its run, its folder, or the last part of its hub name.

    Runs of several seeds lie in folders seed0, seed1, ... of their method, whose name is theirs.
    """
    run = _run_folder(name_or_path)
    return run.parent.name if model_seed(name_or_path) is not None and run.parent.name else run.name


def model_seed(name_or_path: str | os.PathLike[str]) -> int | None:
    """Return N where the folder of a model, or of its run, is called seedN."""
    found = re.fullmatch(r"seed(\d+)", _run_folder(name_or_path).name)
    return int(found[1]) if found else None


def _run_folder(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path).resolve()
    return path.parent if path.name == "model" and path.parent.name else path


def folder_lack(name_or_path: str | os.PathLike[str]) -> str | None:
    """Say what keeps a folder from being a model's; None if nothing does, or if it is no folder but a hub name."""
    folder = Path(name_or_path)
    if _is_model(folder):
        return None
    if not folder.is_dir():
        # Names on the hub are NAME or OWNER/NAME.
        return "there is no such folder" if folder.is_absolute() or len(folder.parts) > 2 else None
    held = "nothing" if not any(folder.iterdir()) else f"no {' or '.join(_MODEL_FILES)}"
    return f"the folder holds {held}"


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in _MODEL_FILES)


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _load_model(name: str, num_labels: int, dtype: torch.dtype) -> nn.Module:
    if _is_adapter(name):
        return _load_adapter(name, num_labels, dtype)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    architectures = getattr(AutoConfig.from_pretrained(name), "architectures", None) or ()
    has_head = any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    # Another number of classes than the head's would not load, with a trace and no word about the data.
    options = {} if has_head else {"num_labels": num_labels}
    if not has_head:
        logger.warning("model=%r has no classification head: a random one is evaluated, as good as guessing.", name)
    return AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, **options)


def _load_adapter(name: str, num_labels: int, dtype: torch.dtype) -> nn.Module:
    from peft import AutoPeftModelForSequenceClassification

    known = _of_its_model(name)
    options = known if "id2label" in known else {**known, "num_labels": num_labels}
    try:
        return AutoPeftModelForSequenceClassification.from_pretrained(name, dtype=dtype, **options)
    except RuntimeError as error:
        # Most adapters' files do not say how many classes the head has; the complaint about the head does.
        found = re.search(rf"size mismatch for .*?\[(\d+).*?\[{num_labels}[,\]]", str(error))
        if found is None or found[1] == str(num_labels) or "num_labels" not in options:
            raise
        options["num_labels"] = int(found[1])
    return AutoPeftModelForSequenceClassification.from_pretrained(name, dtype=dtype, **options)


def _of_its_model(name: str) -> dict[str, Any]:
    """Return the names of the classes and the padding, where an adapter's folder holds its model's configuration."""
    file = Path(name) / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = {key: values[key] for key in ("id2label", "label2id", "pad_token_id") if values.get(key) is not None}
    if "id2label" in known:
        known["id2label"] = {int(index): label for index, label in known["id2label"].items()}
    return known


def _agree_on_padding(model: nn.Module, tokenizer: Any) -> None:
    """Give a decoder that has no padding its end of text, which is what it was trained with if it was in batches."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    config = text_config(model)
    if config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device={device!r} cannot be used here ({first_line(error)}); pass cpu, or a device that is there."
        ) from error


def _tokenizer_source(name: str) -> str:
    """Return where the tokenizer is: an adapter's folder may leave it to the base model."""
    if not _is_adapter(name) or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        return name
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)
