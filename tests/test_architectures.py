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
from tests.helpers.training import outputs, snapshot, train, train_watched

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


# Heads --------------------------------------------------------------------------------------------------------------


def multi_label() -> dict[str, Tensor]:
    return text(labels=torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]]))


def regression() -> dict[str, Tensor]:
    return text(labels=torch.tensor([0.5, -1.0, 2.0, 0.0]))


def tags() -> dict[str, Tensor]:
    inputs = text()
    labels = inputs["input_ids"] % 3
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def spans() -> dict[str, Tensor]:
    return text(start_positions=torch.tensor([0, 1, 2, 3]), end_positions=torch.tensor([1, 3, 2, 5]))


def masked_words() -> dict[str, Tensor]:
    inputs = text()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(torch.arange(LENGTH) % 3 != 0, -100)}


def classifier(**fields: Any) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZES, **fields))


BERT = CASES[0]
HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], str | None]] = {
    "single label": (classifier, classes, "SEQ_CLS"),
    "multi label": (
        lambda: classifier(num_labels=3, problem_type="multi_label_classification"),
        multi_label,
        "SEQ_CLS",
    ),
    "regression": (lambda: classifier(num_labels=1), regression, "SEQ_CLS"),
    "token classification": (
        lambda: tf.BertForTokenClassification(tf.BertConfig(**SIZES, num_labels=3)),
        tags,
        "TOKEN_CLS",
    ),
    "question answering": (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)), spans, "QUESTION_ANS"),
    "masked LM": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)), masked_words, None),
}
every_head = pytest.mark.parametrize("head", HEADS)


