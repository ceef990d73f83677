"""Units of models whose blocks are of several classes, and of models whose blocks change after attaching."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseError, attach_rose, get_selector
from tests.helpers.tiny import SIZES, batch, tiny_bert
from tests.helpers.watching import train_step, unit_weights, watched_step

Inputs = dict[str, Tensor]


def tokens(**further: Tensor) -> Inputs:
    ids = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), **further}


def jamba() -> tuple[nn.Module, Inputs]:
    """Attention and Mamba blocks, each with experts or a plain MLP."""
    config = tf.JambaConfig(
        **{**SIZES, "num_hidden_layers": 4},
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        use_cache=False,
        pad_token_id=0,
    )
    return tf.JambaForCausalLM(config), tokens()


def mllama() -> tuple[nn.Module, Inputs]:
    """Blocks of self attention, and one of cross attention that looks at an image."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

    config = MllamaTextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        num_key_value_heads=1,
        cross_attention_layers=[1, 3],
        rope_scaling={"rope_type": "default"},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    config.max_position_embeddings = 64
    model = MllamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            nn.init.ones_(parameter)  # at 0, as it starts, nothing of the image comes through
    image = torch.randn(4, 3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    return model, tokens(cross_attention_states=image)


class Narrow(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.tanh(self.linear(x)))


class Wide(nn.Module):
    """A block of another class, with experts in it: a list of blocks inside a block."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.experts = nn.ModuleList([Narrow(width), Narrow(width)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + sum(expert(x) for expert in self.experts)


class Mixed(nn.Module):
    """Blocks of two classes in one list, and a head."""

    def __init__(self, *blocks: type[nn.Module], container: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [block() for block in blocks or (Narrow, Wide, Narrow)]
        self.layers = nn.Sequential(*made) if container is nn.Sequential else nn.ModuleList(made)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.2, self.training)
        return self.head(x)


def mixed() -> tuple[nn.Module, Inputs]:
    return Mixed(), {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}


MIXED: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], str]] = {
    "Jamba": (jamba, "model.layers."),
    "Mllama": (mllama, "model.layers."),
    "hand-made": (mixed, "layers."),
}


def weights_in(model: nn.Module, prefix: str) -> set[str]:
    """Every weight in a list of blocks, by name: what has no "bias" in the last part of it."""
    named = model.named_parameters()
    return {name for name, _ in named if name.startswith(prefix) and "bias" not in name.rpartition(".")[2]}


@pytest.mark.parametrize("name", MIXED)
def test_the_weights_of_every_block_are_units(name: str) -> None:
    make, prefix = MIXED[name]
    expected = weights_in(make()[0], prefix)
    assert {unit.name for unit in attach_rose(make()[0], ROSEConfig()).units} == expected
    wrapped = get_peft_model(make()[0], ROSEConfig())
    assert {unit.name for unit in get_selector(wrapped).units} == expected


@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
@pytest.mark.parametrize("name", MIXED)
def test_blocks_of_every_class_are_masked(name: str, strategy: str) -> None:
    """The class of a block is read off its own modules; a mask of 0 is seen in each before long."""
    make, prefix = MIXED[name]
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    kinds = {f"{prefix}{i}.": type(b).__name__ for i, b in enumerate(model.get_submodule(prefix[:-1]))}
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.3, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    frozen: set[str] = set()
    for seed in range(6):
        torch.manual_seed(seed)
        output = model(**inputs)
        (output.square().mean() if isinstance(output, Tensor) else output.loss).backward()
        if seed == 0 and strategy == "second_order":
            optimizer.step()
            optimizer.zero_grad()
            continue
        masks = (
            watched_step(selector, optimizer.step, optimizer)
            if name == "hand-made"
            else step_of_reached(selector, optimizer)
        )
        frozen |= {
            kinds[prefix_]
            for prefix_ in kinds
            for unit, mask in masks.items()
            if unit.startswith(prefix_) and mask == 0
        }
    assert frozen == set(kinds.values())


def step_of_reached(selector: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """As `watched_step`, but an expert that no token went to has no gradient and stays where it is."""
    before = unit_weights(selector)
    reached = {u.name: any(p.grad is not None and bool(p.grad.any()) for p in u.parameters()) for u in selector.units}
    optimizer.step()
    optimizer.zero_grad()
    masks = dict(zip(before, selector.state.last_mask.tolist(), strict=True))
    for unit in selector.units:
        same = all(torch.equal(now, then) for now, then in zip(unit.parameters(), before[unit.name], strict=True))
        if masks[unit.name] == 0:
            assert same, f"{unit.name} has mask 0 and moved"
        elif reached[unit.name]:
            assert not same, f"{unit.name} has mask {masks[unit.name]} and did not move"
    return masks


@pytest.mark.parametrize("blocks", [(Wide, Narrow), (Wide,), (Wide, nn.Identity, Wide)])
def test_lists_in_which_no_class_repeats_and_places_left_empty(blocks: tuple[type[nn.Module], ...]) -> None:
    expected = weights_in(Mixed(*blocks), "layers.")
    assert {unit.name for unit in attach_rose(Mixed(*blocks), ROSEConfig()).units} == expected


def test_blocks_in_a_sequential() -> None:
    model = Mixed(Narrow, Wide, Narrow, container=nn.Sequential)
    assert {unit.name for unit in attach_rose(model, ROSEConfig()).units} == weights_in(Mixed(), "layers.")


def test_two_models_in_a_list_are_no_blocks() -> None:
    """The blocks are inside them; their embeddings and poolers are no units."""
    towers = nn.ModuleList([tiny_bert().bert, tf.RobertaModel(tf.RobertaConfig(**SIZES))])
    blocks = ("0.encoder.layer.", "1.encoder.layer.")
    expected = {name for prefix in blocks for name in weights_in(towers, prefix)}
    assert {unit.name for unit in attach_rose(towers, ROSEConfig()).units} == expected
    pipeline = nn.Sequential(Mixed(), nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    assert {unit.name for unit in attach_rose(pipeline, ROSEConfig()).units} == weights_in(pipeline, "0.layers.")


def test_what_is_no_list_of_blocks_is_left_alone() -> None:
    """A head written as a Sequential of layers, or a list of plain layers, is not repeated blocks."""
    model = Mixed()
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model.side = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    assert {unit.name for unit in attach_rose(model, ROSEConfig()).units} == weights_in(Mixed(), "layers.")


def caught(call: Callable[[], Any], about: str) -> list[str]:
    """Messages of the UserWarnings of a call that speak of something."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        call()
    found = [str(record.message) for record in records if issubclass(record.category, UserWarning)]
    return [message for message in found if about in message]


def test_units_that_cover_less_than_half_of_the_blocks_are_pointed_out() -> None:
    """A frozen or excluded part is the user's wish, but he hears of how little is left."""
    # Per block: 4 matrices of 16 x 16, one of 16 x 32 and one of 32 x 16, two norms of 16.
    narrow = ROSEConfig(target_modules=["query", "key"])
    assert caught(lambda: attach_rose(tiny_bert(), narrow), "half")
    assert caught(lambda: get_peft_model(tiny_bert(), narrow), "half")
    assert not caught(lambda: attach_rose(tiny_bert(), ROSEConfig()), "half")
    assert not caught(lambda: attach_rose(tiny_bert(), ROSEConfig(target_modules=["query", "dense"])), "half")
    # An adapter is small beside the weights by its nature.
    lora = LoraConfig(r=2, target_modules=["query"])
    assert not caught(lambda: get_peft_model(tiny_bert(), ROSEConfig(base_config=lora)), "half")


# Blocks that change after attaching --------------------------------------------------------------------------------


def rebuild(model: nn.Module) -> None:
    model.bert.encoder.layer = nn.ModuleList([copy.deepcopy(block) for block in model.bert.encoder.layer])


def drop(model: nn.Module) -> None:
    del model.bert.encoder.layer[1]


def prune(model: nn.Module) -> None:
    if not hasattr(model, "prune_heads"):
        pytest.skip("transformers 5 prunes no heads")
    model.prune_heads({0: [0], 1: [1]})


def append(model: nn.Module) -> None:
    model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[0]))
    model.config.num_hidden_layers += 1


@pytest.mark.parametrize("strategy", ["first_order", "second_order"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("change", [rebuild, drop, prune, append])
def test_units_follow_blocks_that_change_or_an_error_names_them(
    change: Callable[[nn.Module], None], steps_before: int, strategy: str
) -> None:
    model = tiny_bert()
    selector = attach_rose(model, ROSEConfig(strategy=strategy, upper_quantile=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(steps_before):
        train_step(model, optimizer, seed)
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    expected = weights_in(model, "bert.encoder.layer.")
    try:
        train_step(model, optimizer, 2)
        assert {unit.name for unit in selector.units} == expected
        for seed in range(3, 5):
            torch.manual_seed(seed)
            model(**batch(model, seed=seed)).loss.backward()
            watched_step(selector, optimizer.step, optimizer)
    except RoseError as error:
        assert "encoder.layer" in str(error)
        return
    live = {id(param) for param in model.parameters()}
    assert all(unit.parameters() for unit in selector.units)
    assert {id(param) for unit in selector.units for param in unit.parameters()} <= live
