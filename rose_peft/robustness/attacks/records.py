"""What is kept of each attacked example, in a file that survives being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data import PathLike
from ..errors import ResumeError

#: What can become of an example: misclassified before the attack, misled, not misled, or the attack itself broke.
RESULTS = ("skipped", "success", "failed", "error")


@dataclass(frozen=True)
class Record:
    """One attacked example.

    Args:
        index: Position of the example in its data set.
        original: Text column -> text.
        perturbed: Text column -> text the attack ended with; the original where it was not run.
        label: The label.
        original_prediction: Class of the original text; None if the attack broke.
        perturbed_prediction: Class of the perturbed text; None if the attack broke.
        result: One of `RESULTS`.
        queries: How often the model was asked.
        words: Words of the original.
        words_changed: Word edits between original and perturbed text.
        error: What broke, in one line.
    """

    index: int
    original: dict[str, str]
    perturbed: dict[str, str]
    label: int
    original_prediction: int | None
    perturbed_prediction: int | None
    result: str
    queries: int
    words: int
    words_changed: int
    error: str | None = None


class RecordLog:
    """Append-only file of records: one JSON line each, on the disk before the next example starts.

    The first line says which run the records belong to. A last line that a kill cut short is dropped and its example
    attacked again.

    Args:
        path: The file.
        run: Everything that decides the outcome of an example: model, data, recipe, seed, budget, versions.
        overwrite: Start again instead of continuing.

    Raises:
        ResumeError: If the file belongs to another run, is damaged before its last line, or another process writes it.
    """

    def __init__(self, path: PathLike, run: Mapping[str, Any], overwrite: bool = False) -> None:
        from filelock import FileLock, Timeout

        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.path}: another process is writing it; wait for it or choose another folder."
            ) from None
        try:
            self.records = {} if overwrite else self._read(dict(run))
            if not self.records:
                self._start(dict(run))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        except BaseException:
            self._lock.release()
            raise

    def _start(self, run: dict[str, Any]) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"run": run}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, run: dict[str, Any]) -> dict[int, Record]:
        """Read the records there are and cut off an unfinished last line."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return {}
        found: dict[int, Record] = {}
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._same_run(entry["run"], run)
                else:
                    record = Record(**entry)
                    found[record.index] = record
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, ResumeError):
                    raise
                raise ResumeError(
                    f"{self.path}: line {number} is damaged; remove that line, or start again with overwrite=True."
                ) from None
        if len(whole) != len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return found

    def _same_run(self, there: dict[str, Any], run: dict[str, Any]) -> None:
        different = [
            f"{key} was {there.get(key)!r} and is {run.get(key)!r}"
            for key in sorted(set(there) | set(run))
            if there.get(key) != run.get(key)
        ]
        if different:
            raise ResumeError(
                f"{self.path}: belongs to another run ({'; '.join(different)}); choose another output_dir, or start "
                "again with overwrite=True."
            )

    def append(self, record: Record) -> None:
        """Write one record through to the disk."""
        self._file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.index] = record

    def close(self) -> None:
        """Close the file and let other processes have it."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
