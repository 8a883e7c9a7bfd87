"""One mix of a domain's adapters: its weights, one LoRA on disk, the proof that it is that mix.

Letters: L adapted linear layers, K adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from rc_ray.artifacts import write_json, write_text
from rc_ray.core.adapters import Adapter, load_adapter, save_adapter
from rc_ray.core.compression import compressed
from rc_ray.core.loading import dtype_name
from rc_ray.core.merging import concatenate, fixed_weights, layers_of, merge_fixed_measured
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.predictions import CalibratedScore, UnlabeledPrompt
from rc_ray.core.random_lora import random_like
from rc_ray.core.ranking import Ranker
from rc_ray.core.weight_search import search_weights
from rc_ray.core.weighting import WeightingStep, learn_weights, num_weighting_steps
from rc_ray.errors import ArtifactError, UserError
from rc_ray.merge_prompts import prompts_for
from rc_ray.mix_config import FixedMix, LearnedMix, MixConfig, SearchedMix
from rc_ray.open_domain import OpenDomain
from rc_ray.shards import Stopwatch

_FOLD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit allowed after folding, over the largest logit."""


@dataclass(frozen=True)
class _Mixed:
    adapter: Adapter
    """One LoRA."""
    acting: AdapterMix
    """What it must be equal to when it is folded."""
    errors: dict[str, float]
    """Layer -> what the rank cost, over the update's norm."""
    weights: dict[str, list[float]] | None = None
    """Layer -> K weights; None where no weighted sum was made."""
    curve: tuple[dict[str, Any], ...] = ()
    metrics: Mapping[str, Any] | None = None


def make_mix(
    opened: OpenDomain,
    name: str,
    plan: Mapping[str, Any],
    config: MixConfig,
    work: Path,
    log: TextIO,
) -> dict[str, Any]:
    """Mix, save and check; writes everything but the manifest into `work`.

    Args:
        opened: the domain.
        name: of the mix.
        plan: `rank`, and which adapters are `random` ones in this mix.
        config: the method.
        work: an empty folder.
        log: takes a line per step, for who watches.

    Returns:
        What the manifest tells.

    Raises:
        UserError: the domain lacks what the method needs, or the saved mix is not what was mixed.
    """
    watch = Stopwatch()
    adapters = [
        random_like(adapter, opened.order["seed"]) if one in plan["random"] else adapter
        for one, adapter in opened.adapters.items()
    ]
    rank = plan["rank"]
    if isinstance(config, FixedMix):
        mixed = _by_formula(config, adapters, rank, opened.seed_of(config))
    else:
        mixed = _by_learning(opened, name, config, adapters, rank, log)
    save_adapter(work, mixed.adapter, opened.model_name)
    try:
        check = fold_check(opened.lm, opened.check_texts, mixed.acting, load_adapter(work))
    except FloatingPointError as error:
        raise UserError(f"the mix {name}: {error}; {_mend(config)}") from None
    if not check["relative"] <= _FOLD_TOLERANCE[opened.lm.dtype]:
        is_exact = opened.lm.dtype is torch.float32
        raise ArtifactError(
            f"the mix {name}: folded, its logits are off by "
            f"{check['max_abs_logit_difference']:.3g}; "
            + (_mend(config) if is_exact else "set `model.dtype: float32` and merge again")
        )
    write_json(work / "fold_check.json", check)
    metrics: dict[str, Any] = {"method": config.method, **(mixed.metrics or {})}
    if mixed.weights is not None:
        modules = sorted(mixed.weights)
        rows = [mixed.weights[module] for module in modules]
        names = list(opened.adapters)
        write_json(work / "weights.json", {"modules": modules, "adapters": names, "weights": rows})
        means = np.mean(rows, axis=0).tolist()
        metrics["mean_weights"] = dict(zip(names, means, strict=True))
    if mixed.curve:
        lines = "".join(json.dumps(row) + "\n" for row in mixed.curve)
        write_text(work / "entropy.jsonl", lines)
    if any(mixed.errors.values()):
        write_json(work / "compression.json", {"rank": rank, "relative_errors": mixed.errors})
    return {
        **metrics,
        "rank": max(int(pair.a.shape[0]) for pair in mixed.adapter.modules.values()),
        "max_relative_error": max(mixed.errors.values()),
        "fold_check": check,
        "dtypes": [dtype_name(opened.lm.dtype)],
        "seconds": round(watch.lap(), 1),
        "peak_memory_mb": round(watch.peak_memory_mb(), 1),
    }


def _mend(config: MixConfig) -> str:
    """What helps where the numbers of a mix are out of hand."""
    if isinstance(config, LearnedMix):
        return f"lower `learning_rate` ({config.learning_rate:g})"
    if isinstance(config, SearchedMix):
        return f"lower `max_weight` ({config.max_weight:g})"
    if config.weights is not None:
        return f"lower `weights` ({', '.join(f'{weight:g}' for weight in config.weights)})"
    return "check the training losses of its adapters"


def _by_formula(
    config: FixedMix, adapters: Sequence[Adapter], rank: int | None, seed: int
) -> _Mixed:
    merged, errors = merge_fixed_measured(adapters, config, seed, rank)
    weights = None
    if config.method in ("linear", "task_arithmetic"):
        weights = dict.fromkeys(layers_of(adapters), fixed_weights(config, len(adapters)))
    return _Mixed(merged, AdapterMix([merged]), errors, weights)


