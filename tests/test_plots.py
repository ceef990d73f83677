"""The picture of the masks."""

from __future__ import annotations

import struct

import pytest
import torch
from peft import get_peft_model

from rose_peft import ROSEConfig, RoseError, get_selector, plot_masks
from rose_peft.plots import _short_names
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import optimizer_of, step

pytest.importorskip("matplotlib")


def test_picture_shows_the_masks_that_were_applied(tmp_path) -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig()).train()
    optimizer = optimizer_of(model)
    torch.manual_seed(0)
    masks = torch.stack([step(model, optimizer, batch(model)) for _ in range(7)])
    path = tmp_path / "masks.png"
    figure = plot_masks(get_selector(model), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert width > 800 and height > 400
    axes = figure.axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().filled(float("nan")))
    assert torch.equal(shown, masks.T), "one row per unit, one column per step"
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.get_xlim() == (0.5, 7.5)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 16
    assert labels[0] == "0.attention.self.query" and labels[-1] == "1.output.LayerNorm"
    assert "ensemble" in axes.get_title() and axes.get_xlabel() == "optimizer step"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny_bert(), ROSEConfig()).train()
    step(model, optimizer_of(model), batch(model))
    plot_masks(get_selector(model))
    assert not list(tmp_path.iterdir())


def test_before_the_first_step_there_is_nothing_to_plot() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig())
    with pytest.raises(RoseError, match="train first"):
        plot_masks(get_selector(model))


def test_short_names() -> None:
    assert _short_names(["a.b.0.x.weight", "a.b.1.x.weight"]) == ["0.x", "1.x"]
    assert _short_names(["only.one.weight"]) == ["one"]
    assert _short_names(["a.query", "a.query.inner"]) == ["query", "query.inner"]
