"""Batched prediction with any classifier: evaluation mode, no gradients, padding only to the longest of a batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .data import Examples
from .errors import DivergedModelError, ModelError
from .labels import label_order

#: A single sentence, or the sentences of a pair.
Text = str | Sequence[str]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back into its own mode afterwards.

    Modules need not agree: a frozen backbone is often in evaluation mode under a head in training mode.
    """
    with _in_mode(model, training=False):
        yield


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def model_device(model: nn.Module) -> torch.device:
    """Return the device on which the model takes its inputs."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def longest_input(tokenizer: Any, config: Any) -> int:
    """Return the longest input, in tokens, that both the tokenizer and the model's positions allow; at most 512.

    Without a limit anywhere one overlong text would decide the memory of its whole batch, hence the 512.
    """
    limits = [512]
    # Tokenizers without a limit of their own carry a huge number.
    if 0 < getattr(tokenizer, "model_max_length", 0) < 1_000_000:
        limits = [int(tokenizer.model_max_length)]
    positions = _positions(config)
    return min(limits if positions is None else [*limits, positions])


def _positions(config: Any) -> int | None:
    """Return how many positions the configuration names, without those that cannot be used."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 2:
        return None
    # RoBERTa-like models count positions from the padding index on, so two of the table cannot be used.
    return positions - (2 if getattr(config, "model_type", "") in _OFFSET_POSITIONS else 0)


def position_limit(model: nn.Module) -> int | None:
    """Return the length in tokens beyond which a model fails, or None: relative and rotary positions go on."""
    table = any(
        isinstance(module, nn.Embedding) and re.search(r"position|wpe", name.rpartition(".")[2])
        for name, module in model.named_modules()
    )
    return _positions(getattr(model, "config", None)) if table else None


_OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "roberta-prelayernorm",
}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of what reads the text, or None where the model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _reads_the_last_token(model: nn.Module) -> bool:
    """Whether a head reads the last token that is no padding: in `transformers` that of decoders, always `score`."""
    return any(name.rpartition(".")[2] == "score" for name, _ in model.named_modules())


