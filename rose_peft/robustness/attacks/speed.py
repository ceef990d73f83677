"""How fast attacks run through this kit's wrapper, against TextAttack's own, side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import Examples
from ..errors import ModelError
from ..predict import Predictor, evaluating
from ..seeding import generators_kept, seed_all, seed_from
from .offline import quiet
from .recipes import build_attack, expand, get_recipe
from .run import attack_one


@dataclass(frozen=True)
class Speed:
    """Speed of one attack through both wrappers.

    Args:
        recipe: Name of the attack.
        ours: Examples per second through this kit's wrapper.
        theirs: Examples per second through TextAttack's.
        same_results: Share of examples with the same outcome through both.
    """

    recipe: str
    ours: float
    theirs: float
    same_results: float

    @property
    def ratio(self) -> float:
        """How many times as fast this kit's wrapper is."""
        return self.ours / self.theirs


def compare_wrappers(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    recipes: Sequence[str] = ("offline",),
    *,
    seed: int = 0,
    query_budget: int | None = None,
    batch_size: int = 32,
) -> Iterator[Speed]:
    """Time each attack on the same examples with the same seeds through both wrappers.

    The two take turns example by example, so that a machine that gets slower hits both alike.

    Args:
        model: A `transformers` classifier; TextAttack's wrapper takes no `PeftModel`.
        tokenizer: Its tokenizer.
        examples: What to attack.
        recipes: Recipes that can run on this machine, and presets.
        seed: Seed of the attacks.
        query_budget: Model queries that one example may cost; None for no limit.
        batch_size: Texts per forward pass, for both.

    Yields:
        The speed of each recipe, as soon as it is known.

    Raises:
        ModelError: If TextAttack's wrapper does not take the model.
    """
    from .wrapper import ClassifierWrapper

    ours = ClassifierWrapper(Predictor.for_examples(model, tokenizer, examples, batch_size=batch_size))
    from textattack.models.wrappers import HuggingFaceModelWrapper

    try:
        theirs = HuggingFaceModelWrapper(model, tokenizer)
    except AssertionError as error:
        raise ModelError(f"model is a {type(model).__name__}, which TextAttack's wrapper refuses: {error}") from None
    # TextAttack's wrapper leaves the mode as it is, and would attack a model with dropout.
    with evaluating(model), generators_kept(), quiet():
        for name in expand(recipes):
            attacks = [
                build_attack(get_recipe(name), side, query_budget, batch_size, False) for side in (ours, theirs)
            ]
            seconds = [0.0, 0.0]
            same = 0
            for text, label, index in zip(examples.texts, examples.labels, examples.indices, strict=True):
                outcomes = []
                for side, attack in enumerate(attacks):
                    seed_all(seed_from(seed, name, index))
                    attack.clear_cache()
                    start = time.perf_counter()
                    record = attack_one(attack, examples.columns, text, label, index)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    seconds[side] += time.perf_counter() - start
                    outcomes.append((record.result, record.perturbed))
                same += outcomes[0] == outcomes[1]
            count = len(examples)
            yield Speed(name, count / seconds[0], count / seconds[1], same / count)
