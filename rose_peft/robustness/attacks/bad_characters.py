"""The imperceptible homoglyph attack. Imports TextAttack, so it is imported only when used."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import numpy as np

from ..homoglyphs import HOMOGLYPHS
from .offline import import_textattack

import_textattack()

from textattack.goal_function_results import GoalFunctionResultStatus  # noqa: E402
from textattack.search_methods import SearchMethod  # noqa: E402
from textattack.shared import AttackedText  # noqa: E402
from textattack.transformations import WordSwap  # noqa: E402


class _Found(Exception):
    """Ends the optimizer from within: an example was found, or the budget is spent."""


class HomoglyphSwap(WordSwap):
    """Replace one letter of a word by a look-alike.

    TextAttack's own transformation reads a table that its package, as published, does not contain (0.3.11).
    """

    table = HOMOGLYPHS

    def _get_replacement_words(self, word: str) -> list[str]:
        return [
            word[:place] + replacement + word[place + 1 :]
            for place, letter in enumerate(word)
            for replacement in self.table.get(letter, ())
        ]


class HomoglyphSearch(SearchMethod):
    """Choose which letters to replace by look-alikes with differential evolution (Boucher et al. 2021).

    TextAttack's own search for this recipe runs into errors at the end of a query budget and on texts without any
    replaceable letter, joins the sentences of a pair into one, and goes on after it has found an example.

    Source: "Bad Characters: Imperceptible NLP Attacks", https://arxiv.org/abs/2106.09898.

    Args:
        perturbations: Letters to replace at most.
        population: Candidates per generation (and per replaced letter).
        generations: Generations after the first.
    """

    def __init__(self, perturbations: int = 1, population: int = 32, generations: int = 10) -> None:
        self.perturbations = perturbations
        self.population = population
        self.generations = generations

    def check_transformation_compatibility(self, transformation: Any) -> bool:
        """Accept `HomoglyphSwap` only, whose table the search reads."""
        return isinstance(transformation, HomoglyphSwap)

    @property
    def is_black_box(self) -> bool:
        """Scores are all it needs."""
        return True

    def perform_search(self, initial_result: Any) -> Any:
        """Return the result of the best text found; the initial one if none was better."""
        from scipy.optimize import differential_evolution

        columns = initial_result.attacked_text._text_input
        places = [
            (column, position, replacement)
            for column, text in columns.items()
            for position, letter in enumerate(text)
            for replacement in HOMOGLYPHS.get(letter, ())
        ]
        if not places:
            return initial_result
        best = initial_result

        def score(choice: np.ndarray) -> float:
            nonlocal best
            letters = {column: list(text) for column, text in columns.items()}
            for value in choice:
                # Numbers below zero leave the text alone.
                number = round(float(value))
                if number >= 0:
                    column, position, replacement = places[number]
                    letters[column][position] = replacement
            text = AttackedText(OrderedDict((column, "".join(row)) for column, row in letters.items()))
            results, spent = self.get_goal_results([text])
            if results and results[0].score > best.score:
                best = results[0]
            if spent or best.goal_status == GoalFunctionResultStatus.SUCCEEDED:
                raise _Found
            return -results[0].score

        with contextlib.suppress(_Found):
            differential_evolution(
                score,
                [(-1, len(places) - 1)] * self.perturbations,
                maxiter=self.generations,
                popsize=self.population,
                # Polishing follows gradients, which a choice of letters does not have.
                polish=False,
                seed=np.random.default_rng(np.random.randint(2**31)),
            )
        return best

    def extra_repr_keys(self) -> list[str]:
        """Name the settings in TextAttack's description of an attack."""
        return ["perturbations", "population", "generations"]
