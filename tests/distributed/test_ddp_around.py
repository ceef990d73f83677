"""DDP that is around a model already when ROSE comes; a process group of one process shows it."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rose_peft import ROSEConfig, UnsupportedEngineError, attach_rose
from tests.helpers.tiny import batch, tiny_bert


def test_a_wrapped_model_is_refused_and_the_one_inside_is_welcome(group: None) -> None:
    network = DistributedDataParallel(tiny_bert())
    with pytest.raises(UnsupportedEngineError, match=r"attach_rose\(model\.module, config\)"):
        attach_rose(network, ROSEConfig())
    selector = attach_rose(network.module, ROSEConfig())
    network(**batch(network.module)).loss.backward()
    assert selector.passes.finder.engine.process_groups == [network.process_group]


def test_a_reducer_that_leaves_no_mark_is_refused(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    attach_rose(model, ROSEConfig())
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        network = DistributedDataParallel(model)
        with pytest.raises(UnsupportedEngineError, match="python_reducer"):
            network(**batch(model))
