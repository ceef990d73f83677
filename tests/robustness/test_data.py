"""Loading data in every layout, and saying what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest

from rose_peft.robustness.adv_glue import evaluate_adv_glue
from rose_peft.robustness.data import (
    TASKS,
    Examples,
    examples_from_columns,
    load_adv_glue,
    load_file,
    load_glue,
    load_hub,
)
from rose_peft.robustness.errors import DataError, LabelMismatchError, UnknownTaskError
from rose_peft.robustness.estimate import Estimate
from rose_peft.robustness.labels import label_order
from tests.helpers.victims import KeywordModel

WITH_COUNTERPART = [task for task in TASKS.values() if task.adv_config]


def table(columns: tuple[str, ...], rows: int = 4) -> pandas.DataFrame:
    content = {column: [f"{column} {row} is good" for row in range(rows)] for column in columns}
    return pandas.DataFrame({**content, "label": [row % 2 for row in range(rows)], "idx": range(rows)})


@pytest.mark.parametrize("task", WITH_COUNTERPART, ids=lambda task: task.name)
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_every_task_loads_from_local_files(task, ending: str, tmp_path: Path) -> None:
    for folder, split in (
        (f"glue/{task.glue_config}", task.validation_split),
        (f"adv_glue/{task.adv_config}", "validation"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        path = tmp_path / folder / f"{split}.{ending}"
        frame = table(task.text_columns)
        frame.to_parquet(path) if ending == "parquet" else frame.to_json(path, orient="records", lines=True)
    for examples in (load_glue(task.name, tmp_path), load_adv_glue(task.name, tmp_path)):
        assert examples.columns == task.text_columns
        assert examples.labels == (0, 1, 0, 1)
        assert examples.texts[2] == tuple(f"{column} 2 is good" for column in task.text_columns)
        assert examples.label_names == task.label_names


def test_adv_glue_loads_in_the_layout_it_is_published_in(tmp_path: Path) -> None:
    (tmp_path / "adv_glue").mkdir()
    content = {
        "sst2": [{"idx": 0, "label": 1, "sentence": "fine"}],
        "rte": [{"sentence1": "a", "sentence2": "b", "label": 0}],
    }
    (tmp_path / "adv_glue" / "dev.json").write_text(json.dumps(content))
    assert load_adv_glue("rte", tmp_path).texts == (("a", "b"),)
    with pytest.raises(DataError, match="no list 'qqp'"):
        load_adv_glue("qqp", tmp_path)


def test_adv_glue_names_the_attacks_where_the_annotated_file_is_there(tmp_path: Path) -> None:
    """The layout of AdvGLUE's dev_ann.json; it goes before the others, which say less about the same examples."""
    (tmp_path / "adv_glue").mkdir()
    pair = {"sentence1": "a", "sentence2": "b", "label": 0}
    annotated = [
        {**pair, "original_sentence1": "c", "method": "textbugger", "data_construction": "word"},
        {**pair, "original_sentence1": "c", "method": None, "data_construction": "human"},
        {**pair, "method": "", "data_construction": None},
    ]
    (tmp_path / "adv_glue" / "dev.json").write_text(json.dumps({"rte": [pair]}))
    assert load_adv_glue("rte", tmp_path).sources is None
    (tmp_path / "adv_glue" / "dev_ann.json").write_text(json.dumps({"rte": annotated}))
    # As on the hub, without the attacks.
    (tmp_path / "adv_glue" / "adv_rte").mkdir()
    pandas.DataFrame([pair]).to_parquet(tmp_path / "adv_glue" / "adv_rte" / "validation.parquet")
    examples = load_adv_glue("rte", tmp_path)
    assert examples.texts == (("a", "b"),) * 3
    assert examples.sources == ("textbugger", "human", "unnamed")


def test_the_shared_data_have_their_known_sizes(data: Path) -> None:
    sizes = [len(load(task, data)) for task in ("sst2", "rte") for load in (load_glue, load_adv_glue)]
    assert sizes == [872, 148, 277, 81]


def test_adv_glue_reports_each_source_beside_the_clean_accuracy(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "glue/sst2").mkdir(parents=True)
    (tmp_path / "adv_glue/adv_sst2").mkdir(parents=True)
    pandas.DataFrame({"sentence": ["good", "bad", "good"], "label": [1, 0, 0]}).to_parquet(
        tmp_path / "glue/sst2/validation.parquet"
    )
    pandas.DataFrame(
        {"sentence": ["good", "goood", "bad", "gud"], "label": [1, 1, 0, 1], "method": ["human", "bug", "bug", "bug"]}
    ).to_json(tmp_path / "adv_glue/adv_sst2/validation.jsonl", orient="records", lines=True)
    figures = {
        (row.measure, row.part): row.estimate
        for row in evaluate_adv_glue(KeywordModel(tokenizer), tokenizer, "sst2", data_dir=tmp_path).rows()
    }
    assert figures["clean_accuracy", ""].value == pytest.approx(2 / 3)
    assert (figures["robust_accuracy", "AdvGLUE"].value, figures["robust_accuracy", "AdvGLUE"].n) == (0.5, 4)
    assert figures["robust_accuracy", "AdvGLUE"].low == pytest.approx(0.1500, abs=1e-4)
    assert figures["source_accuracy", "bug"].value == pytest.approx(1 / 3)
    assert figures["source_accuracy", "human"] == Estimate(1.0, 1, pytest.approx(0.2065, abs=1e-4), 1.0)


