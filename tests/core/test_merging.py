"""Fixed merges: identities, PEFT's own functions on dense updates, formulas written out in full."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.merging import (
    concatenate,
    fixed_weights,
    merge_fixed,
    merge_fixed_measured,
)
from rc_ray.core.sparsified import dropped, elected_mean, sparsified_updates, trimmed
from rc_ray.errors import ArtifactError, ConfigError
from rc_ray.mix_config import FixedMix
from tests.tiny import make_model

SHAPES = {"model.layers.0.q_proj": (20, 30), "model.layers.1.q_proj": (24, 16)}
WHOLE = 1000
"""A rank at which nothing is truncated."""
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "knots", "peft_linear")


def adapter(seed: int, rank: int = 4, scale: float = 0.7, layers: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraPair(
                a=torch.randn(rank, fan_in, generator=generator),
                b=torch.randn(out, rank, generator=generator),
                scale=scale,
            )
            for name, (out, fan_in) in list(SHAPES.items())[:layers]
        }
    )


def dense(one: Adapter) -> dict[str, torch.Tensor]:
    return {name: pair.scale * (pair.b @ pair.a) for name, pair in one.modules.items()}


def same(one: Adapter, other: Adapter, tolerance: float = 1e-4) -> bool:
    left, right = dense(one), dense(other)
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], atol=tolerance, rtol=tolerance) for name in left
    )


def scaled(one: Adapter, factor: float) -> Adapter:
    return Adapter(
        {name: LoraPair(pair.a, pair.b, pair.scale * factor) for name, pair in one.modules.items()}
    )


def rewritten(one: Adapter, factor: float) -> Adapter:
    """The same update with A and B of other sizes."""
    return Adapter(
        {
            name: LoraPair(pair.a / factor, pair.b * factor, pair.scale)
            for name, pair in one.modules.items()
        }
    )


def mix_of(method: str, **settings: Any) -> FixedMix:
    """A mix without the settings that have no part in its method, which the file would refuse."""
    if method in ("linear", "task_arithmetic", "peft_linear"):
        settings.pop("density", None)
    return FixedMix(method=method, **settings)


def merged(adapters: Sequence[Adapter], method: str, seed: int = 5, **settings: Any) -> Adapter:
    return merge_fixed(adapters, mix_of(method, **settings), seed, rank=WHOLE)


# Identities


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_at_weight_one_is_that_adapter(method: str) -> None:
    """TIES and KnOTS trim, and DARE drops, below density 1; at 1 they change nothing."""
    one = adapter(1)
    for rank in (None, WHOLE):
        result, errors = merge_fixed_measured([one], mix_of(method, density=1.0), 5, rank)
        assert same(result, one)
        assert max(errors.values()) < 1e-5
    given = mix_of(method, density=1.0, weights=(-0.5,))
    assert same(merge_fixed([one], given, 5), scaled(one, -0.5))


@pytest.mark.parametrize("method", METHODS)
def test_equal_adapters_merge_to_themselves(method: str) -> None:
    """DARE at a lower density does so in expectation only.

    Task arithmetic adds: three times itself. So does PEFT's linear, although its weights are 1/3:
    the roots of the weights add up to sqrt(3) in A and in B.
    """
    one = adapter(1)
    result = merged([one, one, one], method, density=1.0)
    trebles = method in ("task_arithmetic", "peft_linear")
    assert same(result, scaled(one, 3.0) if trebles else one)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    adapters = [adapter(1), adapter(2, scale=1.3), adapter(3, scale=0.2, layers=1)]
    weights = (0.5, 0.8, -0.3)
    reference = merged(adapters, method, weights=weights)
    for order in itertools.permutations(range(3)):
        turned = merged(
            [adapters[k] for k in order], method, weights=tuple(weights[k] for k in order)
        )
        assert same(turned, reference)


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_of_all_updates_is_a_factor_of_the_result(method: str) -> None:
    """DARE is left out of the first half: other values draw other entries."""
    adapters = [adapter(1), adapter(2, scale=1.3)]
    if not method.startswith("dare"):
        result = merged([scaled(one, 3.0) for one in adapters], method)
        assert same(result, scaled(merged(adapters, method), 3.0), 1e-3)
    plain = merged(adapters, method, weights=(0.5, 0.7))
    assert same(merged(adapters, method, weights=(1.5, 2.1)), scaled(plain, 3.0), 1e-3)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "knots"])
def test_what_counts_is_the_update_not_its_factors(method: str) -> None:
    adapters = [adapter(1), adapter(2)]
    result = merged([adapters[0], rewritten(adapters[1], 4.0)], method)
    assert same(result, merged(adapters, method), 1e-3)


def test_peft_linear_depends_on_the_factors_and_is_not_the_weighted_sum() -> None:
    adapters = [adapter(1), adapter(2)]
    result = merged(adapters, "peft_linear")
    assert not same(merged([adapters[0], rewritten(adapters[1], 4.0)], "peft_linear"), result)
    for name, update in dense(result).items():
        wanted = dense(merged(adapters, "linear"))[name]
        # On independent adapters the terms B_1 A_2 and B_2 A_1 are as large as the sum itself.
        assert float((update - wanted).norm() / wanted.norm()) > 0.5


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_opposite_adapters_cancel(method: str) -> None:
    """An entry whose sum is 0 elects no sign. PEFT takes plus there, and keeps one side whole."""
    one = adapter(1)
    result = merged([one, scaled(one, -1.0)], method, density=1.0)
    assert all(float(update.abs().max()) < 1e-5 for update in dense(result).values())
    update = dense(one)["model.layers.0.q_proj"]
    theirs = merge_utils.ties([update, -update], torch.ones(2), 1.0)
    assert torch.allclose(theirs, update.abs())


def test_a_weight_of_zero_leaves_its_adapter_out() -> None:
    adapters = [adapter(1), adapter(2), adapter(3)]
    for method in ("linear", "ties", "dare_linear", "dare_ties", "peft_linear"):
        with_zero = merged(adapters, method, weights=(0.6, 0.4, 0.0), density=1.0)
        assert same(with_zero, merged(adapters[:2], method, weights=(0.6, 0.4), density=1.0))


# Layers that an adapter lacks


def test_a_layer_that_one_adapter_lacks() -> None:
    """Sums add nothing there; an election has one voter, whose update keeps its strength."""
    both, lower = adapter(1), adapter(2, layers=1)
    alone = dense(both)["model.layers.1.q_proj"]
    for method, share in {
        "linear": 0.5,
        "task_arithmetic": 1.0,
        "ties": 1.0,
        "dare_linear": 0.5,
        "dare_ties": 1.0,
        "knots": 1.0,
        "peft_linear": 0.5,
    }.items():
        found = dense(merged([both, lower], method, density=1.0))["model.layers.1.q_proj"]
        assert torch.allclose(found, share * alone, atol=1e-4), method


# Independent implementations


def test_sums_are_the_sums_of_dense_updates() -> None:
    adapters = [adapter(1, rank=3, scale=0.7), adapter(2, rank=6, scale=1.9)]
    one, other = (dense(a) for a in adapters)
    for name in SHAPES:
        linear = dense(merge_fixed(adapters, FixedMix(method="linear"), 0))[name]
        assert torch.allclose(linear, 0.5 * one[name] + 0.5 * other[name], atol=1e-5)
        added = dense(merge_fixed(adapters, FixedMix(method="task_arithmetic"), 0))[name]
        assert torch.allclose(added, one[name] + other[name], atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_agrees_with_peft_on_dense_updates(density: float) -> None:
    """With equal weights. PEFT's weights of 1 are this project's 1/K: the paper's mean."""
    adapters = [adapter(seed, rank=seed + 2) for seed in (1, 2, 3)]
    result = dense(merged(adapters, "ties", density=density))
    for name, update in result.items():
        tensors = [dense(one)[name] for one in adapters]
        assert torch.allclose(update, merge_utils.ties(tensors, torch.ones(3), density), atol=1e-4)


