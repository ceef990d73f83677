"""Whether runs can be compared: over the same examples, under the same noise, attacked with the same query budget."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from .results import Figure, Result

NOISE = re.compile(r"noise/(?P<kind>[^@]+)@(?P<rate>\d+(\.\d+)?(e-\d+)?)/accuracy")
NOISE_MEAN = "noise/mean/accuracy"
_ATTACK = re.compile(r"attack/(?P<recipe>.+)/accuracy_under_attack")
_ERRORS = re.compile(r"attack/(?P<recipe>.+)/errors")
# The other figures of attacks are means over those examples that a model got right, or on which it was fooled.
_OVER_ALL_EXAMPLES = re.compile(rf"(clean|adv_glue)/accuracy|{NOISE.pattern}|{_ATTACK.pattern}")


def noise_settings(result: Result) -> dict[str, float]:
    """Return the accuracy under each kind and rate of noise, by the name of its figure, where there is one."""
    return {
        name: figure.value
        for name, figure in result.figures.items()
        if NOISE.fullmatch(name) and figure.value is not None
    }


def mean_over_noise(result: Result, names: Sequence[str]) -> Figure:
    """Return the mean accuracy over some settings of noise; undefined if there are none."""
    settings = noise_settings(result)
    values = [settings[name] for name in names]
    return Figure(sum(values) / len(values) if values else None)


def over_common_noise(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Let the mean over noise be one over the kinds and rates that all runs have.

    Args:
        results: Results of one task, one per method and seed.

    Returns:
        The results, those without noise as they are; and a line that names what the mean leaves out, if anything.
    """
    found = [noise_settings(result) for result in results if _is_noisy(result)]
    every = list(dict.fromkeys(name for settings in found for name in settings))
    common = [name for name in every if all(name in settings for settings in found)]
    if common == every:
        return list(results), []
    same = [
        dataclasses.replace(result, figures={**result.figures, NOISE_MEAN: mean_over_noise(result, common)})
        if _is_noisy(result)
        else result
        for result in results
    ]
    shown = ", ".join(map(_setting, common))
    left_out = ", ".join(_setting(name) for name in every if name not in common)
    over = f"over the noise that all runs have ({shown})" if common else "undefined, as no noise is common to all runs"
    return same, [
        f"{results[0].task}: {NOISE_MEAN} is {over}; it leaves out {left_out}, which some runs lack: evaluate all "
        "under the same kinds and rates to compare them on all."
    ]


def _is_noisy(result: Result) -> bool:
    return NOISE_MEAN in result.figures or bool(noise_settings(result))


def _setting(name: str) -> str:
    return name.split("/")[1]


def unequal_samples(results: Sequence[Result]) -> list[str]:
    """Name the figures that some runs of a task have over fewer examples than others: theirs are other data.

    Args:
        results: Results of one task, one per method and seed.
    """
    lines = []
    for name in dict.fromkeys(name for result in results for name in result.figures):
        sizes = {
            (result.method, result.seed): str(size) for result in results if (size := _size(result, name)) is not None
        }
        if _OVER_ALL_EXAMPLES.fullmatch(name) and len(set(sizes.values())) > 1:
            lines.append(
                f"{results[0].task}: {name} cannot be compared: it is over n={_by_value(sizes)}; evaluate all on the "
                "same examples."
            )
    return lines


def unequal_budgets(results: Sequence[Result]) -> list[str]:
    """Name the attacks that had another query budget against some runs of a task than against others.

    Args:
        results: Results of one task, one per file, since a file has one budget.
    """
    budgets: dict[str, dict[tuple[str, int], str]] = {}
    for result in results:
        places = (result.config, result.config.get("evaluation"))  # as attacks, and examples/compare.py, write it
        known = [str(place["query_budget"]) for place in places if isinstance(place, dict) and "query_budget" in place]
        for match in filter(None, map(_ATTACK.fullmatch, result.figures if known else ())):
            budgets.setdefault(match["recipe"], {}).setdefault((result.method, result.seed), known[0])
    return [
        f"{results[0].task}: attack/{recipe} cannot be compared: it had query_budget={_by_value(of_recipe)}; attack "
        "all with the same one."
        for recipe, of_recipe in budgets.items()
        if len(set(of_recipe.values())) > 1
    ]


def broken_attacks(results: Sequence[Result]) -> list[str]:
    """Name the attacks that broke on examples, which then count in no accuracy under attack.

    Args:
        results: Results, one per method, task and seed.
    """
    lines = []
    for result in results:
        for name, figure in result.figures.items():
            match = _ERRORS.fullmatch(name)
            if match and figure.value:
                size = _size(result, f"attack/{match['recipe']}/accuracy_under_attack")
                lines.append(
                    f"attack/{match['recipe']} of {result.method}, {result.task}, seed {result.seed} broke on "
                    f"{figure.value:g} of {'its' if size is None else size} examples, which count in no accuracy "
                    "under attack; see the column error of its examples.csv."
                )
    return lines


def _size(result: Result, name: str) -> int | None:
    """Return how many examples a figure is about, with those on which an attack broke, if that is known."""
    figure = result.figures.get(name)
    if figure is None or figure.n is None:
        return None
    attack = _ATTACK.fullmatch(name)
    broken = result.figures.get(f"attack/{attack['recipe']}/errors") if attack else None
    return int(figure.n) + int(broken.value or 0 if broken else 0)


def _by_value(found: Mapping[tuple[str, int], str]) -> str:
    """Write down which runs, given as method and seed, have which value; the most frequent one is of all others."""
    (usual, _), *rare = Counter(found.values()).most_common()
    parts = []
    for value, _ in rare:
        seeds: dict[str, list[str]] = {}
        for (method, seed), its_value in found.items():
            if its_value == value:
                seeds.setdefault(method, []).append(str(seed))
        named = " and ".join(f"{method} (seed {', '.join(numbers)})" for method, numbers in seeds.items())
        parts.append(f"{value} for {named}")
    return f"{', '.join(parts)}, and {usual} for the others"
