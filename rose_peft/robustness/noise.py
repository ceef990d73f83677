"""A stress test without a search: accuracy on texts with typos, homoglyphs, synonyms and the like.

The rate is the chance of each word to be hit, and not every hit changes the word: numbers and punctuation have no
letters, words of one letter cannot lose it, and many words have no synonym. At rate 1 on SST-2, 40 % of the words
change under synonyms, 83 % under swaps, deletions and whitespace, 89 % under typos, homoglyphs and casing. So read a
curve together with `NoiseResult.words_changed`: where it is flat, there may be little noise rather than robustness.

Which words are hit, and how, depends on the seed, the kind and the example only, never on the model: every model
compared reads the same noisy texts, and the words hit at a low rate are among those hit at a higher one, so that a
curve over rates shows the strength and not the luck of the draw.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from .data import Examples
from .errors import MissingResourceError, RobustnessError
from .estimate import Estimate, share
from .homoglyphs import HOMOGLYPHS
from .predict import Predictor, Text
from .results import Row

DEFAULT_RATES = (0.05, 0.1, 0.2, 0.4)

_KEYS = "qwertyuiopasdfghjklzxcvbnm"
# In the order of _KEYS, the keys that a finger hits by mistake.
_BESIDE = "wa qes wrd etf ryg tuh yij uok ipl ol qsz adwx sfec dgrv fhtb gjyn hkum jli kop xas zcsd xvf cbg vnh bmj nk"
_NEIGHBOURS = dict(zip(_KEYS, _BESIDE.split(), strict=True))

_WORD = re.compile(r"\S+")


def _typo(word: str, draw: random.Random) -> str | None:
    """Replace a letter by its neighbour on a QWERTY keyboard."""
    places = [place for place, letter in enumerate(word) if letter.lower() in _NEIGHBOURS]
    if not places:
        return None
    place = draw.choice(places)
    letter = draw.choice(_NEIGHBOURS[word[place].lower()])
    return word[:place] + (letter.upper() if word[place].isupper() else letter) + word[place + 1 :]


def _swap(word: str, draw: random.Random) -> str | None:
    """Exchange two letters side by side."""
    places = [
        place
        for place in range(len(word) - 1)
        if word[place].isalpha() and word[place + 1].isalpha() and word[place] != word[place + 1]
    ]
    if not places:
        return None
    place = draw.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _delete(word: str, draw: random.Random) -> str | None:
    """Leave a letter out; words of a single letter stay."""
    places = [place for place, letter in enumerate(word) if letter.isalpha()]
    if len(places) < 2:
        return None
    place = draw.choice(places)
    return word[:place] + word[place + 1 :]


def _homoglyph(word: str, draw: random.Random) -> str | None:
    """Replace a letter by one of another script that looks the same."""
    places = [place for place, letter in enumerate(word) if letter in HOMOGLYPHS]
    if not places:
        return None
    place = draw.choice(places)
    return word[:place] + draw.choice(HOMOGLYPHS[word[place]]) + word[place + 1 :]


def _case(word: str, draw: random.Random) -> str | None:
    """Turn a word into capitals, or one in capitals into small letters."""
    changed = word.lower() if word.isupper() else word.upper()
    return changed if changed != word else None


def _space(word: str, draw: random.Random) -> str | None:
    """Break a word in two."""
    places = [place for place in range(1, len(word)) if word[place - 1].isalnum() and word[place].isalnum()]
    if not places:
        return None
    place = draw.choice(places)
    return f"{word[:place]} {word[place:]}"


def _synonym(word: str, draw: random.Random) -> str | None:
    """Replace a word by a synonym from WordNet, in its most frequent sense that has one."""
    core = re.search(r"[A-Za-z]+(?:['-][A-Za-z]+)*", word)
    if core is None or core.group().lower() in _stopwords():
        return None
    found = _synonyms(core.group().lower())
    if not found:
        return None
    choice = draw.choice(found)
    if core.group().isupper() and len(core.group()) > 1:
        choice = choice.upper()
    elif core.group()[0].isupper():
        choice = choice.capitalize()
    return word[: core.start()] + choice + word[core.end() :]


Edit = Callable[[str, random.Random], "str | None"]
KINDS: dict[str, Edit] = {
    "typos": _typo,
    "swaps": _swap,
    "deletions": _delete,
    "homoglyphs": _homoglyph,
    "casing": _case,
    "whitespace": _space,
    "synonyms": _synonym,
}


@lru_cache(maxsize=1)
def _stopwords() -> frozenset[str]:
    from nltk.corpus import stopwords

    return frozenset(stopwords.words("english"))


@lru_cache(maxsize=65536)
def _synonyms(word: str) -> tuple[str, ...]:
    """Return single-word synonyms of the word's most frequent sense that has any, in a fixed order."""
    from nltk.corpus import wordnet

    for sense in sorted(wordnet.synsets(word), key=lambda sense: -_frequency(word, sense)):
        names = {name for name in sense.lemma_names() if name.isalpha() and name.lower() != word}
        # Inflected forms of the same word are no synonyms ("goes" for "went").
        names = {name for name in names if wordnet.morphy(word, sense.pos()) != name.lower()}
        if names:
            return tuple(sorted(names))
    return ()


