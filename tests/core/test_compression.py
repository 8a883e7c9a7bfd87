"""Compression against the full SVD of the dense update, which is its definition."""

from __future__ import annotations

import pytest
import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.compression import compressed, product_svd, truncated


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(pair: LoraPair) -> torch.Tensor:
    return pair.scale * (pair.b @ pair.a)


@pytest.mark.parametrize(("out", "fan_in", "rank"), [(40, 24, 9), (5, 30, 9), (30, 5, 9)])
def test_the_svd_of_a_product_is_that_of_the_dense_matrix(out: int, fan_in: int, rank: int) -> None:
    b, a = random(out, rank, seed=1), random(rank, fan_in, seed=2)
    u, s, vt = product_svd(b, a)
    reference = torch.linalg.svdvals(b.double() @ a.double())
    assert torch.allclose(s, reference[: len(s)], atol=1e-10)
    assert torch.allclose((u * s) @ vt, b.double() @ a.double(), atol=1e-10)


def test_compression_is_the_best_approximation_and_knows_its_error() -> None:
    pair = LoraPair(random(8, 24, seed=1), random(40, 8, seed=2), 0.7)
    whole = dense(pair)
    u, s, vt = torch.linalg.svd(whole)
    for rank in (1, 3, 7):
        adapter, errors = compressed(Adapter({"layer": pair}), rank)
        found = adapter.modules["layer"]
        assert found.a.shape == (rank, 24)
        assert found.b.shape == (40, rank)
        assert torch.allclose(dense(found), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4)
        measured = float((whole - dense(found)).norm() / whole.norm())
        assert errors["layer"] == pytest.approx(measured, rel=1e-4)
        # Evenly split: row i of A and column i of B both have the norm sqrt(s_i).
        assert torch.allclose(found.a.norm(dim=1), s[:rank].sqrt(), rtol=1e-4)
        assert torch.allclose(found.b.norm(dim=0), s[:rank].sqrt(), rtol=1e-4)


def test_layers_that_are_small_enough_stay_as_they_are() -> None:
    small = LoraPair(random(2, 24), random(40, 2), 1.5)
    large = LoraPair(random(6, 24), random(40, 6), 1.5)
    adapter, errors = compressed(Adapter({"small": small, "large": large}), 2)
    assert adapter.modules["small"] is small
    assert errors["small"] == 0.0
    assert 0.0 < errors["large"] < 1.0


def test_a_lower_true_rank_costs_nothing() -> None:
    """Two equal halves side by side: rank 6 on paper, 3 in truth."""
    a, b = random(3, 24), random(40, 3, seed=1)
    pair = LoraPair(torch.cat([a, a]), torch.cat([b, b], dim=1), 0.5)
    adapter, errors = compressed(Adapter({"layer": pair}), 3)
    assert errors["layer"] < 1e-12
    assert torch.allclose(dense(adapter.modules["layer"]), b @ a, atol=1e-5)


def test_signs_and_order_do_not_depend_on_how_the_update_is_written() -> None:
    a, b = random(6, 24), random(40, 6, seed=1)
    turned = torch.linalg.qr(random(6, 6, seed=2)).Q
    one, _ = compressed(Adapter({"layer": LoraPair(a, b, 1.0)}), 4)
    other, _ = compressed(Adapter({"layer": LoraPair(turned.T @ a, -b @ turned, -1.0)}), 4)
    for first, second in zip(one.modules.values(), other.modules.values(), strict=True):
        assert torch.allclose(first.a, second.a, atol=1e-4)
        assert torch.allclose(first.b, second.b, atol=1e-4)
        largest = first.a.gather(1, first.a.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()
        norms = first.a.norm(dim=1)
        assert torch.equal(norms, norms.sort(descending=True).values)


@pytest.mark.parametrize("rank", [3, 8, 60])
def test_a_dense_update_is_truncated_nearly_as_well_as_can_be(rank: int) -> None:
    """On noise, the hardest spectrum for a randomised SVD."""
    delta = random(160, 120)
    s = torch.linalg.svdvals(delta)
    best = float(s[rank:].norm() / s.norm())
    pair, error = truncated(delta, rank)
    assert pair.a.shape == (rank, 120)
    assert error == pytest.approx(float((delta - dense(pair)).norm() / delta.norm()), rel=1e-5)
    assert best * (1 - 1e-5) <= error <= best * 1.01
    again, _ = truncated(delta, rank)
    assert torch.equal(pair.a, again.a)


def test_a_dense_update_of_low_rank_and_a_whole_rank_lose_nothing() -> None:
    low = random(160, 5) @ random(5, 120, seed=1)
    pair, error = truncated(low, 5)
    assert error < 1e-5
    assert torch.allclose(dense(pair), low, atol=1e-3)
    noise = random(30, 20)
    pair, error = truncated(noise, 1000)
    assert pair.a.shape == (20, 20)
    assert error < 1e-5


def test_zeros_compress_to_zeros() -> None:
    zeros = LoraPair(torch.zeros(4, 24), torch.zeros(40, 4), 1.0)
    adapter, errors = compressed(Adapter({"layer": zeros}), 2)
    assert errors["layer"] == 0.0
    assert not dense(adapter.modules["layer"]).any()
    pair, error = truncated(torch.zeros(160, 120), 2)
    assert error == 0.0
    assert not dense(pair).any()
    with pytest.raises(ValueError, match="at least 1"):
        compressed(adapter, 0)
