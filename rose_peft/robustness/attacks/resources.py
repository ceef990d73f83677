"""What an evaluation needs beyond Python code, whether it is on this machine, and how to get it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Resource:
    """A package, word list or model.

    Args:
        name: What it is, in the user's words.
        present: Whether it is on this machine, without using the network.
        way_out: How to get it.
        fetched_in_use: Whether the library that uses it downloads it by itself when it can reach the network.
    """

    name: str
    present: Callable[[], bool]
    way_out: str
    fetched_in_use: bool = False

    def lack(self) -> str | None:
        """Return None if it is there, else one sentence with its name and the way to get it."""
        return None if self.present() else f"{self.name}: {self.way_out}"


def package(module: str, requirement: str | None = None) -> Resource:
    """Describe an importable Python package."""
    requirement = requirement or module
    return Resource(
        f"the Python package {requirement}", lambda: find_spec(module) is not None, f"pip install '{requirement}'."
    )


def nltk_data(path: str, what: str) -> Resource:
    """Describe a data package of NLTK, such as `corpora/wordnet`."""

    def present() -> bool:
        if find_spec("nltk") is None:
            return False
        import nltk

        for name in (path, f"{path}.zip"):
            try:
                nltk.data.find(name)
                return True
            except LookupError:
                continue
        return False

    return Resource(
        f"NLTK's {what} ({path})",
        present,
        "set NLTK_DATA to the folder that holds it, or get it with "
        f"'pip install nltk && python -m nltk.downloader {path.rpartition('/')[2]}'.",
    )


def textattack_file(path: str, what: str) -> Resource:
    """Describe a file or folder that TextAttack keeps in its cache and downloads from its own server."""
    return Resource(
        f"{what} ({path} in TextAttack's cache)",
        lambda: (textattack_cache() / path).exists(),
        "run once with downloads allowed and a network, or copy the cache and set TA_CACHE_DIR.",
        fetched_in_use=True,
    )


def textattack_table(path: str) -> Resource:
    """Describe a file that TextAttack reads from its own folder and that its published package may lack."""

    def present() -> bool:
        spec = find_spec("textattack")
        return spec is not None and spec.origin is not None and (Path(spec.origin).parent / path).is_file()

    return Resource(
        f"TextAttack's file {path}",
        present,
        f"its published package lacks it; copy textattack/{path} there from its source repository.",
    )


def hub_model(name: str) -> Resource:
    """Describe a model of the Hugging Face hub."""

    def present() -> bool:
        if Path(name).is_dir():
            return True
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(name, "config.json"), str)

    return Resource(
        f"the hub model {name}",
        present,
        f"run once with downloads allowed and a network, or 'hf download {name}'.",
        fetched_in_use=True,
    )


def tfhub_model(url: str, what: str) -> Resource:
    """Describe a model of TensorFlow Hub, which its library keeps under a digest of its address.

    TextAttack has the models kept in its own cache where that is set and their place is not.
    """

    def present() -> bool:
        folder = os.environ.get("TFHUB_CACHE_DIR") or os.environ.get("TA_CACHE_DIR")
        folder = folder or os.path.join(tempfile.gettempdir(), "tfhub_modules")
        return (Path(folder) / hashlib.sha1(url.encode()).hexdigest()).is_dir()

    return Resource(
        f"{what} ({url})",
        present,
        "run once with downloads allowed and a network, and keep it by setting TFHUB_CACHE_DIR.",
        fetched_in_use=True,
    )


def flair_model(name: str) -> Resource:
    """Describe a tagger of flair, which its library keeps in a cache of its own."""

    def present() -> bool:
        root = os.environ.get("FLAIR_CACHE_ROOT") or str(Path.home() / ".flair")
        return (Path(root) / "models" / name).is_dir()

    return Resource(
        f"flair's tagger {name}",
        present,
        "run once with downloads allowed and a network, or copy the cache and set FLAIR_CACHE_ROOT.",
        fetched_in_use=True,
    )


def textattack_cache() -> Path:
    """Return the folder in which TextAttack keeps its downloads."""
    return Path(os.environ.get("TA_CACHE_DIR", "~/.cache/textattack")).expanduser()


NLTK_STOPWORDS = nltk_data("corpora/stopwords", "list of stop words")
NLTK_WORDNET = nltk_data("corpora/wordnet", "WordNet")
TEXTATTACK = package("textattack", "textattack>=0.3.11")
