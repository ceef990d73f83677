"""The settings that the authors of ROSE published per task and model, by name.

They hold for the whole training sets of GLUE, in mixed precision (fp16) on a GPU.
"""

from __future__ import annotations

from typing import Any

# Learning rate and upper quantile by model and strategy, one pair per task in the order of _TASKS.
_TASKS = ("qnli", "qqp", "rte", "sst2")
_PUBLISHED = {
    ("roberta-base", "first_order"): ((2e-5, 0.70), (2e-5, 0.70), (4e-5, 0.80), (2e-5, 0.60)),
    ("roberta-large", "first_order"): ((3e-5, 0.50), (2e-5, 0.70), (1e-5, 0.80), (4e-5, 0.70)),
    ("roberta-base", "second_order"): ((1e-5, 0.40), (1e-4, 0.60), (4e-5, 0.60), (1e-4, 0.30)),
    ("roberta-large", "second_order"): ((1e-5, 0.50), (1e-5, 0.60), (2e-5, 0.50), (1e-5, 0.50)),
    ("roberta-base", "ensemble"): ((1e-5, 0.90), (5e-5, 0.75), (4e-5, 0.80), (5e-5, 0.40)),
    ("roberta-large", "ensemble"): ((1e-5, 0.30), (1e-5, 0.80), (1e-5, 0.85), (1e-5, 0.70)),
}
_COMMON: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 32,
    "max_length": 128,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "warmup_ratio": 0.0,
    "lower_quantile": 0.0,
    "dropout": 0.1,
}


def _settings(strategy: str, learning_rate: float, upper_quantile: float) -> dict[str, Any]:
    own: dict[str, Any] = {"strategy": strategy, "learning_rate": learning_rate, "upper_quantile": upper_quantile}
    if strategy != "second_order":
        own["risk_pass"] = "paired"
    if strategy == "ensemble":
        own["gamma"] = 0.5
    return {**_COMMON, **own}


#: Name, as STRATEGY/TASK/MODEL -> options of train.py. Neither data nor model are among them.
PRESETS: dict[str, dict[str, Any]] = {
    f"{strategy}/{task}/{model}": _settings(strategy, *pair)
    for (model, strategy), pairs in _PUBLISHED.items()
    for task, pair in zip(_TASKS, pairs, strict=True)
}


def with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """Return options with those of the preset among them added; what is given goes first.

    Args:
        given: Options that the user gave. An unknown preset adds nothing here; `TrainArguments.check` refuses it.
    """
    return {**PRESETS.get(str(given.get("preset")), {}), **given}
