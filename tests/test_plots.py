"""The picture of the masks."""

from __future__ import annotations

import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rose_peft import ROSEConfig, RoseError, get_selector, plot_masks
from rose_peft.plots import FROZEN, FULL, PARTIAL, _layers, _short_names
from rose_peft.state import HISTORY_LENGTH
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import optimizer_of, step

pytest.importorskip("matplotlib")


def trained(steps: int = 7, **settings):
    """A model, its optimizer, and its masks [units, steps]."""
    model = get_peft_model(tiny_bert(), ROSEConfig(**settings)).train()
    optimizer = optimizer_of(model)
    torch.manual_seed(0)
    return model, optimizer, torch.stack([step(model, optimizer, batch(model)) for _ in range(steps)]).T


def parts(figure):
    """The axes by what they show."""
    masks, last, shares, course, legend = figure.axes
    return masks, last, shares, course, legend


def image(axes) -> torch.Tensor:
    return torch.as_tensor(axes.images[0].get_array().filled(float("nan")))


def test_picture_shows_the_masks_that_were_applied(tmp_path) -> None:
    model, _, masks = trained(gamma=0.3)
    assert set(masks.unique().tolist()) > {0, 1}, "and something between"
    path = tmp_path / "masks.png"
    figure = plot_masks(get_selector(model), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert width > 800 and height > 400
    axes, *_ = parts(figure)
    shown = torch.where((masks > 0) & (masks < 1), torch.tensor(0.5), masks)
    assert torch.equal(image(axes), shown), "one row per unit, one column per step, three values"
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.images[0].cmap.N == 3
    assert axes.get_xlim() == (0.5, 7.5)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 16
    assert labels[0] == "layer 0  attention.self.query" and labels[-1] == "layer 1  output.LayerNorm"
    assert axes.get_xlabel() == "optimizer step"
    figure.canvas.draw()
    ticks = [tick for tick in axes.get_xticks() if 0.5 <= tick <= 7.5]
    assert ticks and all(tick == int(tick) for tick in ticks), "whole steps"


def test_shares_by_units_and_by_weights() -> None:
    model, _, masks = trained()
    selector = get_selector(model)
    figure = plot_masks(selector)
    statistics = selector.statistics()
    assert f"{statistics.kept_share:.0%} of the updates kept by units" in figure.get_suptitle()
    assert f"{statistics.kept_weight_share:.0%} by weights" in figure.get_suptitle()
    assert "ensemble" in figure.get_suptitle()
    course = parts(figure)[3]
    sizes = torch.tensor([unit.size() for unit in selector.units], dtype=torch.float64)
    by_units, by_weights = (torch.as_tensor(line.get_ydata()) for line in course.get_lines())
    assert torch.allclose(by_units, masks.double().mean(0))
    assert torch.allclose(by_weights, (masks.double() * sizes[:, None]).sum(0) / sizes.sum())
    assert not torch.allclose(by_units, by_weights)
    bars = [bar.get_width() for bar in parts(figure)[2].patches]
    assert bars == pytest.approx([unit.kept_share for unit in statistics.units.values()])


def test_both_orders_of_the_last_step_tell_who_froze_a_unit() -> None:
    model, _, masks = trained()
    state = get_selector(model).state
    axes = parts(plot_masks(get_selector(model)))[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    shown = image(axes)
    assert torch.equal(shown, torch.stack([state.first_mask, state.second_mask], dim=1))
    assert torch.equal(shown.mean(dim=1), masks[:, -1])


@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
def test_one_strategy_has_one_column(strategy) -> None:
    model, _, _ = trained(strategy=strategy)
    figure = plot_masks(get_selector(model))
    labels = [label.get_text() for label in parts(figure)[1].get_xticklabels()]
    assert labels == [strategy.removesuffix("_order")]
    assert strategy.replace("_", " ") in figure.get_suptitle()


def test_what_is_not_masked_is_said() -> None:
    model, _, _ = trained(steps=1)
    units = sum(unit.size() for unit in get_selector(model).units)
    whole = sum(param.numel() for param in model.parameters() if param.requires_grad)
    text = plot_masks(get_selector(model)).get_supxlabel()
    assert "biases" in text and f"{units / whole:.0%} of the weights that train" in text


@pytest.mark.parametrize("kind", ["optimizer", "state dict", "file", "folder of the Trainer", "folder of Accelerate"])
def test_a_saved_run_gives_the_same_picture(tmp_path, kind) -> None:
    model, optimizer, _ = trained()
    torch.save(optimizer.state_dict(), tmp_path / ("optimizer.bin" if "Accelerate" in kind else "optimizer.pt"))
    source = {
        "optimizer": optimizer,
        "state dict": optimizer.state_dict(),
        "file": tmp_path / "optimizer.pt",
        "folder of the Trainer": str(tmp_path),
        "folder of Accelerate": tmp_path,
    }[kind]
    figure, live = plot_masks(source), plot_masks(get_selector(model))
    assert torch.equal(image(figure.axes[0]), image(live.axes[0]))
    assert figure.get_suptitle() == live.get_suptitle()
    drawn, expected = ([label.get_text() for label in f.axes[0].get_yticklabels()] for f in (figure, live))
    assert drawn == expected


def test_a_long_run_is_shown_in_means_and_says_so() -> None:
    model, _, _ = trained(steps=2)
    selector = get_selector(model)
    state = selector.state
    state.history[:] = 0.25
    state.steps.fill_(2 * HISTORY_LENGTH)
    state.history_stride.fill_(2)
    axes = parts(plot_masks(selector))[0]
    assert "mean of 2" in axes.get_xlabel()
    assert (image(axes) == 0.25).all(), "a mean is not rounded to one of three values"
    low, middle, high = (axes.images[0].cmap(value) for value in (0.0, 0.5, 1.0))
    from matplotlib.colors import to_rgba

    assert low == pytest.approx(to_rgba(FROZEN)) and high == pytest.approx(to_rgba(FULL))
    assert middle == pytest.approx(to_rgba(PARTIAL), abs=0.02)


def test_optimizers_without_one_state_of_rose_are_refused(tmp_path) -> None:
    plain = torch.optim.AdamW(tiny_bert().parameters())
    with pytest.raises(RoseError, match="of 0 adapters"):
        plot_masks(plain)
    model = get_peft_model(tiny_bert(), ROSEConfig(base_config=LoraConfig(target_modules=["query"]))).train()
    optimizer = optimizer_of(model)
    step(model, optimizer, batch(model))
    group = optimizer.param_groups[0]["rose"]
    group["Other.default@0"] = dict(next(iter(group.values())))
    with pytest.raises(RoseError, match="of 2 adapters"):
        plot_masks(optimizer)


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _, _ = trained(steps=1)
    plot_masks(get_selector(model))
    assert not list(tmp_path.iterdir())


def test_before_the_first_step_there_is_nothing_to_plot() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig())
    with pytest.raises(RoseError, match="train first"):
        plot_masks(get_selector(model))


def test_short_names() -> None:
    assert _short_names(["a.b.0.x.weight", "a.b.1.x.weight"]) == ["layer 0  x", "layer 1  x"]
    assert _short_names(["only.one.weight"]) == ["one"]
    assert _short_names(["a.query", "a.query.inner"]) == ["query", "query.inner"]


def test_layers_are_runs_of_rows() -> None:
    assert _layers(["layer 0  a", "layer 0  b", "layer 1  a"]) == [("layer 0", 0, 2), ("layer 1", 2, 3)]
    assert _layers(["encoder.0.a", "encoder.0.b", "decoder.0.a"]) == [("encoder.0", 0, 2), ("decoder.0", 2, 3)]
