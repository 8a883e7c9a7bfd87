"""The memory of a trial: the formula by hand, and against what a process really takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rc_ray.errors import ArtifactError
from rc_ray.training_config import TrainingConfig
from rc_ray.trial_memory import BaseShape, estimate_bytes, read_shape, tokens_per_title
from tests.tiny import ADJECTIVES, NOUNS, make_domain, make_model

TOGETHER = {"num_domains", "tokens_per_pass"}


def estimate(shape: BaseShape, dtype: str = "float32", *, gpu: bool = False, **fields: int) -> int:
    together = {name: fields.pop(name) for name in TOGETHER & fields.keys()}
    setting = TrainingConfig.model_validate({"lora": {"rank": 2, "first_layer": 1}, **fields})
    return estimate_bytes(
        shape,
        setting,
        dtype=dtype,
        use_gpu=gpu,
        tokens_per_title=12.0,
        tokens_per_batch=0,
        num_listed=9,
        **together,
    )


def test_the_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    """By hand: embedding 259 x 32; each layer 2 x 32 x 32, 2 x 16 x 32, 3 x 32 x 48, two norms."""
    shape = read_shape(make_model(tmp_path / "model"))
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert shape == BaseShape(259 * 32 + 2 * layer + 32, 2, 32, 48, 259)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_shape(tmp_path)


def test_the_formula_by_hand() -> None:
    shape = BaseShape(1000, 3, hidden_size=10, intermediate_size=20, vocabulary_size=50)
    # Two adapted layers. LoRA: 2 * 2 * (4 * 20 + 3 * 30) = 680 parameters, 16 bytes each.
    # One pass: 4 rows of 5 titles of 12 tokens, 240 tokens; each 2 * (200 + 200) values.
    expected = 700_000_000 + 1000 * 4 + 680 * 16 + 240 * 2 * 400 * 4
    assert estimate(shape, batch_size=4, max_titles=5) == expected
    assert estimate(shape, batch_size=8, micro_batch_size=4, max_titles=5) == expected
    # Three domains: three LoRAs; a pass of their own 240 tokens, or of 1000 that they share.
    expected = 700_000_000 + 1000 * 4 + 3 * 680 * 16 + 1000 * 2 * 400 * 4
    together = {"num_domains": 3, "tokens_per_pass": 1000}
    assert estimate(shape, batch_size=4, max_titles=5, **together) == expected
    half = 700_000_000 + 1000 * 2 + 680 * 16 + 240 * 2 * 400 * 2
    assert estimate(shape, "bfloat16", batch_size=4, max_titles=5) == half
    assert estimate(shape, "bfloat16", gpu=True) == 3_000_000_000 + 2000


def test_titles_are_measured_in_characters(tmp_path: Path) -> None:
    folder = make_domain(tmp_path / "tools", prefix="T")
    titles = [f"T {a} {n}" for a in ADJECTIVES for n in NOUNS]
    mean = sum(map(len, titles)) / len(titles)
    assert tokens_per_title([folder, tmp_path / "nowhere"]) == pytest.approx(1 + mean / 3)
