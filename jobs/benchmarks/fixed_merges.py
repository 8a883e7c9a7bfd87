r"""Merging LoRAs by formula: ours beside PEFT's and mergekit's, on the same random adapters.

    python jobs/benchmarks/fixed_merges.py
    python jobs/benchmarks/fixed_merges.py --shape qwen2-7b-attention

Two adapters of rank 16 with scales 2 and 1, weights 1/2 each, density 1/2. `smollm2-135m` has the
linear layers of `--layers` decoder layers of that model, `qwen2-7b-attention` the four of one layer
of a 7B model's attention. (PEFT takes the full SVD of each update, which for that model's 18,944
by 3,584 matrices takes minutes and gigabytes each; they are left out.) No LLM is loaded.

For each result the formula in float64 on dense updates, written here, is what all are held against:

linear             sum of the updates by weight. Ours and PEFT's `cat` keep it as a LoRA of rank 32,
                   mergekit's `linear` gives dense matrices
linear-16          the same as a LoRA of rank 16: ours by QR and a small SVD, PEFT's `svd`
ties, dare_linear, as a LoRA of rank 32, the nearest one: ours, PEFT's `..._svd`. Their updates have
dare_ties          full rank, so that `difference` is what the rank loses
ties-dense, ...    the same before that: ours, mergekit's (which gives no LoRA)
peft_linear        PEFT's formula: the A's and the B's apart
knots              ours alone; neither library has it

PEFT's calls without `_svd` act on A and B apart. They are listed under the result whose name they
bear, and `difference` says how far they are from it. DARE drops at random, and no two programs
draw the same: its `difference` is from the same result without dropping and says how much the
dropping changes. PEFT's weights of TIES are 1: it divides by the number of adapters that agree,
ours and mergekit by the sum of their weights (`dare_ties` of mergekit if told to: `normalize`).

Each row is a process of its own, one after another. `s` is the processor's seconds of the merge
alone over `--threads`, the fastest of three turns (of fewer, once 10 s are over); `MB` what the
process held at its highest more than before the merge, adapters not counted. mergekit gets the
updates as dense matrices over a base of zeros, made within its time, for it takes no LoRA. It needs
an environment in which it is installed besides the project (0.1.5 goes with the pinned versions);
without it its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.merging import fixed_weights, merge_fixed
from rc_ray.core.sparsified import sparsified_updates
from rc_ray.mix_config import FixedMix

SEED, RANK, DENSITY = 7, 16, 0.5
SCALES = (2.0, 1.0)
WEIGHTS = (0.5, 0.5)
ENOUGH_S = 10.0

Updates = Mapping[str, Tensor]
Merge = Callable[[], Callable[[], Iterator[tuple[str, Tensor]]]]
"""Merges, and gives what makes the dense updates for the comparison."""


@dataclass(frozen=True)
class Contestant:
    result: str
    who: str
    call: str


CONTESTANTS = (
    Contestant("linear", "ours", "linear"),
    Contestant("linear", "peft", "cat"),
    Contestant("linear", "mergekit", "linear"),
    Contestant("linear", "peft", "linear"),
    Contestant("linear-16", "ours", "linear"),
    Contestant("linear-16", "peft", "svd"),
    Contestant("ties", "ours", "ties"),
    Contestant("ties", "peft", "ties_svd"),
    Contestant("ties", "peft", "ties"),
    Contestant("ties-dense", "ours", "ties"),
    Contestant("ties-dense", "mergekit", "ties"),
    Contestant("dare_linear", "ours", "dare_linear"),
    Contestant("dare_linear", "peft", "dare_linear_svd"),
    Contestant("dare_linear", "peft", "dare_linear"),
    Contestant("dare_linear-dense", "ours", "dare_linear"),
    Contestant("dare_linear-dense", "mergekit", "dare_linear"),
    Contestant("dare_ties", "ours", "dare_ties"),
    Contestant("dare_ties", "peft", "dare_ties_svd"),
    Contestant("dare_ties", "peft", "dare_ties"),
    Contestant("dare_ties-dense", "ours", "dare_ties"),
    Contestant("dare_ties-dense", "mergekit", "dare_ties"),
    Contestant("peft_linear", "ours", "peft_linear"),
    Contestant("peft_linear", "peft", "linear"),
    Contestant("knots", "ours", "knots"),
)


def layer_shapes(name: str, num_layers: int) -> dict[str, tuple[int, int]]:
    """Layer name -> (out, in)."""
    if name == "tiny":
        return {"q_proj": (24, 32), "down_proj": (32, 48)}
    if name == "qwen2-7b-attention":
        return {f"{one}_proj": (512 if one in "kv" else 3584, 3584) for one in "qkvo"}
    own = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    own |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    return {
        f"layer_{layer}_{one}_proj": shape
        for layer in range(num_layers)
        for one, shape in own.items()
    }


def random_adapters(shapes: Mapping[str, tuple[int, int]], rank: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        Adapter(
            {
                name: LoraPair(
                    a=torch.randn(rank, fan_in, generator=generator),
                    b=torch.randn(out, rank, generator=generator) / rank,
                    scale=scale,
                )
                for name, (out, fan_in) in shapes.items()
            }
        )
        for scale in SCALES
    ]


def formula(result: str, adapters: Sequence[Adapter], name: str) -> Tensor | None:
    """The dense update of one layer in float64; None where no formula is compared."""
    pairs = [adapter.modules[name] for adapter in adapters]
    if result == "knots":
        return None
    if result == "peft_linear":
        roots = [(w * pair.scale) ** 0.5 for w, pair in zip(WEIGHTS, pairs, strict=True)]
        a = torch.stack([r * pair.a.double() for r, pair in zip(roots, pairs, strict=True)])
        b = torch.stack([r * pair.b.double() for r, pair in zip(roots, pairs, strict=True)])
        return b.sum(dim=0) @ a.sum(dim=0)
    deltas = torch.stack([pair.scale * (pair.b.double() @ pair.a.double()) for pair in pairs])
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    if result.startswith(("linear", "dare_linear")):
        return (weights * deltas).sum(dim=0)
    if result.startswith("ties"):
        for delta in deltas:
            sizes = delta.abs().flatten()
            smallest = sizes.argsort()[: sizes.numel() - int(DENSITY * sizes.numel())]
            delta.view(-1)[smallest] = 0.0
    agree = (deltas.sign() == (weights * deltas).sum(dim=0).sign()) & (deltas != 0)
    return (weights * deltas * agree).sum(dim=0) / (weights * agree).sum(dim=0).clamp(min=1e-12)


def merge_with_ours(result: str, method: str, adapters: Sequence[Adapter], rank: int) -> Merge:
    config = FixedMix.model_validate({"method": method, "weights": WEIGHTS, "density": DENSITY})
    if result.endswith("-dense"):

        def dense() -> Callable[[], Iterator[tuple[str, Tensor]]]:
            weights = fixed_weights(config, len(adapters))
            found = dict(sparsified_updates(adapters, weights, config, SEED))
            return lambda: iter(found.items())

        return dense

    def merge() -> Callable[[], Iterator[tuple[str, Tensor]]]:
        lora = merge_fixed(adapters, config, SEED, rank if result == "linear-16" else None)
        return lambda: (
            (name, pair.scale * (pair.b.double() @ pair.a.double()))
            for name, pair in lora.modules.items()
        )

    return merge


def merge_with_peft(result: str, call: str, adapters: Sequence[Adapter], rank: int) -> Merge:
    from peft import LoraConfig, PeftModel, get_peft_model

    names = list(adapters[0].modules)
    base = nn.Module()
    for name, pair in adapters[0].modules.items():
        linear = nn.Linear(pair.a.shape[1], pair.b.shape[0], bias=False, device="meta")
        base.add_module(name, linear.to_empty(device="cpu").requires_grad_(False))
    model: Any = None
    for number, scale in enumerate(SCALES):
        config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=names)
        if model is None:
            model = get_peft_model(base, config, adapter_name=str(number))
        else:
            model.add_adapter(str(number), config)
    assert isinstance(model, PeftModel)
    layers = {name: dict(model.get_base_model().named_modules())[name] for name in names}
    with torch.no_grad():
        for name, layer in layers.items():
            for number, adapter in enumerate(adapters):
                layer.lora_A[str(number)].weight.copy_(adapter.modules[name].a)
                layer.lora_B[str(number)].weight.copy_(adapter.modules[name].b)
    further: dict[str, Any] = {}
    if call.endswith("svd"):
        further["svd_rank"] = rank if call == "svd" else 2 * rank
    if "ties" in call or "dare" in call:
        further["density"] = DENSITY
    weights = [1.0, 1.0] if "ties" in call else list(WEIGHTS)

    def merge() -> Callable[[], Iterator[tuple[str, Tensor]]]:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        torch.manual_seed(SEED)
        model.add_weighted_adapter(
            ["0", "1"], weights, adapter_name="merged", combination_type=call, **further
        )
        return lambda: (
            (
                name,
                layer.scaling["merged"]
                * (layer.lora_B["merged"].weight.double() @ layer.lora_A["merged"].weight.double()),
            )
            for name, layer in layers.items()
        )

    return merge


def merge_with_mergekit(call: str, adapters: Sequence[Adapter]) -> Merge:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorEntry, TensorGroup

    method = registry.get(call)
    needs_base = call != "linear"
    parameters: dict[str, Any] = {"weight": dict(zip(("0", "1"), WEIGHTS, strict=True))}
    if needs_base:
        parameters["density"] = dict.fromkeys(("0", "1"), DENSITY)
        parameters["normalize"] = call.endswith("ties")

    def merge() -> Callable[[], Iterator[tuple[str, Tensor]]]:
        torch.manual_seed(SEED)
        found = {}
        for name in adapters[0].modules:
            pairs = [adapter.modules[name] for adapter in adapters]
            deltas = [pair.scale * (pair.b @ pair.a) for pair in pairs]
            entries = [TensorEntry(str(k), delta) for k, delta in enumerate(deltas)]
            if needs_base:
                zero = torch.zeros_like(deltas[0])
                entries.append(TensorEntry("base", zero, is_base=True))
            (found[name],) = method([TensorGroup(tuple(entries))], parameters=parameters)
        return lambda: iter(found.items())

    return merge


def highest_mb() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@torch.no_grad()
def measure(order: Mapping[str, Any]) -> dict[str, float | None]:
    """One contestant's costs and its largest difference; runs in a process of its own."""
    torch.set_num_threads(order["threads"])
    result, who, call = order["contestant"]
    shapes, rank = layer_shapes(order["shape"], order["layers"]), order["rank"]
    adapters = random_adapters(shapes, rank)
    if who == "ours":
        merge = merge_with_ours(result, call, adapters, rank)
    elif who == "peft":
        merge = merge_with_peft(result, call, adapters, rank)
    else:
        merge = merge_with_mergekit(call, adapters)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    at_start = highest_mb()
    times: list[float] = []
    while len(times) < 3 and sum(times) < ENOUGH_S:
        start = time.process_time()
        updates = merge()
        times.append((time.process_time() - start) / order["threads"])
    peak = highest_mb() - at_start
    differences = []
    for name, update in updates():
        wanted = formula(result, adapters, name)
        if wanted is not None:
            differences.append(float((update.double() - wanted).norm() / wanted.norm()))
    return {
        "seconds": min(times),
        "peak_mb": peak,
        "difference": max(differences) if differences else None,
    }


