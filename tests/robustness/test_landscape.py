"""Landscape and sharpness against functions whose answers are known, and on real architectures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rose_peft.robustness.data import Examples
from rose_peft.robustness.directions import filter_normalised_direction, mean_loss, weights_in_use
from rose_peft.robustness.errors import ModelError, RobustnessError
from rose_peft.robustness.landscape import (
    Surface,
    classification_batches,
    classification_loss,
    hessian_trace,
    loss_surface,
    worst_loss,
)
from rose_peft.robustness.plotting import plot_surfaces
from rose_peft.robustness.predict import Predictor
from tests.helpers.victims import tiny_bert

EXAMPLES = Examples((("good film",), ("a bad dull story",), ("it was great",), ("boring",)), (1, 0, 1, 0))


class Quadratic(nn.Module):
    """Loss 1/2 (w - w0)' H (w - w0) + slope' (w - w0) with w at w0, w a matrix of one column per entry."""

    def __init__(self, hessian: torch.Tensor, at: torch.Tensor, slope: torch.Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(at.clone()[:, None])
        self.at, self.hessian = at, hessian
        self.slope = torch.zeros_like(at) if slope is None else slope

    def forward(self) -> torch.Tensor:
        offset = self.w[:, 0] - self.at
        return 0.5 * offset @ self.hessian @ offset + self.slope @ offset


def value(model: nn.Module, batch: Any) -> torch.Tensor:
    return model()[None]


def symmetric(seed: int, size: int = 6) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return matrix @ matrix.T


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.lists(shapes, min_size=1, max_size=3), st.integers(0, 99))
def test_every_filter_of_a_direction_is_as_long_as_the_models(sizes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=generator) for size in sizes]
    weights[0][0] = 0.0
    directions = filter_normalised_direction(weights, torch.Generator().manual_seed(seed))
    again = filter_normalised_direction(weights, torch.Generator().manual_seed(seed))
    for weight, direction, repeated in zip(weights, directions, again, strict=True):
        assert torch.equal(direction, repeated)
        assert direction.shape == weight.shape
        if weight.ndim < 2:
            assert not direction.any()
            continue
        torch.testing.assert_close(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))


def test_filters_keep_the_direction_of_the_draw() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    draw = torch.randn(2, 2, generator=torch.Generator().manual_seed(5))
    (direction,) = filter_normalised_direction([weight], torch.Generator().manual_seed(5))
    torch.testing.assert_close(direction, draw / draw.norm(dim=1, keepdim=True) * torch.tensor([[5.0], [2.0]]))


def test_filters_of_gpt2_lead_to_one_output_too() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2ForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    small = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    base = GPT2ForSequenceClassification(GPT2Config(**small))
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True))
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    assert len(turned) == 4 and turned < set(weights)
    generator = torch.Generator().manual_seed(0)
    directions = filter_normalised_direction(list(weights.values()), generator, model)
    for (name, weight), direction in zip(weights.items(), directions, strict=True):
        across, along = (0, 1) if name in turned else (1, 0)
        torch.testing.assert_close(direction.norm(dim=across), weight.detach().norm(dim=across))
        assert not weight.any() or not torch.allclose(direction.norm(dim=along), weight.detach().norm(dim=along))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_surface_of_a_quadratic_is_the_quadratic(dimensions: int) -> None:
    at, hessian = torch.arange(1.0, 7.0), symmetric(0)
    model = Quadratic(hessian, at)
    surface = loss_surface(model, [0], value, dimensions=dimensions, radius=0.5, points=5, seed=3)
    assert surface.steps == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert surface.dimensions == dimensions
    generator = torch.Generator().manual_seed(3)
    first, second = (filter_normalised_direction([model.w], generator)[0][:, 0] for _ in range(2))
    # Filters of one entry: each moves by its own size, up or down.
    torch.testing.assert_close(first.abs(), at)
    for row, b in enumerate(surface.steps if dimensions == 2 else [0.0]):
        losses = surface.losses[row] if dimensions == 2 else surface.losses
        for a, loss in zip(surface.steps, losses, strict=True):
            offset = a * first + b * second
            assert loss == pytest.approx(float(0.5 * offset @ hessian @ offset), rel=1e-4, abs=1e-5)
    assert surface.centre == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(model.w[:, 0], at)


def test_surfaces_of_gpt2_move_along_its_outputs() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(2, 3)
    weight = layer.weight.detach().clone()
    surface = loss_surface(layer, [0], lambda model, _: model.weight.flatten(), dimensions=1, points=3, seed=3)
    (direction,) = filter_normalised_direction([layer.weight], torch.Generator().manual_seed(3), layer)
    assert surface.losses[2] == pytest.approx(float((weight + direction).mean()), abs=1e-6)


def test_worst_loss_at_a_minimum_follows_the_largest_eigenvalue() -> None:
    # Turned at random, so that no coordinate is special.
    turn = torch.linalg.qr(symmetric(1)).Q
    hessian = turn @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.1])) @ turn.T
    at = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    expected = 0.5 * 8.0 * (0.1 * 5.0) ** 2
    found = worst_loss(Quadratic(hessian, at), [0], value, epsilon=0.1, ascent_steps=60)
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert found.increase == pytest.approx(expected, rel=0.01)
    # A lower bound: what is found was there.
    assert found.increase <= expected * (1 + 1e-4)


def test_worst_loss_of_a_slope_is_its_length_times_the_radius() -> None:
    at, slope = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0])
    model = Quadratic(torch.zeros(2, 2), at, slope)
    assert worst_loss(model, [0], value, epsilon=0.2, ascent_steps=10).increase == pytest.approx(13.0, rel=1e-3)


def test_worst_loss_does_not_depend_on_a_tensors_scale() -> None:
    at, hessian = torch.arange(1.0, 7.0), symmetric(2)
    one = worst_loss(Quadratic(hessian, at), [0], value, epsilon=0.1, ascent_steps=40)
    ten = worst_loss(Quadratic(hessian / 100, 10 * at), [0], value, epsilon=0.1, ascent_steps=40)
    assert one.increase == pytest.approx(ten.increase, rel=0.02)


def test_a_loss_that_blows_up_inside_the_ball_is_the_worst() -> None:
    class Wall(nn.Module):
        """Loss -log(1.02 - w) at w = 1: no number from 1.02 on."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 1))

        def forward(self) -> torch.Tensor:
            return -torch.log(1.02 - self.w[0, 0])

    assert worst_loss(Wall(), [None], value, epsilon=0.05).worst_loss == math.inf
    assert worst_loss(Wall(), [None], value, epsilon=0.01).worst_loss == pytest.approx(-math.log(0.01), rel=1e-3)
    diverged = Wall()
    diverged.w.data.fill_(float("nan"))
    assert worst_loss(diverged, [None], value).worst_loss == math.inf
    assert hessian_trace(diverged, [None], value, probes=2).value is None


