r"""Ingredients of many domains on one device: together, one after another, one process each.

    python jobs/benchmarks/many_ingredients.py runs/domains8/data/*

Needs prepared domains (`rc-ray prepare jobs/domains8.yaml`). The same model, LoRA, data, precision
and number of steps for all, and the same threads over all processes that run at once.

together   one process, one base, all LoRAs side by side (`tune.domains_per_trial`)
in-turn    one process, one base, one domain after another (what a reused Ray actor does)
apart      one process per domain, each with a base of its own and one thread, as many at a time
           as there are threads (`tune.cpus_per_trial: 1`); `--at-once` runs more of them

`wall` is from the first process's start to the last one's end, imports and loading included;
`train` the time inside optimiser steps (of `apart`: their sum over the processes at a time).
tokens/s counts tokens that are not padding over `train`; tokens/cpu-s over the processor's seconds
in optimiser steps, so that other programs on the machine do not count. `measured` is the highest
sum of PSS over the processes that ran at once: a page that several share is counted once. `all at
once` is what all processes of a contestant take side by side: the sum of their highest USS (pages
that no other process has), and once the shared pages of one (libraries, mostly). Ray's own part is
left out: some 0.2 GB for each process.

The last column is the largest difference of a LoRA's matrices from those of `in-turn`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from rc_ray.assets import model_dir
from rc_ray.core.adapters import Adapter, adapter_of, load_adapter, save_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.joint_training import JointTraining, make_member
from rc_ray.core.loading import load_language_model
from rc_ray.core.lora_bank import LoraBank
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.training_config import TrainingConfig

CONTESTANTS = ("together", "in-turn", "apart")
SEED = 7
NUM_LISTED = 19
GB = 1e9

Count = dict[str, float]
"""`tokens`, `seconds` and `cpu_s` inside optimiser steps."""


def make_plan(lm: LanguageModel, domain_dir: Path, config: TrainingConfig) -> TrainingPlan:
    renderer = PromptRenderer(lm.tokenizer, config.style)
    return TrainingPlan([read_domain(domain_dir)], renderer, config, SEED, num_listed=NUM_LISTED)


def train_together(
    lm: LanguageModel, domain_dirs: Sequence[Path], config: TrainingConfig, tokens_per_pass: int
) -> tuple[dict[str, Adapter], Count]:
    plans = {folder.name: make_plan(lm, folder, config) for folder in domain_dirs}
    bank = LoraBank(lm.model, config.lora, dict.fromkeys(plans, SEED))
    members = {name: make_member(lm, bank, name, plan) for name, plan in plans.items()}
    training = JointTraining(lm, bank, members, tokens_per_pass=tokens_per_pass)
    tokens, cpu, start = 0, time.process_time(), time.perf_counter()
    while training.active:
        for name, metrics in training.step().items():
            if isinstance(metrics, Exception):
                raise SystemExit(f"{name}: {metrics}")
            tokens += metrics["num_tokens"]
    count = {
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
    }
    adapters = {name: training.result(name) for name in plans}
    bank.unload()
    return adapters, count


def train_in_turn(
    lm: LanguageModel, domain_dirs: Sequence[Path], config: TrainingConfig
) -> tuple[dict[str, Adapter], Count]:
    adapters = {}
    count: Count = dict.fromkeys(("tokens", "seconds", "cpu_s"), 0.0)
    for folder in domain_dirs:
        plan = make_plan(lm, folder, config)
        peft_model = with_lora(lm.model, config.lora, SEED)
        fuse_lora(peft_model)
        engine = TorchEngine(TrainingModule(peft_model, plan.tries, config), config)
        engine.module.train()
        cpu, start = time.process_time(), time.perf_counter()
        for row in train_steps(
            engine,
            plan,
            device=lm.device,
            learning_rate=lambda engine=engine: engine.schedule.get_last_lr()[0],
        ):
            count["tokens"] += row["num_tokens"]
        count["seconds"] += time.perf_counter() - start
        count["cpu_s"] += time.process_time() - cpu
        adapters[folder.name] = adapter_of(peft_model)
        peft_model.unload()
        lm.model.eval()
    return adapters, count


def work(order: dict[str, Any]) -> None:
    """One process: train its domains, leave the adapters and the counts."""
    torch.set_num_threads(order["threads"])
    config = TrainingConfig.model_validate(order["config"])
    lm = load_language_model(order["model"], getattr(torch, order["dtype"]), order["device"])
    folders = [Path(folder) for folder in order["domain_dirs"]]
    if order["contestant"] == "together":
        adapters, count = train_together(lm, folders, config, order["tokens_per_pass"])
    else:
        adapters, count = train_in_turn(lm, folders, config)
    target = Path(order["target"])
    for name, adapter in adapters.items():
        save_adapter(target / name, adapter, "base")
    (target / f"{folders[0].name}.json").write_text(json.dumps(count))


@dataclass
class Memory:
    """The memory of a contestant's processes, looked at every tenth of a second."""

    measured: float = 0.0
    """Highest sum of PSS over the processes at a time, in bytes."""
    private: dict[int, float] = field(default_factory=dict)
    """By process, the highest USS."""
    shared: float = 0.0
    """Highest difference of a process's resident memory and its USS."""

    def look(self, pids: Sequence[int]) -> None:
        total = 0.0
        for pid in pids:
            try:
                info = psutil.Process(pid).memory_full_info()
            except psutil.Error:
                continue  # it has ended
            total += info.pss
            self.private[pid] = max(self.private.get(pid, 0.0), info.uss)
            self.shared = max(self.shared, info.rss - info.uss)
        self.measured = max(self.measured, total)

    @property
    def all_at_once(self) -> float:
        return sum(self.private.values()) + self.shared