def _by_learning(
    opened: OpenDomain,
    name: str,
    config: LearnedMix | SearchedMix,
    adapters: Sequence[Adapter],
    rank: int | None,
    log: TextIO,
) -> _Mixed:
    prompts = prompts_for(
        opened.domain,
        config,
        opened.seed_of(config),
        num_test_users=opened.evaluate.num_test_users,
        split_seed=opened.order["split_seed"],
    )
    ranker = opened.ranker(config.max_titles)
    num_steps = num_weighting_steps(len(prompts), config)
    curve = []
    for step in _named(name, _steps(opened, ranker, adapters, prompts, config)):
        row = {
            "step": step.step,
            "entropy": step.entropy,
            "objective": step.objective,
            "mean_prediction_entropy": step.mean_prediction_entropy,
            "num_reliable": step.num_reliable,
            "num_steps": num_steps,
        }
        curve.append(row)
        log.write(json.dumps({"mix": name, **row}) + "\n")
        log.flush()
    weights = step.weights
    exact = concatenate(adapters, weights)
    if not all(bool(pair.b.isfinite().all()) for pair in exact.modules.values()):
        raise UserError(f"the mix {name}: its weights are too large to save; {_mend(config)}")
    merged, errors = exact, dict.fromkeys(exact.modules, 0.0)
    if rank is not None:
        merged, errors = compressed(exact, rank)
    if any(errors.values()):
        acting = AdapterMix([merged])
    else:  # the mix as it was learned, not as it was put together
        mix = AdapterMix(adapters)
        rows = torch.tensor([weights[module] for module in mix.modules], device=opened.lm.device)
        acting = mix.with_weights(rows)
    if isinstance(config, LearnedMix):
        per_epoch = num_steps // config.num_epochs
        first, last = curve[:per_epoch], curve[-per_epoch:]
    else:  # the mix that is kept, not the one that was tried last
        first, last = curve[:1], [min(curve, key=_kept)]
    metrics: dict[str, Any] = {
        "num_prompts": len(prompts),
        "num_steps": len(curve),
        "first_entropy": float(np.mean([row["entropy"] for row in first])),
        "last_entropy": float(np.mean([row["entropy"] for row in last])),
        "last_objective": float(np.mean([row["objective"] for row in last])),
    }
    if isinstance(config, LearnedMix):
        metrics["objective"] = config.objective
        if config.objective != "distillation":
            metrics["prompts_of"] = config.prompts_of
    else:
        metrics["prompts_of"] = "other_users"
    return _Mixed(merged, acting, errors, weights, tuple(curve), metrics)


def _kept(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Least for the mix that a search keeps."""
    return math.isnan(row["objective"]), row["objective"]


def _named(name: str, steps: Iterator[WeightingStep]) -> Iterator[WeightingStep]:
    """The steps, whose error tells which mix it is of."""
    try:
        yield from steps
    except FloatingPointError as error:
        raise UserError(f"the mix {name}: {error}") from None


def _steps(
    opened: OpenDomain,
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix | SearchedMix,
) -> Iterator[WeightingStep]:
    seed = opened.seed_of(config)
    if isinstance(config, SearchedMix):
        return search_weights(ranker, adapters, prompts, config, seed, with_prior=opened.with_prior)
    calibration, with_prior = scored_by(opened, adapters, config)
    return learn_weights(
        ranker,
        adapters,
        prompts,
        config,
        seed,
        with_prior=with_prior,
        micro_batch_size=opened.order["micro_batch_size"],
        calibration=calibration,
    )


def scored_by(
    opened: OpenDomain, adapters: Sequence[Adapter], config: LearnedMix
) -> tuple[CalibratedScore | None, bool]:
    """What a mix's `score` is: its calibration, if any, and whether the prior is in the trie."""
    if config.score == "calibrated":
        return opened.calibration(adapters)
    return None, opened.with_prior


def fold_check(
    lm: LanguageModel, texts: Sequence[Sequence[int]], acting: AdapterMix, saved: Adapter
) -> dict[str, float]:
    """Compare a saved mix, folded into the weights, with the mix as it acts at run time.

    Args:
        lm: the base LLM.
        texts: token ids of prompts.
        acting: the mix as it was made.
        saved: read back from disk.

    Returns:
        `max_abs_logit_difference` and `relative` (over the largest absolute logit) of the next
        token after the prompts, and `kl`, the mean divergence of its distribution in nats. What the
        saved mix cannot say in a finite number is NaN or infinite here.

    Raises:
        FloatingPointError: the logits of the mix as it was made are not finite, or all 0.
    """

    def logits() -> list[Tensor]:
        return [
            lm.model(input_ids=torch.tensor([text], device=lm.device)).logits[0, -1].float()
            for text in texts
        ]

    with torch.no_grad():
        with lm.using(acting):
            expected = logits()
        with lm.folded(saved):
            found = logits()
    largest = float(torch.stack([one.abs().max() for one in expected]).max())
    if not 0.0 < largest < math.inf:  # a norm makes zeros of what overflows in it
        raise FloatingPointError("its logits are not finite, or all 0")
    pairs = list(zip(expected, found, strict=True))
    # Of tensors: the largest of numbers passes over a NaN that is not the first.
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    divergence = [
        torch.nn.functional.kl_div(
            b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"
        )
        for a, b in pairs
    ]
    return {
        "max_abs_logit_difference": difference,
        "relative": difference / largest,
        "kl": float(torch.stack(divergence).mean()),
    }
