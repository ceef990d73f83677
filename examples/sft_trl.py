"""ROSE over LoRA in TRL's supervised fine-tuning of a causal language model.

    python examples/sft_trl.py --model Qwen/Qwen2.5-0.5B --output_dir runs/sft

The model is wrapped before it goes to the trainer; TRL then needs no peft_config.
"""

import argparse
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from rose_peft import ROSEConfig, get_selector


def main(argv: list[str] | None = None) -> float:
    """Fine-tune on the demo reviews as text, save the adapter, and return the training loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B", help="Hub name or folder of a language model.")
    parser.add_argument("--output_dir", default="runs/sft", help="Folder of the adapter.")
    parser.add_argument("--max_steps", type=int, default=50, help="Optimizer steps.")
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1)
    model = get_peft_model(base, ROSEConfig(task_type="CAUSAL_LM", base_config=lora))
    data = demo_splits()["train"].rename_column("sentence", "text").remove_columns("label")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_length=128,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    loss = trainer.train().training_loss
    trainer.save_model(args.output_dir)
    kept = get_selector(model).statistics().kept_share
    print(f"loss {loss:.3f}, {kept:.0%} of the units kept; the adapter is in {args.output_dir}")
    return loss


if __name__ == "__main__":
    main()
