"""Under ZeRO-3 no worker holds a copy of the model, and the benchmark that measures it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_benchmarks import load
from tests.tiny import make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_worker_holds_its_share_of_the_model(tmp_path: Path) -> None:
    benchmark = load("zero_memory")
    tokenizer_dir = make_model(tmp_path / "tokenizer")
    shape = benchmark.Shape(768, 3072, 12, 8, 259)  # nearly all in layers
    num = benchmark.make_model(tmp_path / "model", shape, tokenizer_dir)
    size = 2 * num / benchmark.MIB
    assert size > 150
    rows = [
        (way, 2, benchmark.measure(tmp_path / "model", way, 2))
        for way in ("zero3-whole", "zero3-sharded")
    ]
    (_, _, whole), (_, _, sharded) = rows
    # The same run, but for rounding.
    losses = [sum(one["loss"] for one in found) for found in (whole, sharded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    # Of two workers each lacks the half that it held before; samples miss some of the peaks.
    before, after = (max(one["peak"]["anon"] for one in found) for found in (whole, sharded))
    assert before - after > 0.2 * size
    text = benchmark.table(rows)
    assert len(text.splitlines()) == 4
    assert "zero3-sharded" in text
