"""What the processes of distributed tests import, imported once: they are forked from a process that has it all.

What an import reads from the environment (the rank, DeepSpeed's accelerator) must not be imported here.
"""

import gc

import accelerate
import datasets
import peft
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.bert.modeling_bert
import transformers.trainer

import rose_peft

__all__ = ["accelerate", "datasets", "peft", "rose_peft", "torch", "transformers"]

# A collection in a forked process would touch, and so copy, everything that is shared.
gc.freeze()
