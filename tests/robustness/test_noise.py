"""Noise: each kind does what it says, on the share of words asked for, and the same for every model."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rose_peft.robustness import noise
from rose_peft.robustness.attacks import resources
from rose_peft.robustness.data import Examples
from rose_peft.robustness.errors import LabelMismatchError, MissingResourceError, RobustnessError
from rose_peft.robustness.estimate import Estimate
from rose_peft.robustness.homoglyphs import HOMOGLYPHS
from rose_peft.robustness.noise import KINDS, add_noise, evaluate_noise
from rose_peft.robustness.plotting import plot_noise
from rose_peft.robustness.results import find
from tests.helpers.victims import KeywordModel, tiny_bert

WITHOUT_LISTS = [kind for kind in KINDS if kind != "synonyms"]
TEXT = "The  movie's plot was surprisingly entertaining , though OVERLONG .\n"
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


@given(texts, st.sampled_from(WITHOUT_LISTS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_words_hit_at_a_low_rate_are_hit_alike_at_a_high_one(
    text: str, kind: str, a: float, b: float, seed: int
) -> None:
    low, high = (noise._WORD.split(add_noise(text, kind, rate, seed)) for rate in sorted((a, b)))
    # The gaps, that is what is not a word, stay as they are, apart from the ones that breaking words adds.
    assert kind == "whitespace" or low == high == noise._WORD.split(text)
    if kind == "whitespace":
        return
    originals, few, many = (
        noise._WORD.findall(t) for t in (text, *(add_noise(text, kind, rate, seed) for rate in sorted((a, b))))
    )
    for original, at_low, at_high in zip(originals, few, many, strict=True):
        assert at_low in (original, at_high)


@given(texts, st.sampled_from(WITHOUT_LISTS), st.integers(0, 9))
def test_rate_zero_changes_nothing_and_calls_repeat(text: str, kind: str, seed: int) -> None:
    assert add_noise(text, kind, 0, seed) == text
    assert add_noise(text, kind, 1, seed) == add_noise(text, kind, 1, seed)


def test_noise_is_the_same_in_every_process_and_version() -> None:
    assert add_noise("an entertaining movie", "typos", 1, seed=7) == "aj entertainkng movue"


@given(st.text("abcdefghijklmnopqrstuvwxyzABC", min_size=2, max_size=12), st.integers(0, 999))
def test_each_kind_makes_one_edit_of_its_sort(word: str, seed: int) -> None:
    def noisy(kind: str) -> str:
        return add_noise(word, kind, 1, seed)

    typo = noisy("typos")
    (place,) = [n for n in range(len(word)) if word[n] != typo[n]]
    assert len(typo) == len(word)
    assert typo[place].lower() in noise._NEIGHBOURS[word[place].lower()]
    assert typo[place].isupper() == word[place].isupper()

    swapped = noisy("swaps")
    assert sorted(swapped) == sorted(word)
    assert (swapped != word) == (len(set(word)) > 1)
    assert sum(a != b for a, b in zip(swapped, word, strict=True)) in (0, 2)

    deleted = noisy("deletions")
    assert any(deleted == word[:n] + word[n + 1 :] for n in range(len(word)))

    spaced = noisy("whitespace")
    assert spaced.replace(" ", "") == word
    assert spaced.count(" ") == 1

    assert noisy("casing") == (word.lower() if word.isupper() else word.upper())

    glyphs = noisy("homoglyphs")
    changed = [n for n in range(len(word)) if word[n] != glyphs[n]]
    assert len(glyphs) == len(word)
    assert len(changed) == (1 if any(letter in HOMOGLYPHS for letter in word) else 0)


def test_homoglyphs_are_other_letters_of_the_same_case() -> None:
    for letter, others in HOMOGLYPHS.items():
        for other in others:
            assert other != letter and not other.isascii()
            assert unicodedata.category(other) == unicodedata.category(letter)
            # Compatibility forms would be turned back by a tokenizer's normalisation.
            assert unicodedata.normalize("NFD", other) == other


def test_share_of_words_hit_is_the_rate() -> None:
    text = "wonderful " * 5000
    noisy = add_noise(text, "typos", 0.2).split()
    assert sum(word != "wonderful" for word in noisy) / 5000 == pytest.approx(0.2, abs=0.02)


def test_synonyms_are_of_the_sense_that_is_met_most_not_of_the_first_noun() -> None:
    pytest.importorskip("nltk")
    import nltk

    from tests.helpers.victims import nltk_folder

    nltk.data.path.insert(0, nltk_folder())
    assert {add_noise("like", "synonyms", 1, seed) for seed in range(20)} == {"care", "wish"}  # not "ilk"
    assert {add_noise("make", "synonyms", 1, seed) for seed in range(5)} == {"do"}  # not "brand"


@settings(deadline=None)
@given(st.integers(0, 50))
def test_synonyms_come_from_wordnet_and_keep_the_case(seed: int) -> None:
    pytest.importorskip("nltk")
    import nltk

    from tests.helpers.victims import nltk_folder

    nltk.data.path.insert(0, nltk_folder())
    noisy = add_noise("The Movie was wonderful , and it was 9 ...", "synonyms", 1, seed).split()
    assert noisy[0] == "The" and noisy[2] == "was" and noisy[4:] == [",", "and", "it", "was", "9", "..."]
    film = {name.capitalize() for name in nltk.corpus.wordnet.synsets("movie")[0].lemma_names()} - {"Movie"}
    assert noisy[1] in film
    assert noisy[3] in {n for s in nltk.corpus.wordnet.synsets("wonderful") for n in s.lemma_names()} - {"wonderful"}


def examples(*rows: tuple[str, int]) -> Examples:
    return Examples(tuple((text,) for text, _ in rows), tuple(label for _, label in rows))


def test_accuracy_per_kind_and_rate_is_counted(tokenizer, keyword_model: KeywordModel, tmp_path: Path) -> None:
    data = examples(*[("good", 1)] * 30, *[("film", 0)] * 10)
    result = evaluate_noise(
        keyword_model, tokenizer, data, kinds=["typos", "casing"], rates=[0.5, 1.0], progress=False
    )
    assert result.clean.value == 1.0
    # A typo in the only word that counts loses every positive example; the tokenizer reads no capitals.
    assert result.noisy["typos"][1.0].value == 0.25
    assert 0.25 < result.noisy["typos"][0.5].value < 1.0
    assert result.words_changed["typos"][1.0] == 1.0
    assert result.noisy["casing"][1.0].value == 1.0
    assert find(result.rows(), "noise_accuracy", "typos", 1.0).n == 40
    values = [figure.value for rates in result.noisy.values() for figure in rates.values()]
    assert result.mean == pytest.approx(sum(values) / 4)
    picture = plot_noise({"a": result, "b": result}, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in picture.axes] == ["typos", "casing"]


def test_words_changed_are_counted_over_all_texts(tokenizer, keyword_model: KeywordModel) -> None:
    data = Examples((("a good film , 9", "a"), ("plot", "of a story")), (1, 0), columns=("a", "b"))
    result = evaluate_noise(keyword_model, tokenizer, data, kinds=["typos", "deletions"], rates=[1.0], progress=False)
    # Of ten words the comma and the number have no letters to hit, and three "a" no letter to lose.
    assert result.words_changed == {"typos": {1.0: 0.8}, "deletions": {1.0: 0.5}}
    assert {row.measure for row in result.rows()} == {"clean_accuracy", "noise_accuracy"}


def test_the_texts_that_were_evaluated_can_be_made_again(
    tokenizer, keyword_model: KeywordModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(noise.Predictor, "classes", lambda self, texts: seen.extend(texts) or [0] * len(texts))
    rows = tuple((f"a very good film of {n}", "the great story") for n in range(9))
    data = Examples(rows, (0,) * 9, columns=("a", "b")).sample(4, seed=1)
    evaluate_noise(keyword_model, tokenizer, data, kinds=["swaps"], rates=[0.5], seed=3, progress=False)
    again = [
        tuple(add_noise(part, "swaps", 0.5, 3, index, column) for column, part in enumerate(text))
        for index, text in zip(data.indices, data.texts, strict=True)
    ]
    assert seen[-4:] == again and again != list(data.texts)


def test_all_models_read_the_same_noise(tokenizer) -> None:
    seen: list[list[str]] = []

    class Recorder(KeywordModel):
        def forward(self, input_ids, **rest):
            seen[-1] += [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in input_ids]
            return super().forward(input_ids, **rest)

    data = examples(("a very good film", 1), ("a dull story", 0)).sample(None)
    for _ in range(2):
        seen.append([])
        evaluate_noise(Recorder(tokenizer), tokenizer, data, kinds=["typos"], rates=[0.5], progress=False)
    assert seen[0] == seen[1]


def test_no_text_is_predicted_twice_and_none_is_left_out(
    tokenizer, keyword_model: KeywordModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that noise leaves as they are count with what the model said of them before."""
    seen: list[tuple[str, ...]] = []
    predict = noise.Predictor.classes
    monkeypatch.setattr(noise.Predictor, "classes", lambda self, texts: seen.extend(texts) or predict(self, texts))
    data = examples(("a very good film , 9", 1), ("9", 0), ("9", 1), ("the plot of a dull story", 0))
    options: Any = {"kinds": ["typos", "casing"], "rates": [0.1, 0.3], "progress": False}
    known = Estimate(0.5, 4)
    result = evaluate_noise(keyword_model, tokenizer, data, clean_accuracy=known, **options)
    assert result.clean is known and len(seen) == len(set(seen)) < 2 * 2 * 4
    for kind, by_rate in result.noisy.items():
        for rate, accuracy in by_rate.items():
            texts = [(add_noise(text, kind, rate, 0, row),) for row, (text,) in enumerate(data.texts)]
            assert set(texts) <= set(seen)
            guesses = predict(noise.Predictor(keyword_model, tokenizer), texts)
            assert accuracy.value == sum(map(int.__eq__, guesses, data.labels)) / 4


