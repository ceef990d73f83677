"""A tiny task that the tests of the scripts share."""

from __future__ import annotations

import pytest

from tests.helpers.task import tiny_task


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny model and of data for it, see `tiny_task`."""
    return tiny_task(tmp_path_factory.mktemp("inputs"))