def in_process(order: Mapping[str, Any]) -> dict[str, float | None]:
    command = [sys.executable, "-W", "ignore", __file__, "--work", json.dumps(order)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{order['contestant']}: the process ended with {process.returncode}")
    found: dict[str, float | None] = json.loads(process.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> dict[Contestant, dict[str, float | None]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shape",
        default="smollm2-135m",
        choices=("smollm2-135m", "qwen2-7b-attention", "tiny"),
    )
    parser.add_argument("--layers", type=int, default=6, help="of smollm2-135m, which has 30")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", nargs="+", help="some of the results alone")
    options = parser.parse_args(arguments)
    has_mergekit = importlib.util.find_spec("mergekit") is not None
    print(
        f"{options.shape}, {options.threads} thread(s)\n\n"
        f"| result | | call | s | of ours | MB | difference |\n|{'---|' * 7}"
    )
    found: dict[Contestant, dict[str, float | None]] = {}
    for one in CONTESTANTS:
        if options.results and one.result not in options.results:
            continue
        if one.who == "mergekit" and not has_mergekit:
            continue
        order = {**vars(options), "contestant": [one.result, one.who, one.call]}
        found[one] = row = in_process(order)
        ours = next(r for c, r in found.items() if (c.result, c.who) == (one.result, "ours"))
        ratio = "" if row is ours else f"{row['seconds'] / ours['seconds']:.2f}"  # type: ignore[operator]
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        print(
            f"| {one.result} | {one.who} | `{one.call}` | {row['seconds']:.3f} | {ratio} "
            f"| {row['peak_mb']:.0f} | {difference} |",
            flush=True,
        )
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
