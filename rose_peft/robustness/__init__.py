"""Is a fine-tuned classifier robust? Measurements for any `transformers` classifier or `PeftModel`, ROSE or not.

- `evaluate_adv_glue`: accuracy on AdvGLUE beside the clean accuracy.
- `evaluate_noise`: accuracy under typos, homoglyphs, synonyms and the like; no search, fast.
- `run_attacks`: TextAttack recipes by name; resumable, and without network where a recipe needs none.
- `loss_surface`, `worst_loss`, `hessian_trace`: the loss around the weights.
- `write_report`: result files to one page. Also `python -m rose_peft.robustness RESULTS --output_dir FOLDER`.

Every accuracy comes with a 95 % interval. Importing this package imports neither TextAttack nor pandas, datasets or
matplotlib; what needs them imports them when it is called.
"""

from .adv_glue import AdvGlueResult, evaluate_adv_glue
from .attack_recipes import PRESETS, RECIPES
from .attacks import AttackReport, RecipeResult, run_attacks
from .data import TASKS, Examples, examples_from_columns, load_adv_glue, load_file, load_glue, load_hub
from .errors import (
    DataError,
    DivergedModelError,
    LabelMismatchError,
    MissingResourceError,
    ModelError,
    ResultFileError,
    ResumeError,
    RobustnessError,
    UnknownRecipeError,
    UnknownTaskError,
)
from .intervals import Interval, bootstrap_mean, bootstrap_paired_difference, wilson
from .landscape import (
    Sharpness,
    Surface,
    classification_batches,
    classification_loss,
    hessian_trace,
    loss_surface,
    plot_surfaces,
    worst_loss,
)
from .loading import load_classifier
from .noise import NoiseResult, add_noise, evaluate_noise, plot_noise
from .predict import Predictor, evaluating
from .report import Report, write_report
from .results import SCHEMA_VERSION, Figure, Result, load_result

__all__ = [
    "PRESETS",
    "RECIPES",
    "SCHEMA_VERSION",
    "TASKS",
    "AdvGlueResult",
    "AttackReport",
    "DataError",
    "DivergedModelError",
    "Examples",
    "Figure",
    "Interval",
    "LabelMismatchError",
    "MissingResourceError",
    "ModelError",
    "NoiseResult",
    "Predictor",
    "RecipeResult",
    "Report",
    "Result",
    "ResultFileError",
    "ResumeError",
    "RobustnessError",
    "Sharpness",
    "Surface",
    "UnknownRecipeError",
    "UnknownTaskError",
    "add_noise",
    "bootstrap_mean",
    "bootstrap_paired_difference",
    "classification_batches",
    "classification_loss",
    "evaluate_adv_glue",
    "evaluate_noise",
    "evaluating",
    "examples_from_columns",
    "hessian_trace",
    "load_adv_glue",
    "load_classifier",
    "load_file",
    "load_glue",
    "load_hub",
    "load_result",
    "loss_surface",
    "plot_noise",
    "plot_surfaces",
    "run_attacks",
    "wilson",
    "worst_loss",
    "write_report",
]
