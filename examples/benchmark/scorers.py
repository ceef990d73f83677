"""Other scores in place of ROSE's own: a random baseline, and ideas that must prove themselves to become options.

What these found is in results/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rose_peft import Facts, FirstOrder, ROSEConfig, Score, Scores, SecondOrder, Stepping, get_selector
from rose_peft.scores import fresh_factors, rules_of


class RandomScores:
    """Keeps as many units as second order would, at random: does it matter which ones are frozen?

    Args:
        seed: Seed of the run; scores depend on it and on the step alone, so that all ranks and resumed runs draw the
            same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """None."""
        return ()

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Draw; second order cannot rank anything in its first step, and this neither."""
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + facts.steps)
        scores = torch.rand(len(facts.units), generator=generator)
        return scores.to(facts.dtype), torch.full((len(facts.units),), facts.steps == 0)


class MomentumChange:
    """Scores a unit by the relative change of its momentum, norm(m_t - m_(t-1)) / norm(m_(t-1))."""

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Whole differences, not differences of norms: a gradient that turns around is a change too."""
        known = [(entry, entry.momentum) for entry in stepping]
        return (
            [(entry.index, entry.gradient - momentum) for entry, momentum in known if momentum is not None],
            [(entry.index, momentum) for entry, momentum in known if momentum is not None],
        )

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Compare the change with the momentum before."""
        change, before = norms
        return fresh_factors(facts) * (change / before).to(facts.dtype), before == 0


class SizeNormalised(FirstOrder):
    """Divides first-order scores by the square root of a unit's size, so that small tensors are not kept for ever."""

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Score by the root mean square over elements instead of the norm."""
        scores, unranked = super().score(norms, facts)
        return scores / facts.sizes.clamp(min=1).sqrt().to(facts.dtype), unranked


class Together:
    """Scores units that belong together as if their tensors were one, so that they are frozen together.

    Args:
        score: What scores them.
        group: Name of a unit -> what it shares with those it belongs to.
    """

    def __init__(self, score: Score, group: Callable[[str], str]) -> None:
        self._score = score
        self._group = group

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """Those of the score."""
        return self._score.tensors(stepping)

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Give each unit the norms, the risk and the size of its whole group."""
        names = [self._group(name) for name in facts.units]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        index = torch.tensor([places[name] for name in names], device="cpu")

        def whole(values: Tensor) -> Tensor:
            return values.new_zeros(len(places)).index_add(0, index, values)[index]

        risk = None if facts.risk is None else whole(facts.risk)
        return self._score.score(
            [whole(norm.square()).sqrt() for norm in norms], replace(facts, risk=risk, sizes=whole(facts.sizes))
        )


def block_of(name: str) -> str:
    """The repeated block that a unit lies in: its name up to the first number."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def kind_of(name: str) -> str:
    """What a unit is in its block: its name without numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


class ByWeight:
    """Second order with each number of a tensor as a unit: freezes those far from their momentum, and no tensor.

    It puts frozen numbers back after the step, for the selector knows whole tensors alone; their momenta go on.

    Args:
        config: Whose `upper_quantile` of the scores of a tensor its numbers are frozen above, after `warmup_steps`.
    """

    def __init__(self, config: ROSEConfig) -> None:
        self._config = config
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._hooked: list[torch.optim.Optimizer] = []

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """None: it looks at the numbers."""
        return ()

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Remember what is to be put back; no unit as a whole is ranked."""
        rules = rules_of(facts.stepping)
        self._before.clear()  # of a step that raised
        for entry in facts.stepping:
            momentum = entry.momentum
            if momentum is None or facts.steps < self._config.warmup_steps:
                continue
            ratio = rules[id(entry.group)].fresh / facts.loss_scale * entry.gradient.abs() / momentum.abs()
            scores = (ratio - 1).abs().nan_to_num(0.0, posinf=0.0)  # no momentum: nothing to compare with
            place = max(1, round(self._config.upper_quantile * scores.numel()))
            frozen = scores > scores.flatten().kthvalue(place).values
            weights = entry.param.detach()
            self._before.append((weights, frozen, weights[frozen]))
            if entry.optimizer not in self._hooked:
                entry.optimizer.register_step_post_hook(self._put_back)
                self._hooked.append(entry.optimizer)
        count = len(facts.units)
        return torch.zeros(count, dtype=facts.dtype), torch.ones(count, dtype=torch.bool)

    def _put_back(self, *hook_arguments: Any) -> None:
        for weights, frozen, before in self._before:
            weights[frozen] = before
        self._before.clear()


def _together(group: Callable[[str], str]) -> Scores:
    return Scores(first_order=Together(FirstOrder(), group), second_order=Together(SecondOrder(), group))


VARIANTS: dict[str, Callable[[int, ROSEConfig], Scores]] = {
    "random": lambda seed, config: Scores(second_order=RandomScores(seed)),
    "momentum_change": lambda seed, config: Scores(second_order=MomentumChange()),
    "size_normalised": lambda seed, config: Scores(first_order=SizeNormalised()),
    "block_wise": lambda seed, config: _together(block_of),
    "kind_wise": lambda seed, config: _together(kind_of),
    "by_weight": lambda seed, config: Scores(second_order=ByWeight(config)),
}


def use_variant(model: nn.Module, name: str, seed: int) -> None:
    """Let the selector that `get_peft_model` attached rank by a variant.

    Args:
        model: A model that ROSE is attached to.
        name: One of `VARIANTS`.
        seed: Seed of the run, for the variant that draws.
    """
    selector = get_selector(model)
    selector.scores = VARIANTS[name](seed, selector.config)
