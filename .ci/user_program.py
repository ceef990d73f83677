"""A user's program: a step with the installed package, and a card. mypy reads it against the wheel's types."""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import rose_peft
from rose_peft import ROSEConfig, RoseStatistics, get_selector

assert Path(rose_peft.__file__).is_relative_to(sys.prefix), f"not the installed package: {rose_peft.__file__}"

sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
model = get_peft_model(
    BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)), ROSEConfig(task_type="SEQ_CLS")
)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(input_ids=torch.randint(0, 32, (4, 8)), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
optimizer.step()

statistics: RoseStatistics = get_selector(model).statistics()
share: float = statistics.kept_share
assert statistics.steps == 1 and 0 < share < 1, statistics
# If mypy did not see the types, this comment would be an error of its own: nothing to ignore.
wrong: str = statistics.steps  # type: ignore[assignment]
model.save_pretrained("saved")
assert "Trained with ROSE" in Path("saved/README.md").read_text(encoding="utf-8")
print(f"rose_peft {rose_peft.__version__}: one step, {share:.0%} kept")