class Predictor:
    """A model and its tokenizer as one function from texts to class scores.

    Args:
        model: Any `transformers` classifier or `PeftModel` of one, on any device, in any precision.
        tokenizer: Its tokenizer.
        batch_size: Texts per forward pass.
        max_length: Longest input in tokens, special ones included; longer ones are truncated. None for what tokenizer
            and model allow.
        bf16: Run the forward passes under bfloat16 autocast.
        order: Class index of each label number (see `label_order`); None keeps the model's order.

    Raises:
        ModelError: If the tokenizer cannot pad or pads with what the model takes for text, or the model has fewer
            positions than the longest input.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        bf16: bool = False,
        order: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ModelError(f"batch_size={batch_size}: must be at least 1.")
        if getattr(tokenizer, "pad_token", None) is None:
            raise ModelError(
                "tokenizer.pad_token is not set, so texts cannot be batched; set it (often to eos_token) and "
                "model.config.pad_token_id with it."
            )
        pads = getattr(text_config(model), "pad_token_id", None)
        if _reads_the_last_token(model) and pads != tokenizer.pad_token_id:
            raise ModelError(
                f"tokenizer.pad_token_id={tokenizer.pad_token_id}, but model.config.pad_token_id={pads}: the head "
                "would read padding in place of the last token; set both to the one that the model was trained with."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.config = getattr(model, "config", None)
        if max_length is not None and max_length < 1:
            raise ModelError(f"max_length={max_length}: must be at least 1 token; leave it out for the model's own.")
        positions = position_limit(model)
        if max_length and positions and max_length > positions:
            raise ModelError(
                f"max_length={max_length}: the model has {positions} positions; pass at most that, or leave it out."
            )
        self.max_length = max_length or longest_input(tokenizer, self.config)
        # A table counts positions from the left, padding included, so on that side padding would move the text.
        self._side = {"padding_side": "right"} if positions is not None else {}
        self.bf16 = bf16
        self.order = None if order is None else list(order)

    @classmethod
    def for_examples(cls, model: nn.Module, tokenizer: Any, examples: Examples, **options: Any) -> Predictor:
        """Make a predictor whose scores are in the order of the data's label numbers.

        Raises:
            LabelMismatchError: If the model's classes are not the data's labels.
            ModelError: If the tokenizer cannot pad.
        """
        return cls(model, tokenizer, order=label_order(getattr(model, "config", None), examples), **options)

    def encode(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """Tokenize texts into one padded batch of shape `[texts, tokens]` on the CPU.

        Raises:
            ModelError: If the special tokens alone fill the longest input; tokenizers then do not truncate at all.
        """
        columns = _columns(texts)
        special = self.tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
        if self.max_length <= special:
            raise ModelError(
                f"max_length={self.max_length}: leaves no room for text beside {special} special tokens; pass more, "
                "or leave it out for the model's own."
            )
        if special == 0:  # of an empty text nothing would be left
            columns[0] = [text or " " for text in columns[0]]
        options = {"max_length": self.max_length, "return_tensors": "pt", **self._side}
        return dict(self.tokenizer(*columns, padding=True, truncation=True, **options))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Run the model on one batch as it is (no mode, no gradient setting) and return float32 logits on its device.

        Args:
            batch: Tensors of shape `[texts, tokens]` on any device.

        Returns:
            Logits of shape `[texts, classes]`, in the order of the labels.

        Raises:
            ModelError: If the output has no such logits.
        """
        device = model_device(self.model)
        with self._precision(device):
            output = self.model(**{name: value.to(device) for name, value in batch.items()})
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ModelError(
                f"{type(self.model).__name__} returned {type(output).__name__} without logits of shape "
                "[texts, classes]; load it with a sequence classification head."
            )
        logits = logits.float()
        return logits if self.order is None else logits[:, self.order]

    def __call__(self, texts: Sequence[Text], training: bool = False) -> Tensor:
        """Score texts.

        Args:
            texts: Sentences, or pairs of sentences.
            training: Run in training mode, that is with dropout.

        Returns:
            Logits, float32 on the CPU, of shape `[texts, classes]`, in the order of the texts.

        Raises:
            DivergedModelError: If they are not finite: class 0 would be read off them.
        """
        if not len(texts):
            raise ModelError("texts is empty; there is nothing to predict.")
        # Texts of similar length side by side need the least padding.
        by_length = sorted(range(len(texts)), key=lambda position: _length(texts[position]))
        if len(texts) <= self.batch_size:
            by_length = list(range(len(texts)))
        scores: Tensor | None = None
        with _in_mode(self.model, training), torch.no_grad():
            for start in range(0, len(texts), self.batch_size):
                positions = by_length[start : start + self.batch_size]
                logits = self.forward(self.encode([texts[position] for position in positions])).cpu()
                if scores is None:
                    scores = logits.new_empty(len(texts), logits.shape[1])
                scores[positions] = logits
        assert scores is not None
        odd = (~scores.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if odd:
            raise DivergedModelError(
                f"model: {type(self.model).__name__} gives scores that are not finite for {len(odd)} of {len(texts)} "
                f"texts, as for {texts[odd[0]]!r}; did its training diverge, or does it need another dtype?"
            )
        return scores

    def classes(self, texts: Sequence[Text]) -> list[int]:
        """Return the label number of the highest score of each text."""
        return self(texts).argmax(dim=1).tolist()

    def correct(self, examples: Examples) -> list[bool]:
        """Return for each example whether its label has the highest score."""
        predicted = self.classes(examples.texts)
        return [guess == label for guess, label in zip(predicted, examples.labels, strict=True)]

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _columns(texts: Sequence[Text]) -> list[list[str]]:
    """Turn texts into one list per column, which is what tokenizers take."""
    rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or not widths <= {1, 2}:
        raise ModelError(f"texts mix {sorted(widths)} sentences per example; pass single sentences or pairs only.")
    return [list(column) for column in zip(*rows, strict=True)]
