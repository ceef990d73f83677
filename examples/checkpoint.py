"""Files and folders that are complete or not there, and the folder of a run."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from arguments import InputError

ASIDE, OLD = ".partial", ".old"
# What a run leaves in its folder, in the order of deletion; nothing else there is ever touched. While the note is
# there, the folder is known to be a run's; a run without its checkpoint starts anew.
NOTE = "run.json"
OWN = ("checkpoint", "model", "masks.png", "results.json", NOTE)
MADE_BY = "rose-peft examples/train.py"


def sync(*paths: Path) -> None:
    """Force files, or the names in folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; it replaces the one at `path` when it is complete."""
    aside = path.with_name(path.name + ASIDE)
    yield aside
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole under its name at any moment; NaN and infinity become null."""
    with whole_file(path) as aside:
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def whole_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Let all processes write a folder aside; it gets its name, in place of an older one, when it is complete.

    Args:
        path: Final name.
        accelerator: Its main process renames.
    """
    aside = path.with_name(path.name + ASIDE)
    if accelerator.is_main_process:
        _delete(aside)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield aside
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sync(*aside.rglob("*"), aside)
        _replace_folder(aside, path)
    accelerator.wait_for_everyone()


def _replace_folder(aside: Path, path: Path) -> None:
    """Give a complete folder its name; the one that had it is deleted."""
    if not path.exists():
        aside.rename(path)
    elif not _exchange(aside, path):
        # No system call replaces a folder that holds something: for a moment the name is free. `recover` knows.
        old = path.with_name(path.name + OLD)
        path.rename(old)
        aside.rename(path)
        aside = old
    sync(path.parent)
    _delete(aside)


def _exchange(one: Path, two: Path) -> bool:
    """Let two names change places in one step, where the system can do that (Linux); return whether it did."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Finish or undo what a killed process left half done in the folder of a run."""
    for final in (folder / name for name in OWN):
        old, aside = final.with_name(final.name + OLD), final.with_name(final.name + ASIDE)
        if old.exists() and not final.exists():  # killed between the two renames: the old one is the last complete one
            old.rename(final)
        _delete(old)
        _delete(aside)


def open_run(folder: Path, options: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make sure that the output folder is this run's, and note the options in it.

    Args:
        folder: Output folder.
        options: Options that define the run.
        resume: Continue what is there.
        overwrite: Delete the run that is there; files of others stay.

    Raises:
        InputError: If the folder holds something else, or a run with other options.
    """
    saved = read_note(folder)
    if saved is None:
        if resume:
            raise InputError(f"resume: there is no run in output_dir={str(folder)!r}; leave --resume out.")
    elif overwrite:
        _delete_run(folder)
    elif not resume:
        raise InputError(
            f"output_dir={str(folder)!r} holds another run; pass --resume to continue it, --overwrite to delete it, "
            "or another folder."
        )
    else:
        for name in {**saved, **options}:
            if saved.get(name) != options.get(name):
                raise InputError(
                    f"{name}={options.get(name)!r} differs from {saved.get(name)!r} in {folder / NOTE}; resume with "
                    "the same options, or pass another --output_dir."
                )
        recover(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTE, {"made_by": MADE_BY, "options": options})


def read_note(folder: Path) -> dict[str, Any] | None:
    """Read the options of the run in a folder; None if the folder is free for a new one.

    Raises:
        InputError: If the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={str(folder)!r} is a file; pass another folder.")
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note["made_by"] == MADE_BY:
            return note["options"]
    except FileNotFoundError:
        if not folder.exists() or {path.name for path in folder.iterdir()} <= {NOTE + ASIDE}:
            return None
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"output_dir={str(folder)!r} is not empty and holds no run of this script; pass another folder.")


def _delete_run(folder: Path) -> None:
    """Delete what the run left but its note, without which the folder could not be overwritten once more."""
    recover(folder)
    for final in (folder / name for name in OWN if name != NOTE):
        if final.exists():
            aside = final.with_name(final.name + ASIDE)
            final.rename(aside)  # at no moment does a half-deleted folder bear the final name
            _delete(aside)