def with_head(head: str, **fields: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model tuned by first order, and a batch for it."""
    build, inputs, task_type = HEADS[head]
    torch.manual_seed(0)
    return get_peft_model(build(), ROSEConfig(task_type=task_type, strategy="first_order", **fields)), inputs()


@every_head
@pytest.mark.parametrize("over_lora", [False, True])
def test_head(head: str, over_lora: bool, tmp_path) -> None:
    inner = LoraConfig(r=2, target_modules=["query", "value"]) if over_lora else None
    model, inputs = with_head(head, base_config=inner)
    if inner is None:
        assert sorted(unit.name for unit in get_selector(model).units) == BERT.unit_names()
    masks = torch.stack(train_watched(model, inputs))
    assert (masks == 0).any() and (masks == 1).any()
    assert (get_selector(model).state.first_scores > 0).all()
    trained = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(HEADS[head][0](), tmp_path)
    assert torch.equal(outputs(loaded, inputs), trained)


def two_passes(model: nn.Module, inputs: dict[str, Tensor]) -> list[Any]:
    """What the two passes of one training call give, run by hand from the same seed."""
    selector = get_selector(model)
    model.train()
    torch.manual_seed(7)
    with selector.passes.own():  # the hook keeps still
        return [model(**inputs) for _ in range(2)]


@every_head
def test_loss_is_the_mean_of_both_passes(head: str) -> None:
    model, inputs = with_head(head)
    one, two = (output.loss for output in two_passes(model, inputs))
    assert one != two
    torch.manual_seed(7)
    torch.testing.assert_close(model(**inputs).loss, (one + two) / 2, rtol=1e-6, atol=0)


def test_both_passes_divide_by_the_items_that_were_given() -> None:
    """Causal models take `num_items_in_batch` from the Trainer; pass 2 must not divide by its own count."""
    case = next(case for case in CASES if case.name == "Llama")
    model = get_peft_model(case.model(), case.config())
    inputs = case.inputs()
    counted = inputs["labels"][:, 1:] != -100
    sums = [
        torch.nn.functional.cross_entropy(
            output.logits[:, :-1][counted], inputs["labels"][:, 1:][counted], reduction="sum"
        )
        for output in two_passes(model, inputs)
    ]
    torch.manual_seed(7)
    loss = model(**inputs, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(loss, (sums[0] + sums[1]) / 2 / 100, rtol=1e-5, atol=0)


def first_order_scores(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of one training call that changes nothing."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    optimizer.step()
    return get_selector(model).state.first_scores.clone()


def norms(model: nn.Module, divergence: Tensor) -> Tensor:
    params = [unit.parameters()[0] for unit in get_selector(model).units]
    return torch.stack([grad.norm().double() for grad in torch.autograd.grad(divergence, params)])


def between_classes(one: Tensor, two: Tensor) -> Tensor:
    """The symmetric divergence from torch's own distributions, which share no code with the package."""
    first, second = (torch.distributions.Categorical(logits=logits) for logits in (one, two))
    kl = torch.distributions.kl_divergence
    return (kl(first, second) + kl(second, first)).sum() / 4


def by_hand(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    one, two = (output.logits[counted] for output in two_passes(model, inputs))
    return norms(model, between_classes(one, two))


def assert_same(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)


def test_single_label_counts_every_example() -> None:
    model, inputs = with_head("single label")
    everywhere = torch.ones(4, dtype=torch.bool)
    assert_same(first_order_scores(model, inputs), by_hand(model, inputs, everywhere))


def test_multi_label_takes_labels_as_independent() -> None:
    model, inputs = with_head("multi label")
    scores = first_order_scores(model, inputs)
    logits = [output.logits for output in two_passes(model, inputs)]
    one, two = (torch.distributions.Bernoulli(logits=values) for values in logits)
    kl = torch.distributions.kl_divergence
    assert_same(scores, norms(model, (kl(one, two) + kl(two, one)).sum() / 4))


def test_regression_takes_the_squared_difference() -> None:
    model, inputs = with_head("regression")
    scores = first_order_scores(model, inputs)
    one, two = (output.logits for output in two_passes(model, inputs))
    assert_same(scores, norms(model, (one - two).square().mean()))


def test_spans_are_distributions_over_positions() -> None:
    model, inputs = with_head("question answering")
    scores = first_order_scores(model, inputs)
    one, two = two_passes(model, inputs)
    total = between_classes(one.start_logits, two.start_logits) + between_classes(one.end_logits, two.end_logits)
    assert_same(scores, norms(model, total))


@pytest.mark.parametrize("head", ["token classification", "masked LM"])
def test_ignored_positions_do_not_count(head: str) -> None:
    model, inputs = with_head(head)
    inputs["labels"][:, 4:] = -100
    scores = first_order_scores(model, inputs)
    assert_same(scores, by_hand(model, inputs, inputs["labels"] != -100))
    everywhere = by_hand(model, inputs, torch.ones_like(inputs["labels"], dtype=torch.bool))
    assert not torch.allclose(scores, everywhere, rtol=1e-2)


@pytest.mark.parametrize("name", ["GPT-2 (Conv1D)", "Llama"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_ignored_positions_do_not_count_for_the_token_before(name: str, task_type: str | None) -> None:
    """In a causal model position t answers for the label at t + 1, as with prompts that are not to be learnt."""
    case = next(case for case in CASES if case.name == name)
    model = get_peft_model(case.model(), case.config(task_type=task_type, strategy="first_order"))
    inputs = case.inputs()
    inputs["labels"][:, :4] = -100
    shifted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    shifted[:, :-1] = inputs["labels"][:, 1:] != -100
    scores = first_order_scores(model, inputs)
    assert_same(scores, by_hand(model, inputs, shifted))
    unshifted = by_hand(model, inputs, inputs["labels"] != -100)
    assert not torch.allclose(scores, unshifted, rtol=1e-2)


def test_sequence_to_sequence_counts_the_labels_of_the_decoder() -> None:
    case = next(case for case in CASES if case.name == "T5")
    model = get_peft_model(case.model(), case.config(strategy="first_order"))
    inputs = case.inputs()
    inputs["labels"][:, 3:] = -100
    assert_same(first_order_scores(model, inputs), by_hand(model, inputs, inputs["labels"] != -100))


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
