"""From a few free numbers to the weights of every layer."""

from __future__ import annotations

import math

import pytest
import torch

from rc_ray.core.parametrisation import Parametrisation, groups_of

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("mlp.up_proj", "self_attn.q_proj")
]


def test_who_shares_weights() -> None:
    assert groups_of(MODULES, "model").tolist() == [0] * 6
    assert groups_of(MODULES, "layer").tolist() == [0, 0, 1, 1, 2, 2]
    assert groups_of(MODULES, "projection").tolist() == [0, 1] * 3
    assert groups_of(MODULES, "linear").tolist() == list(range(6))
    # No decoder layer in the name: a layer of its own.
    assert groups_of(["model.embed", *MODULES[:2], "lm_head"], "layer").tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "free"])
@pytest.mark.parametrize("num_adapters", [2, 3])
def test_the_start_is_the_uniform_mix(kind: str, num_adapters: int) -> None:
    shape = Parametrisation(MODULES, num_adapters, "layer", kind, 0.7)  # type: ignore[arg-type]
    assert shape.shape == (3, num_adapters)
    uniform = torch.full((6, num_adapters), 1.0 / num_adapters)
    torch.testing.assert_close(shape.weights(shape.start()), uniform)


def test_formulas_worked_by_hand() -> None:
    row = torch.tensor([[0.0, math.log(9.0)]])
    softmax = Parametrisation(MODULES, 2, "model", "softmax", 2.0)
    assert softmax.weights(row)[3].tolist() == pytest.approx([0.25, 0.75])  # log 9 / 2 = log 3
    sigmoid = Parametrisation(MODULES, 2, "model", "sigmoid", 0.5)
    assert sigmoid.weights(row)[3].tolist() == pytest.approx([0.5, 81 / 82])
    free = Parametrisation(MODULES, 2, "model", "free", 0.5)
    assert free.weights(row)[3].tolist() == pytest.approx([0.0, math.log(9.0)])


def test_a_single_adapter() -> None:
    assert (
        Parametrisation(MODULES, 1, "linear", "softmax").weights(torch.randn(6, 1)).tolist()
        == [[1.0]] * 6
    )
    sigmoid = Parametrisation(MODULES, 1, "model", "sigmoid", 3.0)
    assert float(sigmoid.weights(sigmoid.start())[0, 0]) == pytest.approx(0.99)
    free = Parametrisation(MODULES, 1, "model", "free")
    assert float(free.weights(free.start())[0, 0]) == 1.0
