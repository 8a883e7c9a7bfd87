r"""Training a LoRA: ours beside `transformers.Trainer` with PEFT, on the same histories.

    python jobs/benchmarks/training.py runs/demo/data/action
    python jobs/benchmarks/training.py runs/demo/data/action runs/demo/data/drama_documentary \
        --quality-minutes 10
    python jobs/benchmarks/training.py runs/demo/data/action --random-config qwen2-7b

Needs prepared domains (`rc-ray prepare jobs/demo.yaml`), and accelerate for the Trainer. The same
model, LoRA, data, precision, batch of histories and threads for all; each contestant is a process
of its own and they take turns, `--rounds` times. What they see:

trainer-instruct   the paper's prompts, one answer supervised per history; rows padded to the
                   longest of a batch, logits of the whole vocabulary at every position, LoRA
                   masters in fp32 under autocast where the base is in bf16: as LLaMA-Factory and
                   the authors' code train
trainer-sequence   histories as consecutive titles, every title's tokens supervised likewise
ours-*             the same texts by the project's step: no padding, each text attending to itself,
                   the loss at the branches of the title trie, one function per LoRA layer; `brief`
                   cuts titles short

tokens/s counts tokens that are not padding, titles/s titles that are supervised. `peak` is the
memory of the whole process at its highest, `step` what of it was not there before the first step
(after model and imports). `useful` is the share of the machine's own matrix product, measured
in the same process and precision, that the decoder's linear layers need for those tokens: 2
operations per weight forward and 2 backward, without padding, attention, LoRA and output
projection. On a processor seconds are its own, divided by the threads, so that other programs on
the machine do not count; --by-clock takes the clock's instead. On a GPU (--device cuda) they are
the clock's, and memory is the GPU's.

--random-config trains random weights of a known shape, for which nothing is downloaded: `qwen2-7b`
is for a GPU of 80 GB (it runs in bf16; its bf16 product is the peak), `tiny` tries the script out.
Tokens are those of `--model`; their ids fit into the larger vocabulary.

With --quality-minutes each of `--quality` trains for so long, all of them side by side with
`--threads` each, on every domain given, and ranks validation users: NDCG@10 among the candidates,
with the calibration of docs/method.md chosen on the same users for all. The learning rate is
constant, and equal for all unless --trainer-learning-rate says otherwise. Minutes are counted as
seconds are above; on a machine of as many free cores as threads they are the clock's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rc_ray.assets import model_dir
from rc_ray.comparison import calibrate
from rc_ray.core.domains import Domain, read_domain, sample
from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.training_config import TrainingConfig

sys.path.insert(0, str(Path(__file__).parent))
from memory import Memory
from meter import Meter, product_peak
from random_model import SHAPES, random_model
from reference_training import train_with_trainer

CONTESTANTS = (
    "trainer-instruct",
    "trainer-sequence",
    "ours-instruct",
    "ours-sequence",
    "ours-brief",
)
NEVER = 10**6
NUM_LISTED = 19

Count = dict[str, float]


def settings(style: str, arguments: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "style": style,
            "num_steps": NEVER,
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "max_titles": 20,
            "schedule": "constant",
            "warmup_fraction": 20 / NEVER,
        }
    )


def training_plan(lm: LanguageModel, domain: Domain, config: TrainingConfig) -> TrainingPlan:
    """The histories of every step, the same for all contestants of a style."""
    return TrainingPlan(
        [domain], PromptRenderer(lm.tokenizer, config.style), config, 7, num_listed=NUM_LISTED
    )


def train_ours(lm: LanguageModel, plan: TrainingPlan, meter: Meter) -> None:
    config = plan.config
    peft_model = with_lora(lm.model, config.lora, plan.seed)
    fuse_lora(peft_model)
    module = TrainingModule(peft_model, plan.tries, config).to(lm.device)
    engine = TorchEngine(module, config)
    engine.module.train()
    for row in train_steps(
        engine, plan, device=lm.device, learning_rate=lambda: engine.schedule.get_last_lr()[0]
    ):
        if meter.step(row["num_tokens"], row["num_titles"]):
            return


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    device = torch.device(arguments.device)
    folder = model_dir(arguments.model, print)
    dtype = choose_dtype(arguments.dtype, device)
    if arguments.random_config is None:
        return load_language_model(folder, dtype, device)
    return random_model(arguments.random_config, folder, dtype, device)


def build(name: str, arguments: argparse.Namespace) -> tuple[Any, LanguageModel, TrainingConfig]:
    who, _, style = name.partition("-")
    torch.set_num_threads(arguments.threads)
    lm = load_model(arguments)
    config = settings(style, arguments)
    if who == "ours":
        return train_ours, lm, config
    rate = arguments.trainer_learning_rate or arguments.learning_rate
    return train_with_trainer, lm, config.model_copy(update={"learning_rate": rate})


def measure(name: str, arguments: argparse.Namespace) -> Count:
    """Rates of one contestant; runs in a process of its own."""
    train, lm, config = build(name, arguments)
    linears = [m for m in lm.model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    num_weights = sum(linear.weight.numel() for linear in linears)
    domain = read_domain(arguments.domain_dir[0])
    product = product_peak(lm, by_clock=arguments.by_clock)
    memory = Memory(lm.device)
    meter = Meter(arguments.seconds, lm.device, by_clock=arguments.by_clock)
    train(lm, training_plan(lm, domain, config), meter)
    peak = memory.peak()
    rate = meter.num_tokens / meter.seconds
    return {
        "tokens_per_s": rate,
        "titles_per_s": meter.num_titles / meter.seconds,
        "peak_mb": peak,
        # A page at least: where the process once held more than now, nothing new shows.
        "step_mb": max(peak - memory.at_start, 4 / 1024),
        "useful": 4 * num_weights * rate / product,
        "gflops": product / 1e9,
        "num_steps": meter.num_steps,
        "num_tokens": meter.num_tokens,
        "num_titles": meter.num_titles,
    }


def quality(name: str, domain_dir: Path, arguments: argparse.Namespace) -> Count:
    """Train for some minutes and rank validation users."""
    train, lm, config = build(name, arguments)
    domain = read_domain(domain_dir)
    meter = Meter(60 * arguments.quality_minutes, lm.device, by_clock=arguments.by_clock)
    meter.start()
    train(lm, training_plan(lm, domain, config), meter)
    lm.model.eval()
    # The main list alone: `instruct` prompts would name the target once for every further list.
    cases = [
        replace(case, more_candidates={})
        for case in sample(domain.cases("valid", "warm"), arguments.users, 7)
    ]
    ranker = Ranker(
        lm, domain.name, domain.titles, domain.num_train, PromptRenderer(lm.tokenizer, config.style)
    )
    with torch.no_grad():
        scores = ranker.score(
            ranker.prepare(
                [[domain.titles[item] for item in case.history] for case in cases],
                [case.candidates for case in cases],
            )
        )
        empty = ranker.empty_log_likelihoods()
    found = calibrate(
        {"empty": empty[None].numpy(), "valid": torch.stack(scores).numpy()},
        {"valid": cases},
        domain.log_prior(),
        EvaluateConfig(),
        default=(0.0, 0.0, True),
    )
    assert found.valid_ndcg is not None
    return {"valid_ndcg": found.valid_ndcg, "steps": meter.num_steps, "titles": meter.num_titles}


def child(name: str, arguments: argparse.Namespace, *further: str) -> list[str]:
    """The command of one contestant's process."""
    same = [
        *map(str, arguments.domain_dir),
        *("--threads", str(arguments.threads), "--seconds", str(arguments.seconds)),
        *("--batch-size", str(arguments.batch_size), "--users", str(arguments.users)),
        *("--model", arguments.model, "--device", arguments.device, "--dtype", arguments.dtype),
        *("--learning-rate", str(arguments.learning_rate)),
    ]
    if arguments.trainer_learning_rate:
        same += ["--trainer-learning-rate", str(arguments.trainer_learning_rate)]
    if arguments.random_config:
        same += ["--random-config", arguments.random_config]
    if arguments.by_clock:
        same.append("--by-clock")
    return [sys.executable, "-W", "ignore", __file__, *same, "--contestant", name, *further]


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Count:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a contestant failed with exit code {process.returncode}")
    found: Count = json.loads(output.splitlines()[-1])
    return found


