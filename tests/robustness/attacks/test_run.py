"""Attacks: known victims, offline import, resources, resuming, and what is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from rose_peft.robustness.attacks import recipes, run
from rose_peft.robustness.attacks.ahead import read_ahead
from rose_peft.robustness.attacks.recipes import PRESETS, RECIPES, expand
from rose_peft.robustness.attacks.records import Record, RecordLog
from rose_peft.robustness.attacks.resources import Resource, tfhub_model
from rose_peft.robustness.attacks.run import RecipeResult, model_fingerprint, run_attacks
from rose_peft.robustness.data import Examples
from rose_peft.robustness.errors import (
    LabelMismatchError,
    MissingResourceError,
    ModelError,
    ResumeError,
    RobustnessError,
    UnknownRecipeError,
)
from rose_peft.robustness.predict import Predictor
from rose_peft.robustness.results import load_result
from tests.helpers.victims import REPOSITORY, KeywordModel, minilm, need_textattack, nltk_folder, tiny_bert

ROWS = [
    ("the story was good", 1),
    ("a good film and a good plot", 1),
    ("the plot is bad", 0),
    ("a dull story", 1),
    ("good", 1),
]
DATA = Examples(
    tuple((text,) for text, _ in ROWS), tuple(label for _, label in ROWS), columns=("sentence",), name="toy"
)
NAMED = dataclasses.replace(DATA, label_names=("negative", "positive"))


def attack(
    model: Any, tokenizer: Any, folder: Path, recipes: tuple[str, ...] = ("deepwordbug",), **options: Any
) -> Any:
    data = options.pop("data", DATA)
    return run_attacks(
        model, tokenizer, data, recipes, output_dir=folder, num_examples=None, progress=False, **options
    )


def test_a_known_victim_falls_where_it_must(offline_textattack, tokenizer, tmp_path: Path) -> None:
    report = attack(KeywordModel(tokenizer), tokenizer, tmp_path, method="keyword", training_seed=3)
    records = {record.index: record for record in report.records["deepwordbug"]}
    outcomes = {index: record.result for index, record in records.items()}
    # Without the one word all turns into class 0: positives fall, but not one that has it twice, since spoiling the
    # first changes no score; the negative cannot fall, and one was wrong before.
    assert outcomes == {0: "success", 1: "failed", 2: "failed", 3: "skipped", 4: "success"}
    assert [records[index].words_changed for index in (0, 4)] == [1, 1]
    assert "good" not in records[0].perturbed["sentence"].split()
    assert records[3].perturbed == records[3].original and records[3].queries == 1
    for index in (0, 4):
        assert (records[index].original_prediction, records[index].perturbed_prediction) == (1, 0)

    result = report.results["deepwordbug"]
    assert result.clean_accuracy.value == 0.8
    assert result.accuracy_under_attack.value == 0.4
    assert result.success_rate.value == 0.5
    assert result.words_changed.value == pytest.approx((1 / 4 + 1) / 2)
    attacked = [records[index].queries for index in (0, 1, 2, 4)]
    assert result.queries.value == pytest.approx(sum(attacked) / 4)
    for figure in (result.clean_accuracy, result.accuracy_under_attack, result.success_rate, result.queries):
        assert figure.low <= figure.value <= figure.high and figure.low < figure.high

    summary = load_result(tmp_path / "attack.result.json")
    assert (summary.method, summary.task, summary.seed) == ("keyword", "toy", 3)
    assert summary.get("attack_success_rate", "deepwordbug") == result.success_rate
    assert summary.get("clean_accuracy").value == 0.8
    table = pandas.read_csv(tmp_path / "examples.csv")
    assert list(table["result"]) == [records[index].result for index in range(5)]
    columns = ["original_sentence", "perturbed_sentence", "label", "original_prediction", "queries", "recipe"]
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(tmp_path / "examples.parquet")[columns], table[columns], check_dtype=False
    )


def test_all_offline_recipes_run_on_single_sentences_and_pairs(offline_textattack, tokenizer, tmp_path: Path) -> None:
    pairs = Examples(
        (("the story was good", "a dull plot"), ("it is bad", "not very great")), (1, 0), columns=("first", "second")
    )
    for name, data in (("single", DATA), ("pairs", pairs)):
        report = attack(KeywordModel(tokenizer), tokenizer, tmp_path / name, ("offline",), data=data, query_budget=150)
        assert report.unavailable == {}
        assert tuple(report.results) == PRESETS["offline"]
        assert len(PRESETS["offline"]) == 5
        for recipe, records in report.records.items():
            assert [record.error for record in records] == [None] * len(data), recipe
            assert all(set(record.perturbed) == set(data.columns) for record in records)
            assert records[0].result == "success", recipe
            assert max(record.queries for record in records) <= 150
    # Homoglyphs: one letter of one sentence of the pair, and by one that is not Latin.
    first = report.records["bad-characters"][0]
    assert first.perturbed["second"] == first.original["second"]
    changed = [(a, b) for a, b in zip(first.original["first"], first.perturbed["first"], strict=True) if a != b]
    assert len(changed) == 1 and changed[0][0].isascii() and not changed[0][1].isascii()


def test_homoglyphs_stop_at_success_and_at_the_budget(offline_textattack, tokenizer, tmp_path: Path) -> None:
    stubborn = Examples((("the plot is bad",), ("123 456",)), (0, 0), columns=("sentence",))
    report = attack(KeywordModel(tokenizer), tokenizer, tmp_path, ("bad-characters",), data=stubborn, query_budget=20)
    unbroken, without_letters = report.records["bad-characters"]
    assert (unbroken.result, unbroken.queries) == ("failed", 20)
    # Texts without a letter to replace are given up after the first query, not an error.
    assert (without_letters.result, without_letters.queries, without_letters.error) == ("failed", 1, None)


def test_peft_models_are_attacked_in_evaluation_mode_and_left_alone(
    offline_textattack, tokenizer, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_bert(tokenizer, hidden_dropout_prob=0.5)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = model_fingerprint(model)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = attack(model, tokenizer, tmp_path / "a", ("deepwordbug", "wordnet"))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model_fingerprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    # With dropout active two runs would differ.
    assert attack(model, tokenizer, tmp_path / "b", ("deepwordbug", "wordnet")).records == first.records


def test_the_outcome_of_an_example_does_not_depend_on_the_others(
    offline_textattack, tokenizer, tmp_path: Path
) -> None:
    model = tiny_bert(tokenizer)
    whole = attack(model, tokenizer, tmp_path / "a").records["deepwordbug"]
    part = attack(model, tokenizer, tmp_path / "b", data=DATA.select([4, 1])).records["deepwordbug"]
    assert part == [whole[4], whole[1]]
    other = attack(model, tokenizer, tmp_path / "c", seed=1).records["deepwordbug"]
    assert other != whole


def lines(folder: Path, recipe: str = "deepwordbug") -> list[str]:
    return (folder / "records" / f"{recipe}.jsonl").read_text().splitlines()


@pytest.mark.parametrize("passes", [3, 7])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    offline_textattack, tokenizer, tmp_path: Path, passes: int
) -> None:
    recipes = ("deepwordbug", "pwws")
    attack(KeywordModel(tokenizer), tokenizer, tmp_path / "whole", recipes)
    with pytest.raises(KeyboardInterrupt):
        attack(KeywordModel(tokenizer, fail_after=passes), tokenizer, tmp_path / "cut", recipes)
    done = lines(tmp_path / "cut")
    assert 1 < len(done) < 6
    # A kill, or a power failure, may cut a line short; what is whole stays.
    with open(tmp_path / "cut" / "records" / "deepwordbug.jsonl", "a") as file:
        file.write('{"index": 4, "orig')
    resumed = KeywordModel(tokenizer)
    attack(resumed, tokenizer, tmp_path / "cut", recipes)
    for recipe in recipes:
        assert lines(tmp_path / "cut", recipe) == lines(tmp_path / "whole", recipe)
    assert lines(tmp_path / "cut")[: len(done)] == done
    for file in ("examples.csv", "attack.result.json"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()
    again = KeywordModel(tokenizer)
    attack(again, tokenizer, tmp_path / "cut", recipes)
    assert again.passes == 0 < resumed.passes


def test_records_of_another_run_are_not_continued(offline_textattack, tokenizer, tmp_path: Path) -> None:
    model = tiny_bert(tokenizer)
    attack(model, tokenizer, tmp_path)
    with pytest.raises(ResumeError, match="belongs to another run \\(model was '"):
        attack(tiny_bert(tokenizer, seed=1), tokenizer, tmp_path)
    with pytest.raises(ResumeError, match="query_budget was None and is 50"):
        attack(model, tokenizer, tmp_path, query_budget=50)
    with pytest.raises(ResumeError, match="data was"):
        attack(model, tokenizer, tmp_path, data=DATA.select([0, 1]))
    attack(tiny_bert(tokenizer, seed=1), tokenizer, tmp_path, overwrite=True)


def test_what_decides_outcomes_besides_weights_is_part_of_the_run(
    offline_textattack, tokenizer, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_bert(tokenizer), LoraConfig(target_modules=["query"], lora_alpha=1, init_lora_weights=False)
    )
    attack(model, tokenizer, tmp_path)
    attack(model, tokenizer, tmp_path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["thrilling"])
    with pytest.raises(ResumeError, match="tokenizer was"):
        attack(model, other, tmp_path)
    model.peft_config["default"].lora_alpha = 400
    with pytest.raises(ResumeError, match="model_config was"):
        attack(model, tokenizer, tmp_path)
    keyword = KeywordModel(tokenizer)
    attack(keyword, tokenizer, tmp_path / "keyword", data=NAMED)
    keyword.config.id2label = {0: "positive", 1: "negative"}
    with pytest.raises(ResumeError, match=r"label_order was .* and is \[1, 0\]"):
        attack(keyword, tokenizer, tmp_path / "keyword", data=NAMED)


def test_recipes_of_an_earlier_call_stay_in_the_summary(offline_textattack, tokenizer, tmp_path: Path) -> None:
    model = KeywordModel(tokenizer)
    attack(model, tokenizer, tmp_path, ("deepwordbug",))
    first = load_result(tmp_path / "attack.result.json").rows
    report = attack(model, tokenizer, tmp_path, ("bad-characters",))
    assert sorted(report.results) == ["bad-characters", "deepwordbug"]
    summary = load_result(tmp_path / "attack.result.json")
    assert all(row in summary.rows for row in first)
    assert set(pandas.read_csv(tmp_path / "examples.csv")["recipe"]) == {"bad-characters", "deepwordbug"}
    # Those of another budget are of another run.
    report = attack(model, tokenizer, tmp_path, ("wordnet",), query_budget=50)
    assert list(report.results) == ["wordnet"]


class BrokenModel(KeywordModel):
    """Fails where it sees the word "plot", as a model does that lacks memory or a padding token."""

    def forward(self, input_ids: torch.Tensor, **named: Any) -> Any:
        if (input_ids == self.plot).any():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more")
        return super().forward(input_ids, **named)


def test_a_failing_model_is_an_error_and_no_outcome(offline_textattack, tokenizer, tmp_path: Path) -> None:
    broken = BrokenModel(tokenizer)
    broken.plot = tokenizer.convert_tokens_to_ids("plot")
    with pytest.raises(ModelError, match=r"BrokenModel fails on texts like '.*plot.*can't allocate memory\)\.$"):
        attack(broken, tokenizer, tmp_path / "cut")
    assert [Record(**json.loads(line)).index for line in lines(tmp_path / "cut")[1:]] == [0]
    attack(KeywordModel(tokenizer), tokenizer, tmp_path / "cut")
    attack(KeywordModel(tokenizer), tokenizer, tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    diverged = KeywordModel(tokenizer)
    diverged.scale.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="scores that are not finite for 1 of 1 texts, as for 'the story was good'"):
        attack(diverged, tokenizer, tmp_path / "diverged")


def record(index: int, result: str = "failed", **changes: Any) -> Record:
    content = {"a": "x y z"}
    settings = {"original_prediction": 1, "perturbed_prediction": 1, "queries": 5, "words": 3, "words_changed": 1}
    return Record(index, content, content, 1, result=result, **(settings | changes))


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordLog(path, {"seed": 0}) as log:
        log.append(record(0))
        log.append(record(1))
        with pytest.raises(ResumeError, match="another process is writing it"):
            RecordLog(path, {"seed": 0})
    content = path.read_text().splitlines()
    for length in range(0, len(content[2]), 5):
        path.write_text("\n".join([*content[:2], content[2][:length]]))
        with RecordLog(path, {"seed": 0}) as log:
            assert list(log.records) == [0]
    path.write_text("\n".join([content[0], content[1][:-9], content[2], ""]))
    with pytest.raises(ResumeError, match="line 2 is damaged"):
        RecordLog(path, {"seed": 0})


def test_examples_the_attack_breaks_on_are_counted_apart() -> None:
    broken = record(3, "error", queries=0, words=0, perturbed_prediction=None)
    records = [record(0), record(1, "success"), record(2, "skipped", original_prediction=0), broken]
    result = RecipeResult.of("x", records)
    # The model was right on the example on which the attack broke.
    assert (result.clean_accuracy.value, result.clean_accuracy.n) == (0.75, 4)
    assert result.accuracy_under_attack.value == pytest.approx(1 / 3)
    assert result.success_rate.value == 0.5
    assert result.errors == 1
    nothing = RecipeResult.of("x", [record(0, "skipped", original_prediction=0)])
    assert nothing.success_rate.value is None and nothing.queries.value is None


def test_a_broken_example_stops_nothing(
    offline_textattack, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = offline_textattack.Attack.attack

    def sometimes(self: Any, example: Any, label: int) -> Any:
        if "dull" in example["sentence"]:
            raise IndexError("list index out of range\nand more")
        return original(self, example, label)

    monkeypatch.setattr(offline_textattack.Attack, "attack", sometimes)
    said: list[str] = []
    report = attack(KeywordModel(tokenizer), tokenizer, tmp_path, report=said.append)
    assert report.results["deepwordbug"].errors == 1
    assert report.records["deepwordbug"][3].error == "IndexError: list index out of range"
    assert said == ["recipe deepwordbug broke on 1 of 5 examples; see their column error."]
    assert pandas.read_csv(tmp_path / "examples.csv")["result"].tolist()[3] == "error"
    assert report.results["deepwordbug"].clean_accuracy.n == 5
    broken = lines(tmp_path)
    attack(KeywordModel(tokenizer), tokenizer, tmp_path, report=said.append)
    assert lines(tmp_path) == broken  # broke again, and is not written down twice
    monkeypatch.setattr(offline_textattack.Attack, "attack", original)
    assert attack(KeywordModel(tokenizer), tokenizer, tmp_path).results["deepwordbug"].errors == 0


def test_what_cannot_run_is_named_before_anything_runs(
    offline_textattack, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KeywordModel(tokenizer)
    said: list[tuple[str, int]] = []
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "empty"))
    report = attack(
        model,
        tokenizer,
        tmp_path / "out",
        ("textfooler", "deepwordbug", "nonsense", "textbugger"),
        report=lambda line: said.append((line, model.passes)),
    )
    assert list(report.results) == ["deepwordbug"]
    assert [line.split()[1] for line, _ in said] == ["textfooler", "nonsense", "textbugger"]
    assert {passes for _, passes in said} == {0}
    assert all("\n" not in line for line, _ in said)
    assert "word_embeddings/paragramcf" in report.unavailable["textfooler"]
    assert "Universal Sentence Encoder" in report.unavailable["textbugger"]
    assert "recipe='nonsense' is unknown; the kit knows deepwordbug" in report.unavailable["nonsense"]
    assert load_result(tmp_path / "out" / "attack.result.json").config["unavailable"] == report.unavailable
    with pytest.raises(UnknownRecipeError, match="recipe='nonsense'"):
        attack(model, tokenizer, tmp_path / "x", ("nonsense",))
    with pytest.raises(MissingResourceError, match="no recipe can run: textfooler: needs"):
        attack(model, tokenizer, tmp_path / "x", ("textfooler",))


def test_what_an_attack_fetches_itself_is_no_lack_where_downloads_are_allowed() -> None:
    absent = Resource("the thing", lambda: False, "fetch it.", fetched_in_use=True)
    package = Resource("the package", lambda: False, "install it.")
    recipe = recipes.Recipe("x", "y", lambda wrapper: None, (absent, package))
    assert recipe.lacks() == ["the thing: fetch it.", "the package: install it."]
    assert recipe.lacks(allow_downloads=True) == ["the package: install it."]
    assert expand(["pwws", "offline"])[0] == "pwws"
    assert len(expand(["all", "offline"])) == len(RECIPES)


def test_the_sentence_encoder_is_sought_where_textattack_has_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tfhub_model("https://tfhub.dev/x/1", "the encoder")
    for name in ("own", "shared"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.delenv("TFHUB_CACHE_DIR", raising=False)
    assert not model.present()
    (tmp_path / "shared" / hashlib.sha1(b"https://tfhub.dev/x/1").hexdigest()).mkdir()
    assert model.present()
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "own"))
    assert not model.present()


def test_every_published_recipe_is_one_textattack_has(offline_textattack) -> None:
    names = [
        cell.cell_contents
        for recipe in RECIPES.values()
        for cell in recipe.build.__closure__ or ()
        if isinstance(cell.cell_contents, str)
    ]
    assert len(names) == len(RECIPES) - 2  # two are composed here
    assert all(hasattr(offline_textattack.attack_recipes, name) for name in names)


def test_impossible_arguments_are_named(offline_textattack, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RobustnessError, match="query_budget=1"):
        attack(KeywordModel(tokenizer), tokenizer, tmp_path, query_budget=1)
    with pytest.raises(LabelMismatchError, match="num_labels=3"):
        data = Examples((("a",),), (0,), label_names=("x", "y"))
        attack(tiny_bert(tokenizer, classes=3), tokenizer, tmp_path, data=data)
    assert not list(tmp_path.iterdir())


def test_wrapper_agrees_with_textattacks_own(offline_textattack, tokenizer) -> None:
    from textattack.models.wrappers import HuggingFaceModelWrapper

    from rose_peft.robustness.attacks.wrapper import ClassifierWrapper

    model = tiny_bert(tokenizer).eval()
    texts = ["good film", "a very dull story , not great", "bad"]
    ours = ClassifierWrapper(Predictor(model, tokenizer))
    theirs = HuggingFaceModelWrapper(model, tokenizer)(texts).softmax(dim=1)
    torch.testing.assert_close(ours(texts), theirs, rtol=1e-4, atol=1e-6)
    assert ((ours(texts).double().sum(dim=1) - 1).abs() < 1e-6).all()


def test_wrapper_gradients_are_those_at_the_embeddings(offline_textattack, tokenizer) -> None:
    from rose_peft.robustness.attacks.wrapper import ClassifierWrapper

    model = tiny_bert(tokenizer).requires_grad_(False).train()
    wrapper = ClassifierWrapper(Predictor(model, tokenizer))
    found = wrapper.get_grad("a good film")
    assert wrapper.tokenize(["a good film"]) == [["[CLS]", "a", "good", "film", "[SEP]"]]
    assert found["gradient"].shape == (5, 16)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    ids = found["ids"]
    embedded = model.bert.embeddings.word_embeddings(ids).requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1))
    (expected,) = torch.autograd.grad(loss, embedded)
    np.testing.assert_allclose(found["gradient"], expected[0].numpy(), rtol=1e-4, atol=1e-7)


def test_both_wrappers_meet_the_same_examples(offline_textattack, tokenizer) -> None:
    from rose_peft.robustness.attacks.speed import compare_wrappers

    (speed,) = compare_wrappers(tiny_bert(tokenizer), tokenizer, DATA, ["deepwordbug"])
    assert speed.recipe == "deepwordbug" and speed.same_results == 1.0
    assert speed.ratio == pytest.approx(speed.ours / speed.theirs)
    with pytest.raises(ModelError, match="KeywordModel, which TextAttack's wrapper refuses"):
        next(compare_wrappers(KeywordModel(tokenizer), tokenizer, DATA, ["deepwordbug"]))


IMPORT = """
    import logging, socket, sys
    def refuse(*_, **__):
        raise AssertionError("the network was asked")
    socket.create_connection = socket.getaddrinfo = refuse
    on, off = logging.getLogger("on"), logging.getLogger("off")
    off.disabled = True
    from rose_peft.robustness.attacks.offline import import_textattack
    from rose_peft.robustness.errors import RobustnessError
    try:
        import_textattack()
    except RobustnessError as error:
        sys.exit(f"error: {error}")
    from rose_peft.robustness.attacks.recipes import RECIPES, build_attack
    from types import SimpleNamespace
    build_attack(RECIPES["pwws"], SimpleNamespace(model=object()), None, 8, False)
    assert off.disabled and not on.disabled
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_importing_textattack_is_silent_and_leaves_no_trace(tmp_path: Path) -> None:
    need_textattack()
    done = run_python(IMPORT, HOME=str(tmp_path), NLTK_DATA=nltk_folder(), MPLCONFIGDIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # The mark that the downloads were made must not stay: they were not.
    left = [path.name for path in (tmp_path / ".cache" / "textattack").glob("post_install*")]
    assert [name for name in left if not name.endswith(".lock")] == []


def test_missing_stop_words_are_one_clear_line(tmp_path: Path) -> None:
    need_textattack()
    import nltk

    if any((Path(folder) / "corpora").is_dir() for folder in nltk.data.path if folder != os.environ.get("NLTK_DATA")):
        pytest.skip("NLTK data are installed for all users")
    done = run_python(IMPORT, HOME=str(tmp_path), NLTK_DATA=str(tmp_path))
    assert done.returncode == 1
    start = "error: TextAttack attacks need NLTK's list of stop words (corpora/stopwords): set NLTK_DATA"
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_the_package_is_light_and_alone() -> None:
    heavy = ("textattack", "flair", "nltk", "pandas", "datasets", "matplotlib")
    done = run_python(
        f"""
        import sys, types
        package = types.ModuleType("rose_peft")
        package.__path__ = ["rose_peft"]
        sys.modules["rose_peft"] = package  # the kit alone, without the rest of the package
        import rose_peft.robustness
        print([name for name in {heavy!r} if name in sys.modules])
        print([name for name in sys.modules if name.startswith("rose_peft.") and "robustness" not in name])
        """
    )
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


def test_without_textattack_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tokenizer, tmp_path: Path
) -> None:

    gone = ("textattack", "rose_peft.robustness.attacks.wrapper")
    for name in [name for name in sys.modules if name.startswith(gone)]:
        monkeypatch.delitem(sys.modules, name)
    absent = Resource("the Python package textattack>=0.3.11", lambda: False, "pip install 'textattack>=0.3.11'.")
    monkeypatch.setattr("rose_peft.robustness.attacks.offline.TEXTATTACK", absent)
    with pytest.raises(MissingResourceError, match=r"TextAttack attacks need .* pip install 'textattack>=0\.3\.11'\."):
        attack(KeywordModel(tokenizer), tokenizer, tmp_path)


