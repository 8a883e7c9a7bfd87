"""Ray -> one cocktail per domain: spirit and ingredient mixed by the weights that entropy chose.

Domains are mixed in parallel, one Ray task each (rc_ray/mixing.py); a finished domain stands, also
when another one fails. Ray is imported inside the functions, after the session has set it up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, UserError
from rc_ray.progress import JsonlTail, Progress, TaskHandle, polled
from rc_ray.session import require_resources


class CocktailsFailed(UserError):
    """Some domains got no cocktail; the others are finished."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Mix the cocktail of every ingredient domain.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        force: mix anew although finished cocktails are there.
        console: shows progress.

    Returns:
        The folder with one folder per domain: the cocktail as a PEFT LoRA, its weights, the
        entropy curve, the fold check, and `uniform/`, the equal mix.

    Raises:
        ConfigError: the cluster has no room for a single task.
        CocktailsFailed: names the domains without a cocktail and why.
    """
    folder = RunFolder(experiment.run_dir.absolute())
    console.stage("merge: the cocktails")
    failed: dict[str, str] = {}
    orders = []
    for domain in experiment.data.ingredients:
        try:
            order = make_order(experiment, folder, domain)
        except ArtifactError as error:
            failed[domain] = str(error)
            continue
        if not force and artifacts.is_finished(Path(order["target"]), order["fingerprint"]):
            console.note(f"{order['target']} is up to date")
            continue
        orders.append(order)
    if orders:
        failed |= _mix_all(experiment, orders, console)
    if failed:
        raise CocktailsFailed(
            "\n".join(f"merge: no cocktail for {name}: {why}" for name, why in failed.items())
        )
    return folder.root / "cocktails"


def make_order(experiment: Experiment, folder: RunFolder, domain: str) -> dict[str, Any]:
    """What the task of one domain needs to know; all JSON-able.

    Raises:
        ArtifactError: the domain, the spirit or the ingredient is not there yet.
    """
    merge = experiment.merge
    recipe = recipes.cocktail(experiment, domain)
    config, inputs = recipe.config, recipe.inputs(folder)
    return {
        "domain": domain,
        "domain_dir": str(folder.domain_dir(domain)),
        "spirit_dir": str(folder.spirit_dir),
        "ingredient_dir": str(folder.ingredient_dir(domain)),
        "target": str(folder.cocktail_dir(domain)),
        "curve_path": str(folder.root / "cocktails" / f".{domain}.entropy.jsonl"),
        "seed": experiment.seed,
        "num_cpus": merge.cpus_per_task,
        "use_gpu": merge.gpus_per_task > 0,
        "tokens_per_batch": experiment.evaluate.tokens_per_batch,
        "micro_batch_size": merge.micro_batch_size,
        "config": config,
        "inputs": inputs,
        "fingerprint": artifacts.fingerprint(config=config, seed=experiment.seed, inputs=inputs),
    }


def _mix_all(
    experiment: Experiment, orders: list[dict[str, Any]], console: Progress
) -> dict[str, str]:
    """Run the tasks; domain -> what went wrong."""
    import ray

    from rc_ray.assets import model_dir
    from rc_ray.mixing import mix_domain

    merge = experiment.merge
    require_resources(
        "`merge.cpus_per_task` and `merge.gpus_per_task`",
        cpus=merge.cpus_per_task,
        gpus=merge.gpus_per_task,
    )
    model = str(model_dir(experiment.model.path, console.note))
    task = ray.remote(mix_domain).options(
        num_cpus=merge.cpus_per_task, num_gpus=merge.gpus_per_task, max_retries=2
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
            console.note(
                f"{order['domain']}: entropy {result['first_entropy']:.3f} -> "
                f"{result['last_entropy']:.3f} nats, mean weight of the ingredient "
                f"{result['mean_ingredient_weight']:.2f}"
            )
    return failed


def _look(orders: list[dict[str, Any]], console: Progress) -> Any:
    """A function that shows what the tasks have written since its last call."""
    tails = {order["domain"]: JsonlTail(Path(order["curve_path"])) for order in orders}
    handles: dict[str, TaskHandle] = {}

    def look() -> None:
        for domain, tail in tails.items():
            rows = tail.read_new()
            if not rows:
                continue
            if domain not in handles:
                handles[domain] = console.task(domain, rows[-1]["num_steps"])
            handles[domain].update(rows[-1]["step"] + 1, entropy=rows[-1]["entropy"])

    return look
