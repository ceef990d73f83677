"""Is a fine-tuned classifier robust? Measurements for any `transformers` classifier or `PeftModel`, ROSE or not.

- `evaluate_adv_glue`: accuracy on AdvGLUE beside the clean accuracy.
- `evaluate_noise`: accuracy under typos, homoglyphs, synonyms and the like; no search, fast.
- `run_attacks`: TextAttack recipes by name; resumable, and without network where a recipe needs none.
- `loss_surface`, `worst_loss`, `hessian_trace`: the loss around the weights.
- `consistency`: how much predictions change under dropout, typos and synonyms; needs no labels.
- `write_report`: result files to one page.

Also `python -m rose_peft.robustness {noise,attack,landscape,consistency,report} --help`. Every accuracy comes with a
95 % interval. Importing this package imports neither TextAttack nor pandas, datasets, scipy or matplotlib; what needs
them imports them when it is called.
"""

from .adv_glue import AdvGlueResult, evaluate_adv_glue
from .attacks.recipes import PRESETS, RECIPES
from .attacks.run import AttackReport, RecipeResult, run_attacks
from .consistency import ConsistencyResult, consistency
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
from .estimate import Estimate, bootstrap_mean, bootstrap_paired_difference, paired_difference, wilson
from .landscape import (
    Sharpness,
    Surface,
    classification_batches,
    classification_loss,
    hessian_trace,
    loss_surface,
    measure_sharpness,
    worst_loss,
)
from .loading import load_classifier
from .noise import NoiseResult, add_noise, evaluate_noise
from .plotting import plot_noise, plot_surfaces
from .predict import Predictor, evaluating
from .report import Report, write_report
from .results import MEASURES, SCHEMA_VERSION, Result, Row, load_result
from .robust_sets import evaluate_robust_sets, load_robust_files

__all__ = [
    "MEASURES",
    "PRESETS",
    "RECIPES",
    "SCHEMA_VERSION",
    "TASKS",
    "AdvGlueResult",
    "AttackReport",
    "ConsistencyResult",
    "DataError",
    "DivergedModelError",
    "Estimate",
    "Examples",
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
    "Row",
    "Sharpness",
    "Surface",
    "UnknownRecipeError",
    "UnknownTaskError",
    "add_noise",
    "bootstrap_mean",
    "bootstrap_paired_difference",
    "classification_batches",
    "classification_loss",
    "consistency",
    "evaluate_adv_glue",
    "evaluate_noise",
    "evaluate_robust_sets",
    "evaluating",
    "examples_from_columns",
    "hessian_trace",
    "load_adv_glue",
    "load_classifier",
    "load_file",
    "load_glue",
    "load_hub",
    "load_result",
    "load_robust_files",
    "loss_surface",
    "measure_sharpness",
    "paired_difference",
    "plot_noise",
    "plot_surfaces",
    "run_attacks",
    "wilson",
    "worst_loss",
    "write_report",
]