def test_every_tensor_stays_in_its_own_ball() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([10.0]))

        def forward(self) -> torch.Tensor:
            return self.a.sum() + self.b.sum()

    assert worst_loss(Two(), [0], value, epsilon=0.1, ascent_steps=10).increase == pytest.approx(0.1 + 1.0, rel=1e-4)


def test_hutchinson_is_exact_on_a_diagonal_and_unbiased_off_it() -> None:
    at = torch.ones(6)
    diagonal = torch.diag(torch.tensor([1.0, 4.0, 9.0, -2.0, 0.5, 0.0]))
    assert hessian_trace(Quadratic(diagonal, at), [0], value, probes=2).value == pytest.approx(12.5, rel=1e-5)
    hessian = symmetric(4)
    figure = hessian_trace(Quadratic(hessian, at), [0, 0], value, probes=400)
    spread = math.sqrt(2 * float((hessian - torch.diag(hessian.diagonal())).square().sum()) / 400)
    assert figure.value == pytest.approx(float(hessian.trace()), abs=4 * spread)
    assert figure.n == 400 and figure.low < figure.value < figure.high
    assert hessian_trace(Quadratic(torch.zeros(6, 6), at, at), [0], value, probes=1).value == 0.0


def test_probes_share_the_gradient_of_a_batch_and_are_the_same_for_all_batches() -> None:
    hessian, at, calls = symmetric(4), torch.ones(6), []

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(batch)
        return value(model, batch)

    one = hessian_trace(Quadratic(hessian, at), [0], value, probes=5, seed=3)
    two = hessian_trace(Quadratic(hessian, at), [0, 0, 0], counted, probes=5, seed=3)
    assert calls == [0, 0, 0, 0]  # the first finds the weights that take part
    assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))
    generator = torch.Generator().manual_seed(3)
    signs = [torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1 for _ in range(5)]
    assert one.value == pytest.approx(sum(float(v @ hessian @ v) for v in signs) / 5, rel=1e-5)