def test_a_pretrained_encoder_meets_real_sentences(offline_textattack, data: Path, tmp_path: Path) -> None:
    from rose_peft.robustness.adv_glue import evaluate_adv_glue
    from rose_peft.robustness.data import load_adv_glue, load_glue
    from rose_peft.robustness.loading import load_classifier

    model, words = load_classifier(minilm(), 2)
    for task in ("sst2", "rte"):
        clean = load_glue(task, data).sample(6)
        adversarial = load_adv_glue(task, data).sample(6)
        found = evaluate_adv_glue(model, words, task, clean=clean, adversarial=adversarial)
        report = attack(model, words, tmp_path / task, data=clean.select(range(3)), query_budget=40)
        assert report.results["deepwordbug"].errors == 0
        before = [record.result != "skipped" for record in report.records["deepwordbug"]]
        assert before == Predictor(model, words).correct(clean.select(range(3)))
        assert found.adversarial.n == 6


def test_reading_ahead_changes_no_record_and_calls_the_model_less_often(
    offline_textattack, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, passes = [], []
    for name in ("ahead", "one by one"):
        model = KeywordModel(tokenizer)
        found.append(attack(model, tokenizer, tmp_path / name, ("offline",), query_budget=60).records)
        passes.append(model.passes)
        monkeypatch.setattr(run, "read_ahead", lambda *arguments: None)
    assert found[0] == found[1]
    assert passes[0] < 0.75 * passes[1]


def test_only_what_does_not_depend_on_answers_is_read_ahead(offline_textattack, tokenizer) -> None:
    """Originals, and texts without one of their words; for PWWS each swap too; nothing of what was wrong before."""
    from rose_peft.robustness.attacks.wrapper import ClassifierWrapper

    for recipe, swaps in (("deepwordbug", False), ("pwws", True), ("bad-characters", None)):
        wrapper = ClassifierWrapper(Predictor(KeywordModel(tokenizer), tokenizer))
        built = recipes.build_attack(recipes.get_recipe(recipe), wrapper, None, 32, False)
        read_ahead(built, DATA.columns, DATA.texts, DATA.labels)
        known = set(wrapper._known)
        originals = {text for (text,) in DATA.texts}
        assert originals <= known
        rest = known - originals
        assert not any("dull" in text for text in rest)
        without = {"the story was [UNK]", "the [UNK] is bad", "[UNK]"}
        if swaps is None:
            assert not rest
        else:
            assert without <= rest and swaps == any("[UNK]" not in text for text in rest)
        read_ahead(built, DATA.columns, DATA.texts[:1], DATA.labels[:1])
        assert "good" not in wrapper._known  # of the examples before


def test_the_victim_answers_from_memory_in_the_order_it_is_asked(offline_textattack, tokenizer) -> None:
    from rose_peft.robustness.attacks.wrapper import ClassifierWrapper

    model = KeywordModel(tokenizer)
    wrapper = ClassifierWrapper(Predictor(model, tokenizer))
    texts = ["a good film", "a dull story", "the plot is bad"]
    plain = wrapper(texts)
    passes = model.passes
    assert wrapper.remember([texts[2], texts[0], texts[0]]) == plain.argmax(dim=1)[[2, 0, 0]].tolist()
    assert model.passes == passes + 1
    assert torch.equal(wrapper([texts[0], texts[2]]), plain[[0, 2]]) and model.passes == passes + 1
    assert torch.equal(wrapper(texts), plain) and model.passes == passes + 2
    wrapper.forget()
    assert torch.equal(wrapper(texts[:1]), plain[:1]) and model.passes == passes + 3
