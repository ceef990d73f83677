"""Every supported architecture, tiny and random: which weights are units, and that each operation of PEFT works.

`python -m tests.test_architectures` prints the table of architectures and operations.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseInactiveError, get_selector

from .training import outputs, snapshot, train, train_watched

VOCABULARY, WIDTH, LENGTH = 32, 16, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    # Large weights, so that dropout changes the outputs of so small a model visibly.
    "initializer_range": 0.2,
}
# What PEFT lets train: copies of ROSE, and heads that the task types put into modules_to_save.
TRAINED = re.compile(r"\.rose_|\.modules_to_save\.")
V5 = int(tf.__version__.split(".")[0]) >= 5


def text(**labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, **labels}


def classes() -> dict[str, Tensor]:
    return text(labels=torch.tensor([0, 1, 1, 0]))


def next_tokens() -> dict[str, Tensor]:
    inputs = text()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def translation() -> dict[str, Tensor]:
    return text(labels=torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(1)))


def images() -> dict[str, Tensor]:
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 0])}


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        build: Makes the model; called after seeding.
        units: The weights that must be units, written out by hand: `{i}` stands for the blocks 0 and 1.
        inputs: A batch with labels.
        dropout: None where the model has dropout of its own.
    """

    name: str
    build: Callable[[], nn.Module]
    units: tuple[str, ...]
    inputs: Callable[[], dict[str, Tensor]] = classes
    dropout: float | None = None
    task_type: str = "SEQ_CLS"
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().train()

    def config(self, **fields: Any) -> ROSEConfig:
        return ROSEConfig(**{"task_type": self.task_type, "dropout": self.dropout, **fields})

    def unit_names(self) -> list[str]:
        # A name without {i} stands for itself: weights that only the first block has.
        return sorted({name.format(i=i) for name in self.units for i in (0, 1)})