def bert(tokenizer, **changes: Any) -> tuple[Any, list, Any]:
    model = tiny_bert(tokenizer, **changes)
    predictor = Predictor.for_examples(model, tokenizer, EXAMPLES, batch_size=2)
    return model, classification_batches(predictor, EXAMPLES), classification_loss(predictor)


def test_hutchinson_on_attention_agrees_with_the_exact_trace(tokenizer) -> None:
    model, batches, loss = bert(tokenizer, initializer_range=0.2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    query = model.bert.encoder.layer[0].attention.self.query.bias
    query.requires_grad_(True)

    def exact(bias: torch.Tensor) -> torch.Tensor:
        name = "bert.encoder.layer.0.attention.self.query.bias"
        total = sum(
            nn.functional.cross_entropy(
                torch.func.functional_call(
                    model, {name: bias}, kwargs={k: v for k, v in batch.items() if k != "labels"}
                ).logits,
                batch["labels"],
                reduction="sum",
            )
            for batch in batches
        )
        return total / 4

    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        trace = float(torch.autograd.functional.hessian(exact, query.detach()).trace())
    figure = hessian_trace(model, batches, loss, probes=150, scope="trainable")
    assert abs(trace) > 1e-5
    assert figure.low - (figure.high - figure.low) <= trace <= figure.high + (figure.high - figure.low)


def test_loss_is_the_mean_cross_entropy_over_all_examples(tokenizer) -> None:
    model, batches, loss = bert(tokenizer)
    assert [len(batch["labels"]) for batch in batches] == [2, 2]
    logits = Predictor(model, tokenizer)(EXAMPLES.texts)
    expected = nn.functional.cross_entropy(logits, torch.tensor(EXAMPLES.labels))
    assert mean_loss(model, batches, loss) == pytest.approx(float(expected), rel=1e-5)


def run_all(model, batches, loss, **options: Any) -> None:
    loss_surface(model, batches, loss, points=3, **options)
    worst_loss(model, batches, loss, ascent_steps=2, epsilon=0.1, **options)
    hessian_trace(model, batches, loss, probes=1, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_comes_back_to_the_bit(tokenizer, fails: bool) -> None:
    model, batches, loss = bert(tokenizer)
    model.train()
    model.bert.embeddings.eval()
    model.classifier.bias.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("out of luck")
        return loss(model, batch)

    if fails:
        for measure in (loss_surface, worst_loss, hessian_trace):
            calls = 0
            with pytest.raises(RuntimeError, match="out of luck"):
                measure(model, batches, failing)
    else:
        run_all(model, batches, loss)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "classifier.weight")


def test_weights_that_take_no_part_do_not_count(tokenizer) -> None:
    model, batches, loss = bert(tokenizer)
    before = worst_loss(model, batches, loss, ascent_steps=3)
    model.spare = nn.Linear(16, 1000)
    used = weights_in_use(model, batches, loss)
    assert len(used) == sum(1 for name, _ in model.named_parameters() if not name.startswith("spare"))
    assert worst_loss(model, batches, loss, ascent_steps=3) == before


def test_frozen_weights_move_unless_told_otherwise(tokenizer) -> None:
    from peft import LoraConfig, get_peft_model

    base, batches, _ = bert(tokenizer)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    loss = classification_loss(Predictor.for_examples(model, tokenizer, EXAMPLES))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = weights_in_use(model, batches, loss, "trainable")
    assert {id(weight) for weight in chosen} == {id(parameter) for parameter in trainable}
    everything = weights_in_use(model, batches, loss, "used")
    assert len(everything) > len(chosen)
    run_all(model, batches, loss, scope="trainable")
    run_all(model, batches, loss)
    with pytest.raises(ModelError, match="no such floating-point weights"):
        weights_in_use(model.requires_grad_(False), batches, loss, "trainable")


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (loss_surface, {"dimensions": 3}, "dimensions=3"),
        (loss_surface, {"points": 4}, "points=4: must be odd"),
        (loss_surface, {"radius": 0.0}, "radius=0"),
        (loss_surface, {"scope": "some"}, "scope='some'"),
        (worst_loss, {"epsilon": 0.0}, "epsilon=0"),
        (worst_loss, {"ascent_steps": 0}, "ascent_steps=0"),
        (hessian_trace, {"probes": 0}, "probes=0"),
    ],
)
def test_impossible_arguments_are_named(measure, options: dict, message: str) -> None:
    model = Quadratic(torch.eye(2), torch.ones(2))
    with pytest.raises(RobustnessError, match=message):
        measure(model, [0], value, **options)
    with pytest.raises(RobustnessError, match="batches is empty"):
        measure(model, [], value)


