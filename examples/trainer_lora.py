"""ROSE over LoRA under the Trainer: what is saved is a plain LoRA adapter, which any PEFT can load.

python examples/trainer_lora.py
python examples/trainer_lora.py --model roberta-base --output_dir runs/trainer_lora
"""

import argparse
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.demo_data import demo_splits
from examples.training.model import embedded_encoder
from rose_peft import ROSEConfig


def main(argv: list[str] | None = None) -> float:
    """Fine-tune on the demo reviews, save the adapter, and return the accuracy on the validation split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder of an encoder. Default: the embedded MiniLM.")
    parser.add_argument("--output_dir", default="runs/trainer_lora", help="Folder of the adapter.")
    parser.add_argument("--epochs", type=float, default=2, help="Passes over the training data.")
    args = parser.parse_args(argv)

    set_seed(0)
    name = args.model or embedded_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1)
    model = get_peft_model(base, ROSEConfig(task_type="SEQ_CLS", base_config=lora))
    splits = {
        split: data.map(lambda rows: tokenizer(rows["sentence"]), batched=True, remove_columns="sentence")
        for split, data in demo_splits().items()
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda pair: {"accuracy": float((pair.predictions.argmax(-1) == pair.label_ids).mean())},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"accuracy {accuracy:.1%}; the adapter is in {args.output_dir}")
    return accuracy


if __name__ == "__main__":
    main()
