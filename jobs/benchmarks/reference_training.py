"""The reference of `training.py`: a LoRA trained by `transformers.Trainer` with PEFT.

Rows are padded to the longest of a batch, and the logits of the whole vocabulary are computed at
every position.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rc_ray.core.batches import Example
from rc_ray.core.model import LanguageModel
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training_plan import TrainingPlan

sys.path.insert(0, str(Path(__file__).parent))
from meter import Meter

IGNORED = -100


def train_with_trainer(lm: LanguageModel, plan: TrainingPlan, meter: Meter) -> None:
    """Train a LoRA on a plan of one domain until the meter's time is over."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config = plan.config
    (titles,) = plan.title_tokens.values()

    class Texts(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for step in range(config.num_steps):
                for example in plan.examples(step):
                    yield {"tokens": example.tokens, "labels": labels_of(example, titles)}

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["tokens"]) for row in rows)
        batch = {
            "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
            "labels": torch.full((len(rows), longest), IGNORED),
        }
        for place, row in enumerate(rows):
            length = len(row["tokens"])
            batch["input_ids"][place, :length] = torch.tensor(row["tokens"])
            batch["attention_mask"][place, :length] = 1
            batch["labels"][place, :length] = torch.tensor(row["labels"])
        return batch

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            examples = plan.examples(state.global_step - 1)
            control.should_training_stop = meter.step(
                sum(len(one.tokens) for one in examples), sum(len(one.titles) for one in examples)
            )
            return control

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=with_lora(lm.model, config.lora, plan.seed),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=config.num_steps,
                per_device_train_batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=20,
                weight_decay=0.0,
                max_grad_norm=config.max_grad_norm,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=lm.device.type == "cpu",
                bf16=lm.dtype == torch.bfloat16,
                seed=plan.seed,
            ),
            train_dataset=Texts(),
            data_collator=collate,
            callbacks=[Count()],
        ).train()


def labels_of(example: Example, titles: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of supervised titles in their places, elsewhere the label that is left out."""
    labels = [IGNORED] * len(example.tokens)
    for item, start in example.titles:
        for place in range(start, start + len(titles[item])):
            labels[place] = example.tokens[place]
    return labels