def _frequency(word: str, sense: Any) -> int:
    """How often a word was met in a sense, by WordNet's own count: its order has all nouns before all verbs."""
    from nltk.corpus import wordnet

    form = wordnet.morphy(word, sense.pos()) or word
    return sum(lemma.count() for lemma in sense.lemmas() if lemma.name().lower() == form)


def missing_for(kind: str) -> str | None:
    """Return what a kind of noise needs and this machine lacks, or None if it can run.

    Raises:
        RobustnessError: If there is no such kind.
    """
    if kind not in KINDS:
        raise RobustnessError(f"kind={kind!r} is unknown; the kit knows {', '.join(KINDS)}.")
    if kind != "synonyms":
        return None
    from .attacks.resources import NLTK_STOPWORDS, NLTK_WORDNET

    return next((what.lack() for what in (NLTK_WORDNET, NLTK_STOPWORDS) if what.lack()), None)


def add_noise(text: str, kind: str, rate: float, seed: int = 0, example: int = 0, column: int = 0) -> str:
    """Hit about `rate` of the words of a text with one edit each; spaces between words stay as they are.

    With the position of an example (`Examples.indices`) and of its column, it is what `evaluate_noise` evaluates.

    Args:
        text: The text. Words are what stands between spaces.
        kind: One of `KINDS`.
        rate: Chance of each word to be hit, 0 to 1. Words that the kind cannot change (a number, for typos) stay.
        seed: Seed of the noise.
        example: Position of the example, so that equal texts get different noise.
        column: Position of the text in a pair, likewise.

    Returns:
        The noisy text, the same for the same arguments on every machine.

    Raises:
        RobustnessError: If the kind or the rate is not possible.
        MissingResourceError: If the kind needs word lists that are not there.
    """
    lack = missing_for(kind)
    if lack:
        raise MissingResourceError(f"noise {kind!r} needs {lack}")
    if not 0 <= rate <= 1:
        raise RobustnessError(f"rate={rate}: is a share of words and must lie between 0 and 1.")
    return _noisy(text, kind, rate, f"{seed}/{kind}/{example}/{column}").text


class _Noisy(NamedTuple):
    """A noisy text, how many words the text had, and how many of them changed."""

    text: str
    words: int
    changed: int


def _noisy(text: str, kind: str, rate: float, key: str) -> _Noisy:
    # Seeding by a string is stable across processes and versions; hash() of a string is not.
    threshold = random.Random(key)
    parts = []
    end = words = changed = 0
    for number, match in enumerate(_WORD.finditer(text)):
        parts.append(text[end : match.start()])
        end = match.end()
        hit = threshold.random() < rate
        # A draw of its own for each word: what happens to it does not depend on which others are hit.
        edited = KINDS[kind](match.group(), random.Random(f"{key}/{number}")) if hit else None
        parts.append(match.group() if edited is None else edited)
        words += 1
        changed += edited is not None
    return _Noisy("".join(parts) + text[end:], words, changed)


def _noisy_rows(
    texts: Sequence[Sequence[str]], indices: Sequence[int], kind: str, rate: float, seed: int
) -> list[list[_Noisy]]:
    return [
        [_noisy(part, kind, rate, f"{seed}/{kind}/{index}/{column}") for column, part in enumerate(text)]
        for index, text in zip(indices, texts, strict=True)
    ]


