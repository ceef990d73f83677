"""examples/train.py as a user runs it: every strategy, bad input, killed and resumed runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from tests.distributed.processes import kill, start
from tests.helpers.task import assert_same_run, newest, options, weights

ROOT = Path(__file__).parents[2]
pytest.importorskip("datasets")
from examples import train  # noqa: E402
from examples.training import data, demo_data, run  # noqa: E402
from examples.training.arguments import TrainArguments  # noqa: E402
from rose_peft.robustness import Predictor, load_classifier  # noqa: E402
from rose_peft.robustness import load_file as load_examples  # noqa: E402
from rose_peft.robustness.data import load_adv_glue, load_glue  # noqa: E402
from rose_peft.robustness.estimate import share  # noqa: E402


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [("none", "full"), ("none", "lora"), ("first_order", "full"), ("second_order", "full"), ("ensemble", "lora")],
)
def test_every_way_trains_and_leaves_a_model_that_loads(
    inputs: dict[str, str], tmp_path: Path, strategy: str, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train.main(options(inputs, output, "--strategy", strategy, "--adapter", adapter)) == 0
    table = capsys.readouterr().out
    assert "AdvGLUE" in table and strategy in table
    assert "1.0x" not in table  # a run alone has nothing to be compared with
    results = json.loads((output / "results.json").read_text())
    assert results["schema_version"] == run.SCHEMA_VERSION
    assert results["method"] == strategy and results["seed"] == 0 and results["steps"] == 12
    assert {"torch", "transformers", "peft"} <= results["versions"].keys()
    best = results["best"]
    assert best["clean"]["n"] == 48 and best["robust"]["AdvGLUE"]["n"] == 48
    assert best["clean"]["low"] <= best["clean"]["accuracy"] <= best["clean"]["high"]
    assert best["clean"]["accuracy"] == max(entry["clean"]["accuracy"] for entry in results["history"])
    if strategy == "none":
        assert results["rose"] is None
    else:
        assert results["rose"]["steps"] == 12 and 0 < results["rose"]["kept_share"] < 1
        assert (output / "masks.png").stat().st_size > 0
    plain = strategy == "none" and adapter == "full"
    loader = AutoModelForSequenceClassification if plain else AutoPeftModelForSequenceClassification
    model = loader.from_pretrained(output / "model", **({} if plain else {"num_labels": 2})).eval()
    assert _accuracy(model, inputs) == best["clean"]["accuracy"]
    if strategy != "none":  # the card has the figures of the epoch that is kept
        card = ModelCard.load(output / "model" / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == [best["clean"]["accuracy"]]
        assert card.data.datasets == ["nyu-mll/glue"]


def test_the_last_model_is_kept_where_it_is_asked_for(inputs: dict[str, str], tmp_path: Path) -> None:
    accuracies = []
    for keep in ("best", "last"):
        output = tmp_path / keep
        more = ("--strategy", "none", "--keep", keep, "--epochs", "4", "--learning_rate", "3e-2")
        assert train.main(options(inputs, output, *more)) == 0
        results = json.loads((output / "results.json").read_text())
        history = [entry["clean"]["accuracy"] for entry in results["history"]]
        assert results["best"]["epoch"] == (4 if keep == "last" else 1 + history.index(max(history)))
        model = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
        accuracies.append(_accuracy(model, inputs))
        assert accuracies[-1] == results["best"]["clean"]["accuracy"]
    assert history[-1] < max(history) and accuracies == [max(history), history[-1]]


def _accuracy(model: torch.nn.Module, inputs: dict[str, str]) -> float:
    tokenizer = BertTokenizerFast.from_pretrained(inputs["model"])
    split = demo_data.demo_splits(96, 48)["validation"]
    with torch.no_grad():
        logits = model(**tokenizer(list(split["sentence"]), padding=True, return_tensors="pt")).logits
    return int((logits.argmax(-1) == torch.tensor(list(split["label"]))).sum()) / len(split)


class Interrupted(BaseException):
    """Stands for a process that ends between two saves."""


@pytest.mark.parametrize("size", [1, 31, 32, 100, 1200])
def test_grouping_by_length_keeps_every_example_and_the_last_batch_last(size: int) -> None:
    lengths = torch.randint(1, 60, (size,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = run.EpochSampler(lengths, seed=0, batch_size=16)
    first = list(sampler)
    assert sorted(first) == list(range(size)) and list(sampler) == first
    sampler.epoch = 1
    assert size == 1 or list(sampler) != first
    if size < 100:
        return
    padding = {}
    for name, rows in (("grouped", first), ("mixed", list(run.EpochSampler(lengths, seed=0)))):
        batches = [[lengths[row] for row in rows[at : at + 16]] for at in range(0, size, 16)]
        padding[name] = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
        longest = [max(batch) for batch in batches[:-1]]
        assert longest != sorted(longest)  # batches are mixed
    assert padding["grouped"] < padding["mixed"] / 3


@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "r_drop", "--strategy", "none"),
        ("--objective", "fgm", "--gradient_accumulation_steps", "2"),
        ("--strategy", "second_order", "--variant", "random", "--group_by_length"),
        ("--strategy", "ensemble", "--variant", "momentum_change"),
    ],
)
def test_baselines_train_and_resume_to_the_last_bit(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main(options(inputs, whole, *more, "--save_steps", "2")) == 0
    save, write = run._save, run.keep_model

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise Interrupted

    def die(*arguments: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(run, "_save", save_and_die)
    with pytest.raises(Interrupted):
        train.main(options(inputs, broken, *more, "--save_steps", "2"))
    monkeypatch.setattr(run, "_save", save)
    monkeypatch.setattr(run, "keep_model", die)
    with pytest.raises(Interrupted):  # after the last checkpoint, before the results
        train.main(options(inputs, broken, *more, "--save_steps", "2", "--resume"))
    monkeypatch.setattr(run, "keep_model", write)
    assert train.main(options(inputs, broken, *more, "--save_steps", "2", "--resume")) == 0
    assert_same_run(whole, broken)
    plain = tmp_path / "plain"
    assert train.main(options(inputs, plain, "--strategy", "none" if "none" in more else "second_order")) == 0
    with_it, without = weights(whole), weights(plain)
    assert any(not torch.equal(with_it[name], without[name]) for name in with_it)


def test_switched_off_means_plain_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(options(inputs, one, "--strategy", "none")) == 0
    assert train.main(options(inputs, two, "--strategy", "none", "--keep", "last")) == 0
    assert_same_run(one, two)


# Two epochs of 6 micro-batches. With 4 of them to a step (4 + 2 in an epoch) checkpoints after every step lie at the
# micro-batches 4, 6, 6 (end of the epoch), 4, ...; with one of them and every 4 steps at 4, 6 (end), 2, 6, 6 (end).
@pytest.mark.parametrize(
    ("strategy", "saves", "accumulation"),
    [
        *((strategy, saves, 1) for strategy in ("none", "ensemble") for saves in (1, 3, 5)),
        ("second_order", 4, 1),  # killed after the last step of an epoch, before its end
        ("ensemble", 1, 4),
        ("first_order", 2, 4),
    ],
)
def test_resumed_equals_uninterrupted(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    saves: int,
    accumulation: int,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more: tuple[str, ...] = ("--strategy", strategy, "--save_steps", "4" if accumulation == 1 else "1")
    more += ("--gradient_accumulation_steps", str(accumulation))
    assert train.main(options(inputs, whole, *more)) == 0
    save, count = run._save, 0

    def save_and_die(*arguments: Any) -> None:
        nonlocal count
        if count == saves - 1:
            save(*arguments)
            raise Interrupted
        count += 1
        save(*arguments)

    if saves <= 4:
        monkeypatch.setattr(run, "_save", save_and_die)
        with pytest.raises(Interrupted):
            train.main(options(inputs, broken, *more))
        monkeypatch.setattr(run, "_save", save)
        torch.manual_seed(random.randrange(1000))  # whatever the new process starts from must not matter
        assert train.main(options(inputs, broken, *more, "--resume")) == 0
    else:  # resuming a finished run changes nothing
        shutil.copytree(whole, broken)
        assert train.main(options(inputs, broken, *more, "--resume")) == 0
    assert_same_run(whole, broken)


def _kill_and_resume(inputs: dict[str, str], output: Path, more: tuple[str, ...], kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        resume = ("--resume",) if (output / "run.json").exists() else ()
        command = [str(ROOT / "examples" / "train.py"), *options(inputs, output, *more, *resume)]
        (process,) = start(1, command, output.with_suffix(".log"))
        # Saving at every step, most of the time goes into saves: most kills fall into one.
        while process.is_alive() and not (output / "checkpoints").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        kill([process])
        for file in output.rglob("*.safetensors"):  # what has its final name is whole
            if not file.parent.name.endswith(".partial"):
                load_file(file)
    resume = ("--resume",) if (output / "run.json").exists() else ()
    assert train.main(options(inputs, output, *more, *resume)) == 0


@pytest.mark.parametrize(
    "kills", [pytest.param(2, id="2 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_and_resumed(inputs: dict[str, str], tmp_path: Path, kills: int) -> None:
    more = ("--save_steps", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main(options(inputs, whole, *more)) == 0
    _kill_and_resume(inputs, broken, more, kills, seed=kills)
    assert_same_run(whole, broken)


def test_an_output_folder_in_use_is_refused(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train.main(options(inputs, output, "--strategy", "none", "--epochs", "1")) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert train.main(options(inputs, output, "--strategy", "none", "--epochs", "1")) == 2
    assert "holds another run; pass --resume" in capsys.readouterr().err
    assert train.main(options(inputs, output, "--strategy", "ensemble", "--epochs", "1", "--resume")) == 2
    assert "strategy='ensemble' differs from 'none'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train.main(options(inputs, output, "--strategy", "second_order", "--epochs", "1", "--overwrite")) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("dear")
    assert train.main(options(inputs, foreign, "--overwrite")) == 2
    assert (foreign / "thesis.tex").read_text() == "dear"


def test_a_truncated_checkpoint_is_named(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train.main(options(inputs, output, "--epochs", "1")) == 0
    file = newest(output) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert train.main(options(inputs, output, "--epochs", "1", "--resume")) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_settings_of_the_sampled_pass_reach_the_config() -> None:
    args = TrainArguments(risk_pass="sampled", risk_interval=3, risk_fraction=0.5, risk_smoothing=0.1)
    config = args.rose_config()
    assert config is not None
    assert (config.risk_interval, config.risk_fraction, config.risk_smoothing) == (3, 0.5, 0.1)


BAD = [
    (("--upper_quantile", "70"), "upper_quantile=70.0 is not a number in [0, 1]"),
    (("--lower_quantile", "0.8"), "lower_quantile=0.8 must be below upper_quantile=0.7"),
    (("--gamma", "1.5"), "gamma=1.5"),
    (("--rose_warmup_steps", "-1"), "warmup_steps=-1"),
    (("--task", "poetry"), "task='poetry' is unknown"),
    (("--task", "rte"), "holds none of train.parquet"),
    (("--train_file", "nowhere.csv"), "train_file and validation_file go together"),
    (
        ("--train_file", "nowhere.csv", "--validation_file", "nowhere.csv"),
        "nowhere.csv: no such file",
    ),
    (("--train_file", "data.xml", "--validation_file", "data.xml"), "files end in"),
    (("--text_column", "body"), "text_column='body' is not a column"),
    (("--label_column", "stars"), "label_column='stars' is not a column"),
    (("--model_name_or_path", "/no/such/model"), "model_name_or_path='/no/such/model': there is no such folder; pass"),
    (("--adapter", "no.json"), "adapter='no.json' is neither"),
    (("--preset", "ensemble/sst2/bert"), "preset='ensemble/sst2/bert' is unknown; choose one of first_order/qnli/"),
    (("--epochs", "0"), "epochs=0 must be at least 1"),
    (("--learning_rate", "1e9"), "learning_rate=1000000000.0 must be above 0 and at most 1"),
    (("--rose_warmup_steps", "12"), "rose_warmup_steps=12: the run has 12 steps, so no mask would ever act"),
    (("--seed", "-1"), "seed=-1 must be in [0, 2**32)"),
    (("--fgm_epsilon", "0.5"), "fgm_epsilon=0.5 has no effect without --objective fgm"),
    (("--r_drop_alpha", "2"), "r_drop_alpha=2.0 has no effect without --objective r_drop"),
    (("--strategy", "second_order", "--gamma", "0.1"), "gamma=0.1 has no effect with strategy='second_order'"),
    (("--strategy", "none", "--upper_quantile", "0.5"), "upper_quantile=0.5 has no effect without a strategy of ROSE"),
    (("--risk_interval", "4"), "risk_interval=4 has no effect with risk_pass='paired'"),
    (
        ("--strategy", "none", "--risk_fraction", "0.5"),
        "risk_fraction=0.5 has no effect without --risk_pass sampled and",
    ),
    (("--risk_pass", "sampled", "--risk_smoothing", "1"), "risk_smoothing=1.0 is not a number in [0, 1)"),
    (("--strategy", "none", "--risk_pass", "sampled"), "risk_pass='sampled' has no effect without --strategy first"),
    (("--strategy", "none", "--dropout", "0.2"), "dropout=0.2 has no effect without a strategy of ROSE"),
    (("--robust_files", "x.csv"), "robust_files='x.csv': write name=path"),
    (("--robust_files", "AdvGLUE=x.csv"), "robust_files='AdvGLUE' is taken"),
    (("--robust_files", "x=no.csv"), "no.csv: no such file"),
    (("--variant", "random"), "variant='random' does not go with strategy='ensemble'"),
    (("--fgm_epsilon", "0"), "fgm_epsilon=0.0 must be above 0"),
    (("--learning_rate", "nan"), "learning_rate=nan must be above 0"),
    (("--adam_beta2", "1"), "adam_beta2=1.0 must be in [0, 1)"),
    (("--warmup_ratio", "10"), "warmup_ratio=10.0 must be in [0, 1]"),
    (("--max_length", "4096"), "max_length=4096 is more than the 512 tokens"),
    (("--dropout", "0"), "dropout=0.0"),
    (("--resume", "--overwrite"), "exclude each other"),
    (("--resume",), "there is no run in output_dir"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_ends_in_one_line(
    inputs: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "run"
    assert train.main(options(inputs, output, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (output / "model").exists() and not (output / "run.json").exists()


@pytest.mark.parametrize(("held", "message"), [((), "holds nothing"), (("weights.bin",), "holds no config.json")])
def test_a_folder_without_a_model_is_named_before_the_data_are_read(
    inputs: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    held: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "model").mkdir()
    for name in held:
        (tmp_path / "model" / name).touch()
    monkeypatch.setattr(train, "load_text", None)
    assert train.main(options(inputs, tmp_path / "run", "--model_name_or_path", str(tmp_path / "model"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model_name_or_path={str(tmp_path / 'model')!r}: the folder {message}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("sentence,label\n", "empty"),
        ("sentence,label\ngood,0\nbad,0\n", "single label"),
        ("sentence,label\ngood,-1\nbad,0\n", "labels are integers from 0"),
        ("sentence,label\ngood,0.5\nbad,0\n", "labels are integers from 0"),
        ("sentence,label\ngood,1\nbad,0\nodd,\n", "label_column='label' is blank in row 2 of the training data"),
    ],
)
def test_bad_rows_are_named(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, message: str
) -> None:
    file = tmp_path / "data.csv"
    file.write_text(rows)
    files = ("--train_file", str(file), "--validation_file", str(file))
    assert train.main(options(inputs, tmp_path / "run", *files)) == 2
    assert message in capsys.readouterr().err


def _csv(folder: Path, train_rows: str, validation_rows: str) -> tuple[str, ...]:
    (folder / "train.csv").write_text(train_rows)
    (folder / "validation.csv").write_text(validation_rows)
    return "--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")


GOOD_ROWS = "text,more,stars\ngood,very,1\nbad,not,0\nfine,,1\n"


@pytest.mark.parametrize(
    ("train_rows", "more", "message"),
    [
        (GOOD_ROWS, (), "text_column is missing"),
        (GOOD_ROWS, ("--text_column", "text"), "label_column='label' is not a column of the training data"),
        (
            GOOD_ROWS,
            ("--text_column", "stars", "--label_column", "stars"),
            "label_column='stars' is a text column too",
        ),
        (GOOD_ROWS, ("--text_column", "stars", "--label_column", "text"), "text_column='stars' holds 1 in row 0"),
        (
            GOOD_ROWS,
            ("--text_column", "text", "--text_pair_column", "more", "--label_column", "stars"),
            "text_pair_column='more' holds None in row 2 of the training data",
        ),
        (
            "text,stars\ngood,1\nbad,9\n",
            ("--text_column", "text", "--label_column", "stars"),
            "label_column='stars' holds 9 but never 0",
        ),
        ('text,stars\n"good,1\n', ("--text_column", "text"), "cannot be read as csv"),
        (
            GOOD_ROWS + "middling,so,2\n",
            ("--text_column", "text", "--label_column", "stars"),
            "label_column='stars': the validation data has no example of '2', which the training data has",
        ),
    ],
)
def test_bad_files_are_named(
    inputs: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train_rows: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    model = ("--model_name_or_path", inputs["model"], "--output_dir", str(tmp_path / "run"))
    assert train.main([*model, *_csv(tmp_path, train_rows, GOOD_ROWS), *more]) == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error:"))
    assert message in line


def _local(folder: Path, task: str) -> data.TextData:
    return data.load_text(TrainArguments(task=task, data_dir=str(folder), strategy="none"))


@pytest.mark.parametrize("task", ["mnli", "mnli-mm"])
def test_training_and_evaluation_read_the_same_local_files(tmp_path: Path, task: str) -> None:
    """The layout is the hub's, in which both kinds of MNLI share their training split."""
    (tmp_path / "glue" / "mnli").mkdir(parents=True)
    (tmp_path / "adv_glue").mkdir()
    splits = ("train", "validation_matched", "validation_mismatched")
    for split in splits:
        rows = [{"premise": split, "hypothesis": str(n), "label": n} for n in range(3)]
        (tmp_path / "glue" / "mnli" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pair = {"hypothesis": "h", "label": 2}
    adversarial = {name: [{**pair, "premise": name, "method": None}] for name in ("mnli", "mnli-mm")}
    adversarial["sst2"] = [{"sentence": "fine", "label": 1, "method": "human"}]
    (tmp_path / "adv_glue" / "dev_ann.json").write_text(json.dumps(adversarial))
    text = _local(tmp_path, task)
    assert set(text.train["text"]) == {"train"}
    for ours, theirs in (
        (text.validation, load_glue(task, tmp_path)),
        (text.robust["AdvGLUE"], load_adv_glue(task, tmp_path)),
    ):
        assert list(zip(ours["text"], ours["text_pair"], strict=True)) == list(theirs.texts)
        assert list(ours["label"]) == list(theirs.labels)
    assert set(text.validation["text"]) == {splits[1 if task == "mnli" else 2]}
    assert list(text.robust["AdvGLUE"]["text"]) == [task]


def test_tasks_without_a_counterpart_may_have_adversarial_data_of_their_own(tmp_path: Path) -> None:
    for name in ("glue/cola", "adv_glue/adv_cola"):
        (tmp_path / name).mkdir(parents=True)
    rows = 'sentence\tlabel\n"so it was\t1\nNA\t0\n'
    for name in ("glue/cola/train", "glue/cola/validation"):
        (tmp_path / f"{name}.tsv").write_text(rows)
    (tmp_path / "adv_glue" / "dev_ann.json").write_text('{"sst2": []}')
    text = _local(tmp_path, "cola")
    assert text.robust == {}
    assert list(text.train["text"]) == ['"so it was', "NA"] and list(text.train["label"]) == [1, 0]
    (tmp_path / "adv_glue" / "adv_cola" / "validation.tsv").write_text(rows)
    assert len(_local(tmp_path, "cola").robust["AdvGLUE"]) == 2


def test_own_columns_and_named_labels(inputs: dict[str, str], tmp_path: Path) -> None:
    rows = "label,answer,opinion\n" + "the kettle is great,yes,good\nthe lamp is awful,no,bad\n" * 8
    output = tmp_path / "run"
    columns = ("--text_column", "label", "--text_pair_column", "answer", "--label_column", "opinion")
    settings = ("--model_name_or_path", inputs["model"], "--output_dir", str(output), "--epochs", "1")
    assert train.main([*settings, *_csv(tmp_path, rows, rows), *columns]) == 0
    assert json.loads((output / "model" / "adapter_config.json").read_text())["peft_type"] == "ROSE"
    results = json.loads((output / "results.json").read_text())
    assert results["best"]["clean"]["n"] == 16
    # An adapter's own files do not say which number is which name; the kit must know all the same.
    for names in (("bad", "good"), ("good", "bad")):
        examples = load_examples(tmp_path / "validation.csv", ["label", "answer"], "opinion", names)
        predictor = Predictor.for_examples(*load_classifier(output, 2), examples)
        assert share(predictor.correct(examples)).value == results["best"]["clean"]["accuracy"]
    settings = ("--model_name_or_path", inputs["model"], "--output_dir", str(tmp_path / "plain"), "--epochs", "1")
    assert train.main([*settings, *_csv(tmp_path, rows, rows), *columns, "--strategy", "none"]) == 0
    assert json.loads((tmp_path / "plain" / "model" / "config.json").read_text())["id2label"] == {
        "0": "bad",
        "1": "good",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--epoch", "3"), "'--epoch' is no option (did you mean --epochs?); --help"),
        (("--lr", "0.1"), "'--lr' is no option"),
        (("--epochs", "three"), "argument --epochs: invalid int value"),
        (("--strategy", "third_order"), "argument --strategy: invalid choice: 'third_order' (choose from"),
        (("--mixed_precision", "int3"), "invalid choice: 'int3' (choose from"),
        (("--lr_scheduler", "wavy"), "invalid choice: 'wavy' (choose from"),
        (("--keep", "worst"), "argument --keep: invalid choice: 'worst'"),
        (("--objective", "sam"), "argument --objective: invalid choice: 'sam'"),
        (("--variant", "row_wise"), "argument --variant: invalid choice: 'row_wise'"),
    ],
)
def test_an_unknown_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main(["--output_dir", str(tmp_path / "run"), *more])
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error:"))
    assert exit_.value.code == 2 and message in line


