"""What a step of a large model would take on each process, by formulas that the figures of scale.py confirm.

    python -m examples.benchmark.plan
    python -m examples.benchmark.plan --figures examples/benchmark/results/scale.json

FSDP2 with weights in float32 that are gathered in bf16 and reduced in float32, and ZeRO-2 in bf16; AdamW, no
offload. Activations come on top: they depend on the batch, not on the number of processes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rose_peft.config import RISK_INTERVAL

# Weights and blocks of models as they are.
MODELS = {"1 billion": (1e9, 16), "8 billion": (8e9, 32), "70 billion": (70e9, 80)}
PROCESSES = (8, 64)
ENGINES = ("fsdp2", "zero2")
WAYS = {
    "plain": (None, False),
    "second order": (None, False),
    "first order, sampled": ("sampled", False),
    "first order, paired": ("paired", False),
    "ensemble, sampled": ("sampled", True),
    "ensemble, paired": ("paired", True),
}
BUCKET = 5e8  # weights that ZeRO-2 reduces at once: its reduce_bucket_size


@dataclass(frozen=True)
class Training:
    """What is to be trained.

    Args:
        weights: Number of weights W.
        units: Number of those in units U; the rest are embeddings, head and norms.
        layers: Number of blocks; one has about W / layers weights.
        processes: Number of processes N.
        bucket: Weights that ZeRO-2 reduces at once.
    """

    weights: float
    units: float
    layers: int
    processes: int
    bucket: float = BUCKET


@dataclass(frozen=True)
class Memory:
    """Bytes on each process, without activations.

    Args:
        kept: Between steps.
        passes: At most, beside that, in the forward call with its risk pass.
        backward: In the backward pass.
        step: In the optimizer's step.
    """

    kept: float
    passes: float
    backward: float
    step: float

    @property
    def peak(self) -> float:
        """The most."""
        return self.kept + max(self.passes, self.backward, self.step)


def memory(engine: str, way: str, training: Training) -> Memory:
    """Bytes on each process.

    Args:
        engine: "fsdp2" or "zero2".
        way: One of `WAYS`.
        training: What is trained.
    """
    weights, block, n = training.weights, training.weights / training.layers, training.processes
    risk_pass, mixed = WAYS[way]
    if engine == "fsdp2":
        # The graph hangs on whole weights, which make room for their gradients block by block. What is in hand
        # besides: blocks gathered ahead, those of both graphs, gradients of the one that wait for the other's.
        passes = {None: 8 * block, "sampled": 2 * weights + 10 * block, "paired": 2 * weights + 12 * block}[risk_pass]
        # Float32 gradients; two blocks gathered, the gradient of one, and what it is reduced from.
        backward = 4 * weights / n + 10 * block
        # A mask between 0 and 1 has a blended gradient and a learning rate of its own.
        return Memory(12 * weights / n, passes, backward, (10 if mixed else 5) * weights / n)
    # Weights are whole already, and both small passes one graph. Gradients of two graphs wait for each other.
    taken = {None: 2 * block, "sampled": 4 * block, "paired": 2 * training.units + 5 * block}
    backward = 2 * weights / n + 2 * training.bucket
    # Units lie in one flat tensor, so that it is let go on and what is frozen put back: copies of weights, momenta.
    step = (12 if way == "plain" else 14 if risk_pass is None else 16) * weights / n
    return Memory(2 * weights + 12 * weights / n, taken[risk_pass], backward, step)


def collectives(engine: str, way: str, training: Training, interval: int = RISK_INTERVAL) -> dict[str, float]:
    """Bytes that are put together in a step, by collective, without those of ROSE's own: 8 to 24 per unit.

    Args:
        engine: "fsdp2" or "zero2".
        way: One of `WAYS`.
        training: What is trained.
        interval: Steps between sampled passes.
    """
    weights, block = training.weights, training.weights / training.layers
    if engine == "zero2":
        return {"all-reduce": 2 * weights, "all-gather": 2 * weights}
    # For the forward passes, and, as blocks are given back behind the first graph's gradient, for the second's.
    again = 4 * weights - 2 * block
    more = {None: 0.0, "sampled": again / interval, "paired": again}
    # For the forward pass, and once more for the backward pass.
    return {"all-gather": 4 * weights + more[WAYS[way][0]], "reduce-scatter": 4 * weights}


def sent(engine: str, way: str, training: Training) -> float:
    """Bytes that each process sends in a step over a ring: S (N - 1) / N for S bytes, twice that for an all-reduce."""
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
    share = (training.processes - 1) / training.processes
    return sum(rounds[kind] * size * share for kind, size in collectives(engine, way, training).items())


def plan() -> Iterator[str]:
    """The lines of the plan, a table per model, in gigabytes (1e9 bytes); all weights count as units."""
    cells = [(engine, n) for engine in ENGINES for n in PROCESSES]
    names = {"fsdp2": "FSDP2", "zero2": "ZeRO-2"}
    for model, (weights, layers) in MODELS.items():
        yield f"**{model} weights, {layers} blocks**"
        yield ""
        yield "| memory / sent per step, GB | " + " | ".join(f"{names[engine]}, {n}" for engine, n in cells) + " |"
        yield "|---|" + "---|" * len(cells)
        for way in WAYS:
            row = []
            for engine, n in cells:
                training = Training(weights, weights, layers, n)
                needed = memory(engine, way, training).peak / 1e9
                row.append(f"{needed:,.0f} / {sent(engine, way, training) / 1e9:,.0f}")
            yield f"| {way} | " + " | ".join(row) + " |"
        yield ""


def check(figures: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """The lines of a table of what was measured beside what the formulas say, in bytes per weight.

    Args:
        figures: {"ENGINE ...": {way: figures of scale.py}}.
    """
    yield "| run | processes | way | kept | peak | gathered and reduced |"
    yield "|---|---|---|---|---|---|"
    for run, ways in figures.items():
        for way, found in ways.items():
            training = of_figures(found)
            expected, total = memory(run.split()[0], way, training), found["weights"]
            most = found["kept"] + max(found[name] for name in ("passes", "backward", "step"))
            counted = sum(collectives(run.split()[0], way, training, 1).values())
            pairs = [(found["kept"], expected.kept), (most, expected.peak), (sum(found["sent"].values()), counted)]
            text = " | ".join(f"{measured / total:.2f} ({said / total:.2f})" for measured, said in pairs)
            yield f"| {run} | {found['processes']} | {way} | {text} |"


def of_figures(found: dict[str, Any]) -> Training:
    """The training that figures of scale.py are of, with the bucket that scale.py gives ZeRO-2.

    Args:
        found: Figures of one way.
    """
    units = found["unit_weights"] or found["weights"]
    return Training(found["weights"], units, found["layers"], found["processes"], bucket=1e6)


def main(argv: list[str] | None = None) -> None:
    """Print the plan, and with figures how well they agree with the formulas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=None, help="what scale.py has measured, by run")
    args = parser.parse_args(argv)
    lines = plan() if args.figures is None else check(json.loads(args.figures.read_text(encoding="utf-8")))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
