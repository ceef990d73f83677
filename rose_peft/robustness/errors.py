"""Every error the evaluation kit raises on purpose: one line that names the field, its value, and the way out."""

import errno


class RobustnessError(ValueError):
    """Base of all errors of the kit, for users who want to catch any of them."""


class DataError(RobustnessError):
    """A data set is missing, empty, unlabelled, or not laid out as asked for."""


class LabelMismatchError(RobustnessError):
    """The labels of the data and the classes of the model are not the same set."""


class UnknownTaskError(RobustnessError):
    """No task of this name, or none with what was asked for."""


class ModelError(RobustnessError):
    """The model or tokenizer cannot be evaluated as a classifier of text."""


class DivergedModelError(ModelError):
    """A model's scores are no numbers any more."""


class MissingResourceError(RobustnessError):
    """A package, word list or model that the evaluation needs is not on this machine."""


class UnknownRecipeError(RobustnessError):
    """No attack recipe of this name."""


class ResumeError(RobustnessError):
    """Records of an earlier run cannot be continued by this one."""


class ResultFileError(RobustnessError):
    """A result file is truncated, or was not written by this version of the kit."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error, of whatever library, says that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
