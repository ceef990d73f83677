"""How TextAttack sees a model. Imports TextAttack, so the kit imports it only once an attack is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RobustnessError, one_line
from ..predict import Predictor, Text, evaluating, model_device
from .offline import import_textattack

import_textattack()

from textattack.models.wrappers import ModelWrapper  # noqa: E402


class ClassifierWrapper(ModelWrapper):
    """A `Predictor` as TextAttack's victim: any classifier or `PeftModel`, padded only as far as each batch needs.

    TextAttack's own `HuggingFaceModelWrapper` refuses a `PeftModel`, pads every text to the tokenizer's maximum, and
    runs the model in whatever mode it is in.

    Args:
        predictor: The model with its tokenizer.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        # Attacks that use gradients look these up on the wrapper.
        self.model = predictor.model
        self.tokenizer = predictor.tokenizer
        self.max_length = predictor.max_length
        self._known: dict[Text, Tensor] = {}

    def __call__(self, text_input_list: Sequence[Text]) -> Tensor:
        """Return class probabilities in float32 on the CPU, of shape `[texts, classes]`.

        Raises:
            ModelError: If the model fails on the texts.
            DivergedModelError: If its scores are not finite.
        """
        unknown = [text for text in text_input_list if text not in self._known]
        if len(unknown) == len(text_input_list):
            return self._read(text_input_list)
        found = dict(zip(unknown, self._read(unknown), strict=True)) if unknown else {}
        return torch.stack([found[text] if text in found else self._known[text] for text in text_input_list])

    def remember(self, texts: Sequence[Text]) -> list[int]:
        """Read texts now, in full batches, and keep the answers for when they are asked.

        Args:
            texts: Sentences or pairs.

        Returns:
            The class of each.
        """
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        self._known.update(zip(new, self._read(new) if new else (), strict=True))
        return [int(self._known[text].argmax()) for text in texts]

    def forget(self) -> None:
        """Forget what was remembered."""
        self._known = {}

    def _read(self, text_input_list: Sequence[Text]) -> Tensor:
        """Let the model read texts.

        Raises:
            ModelError: If the model fails on the texts.
            DivergedModelError: If its scores are not finite.
        """
        try:
            logits = self.predictor(text_input_list)
        except (RobustnessError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # told apart from the attack's own errors, which say something about the example
            raise ModelError(
                f"model: {type(self.model).__name__} fails on texts like {text_input_list[0]!r} ({one_line(error)})."
            ) from error
        # In double precision, since TextAttack checks that each row sums to 1 within 1e-6.
        return logits.double().softmax(dim=1).float()

    def get_grad(self, text_input: Text) -> dict[str, Any]:
        """Return the gradient of the loss at the predicted class with respect to the token embeddings.

        Args:
            text_input: One sentence or pair.

        Returns:
            `ids`, the token numbers of shape `[1, tokens]`, and `gradient`, an array of shape `[tokens, width]`.
        """
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        captured: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Tensor) -> Tensor:
            # A fresh leaf: the gradient is wanted here and nowhere else, whatever is frozen.
            captured.append(output.detach().requires_grad_())
            return captured[-1]

        handle = embedding.register_forward_hook(keep)
        try:
            with evaluating(self.model), torch.enable_grad():
                batch = self.predictor.encode([text_input])
                logits = self.predictor.forward(batch)
                loss = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1))
                (gradient,) = torch.autograd.grad(loss, captured[:1])
        finally:
            handle.remove()
        return {"ids": batch["input_ids"], "gradient": gradient[0].float().cpu().numpy()}

    def _tokenize(self, inputs: Sequence[Text]) -> list[list[str]]:
        """Return the tokens of each text, as `get_grad` counts them."""
        return [self.tokenizer.convert_ids_to_tokens(self.predictor.encode([text])["input_ids"][0]) for text in inputs]

    def to(self, device: torch.device) -> None:
        """Refuse to move: the model stays where its user put it."""
        if torch.device(device) != model_device(self.model):
            raise RuntimeError(f"device={device}: the model stays on {model_device(self.model)}; move it yourself.")
