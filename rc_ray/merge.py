"""Ray -> the cocktails of all domains: adapters mixed, and what was mixed beside them to compare.

Domains are mixed in parallel, one Ray task each (rc_ray/mixing.py); a finished domain stands, also
when another one fails, and so does a finished mix when another one of its domain fails. Ray is
imported inside the functions, after the session has set it up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rc_ray import artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, UserError
from rc_ray.guard import ARTICLES
from rc_ray.merge_choice import sentence, write_summary
from rc_ray.merge_plan import make_order
from rc_ray.merge_search import RESOURCE_FIELDS, search
from rc_ray.precision import mixed_precision
from rc_ray.progress import JsonlTail, Progress, TaskHandle, polled
from rc_ray.session import require_resources


class CocktailsFailed(UserError):
    """Some domains got no cocktail, or not every mix; the others are finished."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Mix the cocktail of every tested domain, and the mixes beside it.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        force: mix anew although finished cocktails are there.
        console: shows progress.

    Returns:
        The folder with one folder per domain: the cocktail as a PEFT LoRA, its weights, the
        entropy curve, the fold check, `uniform/`, the equal mix, `mixes/`, the named ones, and
        `guard.json`, what is to be served; after a search `trials.parquet`, and beside the domains
        `search.md` and `search.json`.

    Raises:
        ConfigError: the cluster has no room for a single task.
        CocktailsFailed: names the domains without a cocktail, or without a mix, and why.
    """
    folder = RunFolder(experiment.run_dir.absolute())
    console.stage("merge: the cocktails")
    failed: dict[str, str] = {}
    orders: list[dict[str, Any]] = []
    if force:
        shutil.rmtree(folder.mix_work, ignore_errors=True)
    for domain in experiment.data.tested:
        try:
            order = make_order(experiment, folder, domain)
        except ArtifactError as error:
            failed[domain] = str(error)
            continue
        if not force and _is_complete(Path(order["target"]), order["fingerprint"]):
            console.note(f"{order['target']} is up to date")
            continue
        orders.append(order)
    if not orders:
        pass
    elif experiment.merge.search is None:
        failed |= _mix_all(experiment, orders, console)
    else:
        searched = search(experiment, folder, orders, console)
        failed |= searched.failed
        if searched.orders:
            failed |= _mix_all(experiment, searched.orders, console)
        console.note(f"all trials: {write_summary(experiment, folder, failed, searched.spent)}")
    if failed:
        raise CocktailsFailed(
            "\n".join(f"merge: {_lacking(name)}: {why}" for name, why in failed.items())
        )
    return folder.root / "cocktails"


def _lacking(name: str) -> str:
    domain, _, mix = name.partition(":")
    return f"no mix {mix} for {domain}" if mix else f"no cocktail for {domain}"


def _is_complete(target: Path, fingerprint: str) -> bool:
    """Whether a domain is finished, with every mix that was asked for."""
    if not artifacts.is_finished(target, fingerprint):
        return False
    metrics = artifacts.read_json(target / artifacts.MANIFEST)["metrics"]
    return not metrics.get("failed_mixes")


def _mix_all(
    experiment: Experiment, orders: list[dict[str, Any]], console: Progress
) -> dict[str, str]:
    """Run the tasks; domain -> what went wrong."""
    import ray

    from rc_ray.assets import model_dir
    from rc_ray.mixing import mix_domain

    merge = experiment.merge
    memory = int((merge.memory_per_task_gb or 0.0) * 1e9)
    require_resources(
        RESOURCE_FIELDS,
        cpus=merge.cpus_per_task,
        gpus=merge.gpus_per_task,
        memory=memory,
    )
    model = str(model_dir(experiment.model.path, console.note))
    task = ray.remote(mix_domain).options(
        num_cpus=merge.cpus_per_task,
        num_gpus=merge.gpus_per_task,
        memory=memory or None,
        max_retries=2,
    )
    for order in orders:
        Path(order["curve_path"]).unlink(missing_ok=True)
    failed: dict[str, str] = {}
    with polled(_look(orders, console)):
        running = {task.remote({**order, "model_dir": model}): order for order in orders}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            order = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                result = {"error": f"its process died: {str(error).splitlines()[0]}"}
            if "error" in result:
                failed[order["domain"]] = result["error"]
                continue
            for line in _told(order["domain"], result):
                console.note(line)
            for name, why in result["failed_mixes"].items():
                failed[f"{order['domain']}:{name}"] = why
    return failed


def _told(domain: str, result: dict[str, Any]) -> Iterator[str]:
    """What a finished domain says on the console."""
    if "search" in result:
        yield f"{domain}: {sentence(result['search'])}"
    weights = ", ".join(f"{name} {one:.2f}" for name, one in result["mean_weights"].items())
    yield (
        f"{domain}: entropy {result['first_entropy']:.3f} -> {result['last_entropy']:.3f} nats; "
        f"mean weights: {weights}"
    )
    told = mixed_precision(f"{domain}: mixes and guard", result["dtypes"])
    if told is not None:
        yield told
    guard = result["guard"]
    yield f"{domain}: the guard serves {ARTICLES[guard['chosen']]}. {guard['why']}"
    if guard["collapse"] is not None:
        yield f"{domain}: {guard['collapse']}"


def _look(orders: list[dict[str, Any]], console: Progress) -> Any:
    """A function that shows what the tasks have written since its last call."""
    tails = {order["domain"]: JsonlTail(Path(order["curve_path"])) for order in orders}
    handles: dict[tuple[str, str], TaskHandle] = {}

    def look() -> None:
        for domain, tail in tails.items():
            latest = {row["mix"]: row for row in tail.read_new()}
            for name, row in latest.items():
                label = domain if name == "cocktail" else f"{domain}, {name}"
                if (domain, name) not in handles:
                    handles[domain, name] = console.task(label, row["num_steps"])
                handles[domain, name].update(row["step"] + 1, entropy=row["entropy"])

    return look
