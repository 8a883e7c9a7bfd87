"""What bf16 changes of a ranking: adapters folded into the weights, beside them, and in fp32.

    python jobs/benchmarks/precision.py runs/cocktail_study/config.yaml movies --users 100

The evaluation adds an adapter into the weights, whose bf16 values round what is added; the service
lets adapters act beside them. Both are held against fp32 on warm test users of a finished run:
the error of the scores within a list, beside how far the candidates of a list and two systems lie
apart, and NDCG@10 of the likelihood as the adapters learned it. One thread; seconds are the
processor's, without the layers that all systems share.

Letters: N users, C candidates.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rc_ray.artifacts import RunFolder
from rc_ray.assets import model_dir
from rc_ray.compared import scored_adapters
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import Adapter, first_adapted_layer, load_adapter
from rc_ray.core.domains import RankingCase, read_domain, sample
from rc_ray.core.loading import load_language_model
from rc_ray.core.metrics import ndcg, rank_targets
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Prepared, Ranker
from rc_ray.requests import MAIN, target_positions

FP32, FOLDED, BESIDE = "fp32", "bf16, folded", "bf16, beside"


@contextmanager
def acting(lm: LanguageModel, adapter: Adapter, way: str) -> Iterator[None]:
    """Let an adapter act in one of the three ways."""
    with lm.using(AdapterMix([adapter])) if way == BESIDE else lm.folded(adapter):
        yield


def scored(ranker: Ranker, prepared: Prepared, row: int) -> tuple[Tensor, float]:
    """(N, C) fp64 scores under what acts, and the processor's seconds."""
    start = time.process_time()
    with torch.no_grad():
        scores = torch.stack([one[row] for one in ranker.score(prepared)]).double()
    return scores, time.process_time() - start


def within_lists(difference: Tensor) -> float:
    """Root mean square of (N, C) values about the mean of their lists, which ranks nothing."""
    centred = difference - difference.mean(dim=1, keepdim=True)
    return float(centred.square().mean().sqrt())


def quality(scores: Tensor, cases: list[RankingCase]) -> float:
    return float(ndcg(rank_targets(scores.numpy(), target_positions(cases, MAIN)), 10).mean())


def score_all(
    experiment: Experiment, domain_name: str, adapters: dict[str, Adapter], num_users: int
) -> tuple[dict[tuple[str, str], tuple[Tensor, float]], list[RankingCase]]:
    """Scores and seconds by system and way, and the users."""
    folder = RunFolder(experiment.run_dir)
    domain = read_domain(folder.domain_dir(domain_name))
    cases = sample(domain.cases("test", "warm"), num_users, experiment.split_seed)
    histories = [[domain.titles[item] for item in case.history] for case in cases]
    found = {}
    for dtype, ways in ((torch.bfloat16, (FOLDED, BESIDE)), (torch.float32, (FP32,))):
        lm = load_language_model(model_dir(experiment.model.path), dtype)
        ranker = Ranker(
            lm,
            domain_name,
            domain.titles,
            domain.num_train,
            PromptRenderer(lm.tokenizer, experiment.tune.style),
            max_titles=experiment.evaluate.max_titles,
            tokens_per_batch=experiment.evaluate.tokens_per_batch,
        )
        prepared = ranker.prepare(
            histories,
            [case.candidates for case in cases],
            shared_layers=first_adapted_layer(list(adapters.values())),
        )
        for (name, adapter), way in itertools.product(adapters.items(), ways):
            with acting(lm, adapter, way):
                found[name, way] = scored(ranker, prepared, int(experiment.tune.learns_with_prior))
    return found, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.yaml in the folder of a finished run")
    parser.add_argument("domain")
    parser.add_argument("--systems", nargs="+", default=["uniform", "cocktail", "entropy_1"])
    parser.add_argument("--users", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run_dir = options.config.resolve().parent
    experiment = load(options.config, (f"output_dir={run_dir.parent}", f"name={run_dir.name}"))
    folders = scored_adapters(experiment, RunFolder(experiment.run_dir), options.domain)
    adapters = {}
    for name in options.systems:
        folder = folders.get(name)
        if folder is None:
            known = ", ".join(key for key, value in folders.items() if value is not None)
            parser.error(f"{options.domain} has no adapter {name}; known: {known}")
        adapters[name] = load_adapter(folder, experiment.model.path)
    found, cases = score_all(experiment, options.domain, adapters, options.users)

    print(
        "| system | way | NDCG@10 | error, nats | candidates apart | s |\n|---|---|---|---|---|---|"
    )
    for (name, way), (scores, seconds) in found.items():
        exact = found[name, FP32][0]
        error = "" if way == FP32 else f"{within_lists(scores - exact):.3f}"
        cells = (f"{quality(scores, cases):.3f}", error, f"{within_lists(scores):.2f}")
        print(f"| {name} | {way} | {' | '.join(cells)} | {seconds:.1f} |")
    print(f"\n| two systems apart, nats | {FP32} | {FOLDED} | {BESIDE} |\n|---|---|---|---|")
    for one, two in itertools.combinations(adapters, 2):
        cells = [
            f"{within_lists(found[one, way][0] - found[two, way][0]):.3f}"
            for way in (FP32, FOLDED, BESIDE)
        ]
        print(f"| {one}, {two} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
