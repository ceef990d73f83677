"""Importing TextAttack, and building its parts, without its downloads.

On import TextAttack 0.3 runs a once-per-user "post-install" that downloads six NLTK packages and, with stanza
installed, a parser; without a network this prints pages of errors, or hangs until the connection times out. It then
reads NLTK's list of stop words. Its WordNet transformation downloads another package each time one is made. None of
these downloads is needed where the word lists are there. On the way TextAttack switches every existing logger off and
flair switches every one on, also those that the user had switched off; and where TA_CACHE_DIR is set, TextAttack moves
the caches of TensorFlow Hub and of the Hugging Face libraries there, also those that the user had placed elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import MissingResourceError
from .resources import NLTK_STOPWORDS, TEXTATTACK, package, textattack_cache

_FLAIR = package("flair")
# Under this name TextAttack 0.3 remembers that its post-install has run.
_MARKER = "post_install_check_3"
_SET_BY_TEXTATTACK = (
    "TOKENIZERS_PARALLELISM",
    "TFHUB_CACHE_DIR",
    "PYTORCH_TRANSFORMERS_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "WANDB_SILENT",
)


def import_textattack() -> ModuleType:
    """Import TextAttack without network access, keeping the user's loggers and environment as they are.

    Raises:
        MissingResourceError: If TextAttack, flair or NLTK's stop words are missing, or its cache cannot be written.
    """
    if "textattack" in sys.modules:
        return sys.modules["textattack"]
    for resource in (TEXTATTACK, _FLAIR, NLTK_STOPWORDS):
        lack = resource.lack()
        if lack:
            raise MissingResourceError(f"TextAttack attacks need {lack}")
    loggers = {name: log.disabled for name, log in _loggers()}
    environment = {name: os.environ.get(name) for name in _SET_BY_TEXTATTACK}
    try:
        with _post_install_done(), without_downloads():
            import textattack
    finally:
        for name, log in _loggers():
            log.disabled = loggers.get(name, False)
        _restore(environment)
    return textattack


def _restore(environment: dict[str, str | None]) -> None:
    """Take back what TextAttack set, but for the place of TensorFlow Hub's models where the user named none."""
    for name, value in environment.items():
        if value is not None:
            os.environ[name] = value
        elif name != "TFHUB_CACHE_DIR":
            os.environ.pop(name, None)


def _loggers() -> list[tuple[str, logging.Logger]]:
    known = logging.Logger.manager.loggerDict
    return [(name, log) for name, log in known.items() if isinstance(log, logging.Logger)]


@contextmanager
def _post_install_done() -> Iterator[None]:
    """Let TextAttack believe that its post-install has run, and leave its cache as it was."""
    folder = textattack_cache()
    marker = folder / _MARKER
    ran_before = marker.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise MissingResourceError(
            f"TextAttack needs a cache folder and cannot write to {folder} ({error.strerror}); set TA_CACHE_DIR."
        ) from None
    try:
        yield
    finally:
        if not ran_before:
            marker.unlink(missing_ok=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Make `nltk.download` do nothing; what is missing is reported by the resource checks instead."""
    import nltk

    def skip(*_: Any, **__: Any) -> bool:
        return False

    original = nltk.download
    nltk.download = skip
    try:
        yield
    finally:
        nltk.download = original


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back TextAttack's remarks about model classes it does not know; errors still show."""
    log = logging.getLogger("textattack.shared.utils.install")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