def noisy_texts(texts: Sequence[Text], kind: str, rate: float, seed: int = 0) -> list[tuple[str, ...]]:
    """Return all texts of a data set under noise, as `evaluate_noise` evaluates them."""
    rows = [(text,) if isinstance(text, str) else text for text in texts]
    return [tuple(part.text for part in row) for row in _noisy_rows(rows, range(len(rows)), kind, rate, seed)]


@dataclass(frozen=True)
class NoiseResult:
    """Accuracies of one model under noise, each a fraction with its 95 % Wilson interval.

    Args:
        clean: Accuracy without noise.
        noisy: Kind of noise -> rate -> accuracy.
        words_changed: Kind of noise -> rate -> share of all words of all texts that the noise changed.
        unavailable: Kind that could not run -> what it needs.
    """

    clean: Estimate
    noisy: dict[str, dict[float, Estimate]]
    words_changed: dict[str, dict[float, float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean accuracy over all kinds and rates. Without interval: the texts under several kinds are the same."""
        values = [e.value for by_rate in self.noisy.values() for e in by_rate.values() if e.value is not None]
        return sum(values) / len(values) if values else None

    def rows(self) -> list[Row]:
        """Return the figures as rows of a result file."""
        found = [
            Row("noise_accuracy", estimate, kind, rate)
            for kind, by_rate in self.noisy.items()
            for rate, estimate in by_rate.items()
        ]
        return [Row("clean_accuracy", self.clean), *found]


def evaluate_noise(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    *,
    kinds: Sequence[str] | None = None,
    rates: Sequence[float] = DEFAULT_RATES,
    seed: int = 0,
    clean_accuracy: Estimate | None = None,
    progress: bool = True,
    **options: Any,
) -> NoiseResult:
    """Measure accuracy under each kind of noise at each rate, over all examples.

    Both sentences of a pair get noise. On models that read no capitals, casing has no effect and shows the clean
    accuracy.

    Args:
        model: Any classifier or `PeftModel` of one.
        tokenizer: Its tokenizer.
        examples: The data, usually a whole validation set.
        kinds: Some of `KINDS`; None for all. One whose word lists are missing is reported and the others run.
        rates: Shares of words to hit, each above 0 and at most 1.
        seed: Seed of the noise.
        clean_accuracy: Accuracy without noise, where it is known; None measures it.
        progress: Show a progress bar.
        options: Passed to `Predictor`: batch_size, max_length, bf16.

    Raises:
        RobustnessError: If a kind is unknown or a rate out of range.
        LabelMismatchError: If the model's classes are not the data's labels.
        MissingResourceError: If no kind asked for can run.
    """
    from tqdm.auto import tqdm

    chosen = list(KINDS if kinds is None else kinds)
    for rate in rates:
        if not 0 < rate <= 1:
            raise RobustnessError(f"rate={rate}: is a share of words and must lie above 0 and at most at 1.")
    unavailable = {kind: lack for kind in chosen if (lack := missing_for(kind)) is not None}
    runnable = [kind for kind in chosen if kind not in unavailable]
    if not runnable:
        raise MissingResourceError(
            "no kind of noise can run: " + "; ".join(unavailable.values() or ["none was named."])
        )
    predictor = Predictor.for_examples(model, tokenizer, examples, **options)
    clean = share(predictor.correct(examples)) if clean_accuracy is None else clean_accuracy
    known: dict[Text, int] = {}  # many texts stay as they are at low rates, or meet the same edits at several
    noisy: dict[str, dict[float, Estimate]] = {kind: {} for kind in runnable}
    words_changed: dict[str, dict[float, float]] = {kind: {} for kind in runnable}
    settings = [(kind, rate) for kind in runnable for rate in rates]
    for kind, rate in tqdm(settings, desc="noise", disable=not progress):
        rows = _noisy_rows(examples.texts, examples.indices, kind, rate, seed)
        texts = [tuple(part.text for part in row) for row in rows]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known |= zip(new, predictor.classes(new) if new else [], strict=True)
        noisy[kind][rate] = share([known[text] == label for text, label in zip(texts, examples.labels, strict=True)])
        words = sum(part.words for row in rows for part in row)
        words_changed[kind][rate] = sum(part.changed for row in rows for part in row) / max(1, words)
    return NoiseResult(clean, noisy, words_changed, unavailable)