def under(prefix: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{suffix}.weight" for suffix in suffixes)


BERT_BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
DISTILBERT_BLOCK = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
DEBERTA_BLOCK = (
    "attention.self.query_proj",
    "attention.self.key_proj",
    "attention.self.value_proj",
    "attention.self.pos_key_proj",
    "attention.self.pos_query_proj",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
ALBERT_BLOCK = (
    "full_layer_layer_norm",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.dense",
    "attention.LayerNorm",
    "ffn",
    "ffn_output",
)
MPNET_BLOCK = (
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    "attention.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
LLAMA_BLOCK = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
GPT2_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
T5_ATTENTION = ("q", "k", "v", "o")
VIT_BLOCK = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    if V5
    else (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
)

CASES = [
    Case(
        "BERT",
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
        under("bert.encoder.layer.{i}", *BERT_BLOCK),
    ),
    Case(
        "RoBERTa",
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES)),
        under("roberta.encoder.layer.{i}", *BERT_BLOCK),
    ),
    Case(
        "DistilBERT",
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(
                vocab_size=VOCABULARY,
                dim=WIDTH,
                hidden_dim=32,
                n_layers=2,
                n_heads=2,
                max_position_embeddings=20,
                initializer_range=0.2,
            )
        ),
        under("distilbert.transformer.layer.{i}", *DISTILBERT_BLOCK),
        # PEFT's "all-linear" includes the `pre_classifier`, which its SEQ_CLS then refuses to train beside LoRA.
        lora={"target_modules": ["q_lin", "v_lin"]},
    ),
    Case(
        "ELECTRA",
        lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**SIZES, embedding_size=8)),
        under("electra.encoder.layer.{i}", *BERT_BLOCK),
    ),
    Case(
        "DeBERTa-v2",
        lambda: tf.DebertaV2ForSequenceClassification(
            tf.DebertaV2Config(
                **SIZES,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=4,
                norm_rel_ebd="layer_norm",
            )
        ),
        under("deberta.encoder.layer.{i}", *DEBERTA_BLOCK),
    ),
    Case(
        "ALBERT (shared layers)",
        lambda: tf.AlbertForSequenceClassification(
            tf.AlbertConfig(**SIZES, embedding_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        ),
        under("albert.encoder.albert_layer_groups.0.albert_layers.0", *ALBERT_BLOCK),
    ),
    Case(
        "MPNet",
        lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**SIZES)),
        under("mpnet.encoder.layer.{i}", *MPNET_BLOCK),
    ),
    Case(
        "ModernBERT",
        lambda: tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(
                **SIZES,
                initializer_cutoff_factor=2.0,
                pad_token_id=0,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        # The first block has no norm before its attention.
        (
            *under("model.layers.{i}", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"),
            "model.layers.1.attn_norm.weight",
        ),
        dropout=0.1,
    ),
    Case(
        "T5",
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        (
            *under("encoder.block.{i}.layer.0.SelfAttention", *T5_ATTENTION),
            *under("encoder.block.{i}.layer.1.DenseReluDense", "wi", "wo"),
            *under("encoder.block.{i}", "layer.0.layer_norm", "layer.1.layer_norm"),
            *under("decoder.block.{i}.layer.0.SelfAttention", *T5_ATTENTION),
            *under("decoder.block.{i}.layer.1.EncDecAttention", *T5_ATTENTION),
            *under("decoder.block.{i}.layer.2.DenseReluDense", "wi", "wo"),
            *under("decoder.block.{i}", "layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
            # A weight inside a block, whatever its module's name says; only the first block has one.
            *under("encoder.block.0.layer.0.SelfAttention", "relative_attention_bias"),
            *under("decoder.block.0.layer.0.SelfAttention", "relative_attention_bias"),
        ),
        inputs=translation,
        task_type="SEQ_2_SEQ_LM",
    ),
    Case(
        "GPT-2 (Conv1D)",
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=20,
                n_embd=WIDTH,
                n_layer=2,
                n_head=2,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        under("transformer.h.{i}", *GPT2_BLOCK),
        inputs=next_tokens,
        task_type="CAUSAL_LM",
    ),
    Case(
        "Llama",
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1)),
        under("model.layers.{i}", *LLAMA_BLOCK),
        inputs=next_tokens,
        dropout=0.1,
        task_type="CAUSAL_LM",
    ),
    Case(
        "Qwen2",
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=1)),
        under("model.layers.{i}", *LLAMA_BLOCK),
        inputs=next_tokens,
        dropout=0.1,
        task_type="CAUSAL_LM",
    ),
    Case(
        "Qwen3",
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)),
        under("model.layers.{i}", *LLAMA_BLOCK, "self_attn.q_norm", "self_attn.k_norm"),
        inputs=next_tokens,
        dropout=0.1,
        task_type="CAUSAL_LM",
    ),
    Case(
        "ViT",
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                initializer_range=0.2,
            )
        ),
        under("vit.layers.{i}" if V5 else "vit.encoder.layer.{i}", *VIT_BLOCK, "layernorm_before", "layernorm_after"),
        inputs=images,
        dropout=0.1,
        # PEFT has no task type for images; without one the head is what it is.
        task_type=None,  # type: ignore[arg-type]
    ),
]


def check_units(case: Case) -> None:
    model = get_peft_model(case.model(), case.config())
    assert sorted(unit.name for unit in get_selector(model).units) == case.unit_names()
    # The rest of the model trains too, unmasked: nothing of what is not a unit is frozen.
    names = {name for name, _ in case.model().named_parameters()}
    assert set(case.unit_names()) < names
    copies = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert copies == sum(param.numel() for param in case.model().parameters())


def check_untouched_output(case: Case) -> None:
    plain = case.model()
    model = get_peft_model(case.model(), case.config())
    assert torch.equal(outputs(model, case.inputs()), outputs(plain, case.inputs()))


def check_first_order(case: Case) -> None:
    model = get_peft_model(case.model(), case.config(strategy="first_order", upper_quantile=0.7))
    base = {name: tensor for name, tensor in snapshot(model).items() if not TRAINED.search(name)}
    masks = train_watched(model, case.inputs())
    count = len(case.unit_names())
    for mask in masks:  # no two scores of float gradients are equal, so the number kept is known
        assert set(mask.tolist()) == {0.0, 1.0}
        assert int(mask.sum()) == math.floor(0.7 * (count - 1)) + 1
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items()), "the frozen original moved"