def test_trimming_agrees_with_peft() -> None:
    tensor = torch.randn(17, 13, generator=torch.Generator().manual_seed(0))
    for density in (0.01, 0.3, 0.77):
        theirs = merge_utils.magnitude_based_pruning(tensor, density)
        assert torch.equal(trimmed(tensor, density), theirs)
    tied = torch.tensor([1.0, -1.0, 0.5, 0.0])
    assert trimmed(tied, 0.25).tolist() == [1.0, -1.0, 0.0, 0.0]  # neither goes before the other
    assert trimmed(tied, 0.01).count_nonzero() == 2


def test_election_by_hand() -> None:
    deltas = [
        torch.tensor([4.0, 1.0, 2.0, 0.0, 3.0]),
        torch.tensor([2.0, -3.0, -2.0, 0.0, -1.0]),
        torch.tensor([-1.0, 1.0, 0.0, 5.0, -1.0]),
    ]
    equal = [1 / 3] * 3
    total = elected_mean(deltas, equal, "total")
    assert torch.allclose(total, torch.tensor([3.0, -3.0, 0.0, 5.0, 3.0]))
    frequency = elected_mean(deltas, equal, "frequency")
    assert torch.allclose(frequency, torch.tensor([3.0, 1.0, 0.0, 5.0, -1.0]))
    # First entry: (0.6 * 4 + 0.3 * 2) / 0.9. Second: 0.6 + 0.1 is less than 0.3 * 3.
    weighted = elected_mean(deltas, [0.6, 0.3, 0.1], "total")
    assert torch.allclose(weighted, torch.tensor([3.0 / 0.9, -3.0, 2.0, 5.0, 3.0]))