def bowl(height: float, points: int = 5) -> Surface:
    steps = [-1 + 2 * n / (points - 1) for n in range(points)]
    return Surface(steps, [[height * (a * a + b * b) for a in steps] for b in steps], 0)


def test_panels_share_one_scale_and_nothing_overlaps(tmp_path: Path) -> None:
    names = ["before fine-tuning", "overfitted", "plain", "ROSE ensemble"]
    picture = plot_surfaces({name: bowl(n + 1) for n, name in enumerate(names)}, tmp_path / "x" / "land.png", "Title")
    assert (tmp_path / "x" / "land.png").read_bytes().startswith(b"\x89PNG")
    reliefs = [axes for axes in picture.axes if axes.name == "3d"]
    assert [axes.get_title().splitlines()[0] for axes in reliefs] == names
    assert {axes.get_zlim() for axes in reliefs} == {(0.0, 8.0)}
    meshes = [axes.collections[0].get_clim() for axes in picture.axes if axes.name != "3d" and axes.collections]
    assert set(meshes[:4]) == {(0.0, 8.0)}
    capped = plot_surfaces({"a": bowl(1), "b": bowl(100)}, ceiling=3.0)
    assert {axes.get_zlim() for axes in capped.axes if axes.name == "3d"} == {(0.0, 3.0)}


def test_ticks_of_a_flat_landscape_differ_and_are_true() -> None:
    flat = bowl(1e-4)
    flat = dataclasses.replace(flat, losses=[[0.6931 + loss for loss in row] for row in flat.losses])
    picture = plot_surfaces({"plain": flat, "ROSE": flat})
    picture.draw_without_rendering()
    bars = [axes.yaxis for axes in picture.axes if axes.get_label() == "<colorbar>"]
    heights = [axes.zaxis for axes in picture.axes if axes.name == "3d"]
    assert len(bars) == 1 and len(heights) == 2
    for axis in [*bars, *heights]:
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert len(labels) >= 3 and len(set(labels)) == len(labels)
        assert axis.get_offset_text().get_text() == ""
        assert [float(label) for label in labels] == pytest.approx(list(axis.get_ticklocs()), abs=1e-7)


def test_a_landscape_says_its_examples_and_seed() -> None:
    one = dataclasses.replace(bowl(1), n=64, seed=7)
    assert "n = 64 examples; seed of the directions 7" in plot_surfaces({"a": one, "b": one}).get_suptitle()
    mixed = {"a": one, "b": dataclasses.replace(one, n=32)}
    assert "n = 64, 32 examples; seed of the directions 7" in plot_surfaces(mixed).get_suptitle()
    assert "n = unknown examples" in plot_surfaces({"a": bowl(1)}).get_suptitle()


def test_a_surface_counts_its_examples() -> None:
    model = nn.Linear(2, 1)
    batches = [torch.ones(3, 2), torch.ones(2, 2)]
    for dimensions in (1, 2):
        surface = loss_surface(model, batches, lambda m, b: m(b).squeeze(1) ** 2, dimensions=dimensions, points=3)
        assert surface.n == 5


def test_lines_share_one_diagram(tmp_path: Path) -> None:
    lines = {name: Surface([-1.0, 0.0, 1.0], [2.0, 1.0, 2.0], 0) for name in ("plain", "ROSE")}
    picture = plot_surfaces(lines, tmp_path / "line.png")
    assert [line.get_label() for line in picture.axes[0].lines] == ["plain", "ROSE"]
    assert "nats" in picture.axes[0].get_ylabel()
    with pytest.raises(RobustnessError, match="mix lines and planes"):
        plot_surfaces({**lines, "plane": bowl(1)})
    with pytest.raises(RobustnessError, match="nothing to plot"):
        plot_surfaces({})