def check_ensemble(case: Case) -> None:
    model = get_peft_model(case.model(), case.config())
    masks = torch.stack(train_watched(model, case.inputs()))
    assert set(masks[0].tolist()) == {0.5, 1.0}  # there is no momentum to compare with in the first step
    for mask in masks:
        assert (mask < 1).any() and (mask > 0).any()
    assert not torch.equal(masks[1], masks[0])


def check_save_and_load(case: Case) -> None:
    model = get_peft_model(case.model(), case.config())
    train(model, case.inputs())
    trained = outputs(model, case.inputs())
    assert not torch.equal(trained, outputs(case.model(), case.inputs()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.model(), folder)
    assert torch.equal(outputs(loaded, case.inputs()), trained)


def check_merge(case: Case) -> None:
    model = get_peft_model(case.model(), case.config())
    train(model, case.inputs())
    trained = outputs(model, case.inputs())
    merged = model.merge_and_unload()
    plain = case.model()
    assert type(merged) is type(plain)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in plain.named_modules()]
    assert torch.equal(outputs(merged, case.inputs()), trained)
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(outputs(plain, case.inputs()), trained)


def check_lora(case: Case) -> None:
    model = get_peft_model(
        case.model(), case.config(base_config=LoraConfig(r=2, task_type=case.task_type, **case.lora))
    )
    masks = torch.stack(train_watched(model, case.inputs()))
    assert (masks < 1).any() and (masks > 0).any()
    trained = outputs(model, case.inputs())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.model(), folder)
    assert torch.equal(outputs(loaded, case.inputs()), trained)


OPERATIONS = {
    "default units": check_units,
    "eval = plain": check_untouched_output,
    "first-order": check_first_order,
    "ensemble": check_ensemble,
    "save / load": check_save_and_load,
    "merge": check_merge,
    "over LoRA": check_lora,
}
_passed: set[tuple[str, str]] = set()
_tried: set[tuple[str, str]] = set()


def table() -> list[str]:
    """Markdown lines: what passed, what failed (**no**), what was not run (-)."""

    def cell(case: Case, operation: str) -> str:
        key = (case.name, operation)
        return "yes" if key in _passed else "**no**" if key in _tried else "-"

    header = ["architecture", "units", *OPERATIONS]
    rows = [[case.name, str(len(case.unit_names())), *(cell(case, name) for name in OPERATIONS)] for case in CASES]
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def run(case: Case, operation: str) -> None:
    _tried.add((case.name, operation))
    OPERATIONS[operation](case)
    _passed.add((case.name, operation))


@pytest.fixture(scope="module", autouse=True)
def _print_table(record_figures):
    yield
    if _tried:
        record_figures(f"Architectures and operations, transformers {tf.__version__}")
        for line in table():
            record_figures(line)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_architecture(case: Case, operation: str) -> None:
    run(case, operation)


@pytest.mark.parametrize("case", [c for c in CASES if c.dropout is not None], ids=lambda case: case.name)
def test_without_any_dropout_first_order_is_refused(case: Case) -> None:
    """These models have no dropout, or none above 0: both passes give the same output."""
    model = get_peft_model(case.model(), case.config(dropout=None))
    with pytest.raises(RoseInactiveError, match=r"dropout=None .* ROSEConfig\(dropout=0.1\)"):
        train(model, case.inputs(), steps=1)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_injected_dropout_acts_in_training_only(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    plain = case.model()
    model = get_peft_model(case.model(), case.config())
    assert torch.equal(outputs(model, case.inputs()), outputs(plain, case.inputs()))
    model.train()
    with torch.no_grad():
        first, second = (model(**case.inputs()).logits for _ in range(2))
    assert not torch.equal(first, second)


def main() -> None:
    warnings.simplefilter("ignore")
    for case in CASES:
        for operation in OPERATIONS:
            try:
                run(case, operation)
            except Exception as error:
                print(f"{case.name}, {operation}: {type(error).__name__}: {error}")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
