"""Files and folders that are complete or not there, and the folder of a run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rose_peft.robustness.results import write_json

from .arguments import InputError

ASIDE = ".partial"
# What a run leaves in its folder, in the order of deletion; nothing else there is ever touched. While the note is
# there, the folder is known to be a run's; a run without its checkpoints starts anew.
NOTE = "run.json"
OWN = ("checkpoints", "models", "model", "masks.png", "results.json", NOTE)
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


@contextmanager
def whole_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Let all processes write a folder aside; it gets its name, which nothing has yet, when it is complete.

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
        aside.rename(path)
        sync(path.parent)
    accelerator.wait_for_everyone()


class Checkpoints:
    """The numbered checkpoints of a run, of which the newest complete one wins, and the models of its epochs.

    Nothing is ever replaced: each gets a number of its own, and older ones are deleted once it is complete.

    Args:
        folder: Folder of the run.
        accelerator: Its processes.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.checkpoints, self.models = folder / "checkpoints", folder / "models"
        self.accelerator = accelerator

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, if there is one."""
        return max(_numbered(self.checkpoints), key=lambda path: int(path.name), default=None)

    @contextmanager
    def write(self) -> Iterator[Path]:
        """Give the folder for the next checkpoint; when it is complete, older ones go."""
        newest = self.newest()
        following = self.checkpoints / str(1 if newest is None else int(newest.name) + 1)
        with whole_folder(following, self.accelerator) as aside:
            yield aside
        if self.accelerator.is_main_process:
            _delete_all_but(following)

    @contextmanager
    def write_model(self, epoch: int) -> Iterator[Path]:
        """Give the folder for the model of an epoch; one that a killed process left of the same epoch goes first."""
        if self.accelerator.is_main_process:
            _delete(self.models / str(epoch))
        self.accelerator.wait_for_everyone()
        with whole_folder(self.models / str(epoch), self.accelerator) as aside:
            yield aside

    def forget_models(self, kept: int) -> None:
        """Delete the models of all epochs but one, after a checkpoint that knows which."""
        if self.accelerator.is_main_process:
            _delete_all_but(self.models / str(kept))


def keep_model(folder: Path, epoch: int) -> None:
    """Let the model of an epoch be the run's, at its end; it may have been so already."""
    kept = folder / "models" / str(epoch)
    if kept.exists():
        kept.rename(folder / "model")
        sync(folder)
    _delete(folder / "models")


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _delete_all_but(kept: Path) -> None:
    for path in kept.parent.glob("*"):
        if path != kept:
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTE, {"made_by": MADE_BY, "options": options})


def check_writable(folder: Path) -> None:
    """Check before anything long runs that the output folder can be written.

    Raises:
        InputError: If it, or the folder above it, takes no files.
    """
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if (above.is_dir() and above != folder) or folder.is_dir():
        try:
            with tempfile.TemporaryFile(dir=above):
                return
        except OSError as error:
            reason = error.strerror
    else:
        reason = f"{above} is a file"
    raise InputError(f"output_dir={str(folder)!r} cannot be written ({reason}); pass another folder.")


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
    for final in (folder / name for name in OWN if name != NOTE):
        aside = final.with_name(final.name + ASIDE)
        _delete(aside)
        if final.exists():
            final.rename(aside)  # at no moment does a half-deleted folder bear the final name
            _delete(aside)
