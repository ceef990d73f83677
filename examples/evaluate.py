"""Is a trained classifier robust? The kit called from Python: noise, and consistency without labels.

    python examples/evaluate.py runs/plain_loop
    python examples/evaluate.py runs/train/ROSE/seed0 --output_dir runs/train/ROSE/seed0/robustness

The data are the demo reviews; `load_glue`, `load_file` and `load_hub` have others. For whole data sets, attacks and
loss landscapes there is `python -m rose_peft.robustness --help`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from rose_peft.robustness import (
    Result,
    consistency,
    evaluate_noise,
    evaluate_robust_sets,
    examples_from_columns,
    load_classifier,
)
from rose_peft.robustness.loading import model_name, model_seed


def main(argv: list[str] | None = None) -> Result:
    """Measure a classifier on the demo reviews, write a result file, and return what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a model, an adapter, or a run of train.py.")
    parser.add_argument("--output_dir", default="runs/evaluate", help="Folder of the result file.")
    args = parser.parse_args(argv)

    splits = demo_splits()
    names = ("validation", "robust", "turned cue")
    clean, *robust = (examples_from_columns(splits[name], ["sentence"], name=name) for name in names)
    model, tokenizer = load_classifier(args.model, num_labels=2)
    rows = evaluate_noise(model, tokenizer, clean, kinds=["typos", "swaps"], rates=[0.1, 0.3]).rows()
    rows += evaluate_robust_sets(model, tokenizer, dict(zip(names[1:], robust, strict=True)))
    rows += consistency(model, tokenizer, clean.texts, changes=["dropout", "typos"]).rows()
    for row in rows:
        print(f"{row.title:40s} {row.estimate}")
    result = Result(method=model_name(args.model), task="demo", seed=model_seed(args.model) or 0, rows=rows)
    result.save(Path(args.output_dir) / "evaluate.result.json")
    return result


if __name__ == "__main__":
    main()