def compare_speed(arguments: argparse.Namespace) -> None:
    rounds: dict[str, list[Count]] = {name: [] for name in arguments.contestants}
    for round_ in range(arguments.rounds):
        for name, found in rounds.items():
            found.append(answer(started(child(name, arguments))))
            one = found[-1]
            print(
                f"  round {round_ + 1}, {name}: {one['tokens_per_s']:.1f} tokens/s, "
                f"{one['num_steps']:.0f} steps, product {one['gflops']:.0f} GFLOP/s",
                file=sys.stderr,
                flush=True,
            )
    print(
        f"{arguments.domain_dir[0].name}: batches of {arguments.batch_size} histories, "
        f"{arguments.dtype}, {arguments.threads} thread(s), median of {arguments.rounds}"
    )
    print(f"{'':17} tokens/s     x   titles/s      x   peak MB     x   step MB     x   useful")
    first: Count | None = None
    for name, found in rounds.items():
        one = {key: float(np.median([count[key] for count in found])) for key in found[0]}
        first = first or one
        ratio = {key: value / first[key] for key, value in one.items()}
        print(
            f"{name:17} {one['tokens_per_s']:8.1f} {ratio['tokens_per_s']:5.2f} "
            f"{one['titles_per_s']:10.3f} {ratio['titles_per_s']:6.1f} "
            f"{one['peak_mb']:9.0f} {ratio['peak_mb']:5.2f} "
            f"{one['step_mb']:9.0f} {ratio['step_mb']:5.2f} {one['useful']:8.0%}",
            flush=True,
        )


