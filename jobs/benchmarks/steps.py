"""What the choices of the demo save, each against its alternative in the same process and minute.

    python jobs/benchmarks/steps.py runs/demo/data/action

Needs a prepared domain (`rc-ray prepare jobs/demo.yaml`). Prints one line per comparison: the rate
of the baseline, the rate of ours, their ratio. One thread, as one worker of the demo has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rc_ray.assets import model_dir
from rc_ray.core.domains import Domain, read_domain, sample
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.training_config import TrainingConfig

NUM_STEPS = 6
NUM_USERS = 16
NUM_SYSTEMS = 5


def training(folder: Path, domain: Domain, style: str, first_layer: int) -> tuple[float, float]:
    """Tokens and supervised titles per second of training steps, the first one left out."""
    config = TrainingConfig.model_validate(
        {
            "style": style,
            "num_steps": NUM_STEPS,
            "batch_size": 4,
            "max_titles": 20,
            "lora": {"first_layer": first_layer},
        }
    )
    lm = load_language_model(folder, choose_dtype("auto"))
    plan = TrainingPlan(
        [domain], PromptRenderer(lm.tokenizer, config.style), config, seed=7, num_listed=19
    )
    engine = TorchEngine(
        TrainingModule(with_lora(lm.model, config.lora, 7), plan.tries, config), config
    )
    steps = train_steps(
        engine,
        plan,
        device=torch.device("cpu"),
        learning_rate=lambda: engine.optimizer.param_groups[0]["lr"],
    )
    rows = list(steps)[1:]
    seconds = sum(row["seconds"] for row in rows)
    tokens, titles = (sum(row[key] for row in rows) for key in ("num_tokens", "num_titles"))
    return tokens / seconds, titles / seconds


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - start


def line(what: str, unit: str, baseline: float, ours: float) -> None:
    print(f"{what:58} {baseline:8.2f} {ours:8.2f} {unit:12} x {ours / baseline:.2f}", flush=True)


def main(domain_dir: Path) -> None:
    torch.set_num_threads(1)
    folder = model_dir("smollm2-135m-instruct", print)
    domain = read_domain(domain_dir)
    print(f"{'':58} {'baseline':>8} {'ours':>8}")
    every, _ = training(folder, domain, "sequence", 0)
    upper, titles = training(folder, domain, "sequence", 20)
    line("train: all 30 layers, the upper 10", "tokens/s", every, upper)
    _, brief = training(folder, domain, "brief", 20)
    line("train: style sequence, style brief", "titles/s", titles, brief)

    lm = load_language_model(folder, choose_dtype("auto"))
    ranker = Ranker(lm, domain.name, domain.titles, domain.num_train, PromptRenderer(lm.tokenizer))
    cases = sample(domain.cases("test"), NUM_USERS, seed=7)
    histories = [[domain.titles[item] for item in case.history] for case in cases]
    listed = [case.candidates for case in cases]
    ranker.log_likelihoods(histories[:2], listed[:2])  # warm up
    one_pass = seconds_of(lambda: ranker.log_likelihoods(histories, listed))
    singly = seconds_of(
        lambda: ranker.log_likelihoods(
            [history for history in histories[:4] for _ in listed[0]],
            [[item] for items in listed[:4] for item in items],
        )
    )
    line(
        "rank 20 candidates: each in its own pass, all in one",
        "users/s",
        4 / singly,
        NUM_USERS / one_pass,
    )

    def shared() -> None:
        prepared = ranker.prepare(histories, listed, shared_layers=20)
        for _ in range(NUM_SYSTEMS):
            ranker.score(prepared)

    line(
        "5 systems: each by itself, lower 20 layers shared",
        "scores/s",
        NUM_USERS / one_pass,
        NUM_USERS * NUM_SYSTEMS / seconds_of(shared),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
