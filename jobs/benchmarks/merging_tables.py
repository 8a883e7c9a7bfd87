"""What `merging.py` prints: costs, quality beside the reference's, goals met or missed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rc_ray.core.bootstrap import paired_bootstrap

sys.path.insert(0, str(Path(__file__).parent))
from reference_merging import Weights

GOAL_SPEED, GOAL_MEMORY, GOAL_S = 15.0, 1 / 3, 60.0


def print_costs(found: Mapping[str, Mapping[str, Any]], goal_prompts: int) -> None:
    reference = found.get("reference")
    print(
        "\n| | prompts | steps | s | clock s | s a prompt | x | tokens read a prompt | peak MB "
        f"| x | learning MB | x | s for {goal_prompts} prompts |\n|{'---|' * 13}"
    )
    for name, one in found.items():
        num = one["num_prompts"]
        each = one["seconds"] / num
        ratios = ["", "", ""]
        if reference is not None and name != "reference":
            ratios = [
                f"{reference['seconds'] / reference['num_prompts'] / each:.1f} faster",
                f"{one['peak_mb'] / reference['peak_mb']:.2f}",
                f"{one['learning_mb'] / reference['learning_mb']:.2f}",
            ]
        scaled = "" if num == goal_prompts else " (scaled)"
        print(
            f"| {name} | {num} | {one['num_steps']} | {one['seconds']:.1f} | {one['clock_s']:.1f} "
            f"| {each:.2f} | {ratios[0]} | {one['num_tokens'] / num:,.0f} | {one['peak_mb']:.0f} "
            f"| {ratios[1]} | {one['learning_mb']:.0f} | {ratios[2]} "
            f"| {each * goal_prompts:.0f}{scaled} |"
        )


def print_quality(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    weights: Mapping[str, Weights],
    seed: int,
) -> None:
    reference = values.get("reference-unpadded")
    num_users = len(next(iter(values.values()))["HR@1"])
    print(
        f"\n{num_users} test users\n\n| | HR@1 | minus the reference's | NDCG@10 | minus the "
        f"reference's | ingredient's weight, mean and deviation |\n|{'---|' * 6}"
    )
    for name, one in values.items():
        cells = []
        for metric in ("HR@1", "NDCG@10"):
            cells.append(f"{np.mean(one[metric]):.3f}")
            if reference is None or name == "reference-unpadded":
                cells.append("")
                continue
            difference, low, high, _ = paired_bootstrap(one[metric], reference[metric], 2000, seed)
            cells.append(f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows = [row[1] for row in weights[name].values()]
        print(f"| {name} | {' | '.join(cells)} | {np.mean(rows):.3f}, {np.std(rows):.3f} |")


def print_goals(
    found: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    threads: int,
) -> None:
    def verdict(met: bool) -> str:
        return "met" if met else "missed"

    print()
    for one, other in (("ours", "reference"), ("ours-same-loss", "reference-one")):
        if one not in found or other not in found:
            continue
        ours, theirs = found[one], found[other]
        each = [part["seconds"] / part["num_prompts"] for part in (ours, theirs)]
        speed = each[1] / each[0]
        print(
            f"- {one} {GOAL_SPEED:.0f} times faster than {other}: {verdict(speed >= GOAL_SPEED)}, "
            f"{speed:.1f}."
        )
        for key, what in (("peak_mb", "whole process"), ("learning_mb", "learning alone")):
            share = ours[key] / theirs[key]
            print(f"- A third of its memory, {what}: {verdict(share <= GOAL_MEMORY)}, {share:.2f}.")
    if "ours" in values and "reference-unpadded" in values:
        hits = [float(np.mean(values[name]["HR@1"])) for name in ("ours", "reference-unpadded")]
        print(
            f"- Equal or better HR@1 of ours, point estimate: {verdict(hits[0] >= hits[1])}, "
            f"{hits[0]:.3f} for {hits[1]:.3f}."
        )
    if "ours-goal" in found:
        one = found["ours-goal"]
        print(
            f"- {one['num_prompts']} prompts in under a minute on {threads} threads: "
            f"{verdict(one['clock_s'] < GOAL_S)}, {one['clock_s']:.1f} s by the clock."
        )
