"""A two-layer model and a small log of clicks, made on the spot: no test needs a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ADJECTIVES = ("Red", "Blue", "Old", "Tiny", "Loud", "Grand")
NOUNS = ("Lamp", "River", "Engine", "Garden", "Piano", "Window", "Ladder")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path, seed: int = 0) -> Path:
    """A 2-layer Llama with byte tokens, saved as transformers saves models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    # Random weights of the default size give nearly uniform predictions: tests of differences
    # between adapters or positions would pass on noise.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_domain(folder: Path, *, prefix: str, num_users: int = 40, seed: int = 0) -> Path:
    """42 items and users who walk along the item list, in the project's Parquet form."""
    titles = [f"{prefix} {a} {n}" for a in ADJECTIVES for n in NOUNS]
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"user_id": [], "item_id": [], "timestamp": [], "rating": []}
    for user in range(num_users):
        start, length = int(rng.integers(len(titles))), int(rng.integers(6, 14))
        steps = np.cumsum(rng.integers(1, 4, size=length)) % len(titles)
        items = list(dict.fromkeys(((start + steps) % len(titles)).tolist()))
        for time, item in enumerate(items):
            rows["user_id"].append(f"u{user:03d}")
            rows["item_id"].append(f"{prefix}-{item:02d}")
            rows["timestamp"].append(1_000 * user + time)
            rows["rating"].append(None)
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("timestamp", pa.int64()),
            ("rating", pa.float32()),
        ]
    )
    pq.write_table(pa.table(rows, schema=schema), folder / "interactions.parquet")
    items = {
        "item_id": [f"{prefix}-{i:02d}" for i in range(len(titles))],
        "title": titles,
        "category": [None] * len(titles),
    }
    types = pa.schema([(name, pa.string()) for name in items])
    pq.write_table(pa.table(items, schema=types), folder / "items.parquet")
    return folder


def make_experiment(folder: Path, **sections: dict[str, Any]) -> Path:
    """An experiment file over two spirit domains and one ingredient domain, seconds per stage."""
    for seed, domain in enumerate(("lamps", "rivers", "tools")):
        make_domain(folder / "raw" / domain, prefix=domain.capitalize(), seed=seed)
    raw: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(make_model(folder / "model")), "dtype": "float32"},
        "data": {
            "sources": [
                {"format": "parquet", "domain": d, "path": str(folder / "raw" / d)}
                for d in ("lamps", "rivers", "tools")
            ],
            "spirit": ["lamps", "rivers"],
            "ingredients": ["tools"],
            "num_negatives": 9,
        },
        "train": {
            "lora": {"rank": 4, "alpha": 8},
            "num_steps": 6,
            "batch_size": 4,
            "max_titles": 8,
            "checkpoint_every": 2,
        },
        "tune": {"lora": {"rank": 4, "alpha": 8}, "num_steps": 6, "batch_size": 4, "max_titles": 8},
        "merge": {"num_prompts": 6, "num_epochs": 1, "batch_size": 3, "max_titles": 5},
        "evaluate": {"num_valid_users": 10, "max_titles": 5, "num_bootstrap": 200},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path
