"""Whatever users do between steps, and in whatever order: masks and weights are those of the equations.

A model is trained beside a bare copy of it that does everything by hand (`tests.helpers.shadow`), and hypothesis makes
up what happens.
"""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rose_peft import ROSEConfig, attach_rose, get_selector
from tests.helpers.shadow import Shadow

CLASSES, FEATURES = 3, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.drop(torch.tanh(self.linear(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a ROSEConfig, those only that have an effect together."""
    strategy = draw(st.sampled_from(["first_order", "second_order", "ensemble"]))
    fields: dict[str, Any] = {
        "strategy": strategy,
        "upper_quantile": draw(st.sampled_from([0.4, 0.5, 0.7, 0.9])),
        "lower_quantile": draw(st.sampled_from([0.0, 0.2])),
        "warmup_steps": draw(st.sampled_from([0, 2])),
    }
    if strategy == "ensemble":
        fields["gamma"] = draw(st.sampled_from([0.3, 0.5]))
    if strategy != "second_order":
        fields["risk_pass"] = draw(st.sampled_from(["paired", "sampled"]))
    if fields.get("risk_pass") == "sampled":
        fields["risk_interval"] = draw(st.integers(1, 3))
        fields["risk_fraction"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
        fields["risk_smoothing"] = draw(st.sampled_from([0.0, 0.5, 0.8]))
        fields["skip_frozen_gradients"] = strategy == "first_order" and draw(st.booleans())
    return fields


def build(how: str, fields: dict[str, Any], further: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    if how == "attached":
        attach_rose(net, ROSEConfig(**fields))
        return net.train()
    if how == "full":
        model = get_peft_model(net, ROSEConfig(**fields))
        model.add_adapter("other", ROSEConfig(**further))
        return model.train()
    model = get_peft_model(net, ROSEConfig(**fields, base_config=LoraConfig(r=2, target_modules=["linear"])))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    return model.train()


ADAMW = {"lr": 0.03, "betas": (0.9, 0.98), "eps": 1e-8}
SGD = {"lr": 0.03, "momentum": 0.8, "dampening": 0.0, "nesterov": False}
# Class, its options, and what the equations call those that they know by another name or that say the same.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "foreach": (torch.optim.AdamW, {**ADAMW, "weight_decay": 0.1}, {**ADAMW, "decay": 0.1}),
    "fused": (torch.optim.AdamW, {**ADAMW, "weight_decay": 0.0, "fused": True}, {**ADAMW, "decay": 0.0}),
    "coupled": (torch.optim.Adam, {**ADAMW, "weight_decay": 0.1}, {**ADAMW, "decay": 0.1, "coupled": True}),
    "amsgrad": (
        torch.optim.AdamW,
        {**ADAMW, "weight_decay": 0.1, "amsgrad": True},
        {**ADAMW, "decay": 0.1, "amsgrad": True},
    ),
    "sgd": (torch.optim.SGD, {**SGD, "weight_decay": 0.1}, {**SGD, "decay": 0.1}),
    "nesterov": (
        torch.optim.SGD,
        {**SGD, "weight_decay": 0.0, "nesterov": True},
        {**SGD, "decay": 0.0, "nesterov": True},
    ),
}


class Interrupted(Exception):
    """Raised in the middle of what a user does."""


class Training(RuleBasedStateMachine):
    """A model under ROSE, and its shadow."""

    @initialize(
        how=st.sampled_from(["attached", "full", "lora"]),
        fields=configs(),
        further=configs(),
        kind=st.sampled_from(list(OPTIMIZERS)),
    )
    def begin(self, how: str, fields: dict[str, Any], further: dict[str, Any], kind: str) -> None:
        self.how, self.settings, self.kind = how, (fields, further), kind
        self.model = build(how, fields, further)
        self.bare = copy.deepcopy(self.model)
        get_selector(self.bare).detach()
        self.optimizer = self._optimizer(self.model)
        selector = get_selector(self.model)
        selector.follow()
        names = {id(param): name for name, param in self.model.named_parameters()}
        _, _, equation = OPTIMIZERS[kind]
        memory: dict[str, dict[str, Any]] = {}
        self.shadows = {}
        for adapter, steered in selector.adapters.items():
            units = [[names[id(tensor)] for tensor in unit.tensors()] for unit in steered.units]
            trained = [name for name in names.values() if how != "full" or f".{adapter}." in name]
            self.shadows[adapter] = Shadow(self.bare, steered.config, units, equation, memory, trained)
        self.active = next(iter(self.shadows))
        self.calls = 0
        self.pending = False

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        cls, options, _ = OPTIMIZERS[self.kind]
        return cls(model.parameters(), **options)

    @property
    def shadow(self) -> Shadow:
        return self.shadows[self.active]

    def _batch(self, size: int = 5) -> tuple[Tensor, Tensor]:
        """Another one for each call, with random numbers that depend on nothing else."""
        self.calls += 1
        draws = torch.Generator().manual_seed(self.calls)
        return (
            torch.randn(size, FEATURES, generator=draws, dtype=torch.float64),
            torch.randint(0, CLASSES, (size,), generator=draws),
        )

    def _losses(self, size: int = 5) -> tuple[Tensor, Tensor]:
        x, labels = self._batch(size)
        torch.manual_seed(self.calls)
        loss = self.model(x, labels=labels).loss
        drawn = torch.get_rng_state()
        torch.manual_seed(self.calls)
        expected = self.shadow.loss(x, labels)
        assert torch.equal(torch.get_rng_state(), drawn)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        return loss, expected

    @rule(size=st.sampled_from([4, 5, 8]))
    def micro_batch(self, size: int) -> None:
        for loss in self._losses(size):
            loss.backward()
        self.shadow.backward_seen = self.pending = True

    @rule(backward=st.booleans(), zeros=st.booleans())
    def pass_for_nothing(self, backward: bool, zeros: bool) -> None:
        """Its gradients are thrown away, or there are none."""
        if backward:
            self.micro_batch(5)
            self.zero_grad(zeros)
        else:
            self._losses()

    @rule(sizes=st.lists(st.sampled_from([4, 5, 8]), min_size=1, max_size=4), clips=st.booleans(), zeros=st.booleans())
    def train(self, sizes: list[int], clips: bool, zeros: bool) -> None:
        for size in sizes:
            self.micro_batch(size)
            if clips:
                self.clip()
            self.step(zeros)

    @precondition(lambda self: self.pending)
    @rule(zeros=st.booleans())
    def step(self, zeros: bool) -> None:
        self.optimizer.step()
        for adapter, shadow in self.shadows.items():
            mask = shadow.step()
            if mask is not None:
                state = get_selector(self.model).adapters[adapter].state
                assert int(state.steps) == shadow.steps
                assert state.last_mask.tolist() == pytest.approx(mask, abs=1e-6)
        self._compare()
        self.zero_grad(zeros)

    def _compare(self) -> None:
        expected = dict(self.bare.named_parameters())
        for name, param in self.model.named_parameters():
            torch.testing.assert_close(param, expected[name], rtol=1e-6, atol=1e-9, msg=name)

    @rule(where=st.sampled_from(["before", "inside", "after"]), again=st.booleans())
    def step_that_raises(self, where: str, again: bool) -> None:
        self.micro_batch(5)

        def interrupt(*_: object, **__: object) -> None:
            raise Interrupted

        with pytest.MonkeyPatch.context() as patched, pytest.raises(Interrupted):
            if where == "inside":
                for name in ("adam", "sgd"):
                    patched.setattr(sys.modules[f"torch.optim.{name}"], name, interrupt)
            else:
                register = {"before": "register_step_pre_hook", "after": "register_step_post_hook"}[where]
                handle = getattr(self.optimizer, register)(interrupt)
            try:
                self.optimizer.step()
            finally:
                if where != "inside":
                    handle.remove()
        if where == "after":
            for shadow in self.shadows.values():
                shadow.step()
            self.zero_grad(False)
        elif again:
            self.step(False)
        else:
            self.zero_grad(False)
        self._compare()
        self.train([8], clips=False, zeros=False)

    @rule(zeros=st.booleans())
    def zero_grad(self, zeros: bool) -> None:
        self.optimizer.zero_grad(set_to_none=not zeros)
        self.bare.zero_grad(set_to_none=not zeros)
        self.pending = False

    def clip(self) -> None:
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (self.model, self.bare)]
        torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-12)

    @rule(interrupt=st.sampled_from([Interrupted, KeyboardInterrupt]), backward=st.booleans())
    def pass_that_raises(self, interrupt: type[BaseException], backward: bool) -> None:
        if backward and self.shadow.config.risk_pass == "sampled":
            return  # a small pass that raises takes the whole batch in its place
        x, labels = self._batch()
        for model in (self.model, self.bare):
            (block,) = [module for name, module in model.named_modules() if name.endswith("blocks.1")]

            def interrupt_it(*_: object) -> None:
                raise interrupt

            def hook_on_output(module: nn.Module, args: object, output: Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(interrupt_it)

            register = block.register_forward_hook if backward else block.register_forward_pre_hook
            handle = register(hook_on_output if backward else interrupt_it)
            torch.manual_seed(self.calls)
            with pytest.raises(interrupt):
                loss = self.model(x, labels=labels).loss if model is self.model else self.shadow.loss(x, labels)
                loss.backward()
            handle.remove()
        self.shadow.backward_seen = self.shadow.backward_seen or (backward and not self.shadow.is_due())
        self.zero_grad(False)

    @rule(
        what=st.sampled_from(["look", "freeze", "thaw", "switch", "disable", "merge", "copy", "resume"]),
        unit=st.integers(0, 5),
    )
    def between(self, what: str, unit: int) -> None:
        """What users do between passes and steps, where it goes."""
        wrapped = self.how != "attached"
        possible = {
            "switch": self.how == "full",
            "disable": wrapped,
            "merge": wrapped,
            "copy": not self.pending,
            "resume": not self.pending,
        }
        if what in ("freeze", "thaw"):
            self.freeze_or_thaw(unit, what == "thaw")
        elif possible.get(what, True):
            getattr(self, what)()

    def look(self) -> None:
        """A pass without gradients, in evaluation or in training mode."""
        x, _ = self._batch()
        training = bool(self.calls % 2)
        outputs = []
        for model in (self.model, self.bare):
            torch.manual_seed(self.calls)
            with torch.no_grad():
                outputs.append(model.train(training)(x).logits)
            model.train()
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-9)

    def freeze_or_thaw(self, unit: int, trains: bool) -> None:
        units = self.shadow.units
        names = units[unit % len(units)]
        others = [one for one in units if one is not names and self.shadow.trains(one)]
        if len(others) < 2:
            return
        for model in (self.model, self.bare):
            for name in names:
                param = dict(model.named_parameters())[name]
                param.requires_grad_(trains)
                if not trains:
                    param.grad = None
        self.pending = self.pending and any(param.grad is not None for param in self.bare.parameters())

    def switch(self) -> None:
        self.active = next(name for name in self.shadows if name != self.active)
        for model in (self.model, self.bare):
            model.set_adapter(self.active)

    def disable(self) -> None:
        x, _ = self._batch()
        for model in (self.model, self.bare):
            with model.disable_adapter():  # PEFT lets everything of the adapter train again when it is back
                model(x)

    def merge(self) -> None:
        self.model.merge_adapter()
        self.look()
        self.model.unmerge_adapter()

    def copy(self) -> None:
        self.zero_grad(False)
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    def resume(self) -> None:
        """In a new process, as far as the model and the optimizer can tell."""
        self.zero_grad(False)
        self.look()  # lets go of what an interrupt has left
        model = build(self.how, *self.settings)
        if self.how == "full":
            model.set_adapter(self.active)
        model.load_state_dict(self.model.state_dict())
        for param, known in zip(model.parameters(), self.model.parameters(), strict=True):
            param.requires_grad_(known.requires_grad)
        saved = io.BytesIO()
        torch.save(self.optimizer.state_dict(), saved)
        saved.seek(0)
        self.model, self.optimizer = model, self._optimizer(model)
        self.optimizer.load_state_dict(torch.load(saved, weights_only=False))
        get_selector(model).restore(self.optimizer)
        for shadow in self.shadows.values():
            shadow.window, shadow.plan, shadow.backward_seen = [], None, False


Training.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shortening what it finds takes minutes; add Phase.shrink when there is something
    suppress_health_check=list(HealthCheck),
)
TestSequences = pytest.mark.filterwarnings("ignore")(Training.TestCase)
