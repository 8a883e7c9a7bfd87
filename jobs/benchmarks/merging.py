r"""Learning a cocktail's weights: ours beside the procedure of RecCocktail, on the same prompts.

    python jobs/benchmarks/merging.py runs/demo action
    python jobs/benchmarks/merging.py runs/demo action --style instruct

Needs a finished run (`make demo`): its base LLM, its spirit, the domain's ingredient and prepared
data. Every procedure learns one weight per linear layer and adapter, lambda = softmax(w), from
w = 0 by Adam, on the histories and candidate lists of the same users, who are never scored, in the
same order, `--batch-size` prompts a step, one pass over them. The learners:

reference          the procedure of arXiv 2502.08271 (reference_merging.py): the entropy of the
                   tokens of five titles that the model writes, the whole prompt, padded on the
                   left to 1,200 tokens, computed again for each token
reference-unpadded the same without padding: the same numbers, so that what it learns is what the
                   reference learns, and what of the difference in time is padding alone
reference-one      the reference with one title instead of five
ours-same-loss     the loss of `reference-one` by our path (`merge.objective: vocabulary_entropy`)
ours               our objective (`entropy`): the likelihood of the listed candidates, normalised
                   over them, from one pass per prompt
ours-goal          `ours` on `--goal-prompts` prompts, for the goal of a minute

What is made easy for the reference stands in its file.

--style own writes the prompts of both sides as the run's adapters were trained (`tune.style`). For
`sequence` and `brief` the reference then goes on writing the history, a title a line, which is what
these adapters can do; no candidates are listed. --style instruct gives both sides chat prompts that
list the candidates, as in the paper: a form that adapters of another style were not trained for.
The instruction asks the reference for five titles, a line each, and ours for one.

Each learner is a process of its own, one after another, with `--threads` threads. Seconds are the
processor's divided by the threads, so that other programs on the machine do not count; `clock` is
beside. `peak` is the memory of the process at its highest, `learning` what of it was not there
before the first step (after imports, model and adapters). The reference is slow: with padding it
runs `--reference-prompts` only, the others `--prompts`, and what is scaled from fewer prompts says
so.

Then the cocktails learned on `--prompts` prompts rank the same test users, in the run's own style
and with the calibration of docs/method.md, chosen for each on the same validation users.
Differences from `reference-unpadded` are paired by user, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rc_ray.assets import model_dir
from rc_ray.comparison import calibrate
from rc_ray.core.adapters import Adapter, first_adapted_layer, load_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain, sample
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.metrics import hit_rate, ndcg
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import UnlabeledPrompt, learn_weights
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.merge_prompts import unlabeled_prompts
from rc_ray.mix_config import LearnedMix
from rc_ray.requests import MAIN, flat_candidates

sys.path.insert(0, str(Path(__file__).parent))
from memory import Memory
from merging_tables import print_costs, print_goals, print_quality
from reference_merging import NUM_TITLES, NUM_TOKENS, Generating, Weights

LEARNERS = (
    "reference",
    "reference-unpadded",
    "reference-one",
    "ours-same-loss",
    "ours",
    "ours-goal",
)
JUDGED = ("reference-unpadded", "ours-same-loss", "ours")
SEED = 7


@dataclass(frozen=True)
class Run:
    """What a finished run gives to all learners."""

    lm: LanguageModel
    domain: Domain
    adapters: list[Adapter]
    """Spirit and ingredient."""
    style: str
    with_prior: bool
    max_titles: int

    def ranker(self, style: str | None = None) -> Ranker:
        return Ranker(
            self.lm,
            self.domain.name,
            self.domain.titles,
            self.domain.num_train,
            PromptRenderer(self.lm.tokenizer, style or self.style),  # type: ignore[arg-type]
            max_titles=self.max_titles,
        )


def read_run(order: Mapping[str, Any]) -> Run:
    torch.set_num_threads(order["threads"])
    folder, name = Path(order["run_dir"]), order["domain"]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    base = config["model"]["path"]
    dtype = getattr(torch, order["dtype"])
    return Run(
        lm=load_language_model(model_dir(base, print), dtype, order["device"]),
        domain=read_domain(folder / "data" / name),
        adapters=[load_adapter(folder / part) for part in ("spirit", f"ingredients/{name}")],
        style=config["tune"]["style"],
        with_prior=config["tune"]["prior_in_loss"] and config["tune"]["loss"] == "trie",
        max_titles=config["merge"]["max_titles"],
    )


def learn_with_ours(
    run: Run,
    style: str,
    prompts: Sequence[UnlabeledPrompt],
    objective: str,
    order: Mapping[str, Any],
) -> Iterator[Weights]:
    config = LearnedMix.model_validate(
        {
            "objective": objective,
            "num_prompts": len(prompts),
            "num_epochs": 1,
            "batch_size": order["batch_size"],
            "learning_rate": order["learning_rate"],
            "num_tokens": NUM_TOKENS,
            "max_titles": run.max_titles,
        }
    )
    for step in learn_weights(
        run.ranker(style),
        run.adapters,
        prompts,
        config,
        SEED,
        with_prior=run.with_prior,
        micro_batch_size=order["micro_batch_size"],
    ):
        yield step.weights


class TokenCount:
    """Tokens that the decoder's first layer reads, padding included."""

    def __init__(self, lm: LanguageModel) -> None:
        self.num = 0
        embeddings = lm.model.get_input_embeddings()
        self._hook = embeddings.register_forward_hook(self._add)

    def _add(self, _: torch.nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.num += inputs[0].numel()


def learn(order: Mapping[str, Any]) -> dict[str, Any]:
    """One learner's costs and weights; runs in a process of its own."""
    run = read_run(order)
    name = order["learner"]
    style = run.style if order["style"] == "own" else order["style"]
    num_prompts = {
        "reference": order["reference_prompts"],
        "reference-one": order["reference_prompts"],
        "ours-goal": order["goal_prompts"],
    }.get(name, order["prompts"])
    prompts = unlabeled_prompts(run.domain, num_prompts, SEED)
    memory, read = Memory(run.lm.device), TokenCount(run.lm)
    cpu, clock = time.process_time(), time.perf_counter()
    if name.startswith("reference"):
        pad_to = 0 if name == "reference-unpadded" else order["pad_to"]
        num_titles = 1 if name == "reference-one" else NUM_TITLES
        learner = Generating(run.ranker(style), run.adapters, pad_to=pad_to, num_titles=num_titles)
        steps = learner.learn(prompts, order["batch_size"], order["learning_rate"], SEED)
    else:
        objective = "vocabulary_entropy" if name == "ours-same-loss" else "entropy"
        steps = learn_with_ours(run, style, prompts, objective, order)
    learned: list[Weights] = []
    for weights in steps:
        learned.append(weights)
        print(f"  {name}: step {len(learned)}", file=sys.stderr, flush=True)
    peak = memory.peak()
    return {
        "seconds": (time.process_time() - cpu) / order["threads"],
        "clock_s": time.perf_counter() - clock,
        "peak_mb": peak,
        # A page at least: where the process once held more than now, nothing new shows.
        "learning_mb": max(peak - memory.at_start, 4 / 1024),
        "num_prompts": len(prompts),
        "num_steps": len(learned),
        "num_tokens": read.num,
        "weights": learned[-1],
    }


def judge(order: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """HR@1 and NDCG@10 of each test user under each system's weights."""
    run = read_run(order)
    cases = {
        "valid": sample(run.domain.cases("valid"), order["users"], SEED),
        "warm": sample(run.domain.cases("test"), order["users"], SEED),
    }
    ranker = run.ranker()
    mix = AdapterMix(run.adapters)
    shared = first_adapted_layer(run.adapters)
    prepare: Callable[[Sequence[RankingCase]], Any] = lambda found: ranker.prepare(  # noqa: E731
        [[run.domain.titles[item] for item in case.history] for case in found],
        [flat_candidates(case) for case in found],
        shared_layers=shared,
    )
    empty = ranker.prepare([[]], [range(len(run.domain.titles))], shared_layers=shared)
    prepared = {split: prepare(found) for split, found in cases.items()}
    values = {}
    for name, weights in order["weights"].items():
        rows = torch.tensor([weights[module] for module in mix.modules])
        with torch.no_grad(), run.lm.using(mix.with_weights(rows.to(run.lm.device))):
            scores = {
                split: torch.stack(ranker.score(one)).cpu().numpy()
                for split, one in {**prepared, "empty": empty}.items()
            }
        found = calibrate(
            scores, cases, run.domain.log_prior(), EvaluateConfig(), default=(0.0, 0.0, True)
        )
        (ranks,) = found.ranks["warm", MAIN]
        values[name] = {"HR@1": hit_rate(ranks, 1).tolist(), "NDCG@10": ndcg(ranks, 10).tolist()}
        print(f"  judged {name}", file=sys.stderr, flush=True)
    return values


def work(order: Mapping[str, Any]) -> None:
    """One process: learn or judge, leave the result in a file."""
    result = judge(order) if "weights" in order else learn(order)
    Path(order["target"]).write_text(json.dumps(result), encoding="utf-8")


def in_process(order: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "order.json", Path(folder) / "result.json"
        path.write_text(json.dumps({**order, "target": str(target)}), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", __file__, "--work", str(path)]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if code:
            raise SystemExit(f"a process ended with {code}")
        return json.loads(target.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    # Once for all: on a busy machine each process might choose otherwise.
    dtype = choose_dtype(options.dtype, options.device)
    order = {**vars(options), "dtype": str(dtype).removeprefix("torch.")}
    order["run_dir"] = str(options.run_dir)
    found = {
        name: in_process({**order, "learner": name})
        for name in LEARNERS
        if name in options.learners
    }
    weights: dict[str, Weights] = {name: found[name]["weights"] for name in JUDGED if name in found}
    modules = next(iter(found.values()))["weights"]
    for name, row in (("uniform", [0.5, 0.5]), ("spirit", [1.0, 0.0]), ("ingredient", [0.0, 1.0])):
        weights[name] = dict.fromkeys(modules, row)
    values = in_process({**order, "weights": weights})
    print(
        f"{options.domain}, {order['dtype']}, {options.threads} thread(s), prompts in style "
        f"{options.style}, {options.batch_size} a step, learning rate {options.learning_rate}"
    )
    print_costs(found, options.goal_prompts)
    print_quality(values, weights, SEED)
    print_goals(found, values, options.threads)
    return {"costs": found, "values": values}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("run_dir", type=Path)
    made.add_argument("domain", help="one with an ingredient")
    made.add_argument("--learners", nargs="+", default=LEARNERS, choices=LEARNERS)
    made.add_argument("--style", default="own", choices=("own", "instruct"))
    made.add_argument("--prompts", type=int, default=16, help="unless another option says so")
    made.add_argument("--reference-prompts", type=int, default=4, help="of the padded reference")
    made.add_argument("--goal-prompts", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=4, help="prompts of an optimiser step")
    made.add_argument("--micro-batch-size", type=int, help="of ours; all of a step without")
    made.add_argument("--learning-rate", type=float, default=0.5)
    made.add_argument("--pad-to", type=int, default=1200)
    made.add_argument("--users", type=int, default=400, help="at most so many test users")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        main(sys.argv[1:])
