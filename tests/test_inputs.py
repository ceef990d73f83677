"""Some rows of whatever a model was called with, and a call without the user's cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from rose_peft.inputs import row_count, take_rows, tensors_inside, without_cache


def numbered(count: int, *shape: int) -> Tensor:
    """Row i holds i everywhere."""
    return torch.arange(count).view(-1, *[1] * len(shape)).expand(count, *shape).clone()


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True))
def test_rows_are_spread_over_the_batch(count: int, fraction: float) -> None:
    rows = take_rows((), {"input_ids": numbered(count, 2)}, fraction)
    wanted = math.ceil(fraction * count)
    if count == 1 and fraction < 1:
        assert rows.index is None
        return
    assert rows.index is not None and len(rows.index) == wanted == len(rows.kwargs["input_ids"])
    assert torch.equal(rows.kwargs["input_ids"][:, 0], rows.index)
    gaps = rows.index.diff(append=torch.tensor([count]))
    # No two gaps differ by more than one, the first row is in, and no row twice.
    assert rows.index[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@given(st.integers(2, 40), st.floats(0, 1, exclude_min=True))
def test_rows_taken_twice_come_one_time_after_the_other(count: int, fraction: float) -> None:
    kwargs = {"input_ids": numbered(count, 2), "texts": [str(row) for row in range(count)], "scale": torch.tensor(2.0)}
    once, twice = (take_rows((), kwargs, fraction, times=times) for times in (1, 2))
    assert torch.equal(twice.kwargs["input_ids"], torch.cat([once.kwargs["input_ids"]] * 2))
    assert twice.kwargs["texts"] == once.kwargs["texts"] * 2 and twice.kwargs["scale"] is kwargs["scale"]
    assert torch.equal(twice.index, torch.cat([once.index] * 2))


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


def test_every_kind_of_container_gives_the_same_rows() -> None:
    flat, wide = numbered(6), numbered(6, 3, 4)
    nested = {"deep": [flat, (wide, 7)], "name": "x"}
    args = (flat, nested, Pair(flat, wide), None, [flat, wide])
    kwargs = {
        "output": BaseModelOutput(last_hidden_state=wide),
        "encoding": BatchEncoding({"input_ids": wide, "token_type_ids": wide}),
        "texts": ["a", "b", "c", "d", "e", "f"],
        "pictures": [torch.full((1 + row, 2), row) for row in range(6)],
        "targets": [{"boxes": torch.full((row, 4), row), "label": torch.tensor(row)} for row in range(6)],
        "return_dict": True,
        "scale": torch.tensor(2.0),
    }
    rows = take_rows(args, kwargs, 0.5)
    index = torch.tensor([0, 2, 4])
    assert torch.equal(rows.index, index)
    first, deep, pair, nothing, pictures = rows.args
    assert torch.equal(first, index) and nothing is None
    assert torch.equal(deep["deep"][0], index) and torch.equal(deep["deep"][1][0], wide[index])
    assert isinstance(deep["deep"][1], tuple) and deep["deep"][1][1] == 7 and deep["name"] == "x"
    assert isinstance(pair, Pair) and torch.equal(pair.two, wide[index])
    assert all(torch.equal(one, other) for one, other in zip(pictures, [index, wide[index]], strict=True))
    assert isinstance(rows.kwargs["output"], BaseModelOutput)
    assert torch.equal(rows.kwargs["output"].last_hidden_state, wide[index])
    assert torch.equal(rows.kwargs["encoding"].input_ids, wide[index])
    assert rows.kwargs["texts"] == ["a", "c", "e"]
    assert [picture.shape[0] for picture in rows.kwargs["pictures"]] == [1, 3, 5]
    assert [int(target["label"]) for target in rows.kwargs["targets"]] == [0, 2, 4]
    assert rows.kwargs["return_dict"] is True and rows.kwargs["scale"] == 2.0
    # What the user handed in is as it was.
    assert len(kwargs["output"].last_hidden_state) == 6 and len(kwargs["encoding"]["input_ids"]) == 6
    assert len(nested["deep"][0]) == 6 and len(kwargs["targets"]) == 6


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("position_ids", torch.arange(5).view(1, 5)),
        ("cache_position", torch.arange(4)),  # as long as there are rows
        ("head_mask", torch.ones(4, 2)),  # one row for each of as many layers
        ("decoder_head_mask", torch.ones(4, 2)),
        ("cross_attn_head_mask", torch.ones(4, 2)),
        ("num_items_in_batch", torch.tensor([9])),
    ],
)
def test_arguments_for_all_rows_stay(name: str, tensor: Tensor) -> None:
    rows = take_rows((), {"input_ids": numbered(4, 5), name: tensor}, 0.5)
    assert torch.equal(rows.index, torch.tensor([0, 2])) and rows.kwargs[name] is tensor


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), 0)
    return cache


@pytest.mark.parametrize(
    "extra",
    [
        {"pixel_values": torch.zeros(24, 6)},  # patches of all pictures in one list
        {"image_grid_thw": torch.ones(3, 3, dtype=torch.int64)},
        {"position_ids": torch.zeros(4, 4, 5)},  # time, height, width and one more
        {"unknown": filled_cache()},  # not ours to cut
        {"both": [numbered(4, 2)] * 4},  # an item for each row, or rows in each item
        {"cu_seqlens": torch.tensor([0, 2, 5])},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_batch_that_cannot_be_taken_apart_stays_whole(extra: dict[str, Any]) -> None:
    kwargs = {"input_ids": numbered(4, 5), **extra}
    rows = take_rows((), kwargs, 0.5)
    assert rows.index is None and rows.kwargs is kwargs


def test_a_packed_batch_of_one_row_stays_whole_and_says_so() -> None:
    kwargs = {"input_ids": numbered(1, 50), "position_ids": torch.arange(50).view(1, 50)}
    assert take_rows((), kwargs, 0.25).index is None
    assert take_rows((), kwargs, 1.0).index is not None  # which is what was asked for


def test_results_tell_the_number_of_rows() -> None:
    pictures = [torch.zeros(3, 2, 2) for _ in range(4)]  # three channels are not three rows
    rows = take_rows((pictures,), {}, 0.5, [4])
    assert len(rows.args[0]) == 2 and all(one is other for one, other in zip(rows.args[0], pictures[::2], strict=True))
    assert take_rows((numbered(4, 5),), {}, 0.5, [20]).index is None  # logits of all tokens in one row
    assert take_rows((numbered(4, 5),), {}, 0.5, [4, 20]).index is None
    assert take_rows((), {"scale": torch.tensor(2.0)}, 0.5, [4]).index is None  # no input has rows
    assert take_rows((), {}, 0.5).index is None


def test_without_results_the_most_telling_input_counts() -> None:
    ids, flat = numbered(4, 5), numbered(20)
    assert row_count((), {"labels": flat, "input_ids": ids}) == 4
    assert row_count((ids,), {"labels": numbered(4)}) == 4
    assert row_count((), {"scale": torch.tensor(1.0)}) is None


# Caches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "past_key_value", "cache_params", "mems"])
def test_no_cache_is_left(name: str) -> None:
    kwargs = {"input_ids": numbered(2, 3), name: object(), "cache_position": torch.arange(4, 7), "use_cache": True}
    kept = without_cache((), kwargs)
    assert set(kept) == {"input_ids", "use_cache"} and kept["use_cache"] is False
    assert name in kwargs and kwargs["use_cache"] is True


def test_without_a_cache_nothing_changes() -> None:
    kwargs = {"input_ids": numbered(2, 3), "past_key_values": None, "use_cache": True}
    assert without_cache((), kwargs) is kwargs


@pytest.mark.parametrize(
    ("args", "given_as"),
    [
        ((), {"input_ids": torch.zeros(2, 3)}),
        ((), {"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 8)}),
        ((torch.zeros(2, 3),), {}),
    ],
)
@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 3, 7)])
def test_masks_that_reach_into_the_cache_are_cut(
    args: tuple[Tensor, ...], given_as: dict[str, Any], shape: tuple[int, ...]
) -> None:
    mask = torch.arange(7).expand(shape)
    kept = without_cache(args, {**given_as, "attention_mask": mask, "past_key_values": object()})
    assert torch.equal(kept["attention_mask"], mask[..., 4:])


def test_encoder_and_decoder_masks_go_by_their_own_lengths() -> None:
    mask = torch.ones(2, 9)
    kwargs = {
        "input_ids": torch.zeros(2, 9),
        "attention_mask": mask,
        "decoder_input_ids": torch.zeros(2, 2),
        "decoder_attention_mask": torch.arange(6).expand(2, 6),
        "past_key_values": object(),
    }
    kept = without_cache((), kwargs)
    assert torch.equal(kept["attention_mask"], mask)
    assert torch.equal(kept["decoder_attention_mask"], torch.tensor([[4, 5], [4, 5]]))


def test_tensors_inside_finds_each_place_once() -> None:
    tensor = torch.zeros(1)
    cycle: list[Any] = [tensor]
    cycle.append(cycle)
    assert [id(found) for found in tensors_inside({"a": cycle, "b": (tensor,)})] == [id(tensor)] * 2
