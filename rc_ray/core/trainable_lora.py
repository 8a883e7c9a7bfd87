"""A trainable LoRA on the frozen base LLM."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rc_ray.training_config import LoraConfig


def lora_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the linear layers that a LoRA adapts.

    Raises:
        ValueError: a target module is not a linear layer of this model, or `first_layer` leaves
            no layer to adapt.
    """
    num_layers = int(model.config.num_hidden_layers)
    if config.first_layer >= num_layers:
        raise ValueError(
            f"`lora.first_layer` {config.first_layer} leaves nothing to adapt: the model has "
            f"{num_layers} layers"
        )
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    targets = known if config.target_modules == "all-linear" else list(config.target_modules)
    unknown = sorted(set(targets) - set(known))
    if unknown:
        raise ValueError(
            f"`lora.target_modules` names {', '.join(unknown)}; this model has {', '.join(known)}"
        )
    return targets


def with_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Put a trainable LoRA, seeded, on a frozen model; its parameters are fp32.

    Raises:
        ValueError: see `lora_targets`.
    """
    targets = lora_targets(model, config)
    num_layers = int(model.config.num_hidden_layers)
    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        layers_to_transform=(
            list(range(config.first_layer, num_layers)) if config.first_layer else None
        ),
    )
    peft_model = get_peft_model(model, peft_config)
    assert isinstance(peft_model, PeftModel)
    return peft_model
