"""A task for examples/train.py that takes seconds: a tiny random BERT, and demo reviews laid out as --data_dir."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizerFast


def tiny_task(folder: Path) -> dict[str, str]:
    """Write model and data; returns their folders as "model" and "data"."""
    from examples.training.demo_data import demo_splits

    splits = demo_splits(96, 48)
    words = sorted({word for split in splits.values() for text in split["sentence"] for word in text.split()})
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "model")
    for name, split in (("train", "train"), ("validation", "validation")):
        path = folder / "data" / "glue" / "sst2" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        splits[split].to_parquet(path)
    path = folder / "data" / "adv_glue" / "adv_sst2" / "validation.parquet"
    path.parent.mkdir(parents=True)
    splits["robust"].to_parquet(path)
    return {"model": str(folder / "model"), "data": str(folder / "data")}
