"""One domain's cocktail in one process: learn the weights, keep the mix as one LoRA, prove it.

Letters: L adapted linear layers, K adapters.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rc_ray.artifacts import replaced_dir, write_json, write_manifest, write_text
from rc_ray.core.adapters import Adapter, load_adapter, save_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain, sample
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.merging import concatenate, uniform_weights
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import UnlabeledPrompt, learn_weights, num_weighting_steps
from rc_ray.engines import local_model_dir, prepare_process
from rc_ray.errors import ArtifactError, UserError
from rc_ray.merge_config import MergeConfig
from rc_ray.shards import Stopwatch

ADAPTER_NAMES = ("spirit", "ingredient")
_NUM_CHECK_PROMPTS = 4
_FOLD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit allowed after folding, over the largest logit."""


def mix_domain(order: dict[str, Any]) -> dict[str, Any]:
    """The Ray task: the manifest's metrics, or `{"error": why}` where a retry would not help."""
    try:
        return _mix(order)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        return {"error": f"{type(error).__name__}: {error}"}


def _mix(order: dict[str, Any]) -> dict[str, Any]:
    config = MergeConfig.model_validate(
        {**order["config"]["merge"], "micro_batch_size": order["micro_batch_size"]}
    )
    watch = Stopwatch()
    prepare_process(order["num_cpus"])
    device = "cuda" if order["use_gpu"] else "cpu"
    dtype = choose_dtype(order["config"]["model"]["dtype"], device)
    base_name = order["config"]["model"]["path"]
    lm = load_language_model(local_model_dir(order["model_dir"], base_name), dtype, device)
    domain = read_domain(Path(order["domain_dir"]))
    adapters = [load_adapter(Path(order[f"{name}_dir"]), base_name) for name in ADAPTER_NAMES]
    ranker = Ranker(
        lm,
        domain.name,
        domain.titles,
        domain.num_train,
        PromptRenderer(lm.tokenizer, order["config"]["style"]),
        max_titles=config.max_titles,
        tokens_per_batch=order["tokens_per_batch"],
    )
    prompts = unlabeled_prompts(domain, config.num_prompts, order["seed"])
    if not prompts:
        raise UserError("it has no users for unlabeled prompts; raise `data.unlabeled_fraction`")

    curve = []
    num_steps = num_weighting_steps(len(prompts), config)
    curve_path = Path(order["curve_path"])
    curve_path.parent.mkdir(parents=True, exist_ok=True)
    with curve_path.open("w", encoding="utf-8") as log:
        for step in learn_weights(
            ranker,
            adapters,
            prompts,
            config,
            order["seed"],
            with_prior=order["config"]["with_prior"],
            micro_batch_size=config.micro_batch_size,
        ):
            curve.append({"step": step.step, "entropy": step.entropy, "num_steps": num_steps})
            log.write(json.dumps(curve[-1]) + "\n")
            log.flush()
    weights = step.weights

    target = Path(order["target"])
    with replaced_dir(target) as work:
        save_adapter(work, concatenate(adapters, weights), base_name)
        save_adapter(work / "uniform", concatenate(adapters, uniform_weights(adapters)), base_name)
        check = fold_check(lm, ranker, adapters, weights, load_adapter(work), prompts)
        if not check["relative"] <= _FOLD_TOLERANCE[dtype]:
            raise ArtifactError(
                f"the folded cocktail's logits are off by {check['max_abs_logit_difference']:.3g}; "
                "set `model.dtype: float32` and merge again"
            )
        modules = sorted(weights)
        write_json(
            work / "weights.json",
            {
                "modules": modules,
                "adapters": list(ADAPTER_NAMES),
                "weights": [weights[name] for name in modules],
            },
        )
        write_text(work / "entropy.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
        write_json(work / "fold_check.json", check)
        per_epoch = len(curve) // config.num_epochs
        metrics = {
            "num_prompts": len(prompts),
            "num_steps": len(curve),
            "first_entropy": float(np.mean([row["entropy"] for row in curve[:per_epoch]])),
            "last_entropy": float(np.mean([row["entropy"] for row in curve[-per_epoch:]])),
            "mean_ingredient_weight": float(np.mean([row[1] for row in weights.values()])),
            "fold_check": check,
            "seconds": round(watch.lap(), 1),
            "peak_memory_mb": round(watch.peak_memory_mb(), 1),
        }
        write_manifest(
            work,
            stage="merge",
            config=order["config"],
            seed=order["seed"],
            inputs=order["inputs"],
            metrics=metrics,
        )
    curve_path.unlink(missing_ok=True)
    return metrics


def unlabeled_prompts(domain: Domain, num_prompts: int, seed: int) -> list[UnlabeledPrompt]:
    """Histories and candidate lists of users who are never scored; no click is told."""
    cases: Sequence[RankingCase] = domain.cases("valid", "warm", "unlabeled")
    return [
        UnlabeledPrompt(tuple(domain.titles[item] for item in case.history), case.candidates)
        for case in sample(cases, num_prompts, seed)
    ]


def fold_check(
    lm: LanguageModel,
    ranker: Ranker,
    adapters: Sequence[Adapter],
    weights: dict[str, list[float]],
    saved: Adapter,
    prompts: Sequence[UnlabeledPrompt],
) -> dict[str, float]:
    """Compare the saved cocktail, folded into the weights, with the mix as it was learned.

    Returns:
        `max_abs_logit_difference` and `relative` (over the largest absolute logit) of the next
        token after some prompts, and `kl`, the mean divergence of its distribution in nats.
    """
    mix = AdapterMix(adapters)
    learned = mix.with_weights(
        torch.tensor([weights[name] for name in mix.modules], device=lm.device)
    )
    texts = [
        ranker.renderer.prompt(ranker.domain, prompt.history[-ranker.max_titles :])
        for prompt in prompts[:_NUM_CHECK_PROMPTS]
    ]

    def logits() -> list[Tensor]:
        return [
            lm.model(input_ids=torch.tensor([text], device=lm.device)).logits[0, -1].float()
            for text in texts
        ]

    with torch.no_grad():
        with lm.using(learned):
            expected = logits()
        with lm.folded(saved):
            found = logits()
    pairs = list(zip(expected, found, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    divergence = [
        torch.nn.functional.kl_div(
            b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"
        )
        for a, b in pairs
    ]
    return {
        "max_abs_logit_difference": difference,
        "relative": difference / max(float(a.abs().max()) for a in expected),
        "kl": float(torch.stack(divergence).mean()),
    }
