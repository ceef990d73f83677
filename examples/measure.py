"""What the grid measures of one trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from grid import Evaluation

from rose_peft.robustness import (
    AttackReport,
    DataError,
    DivergedModelError,
    Examples,
    Figure,
    MissingResourceError,
    Predictor,
    ResumeError,
    classification_batches,
    classification_loss,
    evaluate_adv_glue,
    evaluate_noise,
    hessian_trace,
    load_classifier,
    load_glue,
    run_attacks,
    worst_loss,
)
from rose_peft.robustness.data import get_task
from rose_peft.robustness.results import share_figure


def measure(
    model_dir: Path, task: str, data_dir: str | None, max_length: int, settings: Evaluation, attack_dir: Path
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Measure a trained model: clean, AdvGLUE, noise, attacks, sharpness.

    Args:
        model_dir: Folder of the model or adapter.
        task: GLUE task; without a counterpart in AdvGLUE that figure is left out.
        data_dir: Folder of local data; None for the hub.
        max_length: Longest input in tokens, as in training.
        settings: What to measure.
        attack_dir: Folder of the attacks' records, from which a killed measurement continues.

    Returns:
        Figures under the names of result files, and what could not be measured with the reason.

    Raises:
        RobustnessError: If the model or the data cannot be used.
    """
    examples = load_glue(task, data_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_classifier(model_dir, len(get_task(task).label_names), device=device)
    options: dict[str, Any] = {"batch_size": settings.batch_size, "bf16": settings.bf16, "max_length": max_length}
    clean = Predictor.for_examples(model, tokenizer, examples, **options).correct(examples)
    figures = {"clean/accuracy": share_figure(clean)}
    unavailable: dict[str, str] = {}
    if get_task(task).adv_config is not None:
        try:
            found = evaluate_adv_glue(model, tokenizer, task, data_dir=data_dir, clean=examples, **options)
            figures |= found.figures()
        except DataError as error:
            if data_dir is None:
                raise  # the hub may be back when the cell is tried again
            unavailable["AdvGLUE"] = str(error)
    if settings.noise_rates:
        kinds = settings.noise_kinds or None
        try:
            noise = evaluate_noise(
                model, tokenizer, examples, kinds=kinds, rates=settings.noise_rates, seed=settings.seed, **options
            )
            figures |= noise.figures()
            unavailable |= {f"noise {kind}": lack for kind, lack in noise.unavailable.items()}
        except MissingResourceError as error:
            unavailable["noise"] = str(error)
    if settings.recipes:
        try:
            attacks = _attacks(model, tokenizer, examples, settings, attack_dir, options)
            # Their clean accuracy is one of a sample; the one of the whole set is there already.
            figures |= {name: figure for name, figure in attacks.figures().items() if name.startswith("attack/")}
            unavailable |= {f"attack {name}": lack for name, lack in attacks.unavailable.items()}
        except (MissingResourceError, DivergedModelError) as error:
            unavailable["attacks"] = str(error)
    if settings.sharpness_examples:
        figures |= _sharpness(
            model, tokenizer, examples.sample(settings.sharpness_examples, settings.seed), settings, max_length
        )
    return figures, unavailable


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


def _sharpness(
    model: Any, tokenizer: Any, sample: Examples, settings: Evaluation, max_length: int
) -> dict[str, Figure]:
    options = {"batch_size": settings.batch_size, "max_length": max_length}
    predictor = Predictor.for_examples(model, tokenizer, sample, **options)
    batches, loss = classification_batches(predictor, sample), classification_loss(predictor)
    found = worst_loss(
        model, batches, loss, epsilon=settings.epsilon, ascent_steps=settings.ascent_steps, seed=settings.seed
    )
    figures = {
        "landscape/loss": Figure(found.loss, len(sample)),
        "landscape/worst_loss_increase": Figure(found.increase, len(sample)),
    }
    if settings.probes:
        figures["landscape/hessian_trace"] = hessian_trace(
            model, batches, loss, probes=settings.probes, seed=settings.seed
        )
    return figures