def test_election_agrees_with_peft_where_no_vote_is_tied() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 30, generator=generator) for _ in range(3)]
    for method in ("total", "frequency"):
        mask = merge_utils.calculate_majority_sign_mask(torch.stack(tensors), method)
        theirs = merge_utils.disjoint_merge(torch.stack(tensors), mask)
        assert torch.allclose(elected_mean(tensors, [1.0] * 3, method), theirs, atol=1e-6)


def test_where_peft_elects_and_weighs_otherwise() -> None:
    """Two updates by frequency: PEFT gives every disagreement to plus; here the larger side wins.

    And with weights PEFT divides by the number of agreeing updates, not by their weights: two equal
    updates at weights 1/2 come out halved.
    """
    tensors = [torch.tensor([1.0, -5.0]), torch.tensor([-2.0, 3.0])]
    mask = merge_utils.calculate_majority_sign_mask(torch.stack(tensors), "frequency")
    assert merge_utils.disjoint_merge(torch.stack(tensors), mask).tolist() == [1.0, 3.0]
    assert elected_mean(tensors, [0.5, 0.5], "frequency").tolist() == [-2.0, -5.0]
    same_twice = [torch.tensor([2.0])] * 2
    stacked = torch.stack([0.5 * tensor for tensor in same_twice])
    mask = merge_utils.calculate_majority_sign_mask(torch.stack(same_twice))
    assert merge_utils.disjoint_merge(stacked, mask).tolist() == [1.0]
    assert elected_mean(same_twice, [0.5, 0.5], "total").tolist() == [2.0]


def test_weighted_ties_agrees_with_normalised_weights_by_entry() -> None:
    """`sum w d m / sum w m`, entry by entry in Python, times the sum of the weights."""
    adapters, weights = [adapter(1), adapter(2), adapter(3)], (0.9, 0.2, 0.4)
    result = dense(merged(adapters, "ties", weights=weights, density=0.6))
    for name, update in result.items():
        tensors = [merge_utils.magnitude_based_pruning(dense(a)[name], 0.6) for a in adapters]
        for index in itertools.product(range(0, update.shape[0], 5), range(0, update.shape[1], 3)):
            values = [w * float(t[index]) for w, t in zip(weights, tensors, strict=True)]
            plus = sum(values) > 0
            agree = [k for k in range(3) if values[k] != 0 and (values[k] > 0) == plus]
            wanted = sum(values[k] for k in agree) / sum(weights[k] for k in agree) if agree else 0
            assert float(update[index]) == pytest.approx(1.5 * wanted, abs=1e-4)


def test_dare_keeps_its_share_rescaled_and_the_mean() -> None:
    ones = torch.ones(400, 500)
    result = dropped(ones, 0.25, torch.Generator().manual_seed(0))
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert float(result.mean()) == pytest.approx(1.0, abs=0.02)  # 5 standard errors


