"""How much a classifier changes its mind where it should not: under dropout, typos and synonyms. Needs no labels.

Read it beside the accuracy: a model that answers the same to everything is perfectly consistent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MissingResourceError, ModelError, RobustnessError
from .estimate import Estimate, mean, share
from .noise import KINDS, missing_for, noisy_texts
from .predict import Predictor, Text
from .results import Row
from .seeding import generators_kept, seed_all

DROPOUT = "dropout"
DEFAULT_CHANGES = (DROPOUT, "typos", "synonyms")


@dataclass(frozen=True)
class ConsistencyResult:
    """How one model's outputs change, by what was done.

    Args:
        flipped: Change -> share of texts whose predicted class changed, with its 95 % Wilson interval.
        divergence: Change -> mean symmetric divergence of the class distributions in nats, with its bootstrap
            interval.
        rate: Share of words hit by each kind of noise.
        unavailable: Change that could not be made -> why.
    """

    flipped: dict[str, Estimate]
    divergence: dict[str, Estimate]
    rate: float
    unavailable: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return the figures as rows of a result file."""
        rates = {change: None if change == DROPOUT else self.rate for change in self.flipped}
        flipped = [Row("flipped_share", estimate, change, rates[change]) for change, estimate in self.flipped.items()]
        return flipped + [Row("divergence", each, change, rates[change]) for change, each in self.divergence.items()]


def consistency(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    changes: Sequence[str] = DEFAULT_CHANGES,
    rate: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> ConsistencyResult:
    """Compare a classifier's outputs with those under one dropout pass and on slightly changed texts.

    Args:
        model: Any classifier or `PeftModel` of one.
        tokenizer: Its tokenizer.
        texts: Sentences or pairs, usually a whole validation set.
        changes: "dropout", and kinds of noise. What cannot be done here is reported and the others are measured.
        rate: Share of words that each kind of noise hits, above 0 and at most 1.
        seed: Seed of the dropout masks and of the noise.
        options: Passed to `Predictor`: batch_size, max_length, bf16.

    Raises:
        RobustnessError: If a change is unknown or the rate is out of range.
        ModelError: If the model has no classes.
        MissingResourceError: If no change asked for can be made.
    """
    known = (DROPOUT, *KINDS)
    for change in changes:
        if change not in known:
            raise RobustnessError(f"change={change!r} is unknown; the kit knows {', '.join(known)}.")
    if not 0 < rate <= 1:
        raise RobustnessError(f"rate={rate}: is a share of words and must lie above 0 and at most at 1.")
    reasons = {change: None if change == DROPOUT else missing_for(change) for change in changes}
    unavailable = {change: reason for change, reason in reasons.items() if reason is not None}
    _require_one(unavailable, reasons)
    predictor = Predictor(model, tokenizer, **options)
    before = predictor(texts)
    if before.shape[1] < 2:
        raise ModelError(
            f"model: {type(model).__name__} gives one score per text, of which no class can flip; pass a classifier."
        )
    flipped: dict[str, Estimate] = {}
    divergence: dict[str, Estimate] = {}
    for change in (change for change in reasons if change not in unavailable):
        if change == DROPOUT:
            with generators_kept():
                seed_all(seed)
                after = predictor(texts, training=True)
            if torch.equal(before, after):
                unavailable[DROPOUT] = "the model has no dropout."
                _require_one(unavailable, reasons)
                continue
        else:
            after = predictor(noisy_texts(texts, change, rate, seed))
        flipped[change] = share((before.argmax(dim=1) != after.argmax(dim=1)).tolist())
        divergence[change] = mean(_symmetric_divergence(before, after).tolist())
    return ConsistencyResult(flipped, divergence, rate, unavailable)


def _require_one(unavailable: Mapping[str, str], changes: Collection[str]) -> None:
    if len(unavailable) == len(changes):
        raise MissingResourceError("no change can be made: " + ("; ".join(unavailable.values()) or "none was named."))


def _symmetric_divergence(one: Tensor, two: Tensor) -> Tensor:
    """Half the sum of both Kullback-Leibler divergences of each row of logits, in nats."""
    p, q = (torch.log_softmax(logits.double(), dim=1) for logits in (one, two))
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=1) / 2
