"""AdamW over LoRA matrices and its learning rate, made anew or as they were after some steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rc_ray.errors import ArtifactError
from rc_ray.training_config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a matrix, by the names that torch gives them."""


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the LoRA parameters."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999)
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then the configured decay to a tenth of the peak."""
    warmup = max(1, round(config.warmup_fraction * config.num_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, config.num_steps - warmup))
        if config.schedule == "cosine":
            return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))
        return 1.0 - 0.9 * progress if config.schedule == "linear" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def moments_of(moments: Mapping[str, Tensor], matrix: str) -> dict[str, Tensor]:
    """The moments of one matrix, out of a checkpoint's.

    Args:
        moments: by `<matrix>.<exp_avg or exp_avg_sq>`.
        matrix: e.g. `<layer>.lora_A`.

    Raises:
        ArtifactError: one of them is not there.
    """
    lost = [key for key in MOMENTS if f"{matrix}.{key}" not in moments]
    if lost:
        raise ArtifactError(f"damaged checkpoint, no {matrix}.{lost[0]} in it")
    return {key: moments[f"{matrix}.{key}"] for key in MOMENTS}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    moments: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]],
    num_steps_done: int,
) -> None:
    """Give AdamW the state that it had after some steps; the matrices themselves are in place."""
    for parameter, own in moments:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_steps_done)),
            **{key: tensor.to(parameter.device) for key, tensor in own.items()},
        }


def advance_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, num_steps_done: int) -> None:
    """Bring a new schedule to where it was after some steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimiser step came before: it did, once
        for _ in range(num_steps_done):
            schedule.step()