def test_dare_agrees_with_peft_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's functions, fed the entries that were dropped here."""
    adapters = [adapter(1), adapter(2)]
    for method, theirs in (
        ("dare_linear", merge_utils.dare_linear),
        ("dare_ties", merge_utils.dare_ties),
    ):
        config = mix_of(method, density=0.4)
        # Each update alone at weight 1 shows its own draws.
        drawn = [dict(sparsified_updates([one], [1.0], config, 5)) for one in adapters]
        kept = [{name: update != 0 for name, update in one.items()} for one in drawn]
        result = dict(sparsified_updates(adapters, [1.0, 1.0], config, 5))
        for name, update in result.items():
            masks = iter([one[name].float() for one in kept])
            monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _, m=masks: next(m))
            tensors = [dense(one)[name] for one in adapters]
            wanted = theirs(tensors, torch.ones(2), 0.4)
            monkeypatch.undo()
            # Weights of 1 are a lambda of K here: PEFT's mean times 2.
            factor = 2.0 if method == "dare_ties" else 1.0
            assert torch.allclose(update, factor * wanted, atol=1e-4)


def test_dare_draws_by_seed_adapter_and_layer() -> None:
    one, config = adapter(1), FixedMix(method="dare_linear", density=0.5)
    first, again, other = (
        dict(sparsified_updates([one], [1.0], config, seed)) for seed in (5, 5, 6)
    )
    for name in SHAPES:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name] != 0, other[name] != 0)
    # Equal adapters draw apart from one another: their mean has entries of either.
    twice = dict(sparsified_updates([one, one], [0.5, 0.5], config, 5))
    for name in SHAPES:
        assert float((twice[name] != 0).float().mean()) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize(
    ("density", "majority_sign"),
    # Below density 1 votes can be tied, which PEFT and this project settle otherwise.
    [(0.2, "total"), (0.5, "total"), (1.0, "total"), (1.0, "frequency")],
)
def test_knots_agrees_with_its_formulas_on_full_matrices(
    density: float, majority_sign: str
) -> None:
    """The authors' steps on dense updates: concatenate, SVD, drop null directions, TIES, back."""
    adapters = [adapter(1, rank=3), adapter(2, rank=5, scale=1.3), adapter(3, rank=2)]
    config = FixedMix(method="knots", density=density, majority_sign=majority_sign)
    result = merge_fixed(adapters, config, 0)
    for name, (_, fan_in) in SHAPES.items():
        tensors = [dense(one)[name].double() for one in adapters]
        u, s, vt = torch.linalg.svd(torch.cat(tensors, dim=1), full_matrices=False)
        keep = s > 1e-5
        parts = (torch.diag(s[keep]) @ vt[keep]).split(fan_in, dim=1)
        if density < 1.0:
            parts = tuple(merge_utils.magnitude_based_pruning(part, density) for part in parts)
        stacked = torch.stack(parts)
        mask = merge_utils.calculate_majority_sign_mask(stacked, majority_sign)
        wanted = u[:, keep] @ merge_utils.disjoint_merge(stacked, mask)
        assert torch.allclose(dense(result)[name], wanted.float(), atol=1e-4)
        assert result.modules[name].a.shape[0] == 10  # the sum of the ranks


