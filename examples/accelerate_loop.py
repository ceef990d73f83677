"""ROSE in an Accelerate loop, on one device or several, with accumulation and clipping.

accelerate launch --config_file accelerate_configs/cpu.yaml examples/accelerate_loop.py
accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml examples/accelerate_loop.py
"""

# Not called accelerate.py, which Python would import in place of the package.
import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from examples.training.evaluation import accuracy
from examples.training.model import embedded_encoder
from examples.training.run import tokenize
from rose_peft import ROSEConfig


def main(argv: list[str] | None = None) -> float:
    """Fine-tune on the demo reviews, save the adapter, and return the accuracy on the validation split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder of an encoder. Default: the embedded MiniLM.")
    parser.add_argument("--output_dir", default="runs/accelerate_loop", help="Folder of the trained model.")
    parser.add_argument("--epochs", type=int, default=2, help="Passes over the training data.")
    parser.add_argument("--accumulation", type=int, default=2, help="Micro-batches per optimizer step.")
    args = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation)
    name = args.model or embedded_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS"))
    rows = {split: data.rename_column("sentence", "text") for split, data in demo_splits().items()}
    pad = DataCollatorWithPadding(tokenizer)
    train, validation = (
        DataLoader(tokenize(rows[split], tokenizer, 64), 16, shuffle=split == "train", collate_fn=pad)
        for split in ("train", "validation")
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)
    for _ in range(args.epochs):
        model.train()
        for batch in train:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    found = accuracy(model, validation, accelerator)["accuracy"]
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=state)
        tokenizer.save_pretrained(args.output_dir)
    accelerator.print(f"accuracy {found:.1%}; the adapter is in {args.output_dir}")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
