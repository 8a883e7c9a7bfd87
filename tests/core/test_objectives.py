"""Objectives of learned weights: values worked by hand, slopes by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rc_ray.core.objectives import (
    anchored,
    clicks,
    distillation,
    divergence,
    entropy,
    is_reliable,
    jensen_shannon,
    mean_entropy,
    mean_prediction_entropy,
)

LOG2 = math.log(2.0)
QUARTERS = [0.5, 0.25, 0.25]
SURE = [1.0 - 2e-12, 1e-12, 1e-12]


def logs(*shares: list[float]) -> list[Tensor]:
    return [torch.tensor(share, dtype=torch.float64).log() for share in shares]


def test_entropy_worked_by_hand() -> None:
    assert float(entropy(torch.zeros(8))) == pytest.approx(math.log(8))
    sure = torch.tensor(QUARTERS).log() - 3.0  # any constant cancels
    assert float(entropy(sure)) == pytest.approx(1.5 * LOG2)
    assert float(mean_entropy([torch.zeros(8), sure])) == pytest.approx((3.0 + 1.5) / 2 * LOG2)


def test_divergences_worked_by_hand() -> None:
    p, q = logs([0.5, 0.5], [0.25, 0.75])
    # KL(q || p) = 1/4 log(1/2) + 3/4 log(3/2)
    assert float(divergence(q, p)) == pytest.approx(-0.25 * LOG2 + 0.75 * math.log(1.5))
    left, right = logs([1.0 - 1e-15, 1e-15], [1e-15, 1.0 - 1e-15])
    assert float(jensen_shannon(left, right)) == pytest.approx(LOG2)  # its largest value
    assert float(jensen_shannon(p, p)) == pytest.approx(0.0, abs=1e-12)
    # The mean is (3/8, 5/8): half of each divergence from it.
    by_hand = 0.5 * (
        0.5 * math.log(0.5 / 0.375)
        + 0.5 * math.log(0.5 / 0.625)
        + 0.25 * math.log(0.25 / 0.375)
        + 0.75 * math.log(0.75 / 0.625)
    )
    assert float(jensen_shannon(p, q)) == pytest.approx(by_hand)
    assert float(jensen_shannon(q, p)) == pytest.approx(by_hand)


def test_mean_prediction_is_by_place() -> None:
    everywhere = torch.arange(2)
    left, right = logs([1.0, 1e-300], [1e-300, 1.0])
    apart = mean_prediction_entropy([left, right], [everywhere, everywhere], 2)
    assert float(apart) == pytest.approx(LOG2)
    same = mean_prediction_entropy([left, left], [everywhere, everywhere], 2)
    assert float(same) == pytest.approx(0.0, abs=1e-9)
    # Options that are lacking count as impossible: (1 + 1/2) / 2 and 1/4 at places 2 and 0.
    one, half = logs([1.0], [0.5, 0.5])
    mixed = mean_prediction_entropy([one, half], [torch.tensor([2]), torch.tensor([2, 0])], 4)
    assert float(mixed) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_distillation_and_clicks_worked_by_hand() -> None:
    p, q = logs([0.5, 0.5], [0.25, 0.75])
    gap = -0.25 * LOG2 + 0.75 * math.log(1.5)
    found = distillation([p, q], [torch.stack([p, q]), torch.stack([q, q])])
    assert float(found) == pytest.approx((gap / 2 + 0.0) / 2)
    loss = clicks([p, q], [0, 1])
    assert float(loss) == pytest.approx((LOG2 - math.log(0.75)) / 2)


def test_anchored_worked_by_hand() -> None:
    p, q = logs([0.5, 0.5], [0.25, 0.75])
    anchors = [torch.stack([p, q])]
    loss, count = anchored(
        [q],
        anchors,
        torch.tensor(0.4),
        divergence_weight=2.0,
        spread_weight=0.5,
        max_entropy_share=1.0,
    )
    entropy_of_q = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    distance = float(jensen_shannon(p, q)) / 2  # the other anchor is q itself
    assert float(loss) == pytest.approx(entropy_of_q + 2.0 * distance - 0.5 * 0.4)
    assert count == 1


def test_unsure_prompts_do_not_count() -> None:
    flat, peaked = logs([1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05])
    assert not is_reliable(flat, 0.999)
    assert is_reliable(peaked, 0.95)
    assert is_reliable(torch.tensor(QUARTERS).log(), 0.95)  # 1.5 log 2 / log 3 = 0.946
    assert not is_reliable(torch.tensor(QUARTERS).log(), 0.94)

    def loss(log_p: list[Tensor]) -> tuple[float, int]:
        value, count = anchored(
            log_p,
            [one[None] for one in log_p],
            torch.tensor(0.0),
            divergence_weight=1.0,
            spread_weight=0.0,
            max_entropy_share=0.95,
        )
        return float(value), count

    assert loss([flat, peaked]) == (pytest.approx(float(entropy(peaked))), 1)
    assert loss([flat, flat]) == (pytest.approx(math.log(3)), 2)  # none is: all count


def test_spread_tells_a_collapse() -> None:
    """Sure predictions all of one place are no better than sure ones of different places."""
    places = [torch.arange(3)] * 3
    collapsed = logs(SURE, SURE, SURE)
    apart = [one.roll(shift) for shift, one in enumerate(collapsed)]

    def loss(log_p: list[Tensor], spread_weight: float) -> float:
        spread = mean_prediction_entropy(log_p, places, 3)
        return float(
            anchored(
                log_p,
                [one[None] for one in log_p],
                spread,
                divergence_weight=1.0,
                spread_weight=spread_weight,
                max_entropy_share=0.95,
            )[0]
        )

    assert loss(collapsed, 0.0) == pytest.approx(loss(apart, 0.0))
    assert loss(collapsed, 1.0) - loss(apart, 1.0) == pytest.approx(math.log(3), abs=1e-6)
    unsure = [torch.log_softmax(one * 0.01, dim=-1) for one in apart]
    assert loss(unsure, 1.0) > loss(apart, 1.0)  # and spreading every prediction gains nothing


def test_slopes_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    anchors = list(torch.randn(3, 2, 5, dtype=torch.float64, generator=generator).log_softmax(-1))
    places = [torch.randperm(5, generator=generator) for _ in range(3)]

    def whole(free: Tensor) -> Tensor:
        log_p = list(free.log_softmax(-1))
        spread = mean_prediction_entropy(log_p, places, 6)
        loss, _ = anchored(
            log_p,
            anchors,
            spread,
            divergence_weight=0.7,
            spread_weight=0.3,
            max_entropy_share=0.999,
        )
        return torch.stack([loss, distillation(log_p, anchors), clicks(log_p, [0, 4, 2])])

    assert gradcheck(whole, (free,))
