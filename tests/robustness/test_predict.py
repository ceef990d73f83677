"""Prediction: modes, order, padding, precision, and models of any kind."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rose_peft.robustness.data import Examples
from rose_peft.robustness.errors import DivergedModelError, LabelMismatchError, ModelError
from rose_peft.robustness.loading import load_classifier
from rose_peft.robustness.predict import Predictor, evaluating
from tests.helpers.victims import KeywordModel, tiny_bert

TEXTS = ["good film", "the plot is very very boring and dull and bad", "a", "bad story", "it was a great great film"]


def one_by_one(model: nn.Module, tokenizer, texts) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        rows = [
            model(**tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")).logits
            for text in texts
        ]
    return torch.cat(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("paired", [False, True])
def test_scores_are_those_of_each_text_alone_in_order(tokenizer, batch_size: int, paired: bool) -> None:
    model = tiny_bert(tokenizer)
    texts = list(zip(TEXTS, reversed(TEXTS), strict=True)) if paired else TEXTS
    expected = one_by_one(model, tokenizer, texts)
    model.train()
    scores = Predictor(model, tokenizer, batch_size=batch_size)(texts)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert not scores.requires_grad
    assert model.training


def test_peft_models_are_taken_as_they_are(tokenizer) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_bert(tokenizer)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    scores = Predictor(model, tokenizer)(TEXTS)
    torch.testing.assert_close(scores, one_by_one(model, tokenizer, TEXTS), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(scores, Predictor(model, tokenizer)(TEXTS))


def test_padding_goes_no_further_than_each_batch(tokenizer) -> None:
    model = KeywordModel(tokenizer)
    texts = ["film " * 20, "good", "film " * 21, "bad"]
    assert Predictor(model, tokenizer, batch_size=2).classes(texts) == [0, 1, 0, 0]
    assert sorted(model.widths) == [3, 23]


def test_long_texts_are_cut_at_the_tighter_limit(tokenizer) -> None:
    model = KeywordModel(tokenizer)
    Predictor(model, tokenizer)(["film " * 500])
    Predictor(model, tokenizer, max_length=7)(["film " * 500])
    assert model.widths == [48, 7]
    assert Predictor(tiny_bert(tokenizer, max_position_embeddings=32), tokenizer).max_length == 32


def test_inputs_longer_than_the_models_positions_are_refused(tokenizer) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForSequenceClassification(RobertaConfig(**small, max_position_embeddings=66, pad_token_id=1))
    for model in (tiny_bert(tokenizer), roberta):
        with pytest.raises(ModelError, match="max_length=65: the model has 64 positions; pass at most that"):
            Predictor(model, tokenizer, max_length=65)
        assert Predictor(model, tokenizer, max_length=64)(["film " * 500]).shape == (1, 2)


def test_relative_positions_have_no_end(tokenizer) -> None:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    relative = {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**small, **relative, intermediate_size=32, max_position_embeddings=64)
    predictor = Predictor(DebertaV2ForSequenceClassification(config), tokenizer, max_length=100)
    assert predictor.encode(["film " * 500])["input_ids"].shape == (1, 100)
    assert predictor(["film " * 500]).shape == (1, 2)


@pytest.mark.parametrize(("texts", "special"), [(["film " * 90], 2), ([("film", "plot")], 3)])
def test_inputs_without_room_for_text_are_refused(tokenizer, keyword_model, texts: list, special: int) -> None:
    for max_length in (1, special):
        message = f"max_length={max_length}: leaves no room for text beside {special} special tokens"
        with pytest.raises(ModelError, match=message):
            Predictor(keyword_model, tokenizer, max_length=max_length)(texts)
    assert Predictor(keyword_model, tokenizer, max_length=special + 1)(texts).shape == (1, 2)


def test_a_whole_classifier_keeps_its_classes_and_the_data_decide(tokenizer, tmp_path: Path) -> None:
    tiny_bert(tokenizer, classes=3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, words = load_classifier(tmp_path, 2)
    two = Examples((("good",), ("bad",)), (1, 0), label_names=("negative", "positive"))
    with pytest.raises(LabelMismatchError, match="num_labels=3: the model has 3 classes, data has 2 labels"):
        Predictor.for_examples(model, words, two)
    # Data that name no labels may lack one of the model's classes.
    nameless = Examples(two.texts, two.labels)
    assert Predictor.for_examples(model, words, nameless)(two.texts).shape == (2, 3)


def test_an_encoder_and_an_adapter_get_the_datas_classes(tokenizer, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_bert(tokenizer).bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load_classifier(tmp_path / "base", 3)
    assert model.config.num_labels == 3
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "lora")
    assert load_classifier(tmp_path / "lora", 3)[0].config.num_labels == 3
    assert load_classifier(tmp_path / "lora", 2)[0].config.num_labels == 3  # as a whole classifier keeps its own
    tiny_bert(tokenizer, hidden_size=32).bert.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"cannot be loaded .*; pass a name that the hub has"):
        load_classifier(tmp_path / "lora", 3)


def test_an_adapter_has_the_names_that_lie_beside_it(tokenizer, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_bert(tokenizer).bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load_classifier(tmp_path / "base", 2)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "lora")
    model.config.id2label, model.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
    model.config.save_pretrained(tmp_path / "lora")
    loaded, words = load_classifier(tmp_path / "lora", 2)
    data = Examples((("good",), ("bad",)), (1, 0), label_names=("negative", "positive"))
    assert Predictor.for_examples(loaded, words, data).order == [1, 0]


def tiny_gpt2(tokenizer, **changes):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), num_labels=2, **sizes, **changes))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_is_read_at_its_last_word(tokenizer, side: str) -> None:
    """However many texts are in a batch, and wherever the tokenizer would pad them."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = side
    model = tiny_gpt2(tokenizer, pad_token_id=0)
    expected = one_by_one(model, tokenizer, TEXTS)
    torch.testing.assert_close(Predictor(model, tokenizer)(TEXTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pads", [None, 5])
def test_a_decoder_that_takes_padding_for_text_is_refused(tokenizer, pads: int | None) -> None:
    with pytest.raises(ModelError, match=rf"pad_token_id=0, but model\.config\.pad_token_id={pads}: the head"):
        Predictor(tiny_gpt2(tokenizer, pad_token_id=pads), tokenizer)


def test_a_decoder_without_padding_gets_its_end_of_text(tokenizer, tmp_path: Path) -> None:
    words = copy.deepcopy(tokenizer)
    words.model_input_names = ["input_ids", "attention_mask"]
    words.pad_token, words.eos_token = None, "[SEP]"
    words.save_pretrained(tmp_path)
    tiny_gpt2(words, pad_token_id=None).save_pretrained(tmp_path)
    model, loaded = load_classifier(tmp_path, 2)
    assert loaded.pad_token == "[SEP]" and model.config.pad_token_id == loaded.pad_token_id == 3
    assert Predictor(model, loaded)(TEXTS).shape == (5, 2)


def test_scores_that_are_no_numbers_are_no_class(tokenizer, keyword_model: KeywordModel) -> None:
    data = Examples((("good",), ("bad",)), (1, 0))
    keyword_model.scale.data.fill_(float("nan"))
    with pytest.raises(DivergedModelError, match=r"not finite for 2 of 2 texts, as for .*good"):
        Predictor(keyword_model, tokenizer).correct(data)


def test_an_empty_text_is_one_without_special_tokens_too(tokenizer) -> None:
    words = copy.deepcopy(tokenizer)
    words.backend_tokenizer.post_processor = None
    words.backend_tokenizer.pre_tokenizer = None  # a space is a token then, as it is to byte-level tokenizers
    predictor = Predictor(tiny_bert(tokenizer), words)
    torch.testing.assert_close(predictor([""]), predictor(["", "good film"])[:1], rtol=1e-4, atol=1e-5)


def test_a_model_whose_file_is_not_whole_is_refused(tokenizer, tmp_path: Path) -> None:
    tiny_bert(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ModelError, match=rf"^model='{tmp_path}' cannot be loaded .*folder of a whole model"):
        load_classifier(tmp_path, 2)


def test_label_order_reorders_scores(tokenizer) -> None:
    model = tiny_bert(tokenizer, classes=3, id2label={0: "c", 1: "a", 2: "b"}, label2id={"c": 0, "a": 1, "b": 2})
    examples = Examples((("good",),), (0,), label_names=("a", "b", "c"))
    scores = Predictor.for_examples(model, tokenizer, examples)(TEXTS)
    torch.testing.assert_close(scores, Predictor(model, tokenizer)(TEXTS)[:, [1, 2, 0]])


def test_each_module_gets_its_own_mode_back(tokenizer) -> None:
    model = tiny_bert(tokenizer).train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_bfloat16_scores_come_back_as_float32(tokenizer) -> None:
    model = tiny_bert(tokenizer)
    exact = Predictor(model, tokenizer)(TEXTS)
    under_autocast = Predictor(model, tokenizer, bf16=True)(TEXTS)
    in_bfloat16 = Predictor(model.to(torch.bfloat16), tokenizer)(TEXTS)
    for scores in (under_autocast, in_bfloat16):
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, exact)
        torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.2)


def test_models_without_usable_logits_are_refused(tokenizer) -> None:
    class Headless(nn.Module):
        def forward(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 3))

    with pytest.raises(ModelError, match="Headless returned SimpleNamespace without logits"):
        Predictor(Headless(), tokenizer)(["a"])


def test_unusable_arguments_are_refused(tokenizer, keyword_model: KeywordModel) -> None:
    with pytest.raises(ModelError, match="pad_token is not set"):
        Predictor(keyword_model, SimpleNamespace(pad_token=None, model_max_length=8))
    with pytest.raises(ModelError, match="batch_size=0"):
        Predictor(keyword_model, tokenizer, batch_size=0)
    with pytest.raises(ModelError, match="max_length=0"):
        Predictor(keyword_model, tokenizer, max_length=0)
    with pytest.raises(ModelError, match="mix"):
        Predictor(keyword_model, tokenizer)(["a", ("a", "b")])
    with pytest.raises(ModelError, match="empty"):
        Predictor(keyword_model, tokenizer)([])
