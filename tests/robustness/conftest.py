"""Models, tokenizers and data for the tests of the evaluation kit; what cannot be made here skips with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest

from tests.helpers.victims import WORDS, KeywordModel, data_dir, need_textattack, nltk_folder, tiny_bert


@pytest.fixture
def data() -> Path:
    """Folder with GLUE and AdvGLUE."""
    return data_dir()


@pytest.fixture
def nltk_data(monkeypatch: pytest.MonkeyPatch) -> str:
    """NLTK with its stop words and WordNet."""
    nltk = pytest.importorskip("nltk")
    folder = nltk_folder()
    monkeypatch.setattr(nltk.data, "path", [folder, *nltk.data.path])
    return folder


@pytest.fixture
def offline_textattack(nltk_data: str) -> Any:
    """TextAttack, imported the way the kit does it."""
    need_textattack()
    from rose_peft.robustness.attacks.offline import import_textattack

    return import_textattack()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A WordPiece tokenizer that knows a few words whole and spells the rest."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    vocabulary += [letter for letter in letters if letter not in vocabulary] + [f"##{letter}" for letter in letters]
    vocabulary += [".", ","]
    raw = Tokenizer(models.WordPiece({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
    )


@pytest.fixture
def keyword_model(tokenizer: Any) -> KeywordModel:
    """A model whose decisions are known."""
    return KeywordModel(tokenizer)


@pytest.fixture
def model(tokenizer: Any, tmp_path: Path) -> Path:
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path / "model"
    tiny_bert(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    """Folder with a few sentences in the layout of GLUE and AdvGLUE."""
    rows = [("the story was good", 1), ("a dull film", 0), ("it is great", 1), ("very boring plot", 0)] * 3
    table = pandas.DataFrame(rows, columns=["sentence", "label"])
    for folder in ("glue/sst2", "adv_glue/adv_sst2"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        table.to_parquet(tmp_path / "data" / folder / "validation.parquet")
    return tmp_path / "data"