@pytest.mark.parametrize("task", ["cola", "wnli"])
def test_task_without_counterpart_is_named(task: str) -> None:
    with pytest.raises(UnknownTaskError, match=rf"task='{task}' has no AdvGLUE counterpart; AdvGLUE covers sst2, "):
        load_adv_glue(task)


def test_unknown_task_is_named() -> None:
    with pytest.raises(UnknownTaskError, match="task='sst3' is unknown"):
        load_glue("sst3")


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"^nyu-mll/glue/sst2: not available .*local files instead\.$"):
        load_hub("nyu-mll/glue", "sst2", "validation", ["sentence"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": [], "label": []}, "holds no examples"),
        ({"text": ["a", "b"], "label": [-1, 1]}, "1 of 2 examples have no label"),
        ({"text": ["a", "b"], "label": [None, 1]}, "1 of 2 examples have no label"),
        ({"text": ["a"]}, "has no labels: no column 'label'"),
        ({"other": ["a"], "label": [0]}, "lacks a text column: no column 'text' among"),
        ({"text": [None], "label": [0]}, "example 0 is"),
        ({"text": ["a"], "label": ["spam"]}, "label='spam' is text and no label names are given"),
        ({"text": ["a"], "label": [0.5]}, "is no class"),
        ({"text": ["a"], "label": [float("inf")]}, "is no class"),
    ],
)
def test_unusable_tables_are_refused(content: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_from_columns(content, ["text"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_file(tmp_path / "absent.csv", ["text"])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_file(broken, ["text"])
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(DataError, match="files end in"):
        load_file(tmp_path / "x.xlsx", ["text"])


def test_named_labels_become_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\nfine,pos\nawful,neg\n")
    assert load_file(tmp_path / "x.csv", ["text"], label_names=["neg", "pos"]).labels == (1, 0)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "json"])
def test_texts_stay_as_they_are_written(ending: str, tmp_path: Path) -> None:
    rows = [("NA", 1), ("null", 0), ("None", 1), ("2021", 0), ("1.50", 1), (" 'a' \\", 0)]
    path = tmp_path / f"x.{ending}"
    if ending in ("tsv", "csv"):
        separator = "\t" if ending == "tsv" else ","
        lines = [separator.join(map(str, row)) for row in [("date", "label"), *rows]]
        path.write_text("\n".join(lines))
    else:
        records = [{"date": text, "label": label} for text, label in rows]
        path.write_text("\n".join(map(json.dumps, records)) if ending == "jsonl" else json.dumps(records))
    examples = load_file(path, ["date"])
    assert examples.texts == tuple((text,) for text, _ in rows)
    assert examples.labels == tuple(label for _, label in rows)


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    rows = [('"a fine start', 1), ("bad film", 0), ("dull", 0), ('ends with a quote"', 1), ("good", 1)]
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    examples = load_file(tmp_path / "x.tsv", ["text"])
    assert list(zip(examples.texts, examples.labels, strict=True)) == [((text,), label) for text, label in rows]
    (tmp_path / "x.csv").write_text('text,label\n"so, a ""fine"" start",1\n')
    assert load_file(tmp_path / "x.csv", ["text"]).texts == (('so, a "fine" start',),)


@pytest.mark.parametrize("missing", ["", "NA", "nan", "null", "None"])
def test_a_missing_label_is_reported_and_none_can_be_a_name(missing: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"text,label\nfine,1\nbad,{missing}\n")
    with pytest.raises(DataError, match="1 of 2 examples have no label"):
        load_file(tmp_path / "x.csv", ["text"])
    (tmp_path / "x.csv").write_text("text,label\nfine,pro\nbad,None\n")
    assert load_file(tmp_path / "x.csv", ["text"], label_names=["None", "pro"]).labels == (1, 0)


def test_numbers_in_quotes_are_label_numbers_unless_they_are_names(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "2021", "label": "1"}\n{"text": "2022", "label": "2"}\n')
    examples = load_file(tmp_path / "x.jsonl", ["text"])
    assert (examples.texts, examples.labels) == ((("2021",), ("2022",)), (1, 2))
    assert load_file(tmp_path / "x.jsonl", ["text"], label_names=["1", "2"]).labels == (0, 1)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("label\ttext\n1\tfine\n0\n")
    with pytest.raises(DataError, match=r"example 1 is \(nan,\)"):
        load_file(tmp_path / "x.tsv", ["text"])


def test_samples_are_fixed_and_without_replacement() -> None:
    examples = Examples(tuple((str(n),) for n in range(100)), tuple(n % 2 for n in range(100)))
    sample = examples.sample(10, seed=3)
    assert sample == examples.sample(10, seed=3)
    assert sample != examples.sample(10, seed=4)
    assert len(set(sample.indices)) == 10
    assert [int(text[0]) for text in sample.texts] == list(sample.indices)
    assert examples.sample(None) is examples
    with pytest.raises(DataError, match="num_examples=0"):
        examples.sample(0)


def stars(path: Path, values: list[Any]) -> Path:
    table = pandas.DataFrame({"text": ["a", "b", "c"], "label": values})
    table.to_csv(path) if path.suffix == ".csv" else table.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_numbers_may_be_names(tmp_path: Path, name: str) -> None:
    """As stars are, whatever the file makes of them."""
    assert load_file(stars(tmp_path / name, [1, 5, 3]), ["text"], label_names=["1", "2", "3", "5"]).labels == (0, 3, 2)
    assert load_file(stars(tmp_path / name, ["1", "5", "3"]), ["text"], label_names=["1", "3", "5"]).labels == (
        0,
        2,
        1,
    )
    assert load_file(stars(tmp_path / name, [True, False, True]), ["text"], label_names=["True", "False"]).labels == (
        (0, 1, 0)
    )
    assert load_file(stars(tmp_path / name, [0, 1, 2]), ["text"], label_names=["1", "2", "3"]).labels == (0, 1, 2)
    assert load_file(stars(tmp_path / name, [0, 1, 1]), ["text"], label_names=["0", "1"]).labels == (0, 1, 1)
    with pytest.raises(DataError, match=r"label=1 may be the name '1' or the number of '2' among"):
        load_file(stars(tmp_path / name, [1, 2, 1]), ["text"], label_names=["1", "2", "3"])


def test_names_that_the_data_carry_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["2", "1"])}
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=datasets.Features(kinds))
    table.to_parquet(tmp_path / "x.parquet")
    for found in (examples_from_columns(table, ["text"]), load_file(tmp_path / "x.parquet", ["text"])):
        assert found.label_names == ("2", "1") and found.labels == (0, 1)
    assert load_file(tmp_path / "x.parquet", ["text"], label_names=["a", "b"]).label_names == ("a", "b")