def test_pairs_get_noise_on_both_sides(tokenizer) -> None:
    data = Examples((("good film", "good plot"),), (1,), columns=("a", "b"))
    result = evaluate_noise(KeywordModel(tokenizer), tokenizer, data, kinds=["deletions"], rates=[1.0], progress=False)
    assert result.noisy["deletions"][1.0].value == 0.0


def test_missing_word_lists_are_named_and_the_others_run(
    tokenizer, keyword_model: KeywordModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "NLTK_WORDNET", resources.Resource("NLTK's WordNet", lambda: False, "get it."))
    data = examples(("good", 1), ("bad", 0))
    result = evaluate_noise(keyword_model, tokenizer, data, kinds=["synonyms", "swaps"], rates=[0.5], progress=False)
    assert result.unavailable == {"synonyms": "NLTK's WordNet: get it."}
    assert list(result.noisy) == ["swaps"]
    with pytest.raises(MissingResourceError, match=r"no kind of noise can run: NLTK's WordNet: get it\."):
        evaluate_noise(keyword_model, tokenizer, data, kinds=["synonyms"])
    with pytest.raises(MissingResourceError, match="noise 'synonyms' needs NLTK's WordNet"):
        add_noise("good", "synonyms", 0.5)


def test_impossible_arguments_are_named(tokenizer, keyword_model: KeywordModel) -> None:
    data = examples(("good", 1), ("bad", 0))
    with pytest.raises(RobustnessError, match="kind='smudges' is unknown; the kit knows typos"):
        evaluate_noise(keyword_model, tokenizer, data, kinds=["smudges"])
    with pytest.raises(RobustnessError, match=r"rate=1\.5"):
        evaluate_noise(keyword_model, tokenizer, data, rates=[1.5])
    with pytest.raises(RobustnessError, match=r"rate=-0\.1"):
        add_noise("good", "typos", -0.1)
    with pytest.raises(LabelMismatchError):
        evaluate_noise(tiny_bert(tokenizer, classes=3), tokenizer, Examples((("a",),), (0,), label_names=("x", "y")))
