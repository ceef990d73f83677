"""ROSE over LoRA on a base of 4 bits (QLoRA), with an optimizer of 8 bits; needs pip install '.[quantized]'.

    python examples/qlora.py --model Qwen/Qwen2.5-0.5B --output_dir runs/qlora

bitsandbytes runs on GPUs and, slowly, on CPUs. The adapter is a plain LoRA adapter and loads over the full base too.
"""

import argparse
import sys
from pathlib import Path

import torch
from bitsandbytes.optim import PagedAdamW8bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from rose_peft import ROSEConfig, get_selector


def main(argv: list[str] | None = None) -> float:
    """Fine-tune on the demo reviews as text, save the adapter, and return the loss of the last batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B", help="Hub name or folder of a language model.")
    parser.add_argument("--output_dir", default="runs/qlora", help="Folder of the adapter.")
    parser.add_argument("--max_steps", type=int, default=50, help="Optimizer steps.")
    args = parser.parse_args(argv)

    set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=quantized, device_map={"": device})
    # Reentrant checkpoints hide the adapter from the gradient of the risk pass.
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(base, ROSEConfig(task_type="CAUSAL_LM", base_config=lora)).train()

    texts = [row["sentence"] for row in demo_splits()["train"]]
    loader = DataLoader(texts, batch_size=8, shuffle=True)
    optimizer = PagedAdamW8bit([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    for step, lines in enumerate(loader):
        if step == args.max_steps:
            break
        batch = tokenizer(lines, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(args.output_dir)
    kept = get_selector(model).statistics().kept_share
    print(f"loss {loss.item():.3f}, {kept:.0%} of the units kept; the adapter is in {args.output_dir}")
    return loss.item()


if __name__ == "__main__":
    main()
