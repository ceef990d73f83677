"""Whether runs can be compared: over the same examples, under the same noise, attacked with the same query budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..results import MEASURES
from .frame import Column, Run, columns, select

if TYPE_CHECKING:
    from pandas import DataFrame


def with_noise_mean(frame: DataFrame, task: str) -> tuple[DataFrame, list[str]]:
    """Add the mean accuracy under noise, over the kinds and rates that all runs of a task have.

    Args:
        frame: Lines of one task.
        task: Its name.

    Returns:
        The lines with the means; and a line that names what the means leave out, if anything.
    """
    from pandas import concat

    noise = frame[frame["measure"] == "noise_accuracy"].dropna(subset="value")
    if noise.empty:
        return frame, []
    # A mean that a file holds itself is over what that run had.
    frame = frame[frame["measure"] != "noise_mean_accuracy"]
    table = noise.pivot(index=["method", "seed"], columns=["part", "rate"], values="value")
    settings = list(dict.fromkeys(zip(noise["part"], noise["rate"], strict=True)))
    common = [setting for setting in settings if table[setting].notna().all()]
    means = table[common].mean(axis=1).rename("value").reset_index() if common else None
    if means is not None:
        means = means.assign(task=task, measure="noise_mean_accuracy", part="", rate=0.0)
        frame = concat([frame, means], ignore_index=True)
    if common == settings:
        return frame, []
    shown, left_out = (
        ", ".join(f"{kind} at {rate:g}" for kind, rate in some)
        for some in (common, [setting for setting in settings if setting not in common])
    )
    over = f"over the noise that all runs have ({shown})" if common else "undefined, as no noise is common to all runs"
    return frame, [
        f"{task}: noise mean accuracy is {over}; it leaves out {left_out}, which some runs lack: evaluate all under "
        "the same kinds and rates to compare them on all."
    ]


def unequal_samples(frame: DataFrame, task: str) -> list[str]:
    """Name the numbers that some runs of a task have over fewer examples than others: theirs are other data.

    Other numbers of attacks are means over those examples that a model got right, or on which it was fooled.
    """
    lines = []
    for column in [c for place in ("main", "") for c in columns(frame, place)]:
        found = select(frame, column).dropna(subset="n")
        if column.measure == "accuracy_under_attack":
            found = _with_broken(frame, column.part)
        elif not MEASURES[column.measure].same_examples:
            continue
        if found["n"].nunique() > 1:
            sizes = {(row.method, row.seed): f"{row.n:g}" for row in found.itertuples()}
            lines.append(
                f"{task}: {column.title('')} cannot be compared: it is over n={_by_value(sizes)}; evaluate all on the "
                "same examples."
            )
    return lines


def _with_broken(frame: DataFrame, recipe: str) -> DataFrame:
    """Return the accuracies under an attack, with its errors, and `n` with those examples on which it broke."""
    found = select(frame, Column("accuracy_under_attack", recipe, 0.0))
    errors = select(frame, Column("attack_errors", recipe, 0.0))[["method", "seed", "value"]]
    both = found.merge(errors.rename(columns={"value": "errors"}), on=["method", "seed"], how="left")
    return both.assign(errors=both["errors"].fillna(0), n=both["n"] + both["errors"].fillna(0)).dropna(subset="n")


def unequal_budgets(runs: Sequence[Run], task: str) -> list[str]:
    """Name the attacks that had another query budget against some runs of a task than against others."""
    budgets: dict[str, dict[tuple[str, int], str]] = {}
    for result in (run.result for run in runs):
        settings = {**result.config, **result.config.get("evaluation", {})}  # as attacks, and the benchmark, write it
        for row in result.rows if "query_budget" in settings else []:
            if row.measure == "accuracy_under_attack":
                budgets.setdefault(row.part, {}).setdefault(
                    (result.method, result.seed), str(settings["query_budget"])
                )
    return [
        f"{task}: attack {recipe} cannot be compared: it had query_budget={_by_value(of_recipe)}; attack all with the "
        "same one."
        for recipe, of_recipe in budgets.items()
        if len(set(of_recipe.values())) > 1
    ]


# How a model was evaluated, and on what, by the names that the commands and the benchmark write down.
_SETTINGS = ("max_length", "bf16", "dtype", "products", "data", "noise_seed", "seed")


def unequal_settings(runs: Sequence[Run], task: str) -> list[str]:
    """Name the settings under which some runs of a task were evaluated otherwise than others."""
    found: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for result in (run.result for run in runs):
        settings = {**result.config, **result.config.get("evaluation", {})}
        # Number by number, for each evaluation may have settings of its own; clean accuracies come with all of them.
        for measure in {row.measure for row in result.rows} - {"clean_accuracy"} or {"clean_accuracy"}:
            for name in _SETTINGS:
                if name in settings:
                    by_run = found.setdefault((name, measure), {})
                    by_run.setdefault((result.method, result.seed), str(settings[name]))
    lines = {(name, _by_value(by_run)) for (name, _), by_run in sorted(found.items()) if len(set(by_run.values())) > 1}
    return [f"{task}: runs were not evaluated alike: with {name}={values}." for name, values in sorted(lines)]


def broken_attacks(frame: DataFrame, task: str) -> list[str]:
    """Name the attacks that broke on examples, which then count in no accuracy under attack."""
    recipes = frame.loc[frame["measure"] == "attack_errors", "part"].unique()
    return [
        f"attack {recipe} of {row.method}, {task}, seed {row.seed} broke on {row.errors:g} of {row.n:g} examples, "
        "which count in no accuracy under attack; see the column error of its examples.csv."
        for recipe in recipes
        for row in _with_broken(frame, recipe).itertuples()
        if row.errors
    ]


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
