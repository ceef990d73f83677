"""Consistency: against its definition, with a model whose decisions are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForSequenceClassification

from rose_peft.robustness.consistency import consistency
from rose_peft.robustness.errors import MissingResourceError, ModelError, RobustnessError
from rose_peft.robustness.noise import noisy_texts
from tests.helpers.victims import KeywordModel, tiny_bert

TEXTS = ["good", "film"] * 10 + ["a very good film"] * 5


def test_flips_and_divergence_are_those_of_the_changed_texts(tokenizer: Any, keyword_model: KeywordModel) -> None:
    found = consistency(keyword_model, tokenizer, TEXTS, changes=["typos"], rate=1.0)
    after = [parts[0] for parts in noisy_texts(TEXTS, "typos", 1.0)]
    flips = [("good" in one.split()) != ("good" in two.split()) for one, two in zip(TEXTS, after, strict=True)]
    assert found.flipped["typos"].value == pytest.approx(sum(flips) / len(flips)) and sum(flips) == 15
    # A flip turns the logits from (-4, 4) to (4, -4): p - q is tanh(4) for either class, and log p - log q is 8.
    each = float(torch.tanh(torch.tensor(4.0, dtype=torch.float64))) * 8
    assert found.divergence["typos"].value == pytest.approx(each * 15 / 25, rel=1e-6)
    low, high = found.flipped["typos"].low, found.flipped["typos"].high
    assert 0 < low < 0.6 < high < 1


def test_dropout_changes_nothing_else(tokenizer: Any) -> None:
    model = tiny_bert(tokenizer, hidden_dropout_prob=0.3).eval()
    state = torch.get_rng_state()
    one = consistency(model, tokenizer, TEXTS, changes=["dropout"], seed=1)
    assert one.divergence["dropout"].value > 0
    assert torch.equal(torch.get_rng_state(), state) and not any(module.training for module in model.modules())
    assert consistency(model, tokenizer, TEXTS, changes=["dropout"], seed=1) == one
    assert consistency(model, tokenizer, TEXTS, changes=["dropout"], seed=2) != one


def test_dropout_that_no_module_does_is_dropout(tokenizer: Any) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "init_std": 0.3}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, dropout=0.3, pad_token_id=0, **sizes)
    found = consistency(OPTForSequenceClassification(config), tokenizer, TEXTS, changes=["dropout"])
    assert found.divergence["dropout"].value > 0


def test_a_model_with_one_score_has_no_class_to_flip(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="gives one score per text"):
        consistency(tiny_bert(tokenizer, classes=1), tokenizer, TEXTS, changes=["typos"])


def test_what_cannot_be_done_is_said(tokenizer: Any, keyword_model: KeywordModel) -> None:
    found = consistency(keyword_model, tokenizer, TEXTS, changes=["dropout", "typos"])
    assert found.unavailable == {"dropout": "the model has no dropout."} and list(found.flipped) == ["typos"]
    with pytest.raises(MissingResourceError, match="no change can be made"):
        consistency(keyword_model, tokenizer, TEXTS, changes=["dropout"])
    with pytest.raises(RobustnessError, match="change='smudges' is unknown"):
        consistency(keyword_model, tokenizer, TEXTS, changes=["smudges"])
    with pytest.raises(RobustnessError, match=r"rate=0.0"):
        consistency(keyword_model, tokenizer, TEXTS, rate=0.0)