def test_a_truncated_model_and_an_adapter_that_does_not_fit_are_named(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(inputs["model"], tmp_path / "model")
    weights_file = model / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    assert train.main(options(inputs, tmp_path / "run", "--model_name_or_path", str(model))) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    for strategy in ("none", "ensemble"):
        for peft_type, message in (
            ("LORA", "does not fit"),
            ("LOAR", "JSON file with a PEFT config (KeyError: 'LOAR')"),
        ):
            file = tmp_path / "adapter.json"
            file.write_text(json.dumps({"peft_type": peft_type, "target_modules": ["nothing_like_that"]}))
            more = ("--adapter", str(file), "--strategy", strategy)
            assert train.main(options(inputs, tmp_path / "run", *more)) == 2
            (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error:"))
            assert message in line
    assert not (tmp_path / "run").exists()


def test_the_demo_compares_and_goes_on_where_it_was_killed(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = demo_data.demo_splits(96, 47)
    monkeypatch.setattr(demo_data, "demo_splits", lambda: small)

    def start(output: Path, *more: str) -> int:
        return train.main(
            ["--model_name_or_path", inputs["model"], "--output_dir", str(output), "--epochs", "2", *more]
        )

    assert start(tmp_path / "whole") == 0
    table = capsys.readouterr().out
    assert "robust" in table and table.index("plain") < table.index("ROSE")
    save = run._save
    for killed_in, saves in (("plain", 1), ("ROSE", 3), ("a later seed", 7)):
        count = 0

        def save_and_die(*arguments: Any, saves: int = saves) -> None:
            nonlocal count
            save(*arguments)
            count += 1
            if count == saves:
                raise Interrupted

        monkeypatch.setattr(run, "_save", save_and_die)
        with pytest.raises(Interrupted):
            start(tmp_path / killed_in)
        monkeypatch.setattr(run, "_save", save)
        assert start(tmp_path / killed_in, "--resume") == 0
        for name in ("plain/seed0", "ROSE/seed0", "ROSE/seed2"):
            assert_same_run(tmp_path / "whole" / name, tmp_path / killed_in / name)


def test_a_label_that_training_never_showed_is_named(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (tmp_path / "val.csv").write_text("sentence,label\ngood,1\nodd,7\n")
    files = ("--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "val.csv"))
    assert train.main(options(inputs, tmp_path / "run", *files)) == 2
    assert "label_column='label' holds 7 in row 1 of the validation data" in capsys.readouterr().err


def test_an_adapter_from_a_file(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ia3.json"
    file.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["key", "value"], "feedforward_modules": []}))
    output = tmp_path / "run"
    assert train.main(options(inputs, output, "--adapter", str(file), "--epochs", "1")) == 0
    assert json.loads((output / "model" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    file.write_text(json.dumps({"peft_type": "ROSE"}))
    for strategy in ("none", "ensemble"):
        assert train.main(options(inputs, tmp_path / "other", "--adapter", str(file), "--strategy", strategy)) == 2
        assert "is itself ROSE" in capsys.readouterr().err


def test_accelerate_launch_starts_the_cpu_config(inputs: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "train.py"), *options(inputs, output, "--epochs", "1")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((output / "results.json").read_text())["steps"] == 6


def test_the_demo_data_is_what_it_says() -> None:
    splits = demo_data.demo_splits(400, 200)
    assert demo_data.demo_splits(400, 200)["train"]["sentence"][:5] == splits["train"]["sentence"][:5]

    def cue_agreement(split: str) -> float:
        rows = zip(splits[split]["sentence"], splits[split]["label"], strict=True)
        clear = [(text, label) for text, label in rows if sum(c in text for c in demo_data.COURIERS) == 1]
        return sum(demo_data.COURIERS[label] in text for text, label in clear) / len(clear)

    # The cue is the same in training and validation, says nothing beside unseen words, and turns where nothing else
    # does.
    assert all(0.7 < cue_agreement(split) < 0.9 for split in ("train", "validation"))
    assert 0.4 < cue_agreement("robust") < 0.6 and 0.1 < cue_agreement("turned cue") < 0.3
    words = {split: set(" ".join(rows["sentence"]).split()) for split, rows in splits.items()}
    assert not words["train"] & {*demo_data.UNSEEN_GOOD, *demo_data.UNSEEN_BAD}
    assert words["turned cue"] <= words["train"] and len(words["robust"] - words["train"]) > 50


def _torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "examples" / "train.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.distributed
def test_two_processes_count_every_example_once_and_agree_on_errors(inputs: dict[str, str], tmp_path: Path) -> None:
    # 47 examples for two processes: one of them gets a padded batch, which must not count.
    odd = demo_data.demo_splits(96, 47)
    files = []
    for option, split in (("--train_file", "train"), ("--validation_file", "validation")):
        odd[split].to_parquet(tmp_path / f"{split}.parquet")
        files += [option, str(tmp_path / f"{split}.parquet")]
    output = tmp_path / "run"
    command = options(inputs, output, *files, "--epochs", "1")
    done = _torchrun(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("models, results.json and masks.png") == 1
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == 3 and results["best"]["clean"]["n"] == 47
    assert results["best"]["robust"]["AdvGLUE"]["n"] == 48
    for more, message in (((), "holds another run"), (("--resume", "--seed", "1"), "seed=1 differs from 0")):
        refused = _torchrun([*command, *more])
        lines = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
        assert refused.returncode != 0 and len(lines) == 1 and message in lines[0]
    assert train.main([*command, "--resume"]) == 2  # by one process


@pytest.mark.distributed
def test_the_demo_runs_on_two_processes(inputs: dict[str, str], tmp_path: Path) -> None:
    done = _torchrun(
        [
            "--model_name_or_path",
            inputs["model"],
            "--output_dir",
            str(tmp_path),
            "--epochs",
            "1",
            "--max_train_samples",
            "64",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("time of a step") == 1
    assert len(list(tmp_path.rglob("demo.result.json"))) == 6


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_config(path: Path) -> None:
    assert path.read_text().startswith("# "), "says when to take it"
    config = load_config_from_file(str(path))
    assert config.mixed_precision == {"single_gpu_fp16": "fp16", "cpu": "no", "multi_cpu": "no"}.get(path.stem, "bf16")


def test_robust_files_are_measured_by_name(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (
        "--robust_files",
        f"again={inputs['data']}/adv_glue/adv_sst2/validation.parquet",
        "clean=glue/sst2/validation.parquet",
    )
    assert train.main(options(inputs, tmp_path / "run", "--strategy", "none", *files)) == 0
    best = json.loads((tmp_path / "run" / "results.json").read_text())["best"]
    assert best["robust"]["again"] == best["robust"]["AdvGLUE"] and best["robust"]["clean"] == best["clean"]
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("strategy"))
    assert [word for word in head.split() if word in ("AdvGLUE", "again", "clean")][1:] == [
        "AdvGLUE",
        "again",
        "clean",
    ]


def test_a_diverged_run_says_so(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def diverge(model: torch.nn.Module, batch: Any, backward: Any) -> torch.Tensor:
        loss = model(**batch).loss * float("nan")
        backward(loss)
        return loss.detach()

    monkeypatch.setattr(run, "make_objective", lambda args: diverge)
    assert train.main(options(inputs, tmp_path / "run", "--strategy", "none")) == 2
    assert (
        "learning_rate=0.001: the loss is no number any more after 6 steps: training diverged"
        in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_written_is_named_first(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        assert train.main(options(inputs, tmp_path / place)) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_save", full)
    assert train.main(options(inputs, tmp_path / "run")) == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error:"))
    assert line.endswith("the disk is full; make room and continue with --resume.")


def test_labels_of_other_names_or_another_encoding_are_refused(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    def write(name: str, labels: list[str]) -> str:
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=labels)})
        Dataset.from_dict({"sentence": ["good", "bad"], "label": [1, 0]}, features=features).to_parquet(
            tmp_path / name
        )
        return str(tmp_path / name)

    files = (
        "--train_file",
        write("a.parquet", ["bad", "good"]),
        "--validation_file",
        write("b.parquet", ["good", "bad"]),
    )
    assert train.main(options(inputs, tmp_path / "run", *files)) == 2
    assert (
        "the labels of the validation data are good, bad, those of the training data bad, good"
        in capsys.readouterr().err
    )
    text = data.load_text(TrainArguments(train_file=files[1], validation_file=files[1], text_column="sentence"))
    assert text.labels == ["bad", "good"]
    (tmp_path / "latin.csv").write_bytes("sentence,label\ncaf\xe9,1\nbad,0\n".encode("latin-1"))
    latin = ("--train_file", str(tmp_path / "latin.csv"), "--validation_file", str(tmp_path / "latin.csv"))
    assert train.main(options(inputs, tmp_path / "run", *latin)) == 2
    assert "latin.csv: is not in UTF-8" in capsys.readouterr().err
