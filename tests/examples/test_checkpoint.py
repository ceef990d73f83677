"""examples/checkpoint.py: killed before any single operation on files, what bears its final name is whole."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("datasets")
from examples.training import checkpoint
from examples.training.arguments import InputError
from rose_peft.robustness.results import write_json

ALONE: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
PARTS = ("weights", "progress")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def killed(action: Callable[[], None], at: int) -> bool:
    """Do something in a process of its own, killed before its operation number `at`; return whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in OPERATIONS:
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(die)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def save(path: Path, content: str) -> None:
    checkpoint._delete(path)
    with checkpoint.whole_folder(path, ALONE) as aside:
        (aside / "deep").mkdir()
        for part in PARTS:
            (aside / "deep" / part).write_text(content)


def content(path: Path) -> str:
    """What a whole folder holds; fails for one that is not whole."""
    (value,) = {(path / "deep" / part).read_text() for part in PARTS}
    return value


def test_the_newest_complete_checkpoint_wins(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with checkpoint.Checkpoints(tmp_path, ALONE).write() as aside:
            for part in PARTS:
                (aside / "deep").mkdir(exist_ok=True)
                (aside / "deep" / part).write_text(text)

    def newest() -> str:
        found = checkpoint.Checkpoints(tmp_path, ALONE).newest()
        assert found is not None
        return content(found)

    write("first")
    seen = []
    for at in range(200):
        if not killed(lambda: write("second"), at):
            break
        seen.append(newest())
        write("first")
    else:
        pytest.fail("the process was killed every time")
    assert newest() == "second"
    # Killed before the new one is complete, the old one is what there is; killed later, while the old one is deleted,
    # the new one is.
    assert len(seen) > 10 and seen == sorted(seen) and set(seen) == {"first", "second"}
    write("third")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_model_is_there_under_its_name_when_it_is_complete(tmp_path: Path) -> None:
    def write() -> None:
        checkpoints = checkpoint.Checkpoints(tmp_path, ALONE)
        for epoch in (1, 2):
            with checkpoints.write_model(epoch) as aside:
                (aside / "deep").mkdir()
                for part in PARTS:
                    (aside / "deep" / part).write_text(str(epoch))
        checkpoints.forget_models(2)
        checkpoint.keep_model(tmp_path, 2)

    for at in range(200):
        if not killed(write, at):
            break
        if (tmp_path / "model").exists():
            assert content(tmp_path / "model") == "2"
            checkpoint.keep_model(tmp_path, 2)  # as the resumed run does
            assert content(tmp_path / "model") == "2" and not (tmp_path / "models").exists()
        checkpoint._delete(tmp_path / "model")
    else:
        pytest.fail("the process was killed every time")
    assert at > 20 and content(tmp_path / "model") == "2"


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"accuracy": 0.5})
    for at in range(20):
        if not killed(lambda: write_json(path, {"accuracy": 0.75, "score": float("nan")}), at):
            break
        assert json.loads(path.read_text()) in ({"accuracy": 0.5}, {"accuracy": 0.75, "score": None})
    assert at > 3 and json.loads(path.read_text()) == {"accuracy": 0.75, "score": None}


def test_an_interrupted_overwrite_can_be_repeated(tmp_path: Path) -> None:
    folder, backup = tmp_path / "run", tmp_path / "run.old"
    backup.mkdir()
    (backup / "mine").write_text("backup")

    def fill() -> None:
        for name in ("model", "checkpoints"):
            save(folder / name, "first")
        (folder / "notes.txt").write_text("mine")

    checkpoint.open_run(folder, {"seed": 0}, resume=False, overwrite=False)
    for at in range(200):
        fill()
        if not killed(lambda: checkpoint.open_run(folder, {"seed": 1}, resume=False, overwrite=True), at):
            break
        for name in ("model", "checkpoints"):
            if (folder / name).exists():
                content(folder / name)
        if not (folder / "checkpoints").exists():  # what is resumed then starts anew, so the model may be gone
            continue
        assert content(folder / "model") == "first"
    assert at > 10
    assert checkpoint.read_note(folder) == {"seed": 1}
    assert sorted(item.name for item in folder.iterdir()) == ["notes.txt", "run.json"]
    assert (backup / "mine").read_text() == "backup"


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.partial", "model.old", "run.json"):
        (tmp_path / name).write_text('{"made_by": "something else"}')
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(InputError, match="holds no run of this script; pass another folder"):
            checkpoint.open_run(tmp_path, {}, resume, overwrite)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.old", "run.json", "thesis.partial"]


@pytest.mark.parametrize("text", ["", "[]", '{"options": {}}', "\x00"])
def test_a_note_that_is_not_ours_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match="pass another folder"):
        checkpoint.open_run(tmp_path, {}, resume=True, overwrite=False)


def test_a_run_killed_before_its_note_leaves_a_free_folder(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("{")
    checkpoint.open_run(tmp_path, {"seed": 0}, resume=False, overwrite=False)
    assert checkpoint.read_note(tmp_path) == {"seed": 0}
