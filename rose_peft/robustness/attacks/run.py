"""Run attacks on any classifier: several recipes over one fixed sample, resumable, with intervals."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Examples, PathLike
from ..errors import (
    MissingResourceError,
    ModelError,
    ResumeError,
    RobustnessError,
    UnknownRecipeError,
    one_line,
)
from ..estimate import Estimate, mean, share
from ..predict import Predictor, evaluating
from ..results import SUFFIX, Result, Row
from ..seeding import generators_kept, seed_all, seed_from
from .ahead import SPAN, read_ahead
from .recipes import Recipe, build_attack, expand, get_recipe
from .records import Record, RecordLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeResult:
    """What one attack did to one model.

    Accuracies and shares are fractions with 95 % intervals: Wilson for shares of examples, bootstrap for means. An
    example on which the attack itself broke counts in `clean_accuracy` and `errors`, and nowhere else.

    Args:
        recipe: Name of the attack.
        clean_accuracy: Share of examples classified correctly before the attack.
        accuracy_under_attack: Share of examples still classified correctly after it.
        success_rate: Share of the correctly classified examples on which the attack found a way.
        words_changed: Mean share of words changed, over successes.
        queries: Mean number of model queries, over attacked (correctly classified) examples.
        errors: Number of examples on which the attack broke.
    """

    recipe: str
    clean_accuracy: Estimate
    accuracy_under_attack: Estimate
    success_rate: Estimate
    words_changed: Estimate
    queries: Estimate
    errors: int = 0

    @classmethod
    def of(cls, recipe: str, records: Sequence[Record]) -> RecipeResult:
        """Sum up records."""
        whole = [record for record in records if record.result != "error"]
        attacked = [record for record in whole if record.result != "skipped"]
        successes = [record for record in attacked if record.result == "success"]
        return cls(
            recipe=recipe,
            clean_accuracy=share([record.original_prediction == record.label for record in records]),
            accuracy_under_attack=share([record.result == "failed" for record in whole]),
            success_rate=share([record.result == "success" for record in attacked]),
            words_changed=mean([record.words_changed / max(record.words, 1) for record in successes]),
            queries=mean([float(record.queries) for record in attacked]),
            errors=len(records) - len(whole),
        )

    def rows(self) -> list[Row]:
        """Return the figures as rows of a result file."""
        return [
            Row("attack_clean_accuracy", self.clean_accuracy, self.recipe),
            Row("accuracy_under_attack", self.accuracy_under_attack, self.recipe),
            Row("attack_success_rate", self.success_rate, self.recipe),
            Row("attack_words_changed", self.words_changed, self.recipe),
            Row("attack_queries", self.queries, self.recipe),
            Row("attack_errors", Estimate(self.errors), self.recipe),
        ]


@dataclass
class AttackReport:
    """What all attacks did to one model.

    Args:
        results: Recipe -> its result, also of recipes that an earlier call with the same settings left in the folder.
        unavailable: Recipe -> what it needs, for those that could not run.
        output_dir: Folder with `examples.csv`, `examples.parquet`, `attack.result.json` and the records.
        records: Recipe -> what it did to each sentence.
    """

    results: dict[str, RecipeResult]
    unavailable: dict[str, str]
    output_dir: Path
    records: dict[str, list[Record]] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return the figures of all recipes as rows of a result file, with the clean accuracy of the sample."""
        clean = [Row("clean_accuracy", result.clean_accuracy) for result in self.results.values()]
        return clean[-1:] + [row for result in self.results.values() for row in result.rows()]


