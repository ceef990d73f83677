"""How well cheap risk scores choose: their masks beside the mask that scores without noise would give.

The expected mask of a point of a training follows from the root mean square of many published draws on as many fresh
batches. Beside it stand one published draw, and sampled passes of several settings as they come along the training.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rose_peft import ROSEConfig, Scores, attach_rose, get_selector
from rose_peft.aside import aside
from rose_peft.average import RiskAverage, RiskFigures, owners_of
from rose_peft.config import RISK_FRACTION, RISK_INTERVAL, RISK_SMOOTHING
from rose_peft.masks import quantile_band
from rose_peft.risk import Call, Head, RiskWindow, paired_pass
from rose_peft.sampled import sampled_pass, take_sample
from rose_peft.scores import Facts, Stepping

Batch = dict[str, Tensor]
PUBLISHED = "published draw"
ONE_SIDED = "published draw, gradient through its second pass only"


class Setting(NamedTuple):
    """A sampled risk pass.

    Args:
        interval: `ROSEConfig.risk_interval`, in steps.
        fraction: `ROSEConfig.risk_fraction`, a share of the rows.
        smoothing: `ROSEConfig.risk_smoothing`.
    """

    interval: int
    fraction: float
    smoothing: float

    def __str__(self) -> str:
        return f"every {self.interval}, {self.fraction:g} of the rows, smoothing {self.smoothing:g}"


DEFAULT = Setting(RISK_INTERVAL, RISK_FRACTION, RISK_SMOOTHING)
SETTINGS = (
    Setting(1, 0.25, 0.0),
    Setting(8, 0.25, 0.0),
    Setting(8, 0.25, 0.8),
    DEFAULT,
    Setting(16, 0.25, 0.8),
    Setting(4, 0.25, 0.8),
    Setting(4, 0.125, 0.8),
    Setting(8, 0.125, 0.8),
    Setting(8, 0.125, 0.9),
)


class Given:
    """A score that was made elsewhere; none yet keeps every unit."""

    scores: Tensor | None = None

    def tensors(self, stepping: Sequence[Stepping]) -> Sequence[Sequence[tuple[int, Tensor]]]:
        """None: the scores are there."""
        return ()

    def score(self, norms: Sequence[Tensor], facts: Facts) -> tuple[Tensor, Tensor]:
        """Hand them over."""
        if self.scores is None:
            return torch.zeros(len(facts.units)), torch.ones(len(facts.units), dtype=torch.bool)
        return self.scores.to(facts.dtype), self.scores == 0


@dataclass
class Agreement:
    """What a training has shown.

    Args:
        shares: For each way to score and each upper quantile the share of units, at each point, whose mask is the
            expected one.
        step_seconds: Times of plain steps of the training, without any risk pass.
        pass_seconds: Times of a risk pass, by fraction of the rows; 2 stands for the published one, with the part of
            the user's backward pass that runs through its second graph.
    """

    shares: dict[tuple[str, float], list[float]] = field(default_factory=lambda: defaultdict(list))
    step_seconds: list[float] = field(default_factory=list)
    pass_seconds: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))

    def cost(self, interval: int, fraction: float) -> float:
        """Time of a step with a risk pass every so many steps, relative to one without."""
        return 1 + statistics.mean(self.pass_seconds[fraction]) / interval / statistics.mean(self.step_seconds)


def point_steps(steps: int, points: int) -> list[int]:
    """Steps at which masks are compared, one in each of as many equal parts of the training.

    Where in its part a step lies changes, so that none of the intervals is met at one phase only.

    Args:
        steps: Length of the training.
        points: Number of points.
    """
    return [int(steps / points * (point + 0.618 * point % 1)) for point in range(points)]


def agreement_along(
    model: nn.Module,
    batches: Iterable[Batch],
    fresh: Callable[[], Batch],
    *,
    steps: int,
    points: int,
    draws: int,
    learning_rate: float,
    uppers: Sequence[float] = (0.7, 0.4),
    clock: Callable[[], float] = time.perf_counter,
    after_point: Callable[[Agreement], None] = lambda found: None,
) -> Agreement:
    """Fine-tune a model by first order with the default sampled pass, and compare masks at points of the training.

    Args:
        model: A classifier of transformers, on its device.
        batches: Its training batches, at least `steps` of them, with labels.
        fresh: Gives a batch for a draw.
        steps: Length of the training.
        points: How many points.
        draws: How many draws the expected mask is from.
        learning_rate: Of AdamW, constant.
        uppers: Upper quantiles; the first one steers the training.
        clock: What times are read from, in seconds.
        after_point: Called after each step with a point, with what is known so far.

    Returns:
        What it has shown.
    """
    given = Given()
    attach_rose(
        model, ROSEConfig(strategy="second_order", upper_quantile=uppers[0]), scores=Scores(second_order=given)
    )
    selector = get_selector(model)
    units, head = len(selector.units), Head(model, "SEQ_CLS", None)
    vectors = torch.tensor([unit.is_vector() for unit in selector.units])
    owners = owners_of(vectors, selector.state.sizes)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.98), 1e-6, weight_decay=0.01)
    found, averages = Agreement(), dict.fromkeys(SETTINGS, RiskAverage.empty(units, owners))
    compared = set(point_steps(steps, points))

    def figures(run: Callable[[RiskWindow], None]) -> RiskFigures:
        window = RiskWindow(units, owners)
        run(window)
        return window.figures(window.sums(torch.device("cpu"), torch.float64, False))

    def parameters() -> list[tuple[int, Tensor]]:
        return selector.live.parameters(selector.current.name)

    def published(call: Call) -> Tensor:
        value, equal, _ = paired_pass(call, call.again(), head)
        return figures(lambda window: window.add(parameters(), value, equal, 1.0, retain_graph=False)).square_sum

    def one_sided(call: Call) -> Tensor:
        with torch.no_grad():
            first = head.logits(call.again())
        value, equal = head.divergence(first, head.logits(call.again()), call.kwargs)
        return figures(lambda window: window.add(parameters(), value, equal, 1.0, retain_graph=False)).square_sum

    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        started = clock()
        output = model(**batch)
        forward = clock() - started
        call = Call(model, (), batch, {})
        is_point = step in compared
        due = [one for one in averages if step % one.interval == 0 and (is_point or one.smoothing or one.interval > 1)]
        for fraction in sorted({setting.fraction for setting in due}):
            started = clock()
            sample = take_sample(call, output, head, fraction)
            with selector.passes.own(), aside(model):
                risk = figures(
                    lambda window, sample=sample: sampled_pass(
                        sample, head, window, parameters, scale=1.0, exact=False
                    )
                )
            found.pass_seconds[fraction].append(clock() - started)
            for setting in due:
                if setting.fraction == fraction:
                    averages[setting] = averages[setting].after(risk, setting.smoothing)
        if is_point:
            started = clock()
            candidates = {PUBLISHED: published(call)}
            paired = clock() - started - forward
            candidates[ONE_SIDED] = one_sided(call)
            candidates |= {str(setting): _known(average) for setting, average in averages.items()}
            expected = torch.stack([published(Call(model, (), fresh(), {})) for _ in range(draws)])
            _compare(found, candidates, expected, uppers)
        given.scores = _known(averages[DEFAULT]).sqrt()
        started = clock()
        output.loss.backward()
        backward = clock() - started
        optimizer.step()
        optimizer.zero_grad()
        found.step_seconds.append(forward + clock() - started)
        if is_point:
            # The loss of the published step is the mean over both passes, so its backward pass runs through both.
            found.pass_seconds[2].append(paired + backward)
            after_point(found)
    return found


def _known(average: RiskAverage) -> Tensor:
    squares = average.squares()
    assert squares is not None  # every setting has a pass at step 0
    return squares


def _compare(found: Agreement, candidates: dict[str, Tensor], expected: Tensor, uppers: Sequence[float]) -> None:
    def share(one: Tensor, other: Tensor, upper: float) -> float:
        masks = [quantile_band(scores.sqrt(), 0.0, upper)[0] for scores in (one, other)]
        return float((masks[0] == masks[1]).double().mean())

    for upper in uppers:
        for name, square in candidates.items():
            found.shares[name, upper].append(share(square, expected.mean(0), upper))
        # Each of the draws is a published one, too, beside the mean of the others.
        others = [(expected.sum(0) - draw) / (len(expected) - 1) for draw in expected]
        found.shares[f"{PUBLISHED}, each beside the others", upper].append(
            statistics.mean(share(draw, other, upper) for draw, other in zip(expected, others, strict=True))
        )
