"""Memory of each worker under ZeRO: a model that every worker loads whole, against one in shards.

    python jobs/benchmarks/zero_memory.py --workers 1 2 4

Makes a Llama of random weights (about 1 billion parameters in bf16, 2 GB, in a temporary folder),
and trains a LoRA on it for a step with 1, 2 and 4 processes under gloo, in three ways: ZeRO-1;
ZeRO-3 on a model that every worker has loaded whole first; ZeRO-3 on a model that is sharded while
it loads, as `rc-ray train` does. Every process samples its own memory: RSS, USS (what no other
process shares) and, of these, the anonymous part. The file of weights is mapped into memory by
the worker that reads it, and its pages count as RSS and USS although the system can drop them at
any time; copies of weights are anonymous. `imports` is what a process holds before it loads
anything, anonymous. Figures are of the worker that holds most.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WAYS = ("zero1", "zero3-whole", "zero3-sharded")
MIB = 2**20


class Shape(NamedTuple):
    """Of a Llama model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocabulary_size: int


SHAPES = {
    "1b": Shape(2048, 5632, 20, 16, 49152),
    "tiny": Shape(64, 96, 2, 4, 49152),
}


def make_model(folder: Path, shape: Shape, tokenizer_dir: Path) -> int:
    """Write a model of random bf16 weights with somebody's tokenizer.

    Returns:
        Its number of parameters.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    config = LlamaConfig(
        vocab_size=max(shape.vocabulary_size, len(tokenizer)),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads // 4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


class Sampler:
    """The highest memory of this process while the block runs, in MiB."""

    def __init__(self) -> None:
        self.peak = {"rss": 0.0, "uss": 0.0, "anon": 0.0}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for name, value in memory().items():
                self.peak[name] = max(self.peak[name], value)
            if self._done.wait(0.05):
                return


def memory() -> dict[str, float]:
    """RSS, USS and anonymous memory of this process in MiB."""
    import psutil

    full = psutil.Process().memory_full_info()
    status = Path("/proc/self/status").read_text()
    anon = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {"rss": full.rss / MIB, "uss": full.uss / MIB, "anon": int(anon.split()[1]) / 1024}


def work(model_dir: Path, way: str, num_workers: int) -> dict[str, Any]:
    """What one process does; its rank and the others' address stand in the environment."""
    import numpy as np
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401  (part of `imports`)

    from rc_ray import zero
    from rc_ray.core.domains import Domain
    from rc_ray.core.loading import load_language_model
    from rc_ray.engines import build_learner
    from rc_ray.training_config import DeepSpeedConfig, TrainingConfig

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    zero.load_deepspeed(use_gpu=False)
    titles = tuple(f"Title {number}" for number in range(40))
    domain = Domain(
        name="titles",
        item_ids=titles,
        titles=titles,
        num_train=np.full(len(titles), 5),
        cold=np.zeros(len(titles), dtype=bool),
        train=tuple((start, start + 1, start + 2) for start in range(30)),
    )
    config = TrainingConfig.model_validate(
        {"batch_size": num_workers, "num_steps": 1, "max_titles": 3, "lora": {"rank": 8}}
    )
    settings = DeepSpeedConfig(zero_stage=1 if way == "zero1" else 3)
    before = memory()
    with Sampler() as sampler:
        with zero.sharded_loading(
            settings if way == "zero3-sharded" else None,
            config,
            dtype=torch.bfloat16,
            world_size=num_workers,
            use_gpu=False,
        ):
            lm = load_language_model(model_dir, torch.bfloat16)
        learner = build_learner(
            lm,
            [domain],
            config,
            seed=1,
            num_listed=3,
            base_name="random",
            deepspeed=settings,
            rank=int(os.environ["RANK"]),
            world_size=num_workers,
        )
        ready = memory()
        losses = [metrics["loss"] for metrics in learner.steps()]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"imports": before, "ready": ready, "peak": sampler.peak, "loss": losses[0]}


def measure(model_dir: Path, way: str, num_workers: int) -> list[dict[str, Any]]:
    """What every worker found, in the order of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(num_workers):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(num_workers),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(num_workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            target = Path(folder) / f"{rank}.json"
            command = [sys.executable, __file__, "--model", str(model_dir), "--work", way]
            command += ["--workers", str(num_workers), "--result", str(target)]
            with (Path(folder) / f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        for rank, process in enumerate(processes):
            if process.wait() != 0:
                for other in processes:
                    other.kill()
                sys.exit((Path(folder) / f"{rank}.log").read_text()[-3000:])
        return [
            json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_workers)
        ]


def table(rows: Sequence[tuple[str, int, Sequence[dict[str, Any]]]]) -> str:
    """One line per way and number of workers, MiB."""
    lines = [
        "| loading | workers | imports | ready (anon) | peak RSS | peak USS | peak anon | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, num_workers, found in rows:
        most = [
            max(one["imports"]["anon"] for one in found),
            max(one["ready"]["anon"] for one in found),
            *(max(one["peak"][name] for one in found) for name in ("rss", "uss", "anon")),
        ]
        cells = " | ".join(f"{value:,.0f}" for value in most)
        loss = sum(one["loss"] for one in found)
        lines.append(f"| {way} | {num_workers} | {cells} | {loss:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: the embedded model's")
    parser.add_argument(
        "--model", type=Path, help="folder of a model to take instead of making one"
    )
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        found = work(options.model, options.work, options.workers[0])
        options.result.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        model_dir = options.model or Path(folder)
        if options.model is None:
            from rc_ray.assets import model_dir as embedded

            tokenizer_dir = options.tokenizer or embedded("smollm2-135m-instruct")
            num = make_model(model_dir, SHAPES[options.shape], tokenizer_dir)
            print(f"{num / 1e6:,.0f} million parameters, {2 * num / MIB:,.0f} MiB in bf16\n")
        rows = [
            (way, num_workers, measure(model_dir, way, num_workers))
            for num_workers in options.workers
            for way in options.ways
        ]
    print(table(rows))


if __name__ == "__main__":
    main()