class InPeft:
    """Two adapters of other scales on one tiny model, merged there and handed over to be merged."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        one, two = (
            PeftLoraConfig(
                r=4,
                lora_alpha=alpha,
                target_modules=["q_proj"],
                init_lora_weights=False,
                **settings,
            )
            for alpha in (6, 9)
        )
        self._model = get_peft_model(model, one, "one")
        self._model.add_adapter("two", two)
        self._layers = {
            name: layer
            for name, layer in self._model.get_base_model().named_modules()
            if hasattr(layer, "lora_A")
        }
        self.adapters = [
            Adapter(
                {
                    name: LoraPair(
                        layer.lora_A[key].weight.detach(),
                        layer.lora_B[key].weight.detach(),
                        layer.scaling[key],
                    )
                    for name, layer in self._layers.items()
                }
            )
            for key in ("one", "two")
        ]

    def merged(self, kind: str, weights: Sequence[float], **how: Any) -> dict[str, torch.Tensor]:
        self._model.add_weighted_adapter(["one", "two"], list(weights), kind, kind, **how)
        return {name: layer.get_delta_weight(kind) for name, layer in self._layers.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("theirs", "how", "ours"),
    [
        ("linear", {}, FixedMix(method="peft_linear", weights=(0.7, -0.4))),
        ("cat", {}, FixedMix(method="linear", weights=(0.7, -0.4))),
        ("svd", {"svd_rank": 3}, FixedMix(method="linear", weights=(0.7, -0.4))),
        # PEFT's mean counts updates, so its weights of 1 are weights of 1/2 here.
        ("ties_svd", {"svd_rank": 3, "density": 0.3}, FixedMix(method="ties", density=0.3)),
    ],
    ids=["linear", "cat", "svd", "ties_svd"],
)
def test_a_model_in_peft_gets_the_same_updates(
    folder: Path, theirs: str, how: dict[str, Any], ours: FixedMix
) -> None:
    peft = InPeft(folder)
    wanted = peft.merged(theirs, ours.weights or (1.0, 1.0), **how)
    found = dense(merge_fixed(peft.adapters, ours, 0, rank=how.get("svd_rank")))
    for name, update in found.items():
        assert torch.allclose(update, wanted[name], atol=1e-5)


def test_where_peft_is_off_on_a_model(folder: Path) -> None:
    """With rsLoRA every kind of merge is too large by the root of the rank it makes.

    And TIES on A and on B apart is far from TIES on the updates.
    """
    peft = InPeft(folder, use_rslora=True)
    for kind, method, root in (("linear", "peft_linear", 4**0.5), ("cat", "linear", 8**0.5)):
        config = FixedMix(method=method, weights=(0.7, 0.4))
        wanted = peft.merged(kind, (0.7, 0.4))
        for name, update in dense(merge_fixed(peft.adapters, config, 0)).items():
            assert torch.allclose(root * update, wanted[name], atol=1e-5)
    peft = InPeft(folder)
    wanted = peft.merged("ties", (1.0, 1.0), density=0.3)
    config = FixedMix(method="ties", density=0.3)
    for name, update in dense(merge_fixed(peft.adapters, config, 0, rank=WHOLE)).items():
        assert float((wanted[name] - update).norm() / update.norm()) > 0.5


# Ranks, errors, mistakes


def test_full_rank_results_are_truncated_with_a_known_error() -> None:
    adapters = [adapter(1, rank=2), adapter(2, rank=3)]
    for method in ("ties", "dare_linear", "dare_ties"):
        config = mix_of(method, density=0.5)
        whole = dict(sparsified_updates(adapters, [0.5, 0.5], config, 5))
        result, errors = merge_fixed_measured(adapters, config, 5)
        for name, update in dense(result).items():
            s = torch.linalg.svdvals(whole[name])
            assert result.modules[name].a.shape[0] == 5
            assert errors[name] == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-3)
            off = float((update - whole[name]).norm() / whole[name].norm())
            assert errors[name] == pytest.approx(off, rel=1e-3)


def test_a_rank_compresses_exact_merges_too() -> None:
    adapters = [adapter(1), adapter(2)]
    result, errors = merge_fixed_measured(adapters, FixedMix(method="linear"), 0, rank=3)
    whole = concatenate(adapters, dict.fromkeys(SHAPES, [0.5, 0.5]))
    for name, update in dense(whole).items():
        s = torch.linalg.svdvals(update)
        assert result.modules[name].a.shape[0] == 3
        assert errors[name] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)


def test_mistakes_are_plain_errors() -> None:
    with pytest.raises(ConfigError, match=r"`weights` of the mix `ties` has 3 values for 2"):
        fixed_weights(FixedMix(method="ties", weights=(1.0, 1.0, 1.0)), 2)
    with pytest.raises(ConfigError, match=r"needs adapters of one rank.* 3, 4; take `method: lin"):
        merged([adapter(1, rank=3), adapter(2, rank=4)], "peft_linear")
    other = Adapter(
        {"model.layers.0.q_proj": LoraPair(torch.zeros(4, 31), torch.zeros(20, 4), 1.0)}
    )
    with pytest.raises(ArtifactError, match="20 x 30 and 20 x 31"):
        merged([adapter(1), other], "linear")
    with pytest.raises(ValueError, match="at least one adapter"):
        merged([], "linear")
