"""Full fine-tuning that holds every weight once: the originals on the CPU, or nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rose_peft import ROSEConfig, RoseConfigError, UnsupportedModelError
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.training import outputs, train_watched

WAYS = ["keep", "cpu", "drop"]


def tuned(way: str, **options) -> PeftModel:
    return get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", original_weights=way, **options))


def held_bytes(model: nn.Module) -> int:
    return sum(param.numel() * param.element_size() for param in model.parameters())


def test_weights_are_held_once() -> None:
    plain = held_bytes(tiny_bert())
    kept, away, dropped = (held_bytes(tuned(way)) for way in WAYS)
    assert kept > 1.9 * plain and away == dropped
    head = held_bytes(tiny_bert().classifier)  # of `modules_to_save`, which PEFT holds twice
    assert dropped <= plain + head


@pytest.mark.parametrize("way", ["cpu", "drop"])
def test_training_saving_and_merging_are_the_same(way: str, tmp_path: Path) -> None:
    models = [tuned("keep"), tuned(way)]
    for model in models:
        train_watched(model, batch(model))
    kept, other = (dict(model.named_parameters()) for model in models)
    assert set(other) < set(kept) and all(torch.equal(other[name], kept[name]) for name in other)
    models[1].save_pretrained(tmp_path)
    wanted = outputs(models[0], batch(models[0]))
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(outputs(loaded, batch(loaded)), wanted)
    with loaded.disable_adapter():  # for inference the originals stay
        assert torch.equal(outputs(loaded, batch(loaded)), outputs(tiny_bert(), batch(tiny_bert())))
    merged = models[1].merge_and_unload()
    assert torch.equal(outputs(merged, batch(merged)), wanted)
    assert set(dict(merged.named_parameters())) == set(dict(tiny_bert().named_parameters()))


def test_originals_on_the_cpu_come_back_while_the_adapter_is_disabled() -> None:
    model = tuned("cpu")
    train_watched(model, batch(model))
    trained, once = outputs(model, batch(model)), held_bytes(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch(model)), outputs(tiny_bert(), batch(tiny_bert())))
        assert held_bytes(model) > once
    assert torch.equal(outputs(model, batch(model)), trained) and held_bytes(model) == once
    model.merge_adapter()
    assert torch.equal(outputs(model, batch(model)), trained)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, batch(model)), trained)
    model.add_adapter("other", ROSEConfig(task_type="SEQ_CLS"))
    base = model.unload()
    wanted = dict(tiny_bert().named_parameters())
    assert all(torch.equal(param, wanted[name]) for name, param in base.named_parameters() if "classifier" not in name)


def test_what_needs_dropped_weights_is_refused_and_the_training_goes_on() -> None:
    model = tuned("drop")
    train_watched(model, batch(model))
    message = r"original_weights='drop'.*'cpu' or 'keep'"
    with pytest.raises(UnsupportedModelError, match=message):
        model.unload()
    with pytest.raises(UnsupportedModelError, match=message):
        model.add_adapter("other", ROSEConfig(task_type="SEQ_CLS"))
    with pytest.raises(UnsupportedModelError, match=message), model.disable_adapter():
        pass


def test_tied_weights_stay_tied() -> None:
    from transformers import BertConfig, BertForMaskedLM

    from tests.helpers.tiny import SIZES

    torch.manual_seed(0)
    model = get_peft_model(BertForMaskedLM(BertConfig(**SIZES)), ROSEConfig(original_weights="drop"))
    found = [param for name, param in model.named_parameters(remove_duplicate=False) if param.shape == (32, 16)]
    assert len({id(param) for param in found if param.shape == (32, 16)}) < len(found)


def test_bad_values_are_named() -> None:
    with pytest.raises(RoseConfigError, match=r"original_weights='disk'.*keep, cpu, drop"):
        ROSEConfig(original_weights="disk")
    with pytest.raises(RoseConfigError, match=r"original_weights='drop'.*base_config"):
        ROSEConfig(original_weights="drop", base_config=LoraConfig())


def test_originals_come_back_in_the_type_that_the_model_has_now() -> None:
    model = get_peft_model(tiny_bert(), ROSEConfig(task_type="SEQ_CLS", original_weights="cpu")).to(torch.bfloat16)
    with torch.no_grad(), model.disable_adapter():
        assert model(**batch(model)).logits.dtype == torch.bfloat16
