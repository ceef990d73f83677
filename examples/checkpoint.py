"""Files that are complete or not there: folders written aside and renamed, and the state of a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from arguments import InputError

ASIDE, OLD = ".partial", ".old"


def sync(path: Path) -> None:
    """Force a file, or a folder with all its files, to the disk."""
    for item in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole under its name at any moment."""
    aside = path.with_name(path.name + ASIDE)
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    sync(aside)
    os.replace(aside, path)


@contextmanager
def whole_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Let all processes write a folder aside; it gets its name, in place of an older one, when it is complete.

    Args:
        path: Final name.
        accelerator: Its main process renames.
    """
    aside = path.with_name(path.name + ASIDE)
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield aside
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sync(aside)
        old = path.with_name(path.name + OLD)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def recover(folder: Path) -> None:
    """Finish or undo what a killed process left half done in a folder of `whole_folder` results."""
    for old in folder.glob("*" + OLD):
        final = old.with_name(old.name.removesuffix(OLD))
        if final.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames: the old one is the last complete one
            old.rename(final)
    for aside in folder.glob("*" + ASIDE):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def open_run(folder: Path, options: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make sure that the output folder is this run's, and note the options in it.

    Args:
        folder: Output folder.
        options: Options that define the run.
        resume: Continue what is there.
        overwrite: Delete what is there.

    Raises:
        InputError: If the folder holds something else, or a run with other options.
    """
    note = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={str(folder)!r} is a file; pass another folder.")
    if folder.is_dir():
        recover(folder)
    if note.exists() and overwrite:
        trash = folder.with_name(folder.name + OLD)  # renamed first: a run that is half deleted looks like no run
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)
    elif note.exists() and resume:
        saved = json.loads(note.read_text(encoding="utf-8"))
        for name, value in options.items():
            if saved.get(name) != value:
                raise InputError(
                    f"{name}={value!r} differs from {saved.get(name)!r} in {note}; resume with the same options, or "
                    "pass another --output_dir."
                )
    elif note.exists():
        raise InputError(
            f"output_dir={str(folder)!r} holds another run; pass --resume to continue it, --overwrite to delete it, "
            "or another folder."
        )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"output_dir={str(folder)!r} is not empty and holds no run; pass another folder.")
    elif resume:
        raise InputError(f"resume: there is no run in output_dir={str(folder)!r}; leave --resume out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, options)
