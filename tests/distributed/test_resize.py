"""ROSE's state survives a change of the number of processes: the next masks are those of the run that went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import start, wait
from tests.helpers.comparing import worst

pytestmark = pytest.mark.distributed
# A process group of one, for which nobody else has to find the port.
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run(ranks: int, route: str, action: str, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Run the script and return what each rank wrote."""
    script = str(Path(__file__).with_name("resize.py"))
    output = folder / action
    alone = ALONE if ranks == 1 else {}
    command = [script, route, action, str(folder / "state"), str(output)]
    codes = wait(start(ranks, command, folder / f"log.{action}", **{**environment, **alone}), 300)
    assert codes == [0] * ranks, Path(f"{folder / f'log.{action}'}.0").read_text()[-3000:]
    return [torch.load(f"{output}.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("route", ["dcp ddp", "dcp fsdp2", "accelerate ddp", "accelerate fsdp2"])
def test_state_survives(route: str, before: int, after: int, tmp_path: Path) -> None:
    expected = run(before, route, "save", tmp_path)[0]
    assert int(expected["state"]["steps"]) == 2 and expected["state"]["risk_linear"].any()
    assert (torch.stack(expected["masks"]) == 0).any()
    for found in run(after, route, "load", tmp_path):
        for name, value in expected["state"].items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda one, two: one == two
            one, two = (state[name] for state in (expected["state"], found["state"]))
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                one, two = one.nan_to_num(-1), two.nan_to_num(-1)
            assert same(one, two), name
        assert torch.equal(torch.stack(found["masks"]), torch.stack(expected["masks"][2:]))
        assert worst(found["weights"], expected["weights"]) < 1e-4


def test_zero_itself_refuses_another_number(deepspeed_environment: dict[str, str], tmp_path: Path) -> None:
    run(2, "accelerate zero2", "save", tmp_path, **deepspeed_environment)
    (found,) = run(1, "accelerate zero2", "load", tmp_path, **deepspeed_environment)
    assert "world size" in found["error"]
