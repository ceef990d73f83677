"""ROSE, robust selective fine-tuning, as a PEFT method. Importing this package registers it with PEFT."""

from .registration import add_peft_type, register

add_peft_type()

from .attach import attach_rose, detach_rose, get_selector  # noqa: E402
from .config import ROSEConfig  # noqa: E402
from .errors import (  # noqa: E402
    AdapterFileError,
    AlreadyAttachedError,
    RankMismatchError,
    RoseConfigError,
    RoseError,
    RoseInactiveError,
    TargetModulesError,
    UnsupportedEngineError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)
from .model_card import update_model_card, write_cards_with_peft  # noqa: E402
from .optimizers import MomentumRule, register_momentum_rule  # noqa: E402
from .plots import plot_masks  # noqa: E402
from .scores import Facts, FirstOrder, Score, Scores, SecondOrder, Stepping  # noqa: E402
from .selector import RoseSelector  # noqa: E402
from .state import RoseStatistics, UnitStatistics  # noqa: E402
from .tuner import ROSEModel  # noqa: E402
from .version import __version__  # noqa: E402

register(ROSEConfig, ROSEModel)
write_cards_with_peft()

__all__ = [
    "AdapterFileError",
    "AlreadyAttachedError",
    "Facts",
    "FirstOrder",
    "MomentumRule",
    "ROSEConfig",
    "ROSEModel",
    "RankMismatchError",
    "RoseCallback",
    "RoseConfigError",
    "RoseError",
    "RoseInactiveError",
    "RoseSelector",
    "RoseStatistics",
    "Score",
    "Scores",
    "SecondOrder",
    "Stepping",
    "TargetModulesError",
    "UnitStatistics",
    "UnsupportedEngineError",
    "UnsupportedModelError",
    "UnsupportedOptimizerError",
    "__version__",
    "attach_rose",
    "detach_rose",
    "get_selector",
    "plot_masks",
    "register_momentum_rule",
    "update_model_card",
]


def __getattr__(name: str) -> object:
    # transformers' trainer modules are slow to import, and only Trainer users need them.
    if name == "RoseCallback":
        from .callbacks import RoseCallback

        return RoseCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
