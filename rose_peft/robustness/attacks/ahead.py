"""What attacks will ask the model first, known before they run: so that many examples are read in full batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ..errors import ModelError
from ..predict import Text

# Examples that are read ahead together; those of a run lie in the same spans, however often it is killed and resumed.
SPAN = 32
# How greedy searches rank the words before they swap any: by the answers without each word, or besides for each swap.
_BY_ANSWERS = ("unk", "delete", "weighted-saliency")


def read_ahead(attack: Any, columns: Sequence[str], texts: Sequence[Sequence[str]], labels: Sequence[int]) -> None:
    """Let the model read what an attack will ask of some examples whatever the answers, all of them in full batches.

    The victim keeps the answers until the next call; what it is asked, and how often, does not change.

    Args:
        attack: A `textattack.Attack` whose victim is a `ClassifierWrapper`.
        columns: Names of the text columns.
        texts: One text per column of each example.
        labels: Their labels.
    """
    from textattack.shared import AttackedText

    victim = attack.goal_function.model
    victim.forget()
    originals = [AttackedText(OrderedDict(zip(columns, text, strict=True))) for text in texts]
    # What fails here for many is asked again for one, and there says what it fails on.
    with suppress(ModelError, torch.OutOfMemoryError, MemoryError):
        _read(attack, originals, labels)


def _read(attack: Any, originals: Sequence[Any], labels: Sequence[int]) -> None:
    victim = attack.goal_function.model
    answers = victim.remember([original.tokenizer_input for original in originals])
    # An example that is wrong from the start is not attacked.
    right = [original for original, answer, label in zip(originals, answers, labels, strict=True) if answer == label]
    asked = [text for original in right for text in _first_queries(attack, original)]
    if asked:
        victim.remember(asked)


def _first_queries(attack: Any, original: Any) -> list[Text]:
    """The texts that rank an example's words; none where they depend on answers, or where making them fails."""
    search = attack.search_method
    method = getattr(search, "wir_method", None)
    if method not in _BY_ANSWERS or getattr(search, "truncate_words_to", None) is not None:
        return []
    try:
        _, places = attack.get_indices_to_order(original)
        if method == "delete":
            texts = [original.delete_word_at_index(place) for place in places]
        else:
            texts = [original.replace_word_at_index(place, search.unk_token) for place in places]
        if method == "weighted-saliency":
            for place in places:
                texts += attack.get_transformations(original, original_text=original, indices_to_modify=[place])
    except Exception:  # the attack will meet it again, and its record says how
        return []
    return [text.tokenizer_input for text in texts]
