"""What a result file says of the code that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rose_peft.robustness import Result, load_result
from rose_peft.robustness.results import source_commit


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    source_commit.cache_clear()


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_the_commit_is_the_last_that_touched_the_package(clone: Path) -> None:
    first = git(clone, "rev-parse", "HEAD").strip()
    (clone / "notes.txt").write_text("nothing of the package")
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "-m", "second")
    found = source_commit(clone / "package")
    assert len(found) >= 4 and first.startswith(found)


def test_files_that_differ_from_it_are_told(clone: Path) -> None:
    before = source_commit(clone / "package")
    (clone / "package" / "code.py").write_text("2")
    source_commit.cache_clear()
    assert source_commit(clone / "package") == before + "+"


def test_what_git_does_not_track_has_no_commit(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor has what is installed in a virtual environment inside of a user's own clone."""
    installed = clone / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("1")
    outside = tmp_path_factory.mktemp("outside")
    assert source_commit(installed) == "" == source_commit(outside) == source_commit(outside / "missing")


def test_results_carry_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for commit in ("abc1234+", ""):
        monkeypatch.setattr("rose_peft.robustness.results.source_commit", lambda folder, commit=commit: commit)
        Result("plain", "sst2", 0).save(tmp_path / "one.result.json")
        assert load_result(tmp_path / "one.result.json").versions.get("rose-peft commit", "") == commit