@pytest.mark.parametrize("names", [None, ["a", "b"]])
def test_several_labels_of_one_example_are_refused(names: list[str] | None) -> None:
    with pytest.raises(DataError, match=r"label=\[0, 1\] is neither a number nor a name"):
        examples_from_columns({"text": ["a", "b"], "label": [[0, 1], [1]]}, ["text"], label_names=names)


def test_missing_values_of_nullable_columns_are_missing(tmp_path: Path) -> None:
    table = pandas.DataFrame({"text": ["a", "b"], "label": pandas.array([1, None], dtype="Int64")})
    table.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="1 of 2 examples have no label"):
        load_file(tmp_path / "x.parquet", ["text"])
    with pytest.raises(DataError, match="1 of 2 examples have no label"):
        examples_from_columns(table, ["text"])


def config(*names: str) -> SimpleNamespace:
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


def named(*names: str) -> Examples:
    return Examples((("a",),), (0,), label_names=names or None)


def test_label_order_follows_names_where_both_have_them() -> None:
    data = named("entailment", "neutral", "contradiction")
    assert label_order(config("Contradiction", "entailment", "NEUTRAL"), data) == [1, 2, 0]
    assert label_order(config("LABEL_0", "LABEL_1", "LABEL_2"), data) == [0, 1, 2]
    assert label_order(config("0", "1", "2"), data) == [0, 1, 2]
    assert label_order(config("x", "y"), named()) == [0, 1]


def test_different_label_sets_are_refused() -> None:
    data = named("negative", "positive")
    with pytest.raises(LabelMismatchError, match="has 3 classes, data has 2 labels"):
        label_order(config("a", "b", "c"), data)
    with pytest.raises(LabelMismatchError, match=r"set model\.config\.id2label"):
        label_order(config("ham", "spam"), data)
    with pytest.raises(LabelMismatchError, match="label 2 of data lies outside"):
        label_order(config("LABEL_0", "LABEL_1"), Examples((("a",),), (2,)))
    with pytest.raises(LabelMismatchError, match="is no classifier"):
        label_order(config("score"), data)