def run(orders: Sequence[dict[str, Any]], at_once: int) -> tuple[float, Memory]:
    """Run processes, so many at a time; wall seconds and memory."""
    memory, alive, ended = Memory(), dict[int, subprocess.Popen[bytes]](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            memory.look(list(alive))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    waiting = list(orders)
    try:
        while waiting or alive:
            while waiting and len(alive) < at_once:
                command = [sys.executable, __file__, "--work", json.dumps(waiting.pop(0))]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                alive[process.pid] = process
            time.sleep(0.05)
            for pid, process in list(alive.items()):
                code = process.poll()
                if code is None:
                    continue
                del alive[pid]
                if code:
                    raise SystemExit(f"a process ended with {code}")
    finally:
        ended.set()
        watcher.join()
        for process in alive.values():
            process.kill()
    return time.perf_counter() - start, memory


def largest_difference(one: Path, other: Path) -> float:
    first, second = load_adapter(one).modules, load_adapter(other).modules
    return max(
        float((x - y).abs().max())
        for name, pair in first.items()
        for x, y in ((pair.a, second[name].a), (pair.b, second[name].b))
    )


def contest(options: argparse.Namespace, folder: Path, contestant: str) -> dict[str, float]:
    """One contestant's row; its adapters stay in `folder`."""
    at_once = (options.at_once or options.threads) if contestant == "apart" else 1
    domain_dirs = [str(Path(path).absolute()) for path in options.domain_dirs]
    target = folder / contestant
    target.mkdir(parents=True, exist_ok=True)
    order = {
        "contestant": contestant,
        "threads": max(1, options.threads // at_once),
        "model": str(options.model or model_dir("smollm2-135m-instruct", print)),
        "dtype": options.dtype,
        "device": options.device,
        "tokens_per_pass": options.tokens_per_pass,
        "target": str(target),
        "config": {
            "style": options.style,
            "num_steps": options.steps,
            "batch_size": options.batch_size,
            "max_titles": options.max_titles,
        },
    }
    shares = [[one] for one in domain_dirs] if contestant == "apart" else [domain_dirs]
    wall_s, memory = run([{**order, "domain_dirs": share} for share in shares], at_once)
    counts = [json.loads((target / f"{Path(s[0]).name}.json").read_text()) for s in shares]
    return {
        "wall_s": wall_s,
        "train_s": sum(count["seconds"] for count in counts) / at_once,
        "cpu_s": sum(count["cpu_s"] for count in counts),
        "tokens": sum(count["tokens"] for count in counts),
        "measured": memory.measured,
        "all_at_once": memory.all_at_once,
    }


def main(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("domain_dirs", nargs="+")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-titles", type=int, default=20)
    parser.add_argument("--style", default="sequence")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--at-once", type=int, help="processes of `apart` at a time")
    parser.add_argument("--tokens-per-pass", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="turns; the fastest counts")
    parser.add_argument("--model", type=Path, help="a model folder; the embedded one without")
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work_dir:
        folder = Path(work_dir)
        for _ in range(options.rounds):
            for contestant in CONTESTANTS:
                row = contest(options, folder, contestant)
                best = rows.get(contestant)
                rows[contestant] = row if best is None or row["cpu_s"] < best["cpu_s"] else best
        for contestant, row in rows.items():
            row["difference"] = max(
                largest_difference(folder / contestant / name, folder / "in-turn" / name)
                for name in (Path(path).name for path in options.domain_dirs)
            )
    print(
        f"{len(options.domain_dirs)} domains, {options.steps} steps of {options.batch_size} "
        f"histories each, style {options.style}, {options.dtype}, {options.threads} thread(s)"
    )
    print(
        f"{'':9} {'wall s':>8} {'train s':>8} {'tokens/s':>9} {'tokens/cpu-s':>13} "
        f"{'measured GB':>12} {'all at once GB':>15} {'difference':>11}"
    )
    for contestant, row in rows.items():
        print(
            f"{contestant:9} {row['wall_s']:8.1f} {row['train_s']:8.1f} "
            f"{row['tokens'] / row['train_s']:9.0f} {row['tokens'] / row['cpu_s']:13.0f} "
            f"{row['measured'] / GB:12.2f} {row['all_at_once'] / GB:15.2f} "
            f"{row['difference']:11.1e}"
        )
    share = rows["together"]["all_at_once"] / rows["apart"]["all_at_once"]
    print(f"together takes {share:.2f} of the memory of all processes side by side")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