def compare_quality(arguments: argparse.Namespace) -> None:
    minutes = str(arguments.quality_minutes)
    print(f"NDCG@10 on {arguments.users} validation users after {minutes} minutes", flush=True)
    for folder in arguments.domain_dir:
        processes = {
            name: started(child(name, arguments, "--quality-minutes", minutes, "--on", str(folder)))
            for name in arguments.quality
        }
        for name, process in processes.items():
            found = answer(process)
            print(
                f"{folder.name:17} {name:17} {found['valid_ndcg']:.3f}   "
                f"{found['steps']:.0f} steps, {found['titles']:.0f} titles",
                flush=True,
            )


def main(arguments: argparse.Namespace) -> None:
    if arguments.contestant and arguments.on:
        print(json.dumps(quality(arguments.contestant, arguments.on, arguments)))
        return
    if arguments.contestant:
        print(json.dumps(measure(arguments.contestant, arguments)))
        return
    # Once for all: on a busy machine each process might choose otherwise.
    dtype = choose_dtype(arguments.dtype, torch.device(arguments.device))
    arguments.dtype = str(dtype).removeprefix("torch.")
    if arguments.quality_minutes:
        compare_quality(arguments)
    else:
        compare_speed(arguments)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("domain_dir", type=Path, nargs="+", help="speed: the first alone")
    made.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    made.add_argument("--model", default="smollm2-135m-instruct", help="name or folder")
    made.add_argument("--random-config", choices=SHAPES)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--seconds", type=float, default=30.0, help="of each contestant's turn")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--by-clock", action="store_true")
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--trainer-learning-rate", type=float)
    made.add_argument("--quality-minutes", type=float, default=0.0)
    made.add_argument(
        "--quality", nargs="+", default=["trainer-instruct", "ours-brief"], choices=CONTESTANTS
    )
    made.add_argument("--users", type=int, default=200, help="validation users that judge")
    made.add_argument("--contestant", help=argparse.SUPPRESS)
    made.add_argument("--on", type=Path, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main(parser().parse_args())
