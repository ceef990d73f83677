"""What the grid measures of one trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rose_peft.robustness import (
    AttackReport,
    DataError,
    Examples,
    MissingResourceError,
    Predictor,
    ResumeError,
    Row,
    consistency,
    evaluate_adv_glue,
    evaluate_noise,
    evaluate_robust_sets,
    load_classifier,
    load_file,
    load_glue,
    load_robust_files,
    measure_sharpness,
    run_attacks,
)
from rose_peft.robustness.adv_glue import ADV_GLUE
from rose_peft.robustness.data import get_task
from rose_peft.robustness.estimate import share
from rose_peft.robustness.robust_sets import find_file

from .grid import Evaluation


def measure(
    model_dir: Path,
    task: str,
    data_dir: str | None,
    max_length: int,
    settings: Evaluation,
    attack_dir: Path,
    robust_files: Sequence[str] = (),
    validation_file: str | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Measure a trained model: clean, AdvGLUE and other robust sets, noise, consistency, attacks, sharpness.

    Args:
        model_dir: Folder of the model or adapter.
        task: GLUE task that has the columns and labels; without a counterpart in AdvGLUE that figure is left out.
        data_dir: Folder of local data; None for the hub.
        max_length: Longest input in tokens.
        settings: What to measure.
        attack_dir: Folder of the attacks' records, from which a killed measurement continues.
        robust_files: Robust sets as NAME=PATH.
        validation_file: The clean data, where they are not the task's own.

    Returns:
        Rows of a result file, and what could not be measured with the reason.

    Raises:
        RobustnessError: If the model or the data cannot be used.
    """
    layout = get_task(task)
    if validation_file is None:
        examples = load_glue(task, data_dir)
    else:
        found_at = find_file(validation_file, data_dir)
        examples = load_file(found_at, layout.text_columns, label_names=layout.label_names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_classifier(model_dir, len(layout.label_names), device=device)
    options: dict[str, Any] = {"batch_size": settings.batch_size, "bf16": settings.bf16, "max_length": max_length}
    clean = share(Predictor.for_examples(model, tokenizer, examples, **options).correct(examples))
    rows = [Row("clean_accuracy", clean)]
    once = {"clean_accuracy": clean, **options}
    unavailable: dict[str, str] = {}
    if layout.adv_config is not None:
        try:
            found = evaluate_adv_glue(model, tokenizer, task, data_dir=data_dir, **once)
            rows += found.rows()[1:]
        except DataError as error:
            if data_dir is None:
                raise  # the hub may be back when the cell is tried again
            unavailable[ADV_GLUE] = str(error)
    robust = load_robust_files(robust_files, layout.text_columns, label_names=layout.label_names, data_dir=data_dir)
    rows += evaluate_robust_sets(model, tokenizer, robust, **options)
    if settings.noise_rates:
        kinds = settings.noise_kinds or None
        try:
            noise = evaluate_noise(
                model, tokenizer, examples, kinds=kinds, rates=settings.noise_rates, seed=settings.seed, **once
            )
            rows += noise.rows()[1:]
            unavailable |= {f"noise {kind}": lack for kind, lack in noise.unavailable.items()}
        except MissingResourceError as error:
            unavailable["noise"] = str(error)
    if settings.consistency_changes:
        try:
            steady = consistency(
                model, tokenizer, examples.texts, changes=settings.consistency_changes, seed=settings.seed, **options
            )
            rows += steady.rows()
            unavailable |= {f"consistency under {change}": lack for change, lack in steady.unavailable.items()}
        except MissingResourceError as error:
            unavailable["consistency"] = str(error)
    if settings.recipes:
        try:
            attacks = _attacks(model, tokenizer, examples, settings, attack_dir, options)
            # Their clean accuracy is one of a sample; the one of the whole set is there already.
            rows += [row for row in attacks.rows() if row.measure != "clean_accuracy"]
            unavailable |= {f"attack {name}": lack for name, lack in attacks.unavailable.items()}
        except MissingResourceError as error:
            unavailable["attacks"] = str(error)
    if settings.sharpness_examples:
        sample = examples.sample(settings.sharpness_examples, settings.seed)
        predictor = Predictor.for_examples(model, tokenizer, sample, **{**options, "bf16": False})
        rows += measure_sharpness(
            predictor,
            sample,
            epsilon=settings.epsilon,
            ascent_steps=settings.ascent_steps,
            probes=settings.probes,
            seed=settings.seed,
        )
    return rows, unavailable


def _attacks(
    model: Any, tokenizer: Any, examples: Examples, settings: Evaluation, folder: Path, options: dict[str, Any]
) -> AttackReport:
    def attack(overwrite: bool) -> AttackReport:
        return run_attacks(
            model,
            tokenizer,
            examples,
            settings.recipes,
            output_dir=folder,
            num_examples=settings.attack_examples,
            seed=settings.seed,
            query_budget=settings.query_budget,
            overwrite=overwrite,
            **options,
        )

    try:
        return attack(overwrite=False)
    except ResumeError:  # records of other settings, or of a model that was trained anew: there is no result of them
        return attack(overwrite=True)