def run_attacks(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    recipes: Sequence[str] = ("offline",),
    *,
    output_dir: PathLike,
    num_examples: int | None = 200,
    seed: int = 0,
    query_budget: int | None = None,
    allow_downloads: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    method: str = "model",
    task: str | None = None,
    training_seed: int = 0,
    report: Callable[[str], None] = logger.warning,
    **options: Any,
) -> AttackReport:
    """Attack a classifier with several recipes and write down what happened to each example.

    The sample of examples depends on the data, `num_examples` and `seed` only, and the attack on an example on nothing
    but `seed`, the recipe and the example (what can be known beforehand is read in batches of many examples, which may
    round otherwise): all models meet the same, and a run that was killed ends, when it is called again with the same
    arguments, with the records an uninterrupted one would have.

    Args:
        model: Any classifier or `PeftModel` of one, where and in the precision in which it is to run.
        tokenizer: Its tokenizer.
        examples: The data; single sentences or pairs.
        recipes: Names of recipes, and presets: "offline" for those that need no download, "all".
        output_dir: Folder for everything that is written, one per model.
        num_examples: Size of the random sample; None for all.
        seed: Seed of the sample and of the attacks.
        query_budget: Model queries that one example may cost at most, at least 2; None for no limit.
        allow_downloads: Let recipes fetch what they miss. Without, one that misses something is reported.
        overwrite: Start again where records are found instead of continuing.
        progress: Show a progress bar.
        method: Name of the model in the result file.
        task: Name of the task in the result file; None for the name of the data.
        training_seed: Seed that the model was trained with, for the result file.
        report: Called with one line for each recipe that cannot run, before any other starts.
        options: Passed to `Predictor`: batch_size, max_length, bf16.

    Returns:
        The results, and what could not run.

    Raises:
        MissingResourceError: If TextAttack cannot be used at all, or no recipe can run.
        UnknownRecipeError: If no recipe of the names given exists.
        LabelMismatchError: If the model's classes are not the data's labels.
        ResumeError: If `output_dir` holds records of another run.
        ModelError: If the model fails; what was attacked until then is kept.
    """
    if query_budget is not None and query_budget < 2:
        raise RobustnessError(f"query_budget={query_budget}: one query reads the original, so at least 2 are needed.")
    sample = examples.sample(num_examples, seed)
    predictor = Predictor.for_examples(model, tokenizer, sample, **options)
    attacks, unavailable = _prepare(recipes, predictor, query_budget, allow_downloads)
    for name, reason in unavailable.items():
        report(f"recipe {name} does not run: {reason}")
    if not attacks:
        every = "; ".join(f"{name}: {reason}" for name, reason in unavailable.items()) or "recipes is empty."
        unknown = all(reason.startswith("recipe=") for reason in unavailable.values())
        raise (UnknownRecipeError if unknown and unavailable else MissingResourceError)(f"no recipe can run: {every}")

    folder = Path(output_dir)
    run = {
        "data": sample.fingerprint(),
        "model": model_fingerprint(model),
        "model_config": _config_fingerprint(model),
        "tokenizer": _tokenizer_fingerprint(predictor, sample),
        "label_order": predictor.order,
        "max_length": predictor.max_length,
        "bf16": predictor.bf16,
        "seed": seed,
        "query_budget": query_budget,
        "textattack": version("textattack"),
    }
    records: dict[str, list[Record]] = {}
    with evaluating(model), generators_kept():
        for name, attack in attacks.items():
            with RecordLog(folder / "records" / f"{name}.jsonl", {"recipe": name, **run}, overwrite) as log:
                _attack_all(attack, sample, name, seed, log, progress)
                records[name] = [log.records[index] for index in sample.indices]
    records |= _earlier_records(folder / "records", run, sample, set(records))
    results = {name: RecipeResult.of(name, kept) for name, kept in records.items()}
    for name, result in results.items():
        if result.errors:
            report(f"recipe {name} broke on {result.errors} of {len(sample)} examples; see their column error.")
    done = AttackReport(results, unavailable, folder, records)
    _write_table(records, sample, folder)
    Result(
        method=method,
        task=task or examples.name,
        seed=training_seed,
        rows=done.rows(),
        config={**run, "num_examples": len(sample), "unavailable": unavailable},
    ).save(folder / f"attack{SUFFIX}")
    return done


