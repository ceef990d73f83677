"""The model card: what ROSE adds to it, whoever writes it, and how a card gets its data set and figures."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from torch import nn

from .config import ROSEConfig
from .errors import RoseConfigError
from .selector import find_selector
from .state import RoseStatistics
from .version import __version__

PIPELINE_TAGS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# The section is found again by these, so that it is replaced and never doubled; readers do not see them.
_BEGIN, _END = "<!-- rose-peft: begin -->", "<!-- rose-peft: end -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)
_PATCHED = "_rose_writes_cards"

_LOADING_ROSE = """\
### Loading this adapter

PEFT knows the adapter type `ROSE` only after `import rose_peft` (of the package rose-peft); without it loading ends in
`KeyError: 'ROSE'`.

```python
import rose_peft  # registers ROSE with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

### Publishing

These are full weights, so publish a plain model, which loads without this package:
`model.merge_and_unload().save_pretrained("merged")`.
"""
_LOADING_PLAIN_ADAPTER = """\
### Loading this adapter

It is a plain adapter of type `{kind}`: ROSE steered its training and left nothing in it. PEFT loads it as any other,
without rose_peft.
"""
_LOADING_PLAIN_MODEL = """\
### Loading this model

It is a plain model: ROSE steered its training and left nothing in it. It loads as any other, without rose_peft.
"""


def update_model_card(
    folder: str | os.PathLike[str],
    config: ROSEConfig,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Say in a saved model's card that ROSE trained it, and on which data with which figures.

    `PeftModel.save_pretrained`, `push_to_hub` and the Trainer's cards do this by themselves, apart from data set and
    figures. Call it for those, and for a plain model (merged, or trained with `attach_rose`). What the card says
    already stays.

    Args:
        folder: Folder of the saved model; its README.md is made or changed.
        config: The settings it was trained with.
        dataset: Hub name of the data set it was trained on, such as "nyu-mll/glue".
        metrics: Figures by the hub's names of metrics, such as {"accuracy": 0.92}; need a data set.

    Raises:
        RoseConfigError: If there are metrics without a data set, which the hub refuses.
    """
    if metrics and dataset is None:
        raise RoseConfigError(f"metrics={dict(metrics)!r} need the data set they were measured on; pass dataset=.")
    _write(os.fspath(folder), config, _kind_of_folder(folder), None, dataset, metrics or {})


def write_cards_with_peft() -> None:
    """Let every card that PEFT makes or changes say what ROSE did; once.

    PEFT rewrites the card in `save_pretrained`, `push_to_hub` and the Trainer's `create_model_card`, always through
    this one method, and has no hook beside it.
    """
    theirs = PeftModel.create_or_update_model_card
    if not hasattr(theirs, _PATCHED):
        PeftModel.create_or_update_model_card = _with_rose(theirs)  # type: ignore[method-assign, assignment]


def _with_rose(theirs: Callable[[PeftModel, str], None]) -> Callable[[PeftModel, str], None]:
    @functools.wraps(theirs)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        theirs(self, output_dir)
        config, statistics = _training_of(self)
        if config is not None:
            kind = getattr(self.active_peft_config.peft_type, "value", self.active_peft_config.peft_type)
            _write(output_dir, config, kind, statistics, None, {})

    setattr(create_or_update_model_card, _PATCHED, True)
    return create_or_update_model_card


def _training_of(model: nn.Module) -> tuple[ROSEConfig | None, RoseStatistics | None]:
    """The settings a model is or was trained with, and what came of it where that is known."""
    selector = find_selector(model)
    if selector is not None:
        return selector.config, selector.statistics()
    configs = getattr(model, "peft_config", {}).values()
    return next((config for config in configs if isinstance(config, ROSEConfig)), None), None


def _kind_of_folder(folder: str | os.PathLike[str]) -> str | None:
    """The adapter type saved in a folder; None for a plain model."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return str(json.load(file).get("peft_type"))


def _write(
    folder: str,
    config: ROSEConfig,
    kind: str | None,
    statistics: RoseStatistics | None,
    dataset: str | None,
    metrics: Mapping[str, float],
) -> None:
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData(), template_str="")
    _fill_metadata(card.data, config, kind, dataset, metrics)
    known = _SECTION.search(card.text)
    figures = _figures(statistics) or (_known_figures(known.group()) if known else "")
    section = f"{_BEGIN}\n{_section(config, kind, figures).strip()}\n{_END}"
    text = card.text.rstrip()
    card.text = _SECTION.sub(lambda _: f"\n\n{section}\n\n", text) if known else f"{text}\n\n{section}\n"
    card.save(path)


def _fill_metadata(
    data: ModelCardData,
    config: ROSEConfig,
    kind: str | None,
    dataset: str | None,
    metrics: Mapping[str, float],
) -> None:
    tags = {*(data.tags or []), "rose", *(("peft",) if kind is not None else ())}
    data.tags = sorted(tags)
    task = getattr(config.task_type, "value", config.task_type)
    data.pipeline_tag = data.pipeline_tag or PIPELINE_TAGS.get(str(task))
    data["rose"] = _settings(config)
    if dataset is not None:
        data.datasets = sorted({*_listed(data.datasets), dataset})
        data.metrics = sorted({*_listed(data.metrics), *metrics})
    if metrics:
        base = os.path.basename(str(config.base_model_name_or_path or "").rstrip("/"))
        data.model_name = data.model_name or f"{base} ROSE".strip()
        data.eval_results = [
            EvalResult(
                task_type=data.pipeline_tag or "other",
                dataset_type=str(dataset),
                dataset_name=str(dataset),
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _settings(config: ROSEConfig) -> dict[str, Any]:
    """The settings that had an effect."""
    names = ["strategy", "upper_quantile", "lower_quantile", "warmup_steps"]
    if config.strategy == "ensemble":
        names.append("gamma")
    if config.needs_risk_pass:
        names.append("risk_pass")
        if config.risk_pass == "sampled":
            names += ["risk_interval", "risk_fraction", "risk_smoothing"]
    if config.dropout is not None:
        names.append("dropout")
    return {name: getattr(config, name) for name in names}


def _section(config: ROSEConfig, kind: str | None, figures: str) -> str:
    settings = ", ".join(f"`{name}={value!r}`" for name, value in _settings(config).items())
    if kind is None:
        loading = _LOADING_PLAIN_MODEL
    else:
        loading = _LOADING_ROSE if kind == "ROSE" else _LOADING_PLAIN_ADAPTER.format(kind=kind)
    return (
        "## Trained with ROSE\n\n"
        "ROSE (robust selective fine-tuning, EMNLP 2022) held back, at every step, updates of weights that reacted "
        "strongly to dropout, or whose new gradient departed from the momentum. "
        f"rose-peft {__version__} trained with {settings}.\n\n"
        f"{figures}{loading}"
    )


def _figures(statistics: RoseStatistics | None) -> str:
    if statistics is None or statistics.steps == 0:
        return ""
    return (
        f"In {statistics.steps} steps {statistics.kept_share:.0%} of the units' updates went in, "
        f"{statistics.kept_weight_share:.0%} counted by weights.\n\n"
    )


def _known_figures(section: str) -> str:
    """What an earlier card says of the training, which a loaded adapter does not know."""
    found = re.search(r"^In \d+ steps .* counted by weights\.$", section, re.MULTILINE)
    return f"{found.group()}\n\n" if found else ""
