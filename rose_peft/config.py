"""ROSEConfig: the fields, their help and their validation."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from peft import PeftConfig, PeftType, get_peft_config

from .adapter_file import check_adapter_file
from .errors import RoseConfigError

STRATEGIES = ("first_order", "second_order", "ensemble")
RISK_PASSES = ("paired", "sampled")
ORIGINAL_WEIGHTS = ("keep", "cpu", "drop")
GAMMA = 0.5
RISK_INTERVAL, RISK_FRACTION, RISK_SMOOTHING = 8, 0.25, 0.5
HEADS = ("softmax", "multi_label", "regression", "causal")


@dataclass
class ROSEConfig(PeftConfig):
    """
    Settings of ROSE, robust selective fine-tuning (EMNLP 2022), for `peft.get_peft_model`.

    Without `base_config` the whole model is fine-tuned (or the modules in `target_modules`) and the update of each
    unit (a weight tensor) is masked. With `base_config` that PEFT method is trained as always and a unit is all the
    adapter tensors of one module.

    Args:
        strategy: Which score decides: "first_order" (size of the gradient of the dropout divergence), "second_order"
            (new gradient against the momentum) or "ensemble" (a mix of both masks).
        upper_quantile: Units with a score above this quantile are frozen for the step, in [0, 1].
        lower_quantile: Units with a score below this quantile are frozen for the step, in [0, 1].
        gamma: Weight of the first-order mask in the ensemble, in [0, 1]; the second-order mask has 1 - gamma.
        warmup_steps: Number of optimizer steps at the start that update every unit fully.
        risk_pass: How the dropout divergence is measured: "paired" (as published: the whole batch twice at every step;
            the loss is the mean over both passes) or "sampled" (some rows twice at every few steps, beside the user's
            own pass, which is left as it is).
        risk_interval: Sampled: number of optimizer steps from one risk pass to the next.
        risk_fraction: Sampled: share of the batch's rows in a risk pass, in (0, 1].
        risk_smoothing: Sampled: weight of the past in the average of squared norms, in [0, 1).
        skip_frozen_gradients: Sampled first order: mask a step by the risk passes before it, and build no gradients of
            frozen units in it. Faster than plain fine-tuning; the norm that clipping sees has no part of theirs, and
            their second moments and step counts rest instead of going on. To resume to the last bit call
            `get_selector(model).restore(optimizer)` after loading; `RoseCallback` does so.
        dropout: None trains with the model's own dropout. A probability in (0, 1) is set, while ROSE is attached, on
            every dropout module and on every number that a module drops with (`attention_dropout` of Llama, `dropout`
            of BART); where no dropout comes up to the last target module, the inputs of the targets are dropped.
        head: What the logits mean: "softmax" (one distribution over the classes), "multi_label" (a yes or no per
            number), "regression" (numbers) or "causal" (softmax, where position t predicts the label at t + 1).
            None goes by `model.config.problem_type`, the kind of model and the shape of the logits.
        target_modules: None trains the whole model; units are then the weights inside the repeated blocks. Names or a
            regular expression train those modules only, and their weights are units.
        exclude_modules: Names or a regular expression of modules that stay frozen.
        modules_to_save: Further modules that are trained, unmasked, and saved with the adapter.
        original_weights: Full fine-tuning: what becomes of the weights as they were before the training, while copies
            of them train: "keep" (twice the memory for weights), "cpu" (they come back while the adapter is disabled)
            or "drop" (disabling, unloading without merging and further adapters are errors).
        base_config: The config of the PEFT method that ROSE steers, such as `LoraConfig(r=8)`.

    Raises:
        RoseConfigError: If a value cannot work; the message names the field, the value and the way out.
    """

    strategy: Literal["first_order", "second_order", "ensemble"] = field(
        default="ensemble",
        metadata={"help": "Score that selects the units: 'first_order', 'second_order' or 'ensemble'."},
    )
    upper_quantile: float = field(
        default=0.7, metadata={"help": "Units with a score above this quantile are frozen for the step, in [0, 1]."}
    )
    lower_quantile: float = field(
        default=0.0, metadata={"help": "Units with a score below this quantile are frozen for the step, in [0, 1]."}
    )
    gamma: float = field(
        default=GAMMA, metadata={"help": "Weight of the first-order mask in the ensemble, in [0, 1]."}
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "Number of optimizer steps at the start that update every unit fully."}
    )
    risk_pass: Literal["paired", "sampled"] = field(
        default="paired",
        metadata={
            "help": (
                "How the dropout divergence is measured: 'paired' (as published: the whole batch twice at every step) "
                "or 'sampled' (some rows twice at every few steps)."
            )
        },
    )
    risk_interval: int = field(
        default=RISK_INTERVAL,
        metadata={"help": "Sampled: number of optimizer steps from one risk pass to the next, at least 1."},
    )
    risk_fraction: float = field(
        default=RISK_FRACTION, metadata={"help": "Sampled: share of the batch's rows in a risk pass, in (0, 1]."}
    )
    risk_smoothing: float = field(
        default=RISK_SMOOTHING,
        metadata={"help": "Sampled: weight of the past in the average of squared norms, in [0, 1)."},
    )
    skip_frozen_gradients: bool = field(
        default=False,
        metadata={
            "help": "With strategy='first_order' and risk_pass='sampled': build no gradients of units that are frozen."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": (
                "None: the model's own dropout. A probability in (0, 1): set on all dropout of the model while ROSE "
                "is attached, and applied to the inputs of the target modules where the model has none up to them."
            )
        },
    )
    head: Literal["softmax", "multi_label", "regression", "causal"] | None = field(
        default=None,
        metadata={
            "help": (
                "What the logits mean: 'softmax', 'multi_label', 'regression' or 'causal'. None: found from the "
                "model's problem_type, its kind and the shape of the logits."
            )
        },
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "None: the whole model. Names or a regular expression: those modules only."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules that stay frozen."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained, unmasked, and saved with the adapter."}
    )
    original_weights: Literal["keep", "cpu", "drop"] = field(
        default="keep",
        metadata={
            "help": (
                "Full fine-tuning: 'keep' the original weights beside the copies that train, move them to the 'cpu', "
                "or 'drop' them."
            )
        },
    )
    base_config: PeftConfig | None = field(
        default=None, metadata={"help": "Config of the PEFT method that ROSE steers; None for full fine-tuning."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ROSE")
        self._make_plain()
        self._check_selection()
        self._check_model()
        if isinstance(self.base_config, dict):
            self.base_config = get_peft_config(self.base_config)
        if self.base_config is not None:
            self._check_base_config(self.base_config)
            self._take_over(self.base_config)

    @property
    def needs_risk_pass(self) -> bool:
        """Whether the strategy looks at the dropout divergence."""
        return self.strategy != "second_order"

    @property
    def needs_momentum(self) -> bool:
        """Whether the strategy compares gradients with the momentum."""
        return self.strategy != "first_order"

    def risk_is_due(self, step: int) -> bool:
        """Whether the risk passes of a step are wanted.

        Args:
            step: Number of masked optimizer steps taken before.
        """
        return self.needs_risk_pass and step % self.risk_period == 0

    @property
    def risk_period(self) -> int:
        """Optimizer steps from one risk pass to the next."""
        return 1 if self.risk_pass == "paired" else self.risk_interval

    def _make_plain(self) -> None:
        """Turn numbers of numpy into Python's, which JSON knows, and copy lists, so that none is shared."""
        for name in (
            "upper_quantile",
            "lower_quantile",
            "gamma",
            "dropout",
            "warmup_steps",
            "risk_interval",
            "risk_fraction",
            "risk_smoothing",
        ):
            value = getattr(self, name)
            if isinstance(value, Integral) and not isinstance(value, (bool, int)):
                setattr(self, name, int(value))
            elif isinstance(value, Real) and not isinstance(value, (bool, int, float)):
                setattr(self, name, float(value))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, (list, tuple, set)):
            self.modules_to_save = list(self.modules_to_save)  # PEFT adds the heads of the task in place

    def _check_selection(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RoseConfigError(f"strategy={self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        for name in ("upper_quantile", "lower_quantile", "gamma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                hint = f" ({value} percent is {value / 100})" if isinstance(value, int) and 1 < value <= 100 else ""
                raise RoseConfigError(f"{name}={value!r} is not a number in [0, 1]{hint}; pass one that is.")
        if self.lower_quantile >= self.upper_quantile:
            raise RoseConfigError(
                f"lower_quantile={self.lower_quantile} must be below upper_quantile={self.upper_quantile}; units with "
                "a score between both are kept, so this keeps none. Lower the first or raise the second."
            )
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise RoseConfigError(
                f"warmup_steps={self.warmup_steps!r} is not a number of optimizer steps; pass an integer >= 0."
            )
        if self.gamma != GAMMA and self.strategy != "ensemble":
            raise RoseConfigError(
                f"gamma={self.gamma!r} has no effect with strategy={self.strategy!r}, which mixes no masks; leave it "
                "out, or choose 'ensemble'."
            )
        self._check_risk_pass()

    def _check_model(self) -> None:
        if self.original_weights not in ORIGINAL_WEIGHTS:
            raise RoseConfigError(
                f"original_weights={self.original_weights!r} is unknown; choose one of {', '.join(ORIGINAL_WEIGHTS)}."
            )
        if self.original_weights != "keep" and self.base_config is not None:
            raise RoseConfigError(
                f"original_weights={self.original_weights!r} has no effect beside a base_config, whose adapter needs "
                "the original weights; leave it out."
            )
        if self.dropout is not None and (not isinstance(self.dropout, (int, float)) or not 0 < self.dropout < 1):
            raise RoseConfigError(
                f"dropout={self.dropout!r} is not a probability in (0, 1); pass one, or None for the model's own."
            )
        if self.head is not None and self.head not in HEADS:
            raise RoseConfigError(
                f"head={self.head!r} is unknown; choose one of {', '.join(HEADS)}, or None to have it found."
            )
        if self.head is not None and not self.needs_risk_pass:
            raise RoseConfigError(
                f"head={self.head!r} has no effect with strategy='second_order', which looks at no logits; leave it "
                "out, or choose 'first_order' or 'ensemble'."
            )

    def _check_risk_pass(self) -> None:
        if self.risk_pass not in RISK_PASSES:
            raise RoseConfigError(f"risk_pass={self.risk_pass!r} is unknown; choose one of {', '.join(RISK_PASSES)}.")
        interval = self.risk_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise RoseConfigError(
                f"risk_interval={interval!r} is not a number of optimizer steps; pass an integer >= 1."
            )
        for name, inside, words in (
            ("risk_fraction", lambda value: 0 < value <= 1, "(0, 1]"),
            ("risk_smoothing", lambda value: 0 <= value < 1, "[0, 1)"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value):
                raise RoseConfigError(f"{name}={value!r} is not a number in {words}; pass one that is.")
        for name, default in (
            ("risk_interval", RISK_INTERVAL),
            ("risk_fraction", RISK_FRACTION),
            ("risk_smoothing", RISK_SMOOTHING),
        ):
            if self.risk_pass == "paired" and getattr(self, name) != default:
                raise RoseConfigError(
                    f"{name}={getattr(self, name)!r} has no effect with risk_pass='paired'; leave it out, or set "
                    "risk_pass='sampled'."
                )
        if self.skip_frozen_gradients and (self.risk_pass != "sampled" or self.strategy != "first_order"):
            raise RoseConfigError(
                "skip_frozen_gradients=True needs masks that are known before the gradients: set "
                f"strategy='first_order' and risk_pass='sampled' (here {self.strategy!r} and {self.risk_pass!r}), or "
                "leave it out."
            )
        if self.risk_pass == "sampled" and not self.needs_risk_pass:
            raise RoseConfigError(
                "risk_pass='sampled' has no effect with strategy='second_order', which looks at no divergence; leave "
                "it out, or choose 'first_order' or 'ensemble'."
            )

    def _check_base_config(self, base_config: Any) -> None:
        if not isinstance(base_config, PeftConfig):
            raise RoseConfigError(
                f"base_config={base_config!r} is a {type(base_config).__name__}, not a PEFT config; pass one such as "
                "LoraConfig(r=8), or None for full fine-tuning."
            )
        kind = getattr(base_config.peft_type, "value", base_config.peft_type)
        if isinstance(base_config, ROSEConfig):
            raise RoseConfigError(
                "base_config is itself a ROSEConfig; pass the PEFT method that ROSE shall steer (such as "
                "LoraConfig(r=8)), or None for full fine-tuning."
            )
        if base_config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA", "POLY"):
            raise RoseConfigError(
                f"base_config of type {kind} is not supported: it adapts no single module that could be a unit. Use "
                "a method that does, such as LoraConfig."
            )
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                raise RoseConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning beside a base_config; set {name} on the "
                    f"{type(base_config).__name__} instead."
                )

    def _take_over(self, base_config: PeftConfig) -> None:
        """Fields that PEFT reads from the config it was given, and which the user may have set on either config."""
        for name in ("task_type", "modules_to_save", "revision"):
            mine, theirs = getattr(self, name), getattr(base_config, name, None)
            if mine is None:
                setattr(self, name, list(theirs) if isinstance(theirs, (list, set, tuple)) else theirs)
            elif theirs is not None and name == "modules_to_save":
                self.modules_to_save = [*mine, *(module for module in theirs if module not in mine)]
            elif theirs is not None and theirs != mine:
                raise RoseConfigError(
                    f"{name}={mine!r} differs from base_config.{name}={theirs!r}; set it on one of them only."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the config of a saved adapter, and look at the weights beside it.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            subfolder: Folder inside it.
            **kwargs: As in `PeftConfig.from_pretrained`.

        Raises:
            AdapterFileError: If the weights are cut off, or are not ROSE's.
        """
        check_adapter_file(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the base config's too, ready for JSON."""
        values = super().to_dict()
        if self.base_config is not None:
            inner = self.base_config.to_dict()
            values["base_config"] = {k: sorted(v) if isinstance(v, set) else v for k, v in inner.items()}
        return values
