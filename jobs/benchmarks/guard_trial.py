"""What a guard's margin is worth: whom each rule has served, and how good that is on test users.

    python jobs/benchmarks/guard_trial.py runs/cocktail_study/config.yaml

Reads the scores that a finished `rc-ray run` keeps in `evaluate.work`; nothing is scored anew, no
Ray is started and nothing is written. Every learned mix of every domain, or those that `--mixes`
names, stands in the cocktail's place once. Many times over, some validation users are drawn with
replacement; they choose the calibrations, and the rule then takes the mix or, where the best
control is far enough ahead, that control. The warm test users tell what was served: mean NDCG@10
minus that of the mix itself. Rules that ask nobody stand beside them.

The calibration is each system's own, or one for the mix and its controls, the best on the mean of
them. A margin is in NDCG of the whole list, as `merge.guard.margin`, or in standard errors of the
paired difference between the control and the mix.

Letters: G settings of the score, N validation users, M test users, S systems, D draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rc_ray import recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment, load
from rc_ray.core.domains import RankingCase, read_domain
from rc_ray.core.metrics import ndcg
from rc_ray.evaluate import plan
from rc_ray.guard import COCKTAIL, CONTROLS
from rc_ray.merge_config import LearnedMix
from rc_ray.requests import MAIN
from rc_ray.score_settings import Floats, aligned, grid, ranks_in, score_of
from rc_ray.shards import read_scores

MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1)
ERRORS = (1.0, 2.0, 3.0)
CALIBRATIONS = ("each its own", "one for all")


@dataclass(frozen=True)
class Measured:
    """One system on a domain under every setting of the score."""

    valid: Floats
    """(G, N) NDCG of the whole main list."""
    test: Floats
    """(G, M) NDCG@10."""


@dataclass(frozen=True)
class Rule:
    """When a control is served in the place of a mix."""

    label: str
    margin: float = 0.0
    num_errors: float = 0.0
    """Standard errors of the difference that the control must be ahead by."""
    always: str = ""
    """A system that is served whatever the users say; `mix` is the mix."""


RULES = (
    Rule("always the mix", always="mix"),
    *(Rule(f"always the {name}", always=name) for name in CONTROLS),
    *(Rule(f"margin {margin:g}", margin=margin) for margin in MARGINS),
    *(Rule(f"{num:g} standard errors", num_errors=num) for num in ERRORS),
)


def read_run(path: Path, mixes: Sequence[str]) -> dict[str, dict[str, Measured]]:
    """Mixes and controls of a finished run, by domain and system.

    Args:
        path: of the file in the run's folder, wherever that was moved.
        mixes: by name; none takes those that are learned, but not the one of a random LoRA, which
            is a control of the study and no cocktail that one would serve.
    """
    run_dir = path.resolve().parent
    experiment = load(path, (f"output_dir={run_dir.parent}", f"name={run_dir.name}"))
    folder = RunFolder(experiment.run_dir)
    inputs = recipes.evaluation(experiment).inputs(folder)
    made = recipes.mixes(experiment).items()
    learned = {COCKTAIL, *(name for name, mix in made if isinstance(mix, LearnedMix))}
    wanted = {*CONTROLS, *(mixes or learned - {"random_spirit"})}
    found: dict[str, dict[str, Measured]] = {}
    for name in experiment.data.tested:
        domain = read_domain(folder.domain_dir(name))
        llm, _ = plan(experiment, folder, domain, inputs)
        for system in llm.systems:
            if system.system not in wanted:
                continue
            scores = read_scores(llm, system).by_split
            both = [
                measured(experiment, scores, split, llm.cases[split], domain.log_prior(), cut)
                for split, cut in (("valid", None), ("warm", 10))
            ]
            found.setdefault(name, {})[system.system] = Measured(*both)
    return found


def measured(
    experiment: Experiment,
    scores: dict[str, Floats],
    split: str,
    cases: Sequence[RankingCase],
    log_prior: Floats,
    cut: int | None,
) -> Floats:
    """(G, N) NDCG of the main lists under every setting; `cut` None takes the whole list."""
    parts = (scores[split], *aligned(split, cases, scores, log_prior))
    depth = len(cases[0].candidates) if cut is None else cut
    return np.stack(
        [
            ndcg(ranks_in(score_of(*parts, point), cases, MAIN), depth)
            for point in grid(experiment.evaluate)
        ]
    )


def served(
    mix: Measured, controls: dict[str, Measured], users: np.ndarray, calibration: str
) -> dict[str, tuple[str, float]]:
    """Under each rule: the system that these validation users have served, and its test NDCG.

    Args:
        mix: in the cocktail's place.
        controls: those that the domain has.
        users: (N,) places of the validation users, drawn with replacement.
        calibration: one of `CALIBRATIONS`.
    """
    systems = {"mix": mix, **controls}
    drawn = {name: one.valid[:, users] for name, one in systems.items()}  # (G, N)
    means = {name: one.mean(axis=1) for name, one in drawn.items()}  # (G,)
    common = int(np.argmax(np.mean(list(means.values()), axis=0)))
    at = {
        name: common if calibration == "one for all" else int(np.argmax(one))
        for name, one in means.items()
    }
    best = max(controls, key=lambda name: means[name][at[name]])  # of equals the first
    lead = drawn[best][at[best]] - drawn["mix"][at["mix"]]  # (N,)
    error = float(lead.std(ddof=1) / np.sqrt(len(lead)))
    found = {}
    for rule in RULES:
        taken = rule.always
        if not taken:
            is_ahead = lead.mean() > rule.margin + rule.num_errors * error
            taken = best if is_ahead else "mix"
        if taken in systems:
            found[rule.label] = (taken, float(systems[taken].test[at[taken]].mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.yaml in the folder of a finished run")
    parser.add_argument("--mixes", nargs="+", default=[], help="default: the learned ones")
    parser.add_argument("--users", type=int, nargs="+", default=[25, 50, 100, 150])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    domains = read_run(arguments.config, arguments.mixes)
    rng = np.random.default_rng(arguments.seed)
    for calibration in CALIBRATIONS:
        for num_users in arguments.users:
            # One row a mix of a domain: (D,) NDCG under each rule, and the share of fallbacks.
            gathered: dict[str, dict[str, list[tuple[float, float]]]] = {}
            for domain, systems in domains.items():
                controls = {name: systems[name] for name in CONTROLS if name in systems}
                for name, mix in systems.items():
                    if name in controls:
                        continue
                    for _ in range(arguments.draws):
                        users = rng.integers(mix.valid.shape[1], size=num_users)
                        found = served(mix, controls, users, calibration)
                        own = found["always the mix"][1]
                        for label, (taken, quality) in found.items():
                            row = gathered.setdefault(label, {}).setdefault(domain, [])
                            row.append((quality - own, float(taken != "mix")))
            print(f"\n{num_users} validation users, calibration {calibration}\n")
            print("| rule | fallback taken | all | " + " | ".join(domains) + " |")
            print("|---" * (3 + len(domains)) + "|")
            for label, by_domain in gathered.items():
                means = {name: np.mean(rows, axis=0) for name, rows in by_domain.items()}
                cells = [f"{means[name][0]:+.3f}" if name in means else "" for name in domains]
                gain, share = np.mean(list(means.values()), axis=0)
                print(f"| {label} | {share:.0%} | {gain:+.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
