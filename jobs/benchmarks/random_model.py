"""A model of a known shape with random weights, for benchmarks that need no others."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from rc_ray.core.model import LanguageModel

SHAPES = ("tiny", "qwen2-7b")


def random_model(
    shape: str, tokenizer_dir: Path, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """One of `SHAPES`, frozen, and the tokenizer of another model, whose ids it can read."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    torch.manual_seed(7)
    with device:  # the weights are made where they stay
        model = AutoModelForCausalLM.from_config(
            _config(shape, len(tokenizer)),
            dtype=dtype,
            attn_implementation="sdpa",
        )
    model.requires_grad_(False)
    return LanguageModel(model=model.eval(), tokenizer=tokenizer)


def _config(shape: str, vocab_size: int) -> Qwen2Config:
    if shape == "tiny":
        return Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
    )
