"""Weights that move without us are noticed; weights that are loaded, averaged or swapped between steps are fine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rose_peft import ROSEConfig, RoseError, RoseInactiveError, UnsupportedOptimizerError, attach_rose, get_selector
from tests.helpers.blocks import DropoutBlocks
from tests.helpers.tiny import batch, tiny_bert
from tests.helpers.watching import assert_masks_acted, backward, train_step, unit_weights

STRATEGIES = ["first_order", "second_order", "ensemble"]
PATIENCE = 25  # steps that may pass before ROSE says something
Update = Callable[[nn.Module], None]


def make(kind: str, strategy: str) -> nn.Module:
    config = ROSEConfig(strategy=strategy, upper_quantile=0.3)
    if kind == "attach":
        model = tiny_bert()
        attach_rose(model, config)
        return model
    if kind == "lora":
        config = ROSEConfig(
            strategy=strategy,
            upper_quantile=0.3,
            base_config=LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"]),
        )
    return get_peft_model(tiny_bert(), config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def through_data(model: nn.Module) -> None:
    """An update past autograd and its counters."""
    for param in trained(model):
        if param.grad is not None:
            param.data.add_(param.grad, alpha=-1e-2)


def under_no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        for param in trained(model):
            if param.grad is not None:
                param -= 1e-2 * param.grad


def by_replacement(model: nn.Module) -> None:
    """The tensor of each parameter becomes a new one, as in fused update rules."""
    for param in trained(model):
        if param.grad is not None:
            param.data = param.data - 1e-2 * param.grad


def train_by(model: nn.Module, update: Update, steps: int) -> None:
    for seed in range(steps):
        backward(model, seed)
        update(model)
        model.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("update", [through_data, under_no_grad, by_replacement])
@pytest.mark.parametrize("kind", ["attach", "full", "lora"])
def test_manual_updates_are_an_error_after_a_few_steps(kind: str, update: Update, strategy: str) -> None:
    model = make(kind, strategy)
    with pytest.raises(RoseInactiveError, match=r"optimizer|step"):
        train_by(model, update, PATIENCE)
    assert get_selector(model).statistics().steps == 0


@pytest.mark.parametrize("update", [through_data, under_no_grad])
def test_manual_updates_after_ordinary_steps_are_noticed(update: Update) -> None:
    model = make("attach", "ensemble")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(5):
        train_step(model, optimizer, seed)
    with pytest.raises(RoseInactiveError):
        train_by(model, update, PATIENCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_was_replaced_on_the_optimizer_is_noticed(strategy: str) -> None:
    """A step put on the instance calls none of the hooks of torch."""
    model = make("attach", strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    @torch.no_grad()
    def step() -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])

    optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(RoseInactiveError):
        for seed in range(PATIENCE):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("with_optimizers", [False, True])
def test_updates_during_the_backward_pass_are_noticed(with_optimizers: bool, strategy: str) -> None:
    """One optimizer per parameter, or a bare update, as soon as its gradient is there."""
    model = make("attach", strategy)
    optimizers = {param: torch.optim.SGD([param], lr=1e-2, momentum=0.9) for param in model.parameters()}

    def update(param: Tensor) -> None:
        if with_optimizers:
            optimizers[param].step()
        else:
            with torch.no_grad():
                param.add_(param.grad, alpha=-1e-2)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    with pytest.raises((RoseInactiveError, UnsupportedOptimizerError)):
        for seed in range(PATIENCE):
            backward(model, seed)


# What is not meant ---------------------------------------------------------------------------------------------------


def load(model: nn.Module, kept: dict[str, Tensor], step: int) -> None:
    """Back to the best checkpoint so far."""
    model.load_state_dict(kept)


def swap(model: nn.Module, kept: dict[str, Tensor], step: int) -> None:
    """Evaluation with an average of the weights, which are put back afterwards."""
    own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            kept[name].lerp_(tensor, 0.1)
            tensor.data.copy_(kept[name])
    model.eval()
    with torch.no_grad():
        model(**batch(tiny_bert(), seed=500 + step))
    model.train()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(own[name])


def exchange(model: nn.Module, kept: dict[str, Tensor], step: int) -> None:
    """The average takes the place of the weights, which go on from there: no copy, another tensor."""
    for name, param in model.named_parameters():
        kept[name].lerp_(param.detach(), 0.1)
        param.data = kept[name].clone()


def clip(model: nn.Module, kept: dict[str, Tensor], step: int) -> None:
    """Weights are kept in a range by hand after every step."""
    with torch.no_grad():
        for param in trained(model):
            param.clamp_(-0.3, 0.3)
            param.copy_(param * 0.999)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("between", [load, swap, exchange, clip])
@pytest.mark.parametrize("kind", ["attach", "lora"])
def test_weights_that_change_between_masked_steps_are_no_matter(
    kind: str, between: Callable[[nn.Module, dict[str, Tensor], int], None], strategy: str
) -> None:
    model = make(kind, strategy)
    selector = get_selector(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    kept = copy.deepcopy(model.state_dict())
    for seed in range(PATIENCE + 10):
        backward(model, seed)
        before = unit_weights(selector)
        optimizer.step()
        optimizer.zero_grad()
        if seed >= 2:
            assert_masks_acted(selector, before)
        between(model, kept, seed)
    assert selector.statistics().steps == PATIENCE + 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_perturbation_by_hand_around_the_gradient_is_no_matter(strategy: str) -> None:
    """Sharpness-aware training: up the slope, a second gradient there, back, and an ordinary step."""
    model = make("attach", strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(PATIENCE + 5):
        backward(model, seed)
        moved = [(param, 1e-3 * param.grad.sign()) for param in model.parameters() if param.grad is not None]
        with torch.no_grad():
            for param, move in moved:
                param.add_(move)
        model.zero_grad()
        backward(model, seed)
        with torch.no_grad():
            for param, move in moved:
                param.sub_(move)
        optimizer.step()
        optimizer.zero_grad()
    assert get_selector(model).statistics().steps == PATIENCE + 5


@pytest.mark.parametrize("training", [True, False])
def test_many_checkpoints_are_looked_at_without_a_step(training: bool) -> None:
    """Loading and evaluating is no training, and neither is an estimate with dropout on."""
    model = make("attach", "ensemble")
    checkpoints = [tiny_bert(seed=seed).state_dict() for seed in range(3)]
    for seed in range(2 * PATIENCE):
        model.load_state_dict(checkpoints[seed % 3])
        model.train(training)
        with torch.no_grad():
            model(**batch(model, seed=seed))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer, 0)
    assert get_selector(model).statistics().steps == 1


def test_several_folds_in_one_process() -> None:
    """Cross-validation: back to the start, a new optimizer, many times over."""
    model = make("attach", "ensemble")
    start = copy.deepcopy(model.state_dict())
    for _ in range(PATIENCE + 5):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(2):
            train_step(model, optimizer, seed)
    assert get_selector(model).statistics().steps > 0


def test_the_error_is_one_that_users_can_catch() -> None:
    model = make("attach", "first_order")
    with pytest.raises(RoseError) as caught:
        train_by(model, under_no_grad, PATIENCE)
    assert "\n" not in str(caught.value)


# Optimizers that hold no unit ---------------------------------------------------------------------------------------


def test_an_optimizer_of_a_former_adapter_is_told() -> None:
    """Its steps move nothing of this model, so the new adapter does not train."""

    def tuned(base: nn.Module) -> nn.Module:
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"])
        return get_peft_model(base, ROSEConfig(strategy="second_order", base_config=lora))

    model = tuned(tiny_bert())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    train_step(model, optimizer, 0)
    model = tuned(model.merge_and_unload())
    with pytest.warns(UserWarning, match="no optimizer that holds units has stepped in .* but AdamW has"):
        for seed in range(60):
            backward(model, seed)
            optimizer.step()
    assert get_selector(model).statistics().steps == 0


def test_an_optimizer_from_before_the_adapter_is_told_where_it_holds_biases_that_train() -> None:
    base = tiny_bert()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "dense"], bias="all")
    model = get_peft_model(base, ROSEConfig(strategy="second_order", base_config=lora))
    with pytest.warns(UserWarning, match="no optimizer that holds units has stepped"):
        for seed in range(60):
            backward(model, seed)
            optimizer.step()


@pytest.mark.filterwarnings("error")
def test_an_optimizer_of_the_head_beside_that_of_the_units_is_fine() -> None:
    model = make("attach", "second_order")
    head = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    rest = torch.optim.AdamW(model.bert.parameters(), lr=1e-3)
    for step in range(120):
        backward(model, step)
        head.step()
        if step % 10 == 9:
            rest.step()


class Dropping(DropoutBlocks):
    """Leaves whole layers out of the calls that it is told, as LayerDrop does by chance."""

    def __init__(self, layerdrop: float) -> None:
        super().__init__(depth=4, dtype=torch.float32)
        self.layerdrop = layerdrop
        self.calls, self.left_out = 0, frozenset[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for number, layer in enumerate(self.layers):
            # Each step makes a call of the user's and two small passes.
            if self.calls % 3 == 1 or number not in self.left_out:
                x = nn.functional.dropout(layer(x), 0.3, training=self.training)
        return self.head(x)


def dropping_steps(model: Dropping, left_out: list[set[int]]) -> int:
    selector = attach_rose(model, ROSEConfig(strategy="first_order", risk_pass="sampled", risk_interval=1))
    optimizer = torch.optim.AdamW(model.parameters())
    for layers in left_out:
        model.left_out = frozenset(layers)
        model.calls = 0
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return selector.statistics().steps


def test_layers_that_are_left_out_by_chance_are_no_alarm() -> None:
    assert dropping_steps(Dropping(0.1), [set(), {0, 1}, {2, 3}]) == 3
    # Nor in the very first steps; but a layer that is never reached is.
    assert dropping_steps(Dropping(0.1), [{0, 1}] * 3 + [set()]) == 4
    with pytest.raises(RoseInactiveError, match="2 of 4 units have a gradient of the loss but none"):
        dropping_steps(Dropping(0.1), [{0, 1}] * 40)
    with pytest.raises(RoseInactiveError, match="2 of 4 units have a gradient of the loss but none"):
        dropping_steps(Dropping(0.0), [{0, 1}])
