"""Pipeline parallelism is refused, however ROSE and the stages come together; one process shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline

from rose_peft import ROSEConfig, UnsupportedEngineError, attach_rose, get_selector
from tests.helpers.blocks import DropoutBlocks

REFUSAL = r"stage \d of 2 of a pipeline.*FSDP2"


class Half(nn.Module):
    """A part of a model, as those who make stages by hand write it."""

    def __init__(self, model: DropoutBlocks, layers: slice) -> None:
        super().__init__()
        self.layers = nn.ModuleList(list(model.layers)[layers])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.3, training=self.training)
        return x


def stage(module: nn.Module, stages: int = 2) -> PipelineStage:
    return PipelineStage(module, 0, stages, torch.device("cpu"))


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
def test_a_stage_that_rose_is_attached_to(group: None, strategy: str) -> None:
    half = Half(DropoutBlocks(dtype=torch.float32), slice(0, 3))
    attach_rose(half, ROSEConfig(strategy=strategy))
    made = stage(half)
    with pytest.raises(UnsupportedEngineError, match=REFUSAL):
        made.submod(torch.randn(4, 3))


@pytest.mark.parametrize("strategy", ["second_order", "ensemble"])
def test_a_stage_of_a_model_that_rose_is_attached_to(group: None, strategy: str) -> None:
    """The stage is called in the model's place, so the step is what ROSE sees first."""
    model = DropoutBlocks(dtype=torch.float32)
    attach_rose(model, ROSEConfig(strategy=strategy))
    made = stage(Half(model, slice(0, 3)))
    made.submod(torch.randn(4, 3)).square().sum().backward()
    with pytest.raises(UnsupportedEngineError, match=REFUSAL):
        torch.optim.AdamW(made.submod.parameters()).step()


def test_a_traced_stage(group: None) -> None:
    model = DropoutBlocks(dtype=torch.float32)
    traced = pipeline(model, (torch.randn(4, 3),), split_spec={"layers.2": SplitPoint.BEGINNING})
    attach_rose(model, ROSEConfig(strategy="second_order"))
    made = traced.build_stage(0, torch.device("cpu"))
    made.submod(torch.randn(4, 3))
    with pytest.raises(UnsupportedEngineError, match=REFUSAL):
        model(torch.randn(4, 3))


def test_a_pipeline_of_one_stage_and_one_of_another_model_are_welcome(group: None) -> None:
    other = stage(Half(DropoutBlocks(), slice(0, 3)))
    model = DropoutBlocks(dtype=torch.float32)
    selector = attach_rose(model, ROSEConfig(strategy="second_order"))
    schedule = ScheduleGPipe(stage(model, 1), 2, loss_fn=lambda output, target: output.square().mean())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        schedule.step(torch.randn(8, 3), target=torch.zeros(8, 2))
        optimizer.step()
        optimizer.zero_grad()
    assert get_selector(model) is selector and selector.statistics().steps == 2 and other.num_stages == 2
