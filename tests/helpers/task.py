"""A task for examples/train.py that takes seconds: a tiny random BERT, and demo reviews laid out as --data_dir."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
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


def options(inputs: dict[str, str], output: Path, *more: str) -> list[str]:
    """A short run on the tiny inputs."""
    settings = {
        "task": "sst2",
        "data_dir": inputs["data"],
        "model_name_or_path": inputs["model"],
        "output_dir": str(output),
        "epochs": "2",
        "batch_size": "16",
        "learning_rate": "1e-3",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)] + list(more)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Trained weights of the run's last checkpoint."""
    return load_file(newest(output) / "model.safetensors")


def newest(output: Path) -> Path:
    """The newest checkpoint of a run."""
    from examples.training.checkpoint import Checkpoints

    found = Checkpoints(output, None).newest()  # type: ignore[arg-type]
    assert found is not None
    return found


def assert_same_run(one: Path, two: Path) -> None:
    """Two runs ended in the same weights and figures, to the last bit."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    results = [json.loads((path / "results.json").read_text()) for path in (one, two)]
    assert results[0]["history"] == results[1]["history"]
    assert results[0]["rose"] == results[1]["rose"]
