"""Accuracy on AdvGLUE beside the accuracy on the clean data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .data import Examples, PathLike, load_adv_glue, load_glue
from .estimate import Estimate, share
from .predict import Predictor
from .results import Row

#: Name of AdvGLUE among the robust sets.
ADV_GLUE = "AdvGLUE"


@dataclass(frozen=True)
class AdvGlueResult:
    """Accuracies of one model, each a fraction with its 95 % Wilson interval.

    Args:
        task: Name of the task.
        clean: On GLUE's evaluation split.
        adversarial: On AdvGLUE.
        by_source: On the part of AdvGLUE made by each attack, where the data name it.
    """

    task: str
    clean: Estimate
    adversarial: Estimate
    by_source: dict[str, Estimate] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return the figures as rows of a result file."""
        return [
            Row("clean_accuracy", self.clean),
            Row("robust_accuracy", self.adversarial, ADV_GLUE),
            *(Row("source_accuracy", estimate, source) for source, estimate in self.by_source.items()),
        ]


def evaluate_adv_glue(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    data_dir: PathLike | None = None,
    clean: Examples | None = None,
    adversarial: Examples | None = None,
    clean_accuracy: Estimate | None = None,
    **options: Any,
) -> AdvGlueResult:
    """Measure a classifier on AdvGLUE (Wang et al. 2021, https://arxiv.org/abs/2111.02840) and on the clean data.

    Args:
        model: Any classifier or `PeftModel` of one.
        tokenizer: Its tokenizer.
        task: sst2, qqp, mnli, mnli-mm (mismatched), qnli or rte.
        data_dir: Folder of local files (see `load_glue`, `load_adv_glue`); None for the hub.
        clean: Clean examples to use instead of GLUE's evaluation split.
        adversarial: Adversarial examples to use instead of AdvGLUE's development set.
        clean_accuracy: Accuracy on the clean data, where it is known; None measures it.
        options: Passed to `Predictor`: batch_size, max_length, bf16.

    Raises:
        UnknownTaskError: If AdvGLUE has no such task.
        DataError: If the data cannot be used.
        LabelMismatchError: If the model's classes are not the task's labels.
    """
    attacked = load_adv_glue(task, data_dir) if adversarial is None else adversarial
    if clean_accuracy is None:
        plain = load_glue(task, data_dir) if clean is None else clean
        clean_accuracy = share(Predictor.for_examples(model, tokenizer, plain, **options).correct(plain))
    right = Predictor.for_examples(model, tokenizer, attacked, **options).correct(attacked)
    by_source: dict[str, list[bool]] = {}
    for source, outcome in zip(attacked.sources or (), right, strict=False):
        by_source.setdefault(source, []).append(outcome)
    return AdvGlueResult(
        task=task,
        clean=clean_accuracy,
        adversarial=share(right),
        by_source={source: share(outcomes) for source, outcomes in sorted(by_source.items())},
    )