def _prepare(
    names: Sequence[str], predictor: Predictor, query_budget: int | None, allow_downloads: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Build every recipe that can run, and say of each other one why it cannot."""
    # First, and on its own: it needs TextAttack and the stop words, without which nothing runs.
    from .wrapper import ClassifierWrapper

    wrapper = ClassifierWrapper(predictor)
    attacks: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for name in expand(names):
        try:
            recipe = get_recipe(name)
        except UnknownRecipeError as error:
            unavailable[name] = str(error)
            continue
        lacks = recipe.lacks(allow_downloads)
        if lacks:
            unavailable[name] = "needs " + " ".join(lacks)
            continue
        try:
            attacks[name] = build_attack(recipe, wrapper, query_budget, predictor.batch_size, allow_downloads)
        except Exception as error:  # a failed download or a broken cache stops this recipe, not the others
            unavailable[name] = f"cannot be built: {one_line(error)}"
    return attacks, unavailable


def _attack_all(attack: Any, sample: Examples, recipe: str, seed: int, log: RecordLog, progress: bool) -> None:
    """Attack every example that has no record yet, and again where the attack broke: the cause may be gone."""
    from tqdm.auto import tqdm

    bar = tqdm(total=len(sample), desc=recipe, disable=not progress)
    rows = list(zip(sample.texts, sample.labels, sample.indices, strict=True))
    with bar:
        for place, (text, label, index) in enumerate(rows):
            if place % SPAN == 0:
                span = rows[place : place + SPAN]
                if any(_is_open(log.records.get(index)) for _, _, index in span):
                    # All of it, whatever is done: in other batches the model may round otherwise.
                    texts, labels, _ = zip(*span, strict=True)
                    read_ahead(attack, sample.columns, texts, labels)
            known = log.records.get(index)
            if _is_open(known):
                # Every example starts from the same state, so that what came before it cannot matter.
                seed_all(seed_from(seed, recipe, index))
                attack.clear_cache()
                record = attack_one(attack, sample.columns, text, label, index)
                if record != known:
                    log.append(record)
            bar.update()


def _is_open(record: Record | None) -> bool:
    return record is None or record.result == "error"


def _earlier_records(folder: Path, run: dict[str, Any], sample: Examples, done: set[str]) -> dict[str, list[Record]]:
    """Return the complete records of other recipes that an earlier call with the same settings left."""
    found: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem in done:
            continue
        try:
            with RecordLog(path, {"recipe": path.stem, **run}) as log:
                kept = [log.records[index] for index in sample.indices if index in log.records]
        except ResumeError:  # of other settings, or being written by another process
            continue
        if len(kept) == len(sample):
            found[path.stem] = kept
    return found


def attack_one(attack: Any, columns: Sequence[str], text: Sequence[str], label: int, index: int) -> Record:
    """Attack one example; if the attack breaks, the record says how.

    Args:
        attack: A `textattack.Attack`.
        columns: Names of the text columns.
        text: One text per column.
        label: The label number.
        index: Position of the example in its data set.

    Raises:
        ModelError: If the model fails.
    """
    original = dict(zip(columns, text, strict=True))
    results = {"SkippedAttackResult": "skipped", "SuccessfulAttackResult": "success", "FailedAttackResult": "failed"}
    try:
        result = attack.attack(OrderedDict(original), label)
        kind = type(result).__name__
        if kind not in results:
            raise RuntimeError(f"{kind}: this goal has no success or failure")
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise  # says something about the model or the machine and nothing about the example
    except Exception as error:
        scores = attack.goal_function.model([text[0] if len(text) == 1 else tuple(text)])
        before = int(torch.as_tensor(scores)[0].argmax())
        return Record(index, original, original, label, before, None, "error", 0, 0, 0, one_line(error))
    before, after = result.original_result, result.perturbed_result
    return Record(
        index=index,
        original=original,
        perturbed=dict(after.attacked_text._text_input),
        label=label,
        original_prediction=int(before.output),
        perturbed_prediction=int(after.output),
        result=results[kind],
        queries=int(result.num_queries),
        words=before.attacked_text.num_words,
        words_changed=after.attacked_text.words_diff_num(before.attacked_text),
    )


def model_fingerprint(model: nn.Module) -> str:
    """Return a short digest of all parameters and buffers, bit by bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config_fingerprint(model: nn.Module) -> str:
    """Digest what decides the outputs besides weights: the configuration, and the adapters with theirs."""
    config: Any = getattr(model, "config", None)
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    active: Any = getattr(model, "active_adapters", None) if adapters else None
    return _digest(
        {
            "config": config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", None),
            "adapters": adapters,
            "active": active() if callable(active) else active,
        }
    )


def _tokenizer_fingerprint(predictor: Predictor, sample: Examples) -> str:
    """Digest the vocabulary, and the sample as the model gets to see it."""
    tokens = [predictor.encode([text])["input_ids"][0].tolist() for text in sample.texts]
    return _digest([sorted(predictor.tokenizer.get_vocab().items()), tokens])


# Where a model was loaded from, and by what, decides nothing.
_NO_SETTINGS = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(_plain(content)).encode(), digest_size=8).hexdigest()


def _plain(content: Any) -> Any:
    """Write settings in one way only, whatever the order of their sets and dicts."""
    if isinstance(content, dict):
        return sorted((str(key), _plain(value)) for key, value in content.items() if key not in _NO_SETTINGS)
    if isinstance(content, set | frozenset):
        return sorted(map(str, content))
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content if isinstance(content, int | float | str | None) else str(content)


def _write_table(records: dict[str, list[Record]], sample: Examples, folder: Path) -> None:
    """Write all records as one table, with one column per text column."""
    import pandas

    rows = []
    for recipe, kept in records.items():
        for record in kept:
            row = {"recipe": recipe, **asdict(record)}
            for part in ("original", "perturbed"):
                texts = row.pop(part)
                row.update({f"{part}_{column}": texts[column] for column in sample.columns})
            rows.append(row)
    table = pandas.DataFrame(rows)
    # Predictions are missing where an attack broke; a plain int column would turn them all into floats.
    for column in ("original_prediction", "perturbed_prediction"):
        table[column] = table[column].astype("Int64")
    table["error"] = table["error"].astype("string")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "examples.csv", index=False)
    table.to_parquet(folder / "examples.parquet", index=False)


def describe(recipe: Recipe) -> str:
    """Return one line about a recipe: its name, source, and what it needs."""
    needs = "; ".join(resource.name for resource in recipe.needs) or "nothing"
    return f"{recipe.name} ({recipe.source}) needs {needs}"
