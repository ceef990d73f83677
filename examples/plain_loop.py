"""ROSE in a plain PyTorch loop: only the config tells that it is on.

python examples/plain_loop.py
python examples/plain_loop.py --model roberta-base --output_dir runs/plain_loop
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from examples.training.model import embedded_encoder
from rose_peft import ROSEConfig, get_selector


def main(argv: list[str] | None = None) -> float:
    """Fine-tune on the demo reviews, save the adapter, and return the accuracy on the validation split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder of an encoder. Default: the embedded MiniLM.")
    parser.add_argument("--output_dir", default="runs/plain_loop", help="Folder of the trained model.")
    parser.add_argument("--epochs", type=int, default=2, help="Passes over the training data.")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    name = args.model or embedded_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()

    splits = demo_splits()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    for epoch in range(args.epochs):
        for rows in splits["train"].shuffle(seed=epoch).iter(batch_size=32):
            batch = tokenizer(rows["sentence"], padding=True, return_tensors="pt").to(device)
            loss = model(**batch, labels=torch.tensor(rows["label"], device=device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {get_selector(model).statistics().kept_share:.0%} kept")

    model.eval()
    right = 0
    with torch.no_grad():
        for rows in splits["validation"].iter(batch_size=64):
            logits = model(**tokenizer(rows["sentence"], padding=True, return_tensors="pt").to(device)).logits
            right += int((logits.argmax(dim=-1).cpu() == torch.tensor(rows["label"])).sum())
    accuracy = right / len(splits["validation"])
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"accuracy {accuracy:.1%}; the adapter is in {args.output_dir}")
    return accuracy


if __name__ == "__main__":
    main()
