"""The cells of the table: which engine, loop, precision and strategy go together, and what must come of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

STRATEGIES = ("first_order", "second_order", "ensemble")
ENGINES = ("one", "ddp", "ddp_unused", "ddp_static", "fsdp2")  # "one" is a single process
LOOPS = ("plain", "accelerate", "trainer")
ELSEWHERE = ("sft", "lightning")  # loops of tests/helpers/loops.py, for one process: TRL's SFTTrainer, and Lightning
PRECISIONS = ("float32", "bf16_autocast", "fp16_autocast", "bf16", "float64")
RISK = ("first_order", "ensemble")


@dataclass(frozen=True)
class Cell:
    """One way to train; `refusal` is what ROSE's error must say, `obstacle` what keeps it from running on a CPU."""

    engine: str
    loop: str
    precision: str
    strategy: str
    refusal: str = ""
    obstacle: str = ""
    risk_pass: str = "paired"

    @property
    def way(self) -> str:
        """Strategy and risk pass in a word."""
        return self.strategy if self.risk_pass == "paired" else f"{self.strategy}_{self.risk_pass}"

    @property
    def name(self) -> str:
        """Unique name, for files and test ids."""
        return f"{self.engine}-{self.loop}-{self.precision}-{self.way}"

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return 1 if self.engine in ("one", "data_parallel") else 2

    @property
    def reference(self) -> str:
        """Name of the cell that does the same in one process; empty where rounding makes them differ."""
        exact = self.engine in ENGINES[1:] and self.precision in ("float32", "float64") and not self.refusal
        return f"one-{self.loop}-{self.precision}-{self.way}" if exact else ""


def _obstacle(loop: str, precision: str) -> str:
    return "has no fp16 here" if precision == "fp16_autocast" and loop != "plain" else ""


def _refused() -> list[Cell]:
    """What cannot work, and part of the message that says so; where it works with one strategy, that is here too."""
    cells = []
    for strategy in STRATEGIES:
        reentrant = "use_reentrant" if strategy in RISK else ""
        cells += [
            Cell("one", "step(closure)", "float32", strategy, "without a closure"),
            Cell("one", "checkpointing", "float32", strategy),
            Cell("one", "reentrant", "float32", strategy, reentrant),
            Cell("ddp", "checkpointing", "float32", strategy),
            Cell("ddp", "reentrant", "float32", strategy, reentrant),
            Cell("data_parallel", "plain", "float32", strategy, "one process per GPU"),
            Cell("fsdp1", "plain", "float32", strategy, "Use FSDP2"),
            Cell("fsdp1", "accelerate", "float32", strategy, "Use FSDP2"),
        ]
    return cells


def _sampled() -> list[Cell]:
    """Sampled passes under each engine, in each loop and in each precision, and where only paired ones are refused."""
    ways = [(engine, "plain", precision) for engine in ENGINES for precision in ("float32", "bf16_autocast")]
    ways += [("one", "plain", precision) for precision in ("fp16_autocast", "bf16", "float64")]
    ways += [(engine, loop, "float32") for engine in ("one", "ddp", "fsdp2") for loop in ("accelerate", "trainer")]
    ways += [("one", loop, "float32") for loop in (*ELSEWHERE, "checkpointing", "reentrant")]
    ways += [("ddp", "reentrant", "float32")]
    cells = [Cell(*way, "ensemble", risk_pass="sampled") for way in ways]
    return cells + [Cell(engine, "plain", "float32", "first_order", risk_pass="sampled") for engine in ENGINES]


CELLS = [
    Cell(engine, loop, precision, strategy, obstacle=_obstacle(loop, precision))
    for engine, loop, precision, strategy in product(ENGINES, LOOPS, PRECISIONS, STRATEGIES)
]
CELLS += [Cell("one", loop, "float32", strategy) for loop, strategy in product(ELSEWHERE, STRATEGIES)]
CELLS += _refused()
CELLS += _sampled()
