"""Ray Tune's trainable: what a worker process does with a trial's order.

The driver imports this module, the worker alone the rest: PyTorch and transformers take seconds to
import, and the driver needs neither.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rc_ray.artifacts import MANIFEST, read_json, write_json
from rc_ray.errors import UserError
from rc_ray.freed_memory import give_memory_back
from rc_ray.sweep_plan import ERROR, STOPPED, is_finished, was_stopped


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial; never raises, so that only a dead process is tried again.

    What went wrong stands in `error.json` of the trial's folder.

    Args:
        config: `trial` is the path of the trial's order, see `rc_ray.sweep_plan`.
    """

    def train(trial: dict[str, Any], report: Callable[[int, float], None]) -> dict[str, Any]:
        if trial["num_workers"] > 1:
            from rc_ray.trial_workers import train_on_workers

            return train_on_workers(trial)
        from rc_ray.trial import train_ingredient

        return train_ingredient(trial, report if trial["scheduler"] is not None else None)

    _run(config, train)


def run_merge_trial(config: dict[str, Any]) -> None:
    """Run one trial of a search over merge settings; like `run_trial` it never raises.

    Args:
        config: `trial` is the path of the trial's order, see `rc_ray.merge_plan`.
    """

    def mix(trial: dict[str, Any], report: Callable[[int, float], None]) -> dict[str, Any]:
        from rc_ray.merge_trial import mix_cocktail

        return mix_cocktail(trial)

    _run(config, mix)


def _run(
    config: dict[str, Any],
    work: Callable[[dict[str, Any], Callable[[int, float], None]], dict[str, Any]],
) -> None:
    """Run a trial unless it has ended; `work` seals its folder and returns its metrics."""
    from ray import tune

    trial = read_json(Path(config["trial"]))
    folder = Path(trial["folder"])
    # It may have ended since a driver that was killed had last written Tune's books.
    if is_finished(trial):
        tune.report({"failed": False, **read_json(folder / MANIFEST)["metrics"]})
        return
    if was_stopped(folder, trial["scheduler"]):
        tune.report({"failed": False})
        return
    begin(folder)

    def report(num_steps: int, valid_loss: float) -> None:
        tune.report({"num_steps_done": num_steps, "valid_loss": valid_loss})

    try:
        metrics = work(trial, report)
    except Exception as error:
        fail(folder, error, mend=trial.get("mend"))
        give_memory_back()
        tune.report({"failed": True})
        return
    give_memory_back()
    tune.report({"failed": False, **metrics})


def run_group(config: dict[str, Any]) -> None:
    """Run several trials together; like `run_trial` it never raises.

    Args:
        config: `trial` is the path of the group's order, see `rc_ray.sweep_plan`.
    """
    from ray import tune

    orders = [read_json(Path(path)) for path in read_json(Path(config["trial"]))["orders"]]
    for order in orders:
        begin(Path(order["folder"]))
    from rc_ray.together import train_group

    failed = train_group(orders)
    give_memory_back()
    tune.report({"failed": bool(failed), "num_failed": len(failed)})


def begin(folder: Path) -> None:
    """Show that a trial has a process, and forget how it ended before."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ERROR, STOPPED):
        (folder / name).unlink(missing_ok=True)
    (folder / "metrics.jsonl").touch()  # last: who sees this reads the others


def fail(folder: Path, error: Exception, *, mend: str | None = None) -> None:
    """Write down why a trial failed, and drop what it may have spoilt."""
    from rc_ray.trial import forget_base

    forget_base()
    write_error(folder, error, mend=mend)


def write_error(
    folder: Path, error: Exception, *, num_together: int = 1, mend: str | None = None
) -> None:
    """Write down in one line why a trial failed; the trace goes into the worker's log.

    Args:
        folder: the trial's.
        error: what was raised.
        num_together: domains that trained in the process.
        mend: what makes a trial smaller; None, what makes a training smaller.
    """
    traceback.print_exception(error)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_out_of_memory(error):
        text = f"out of memory; {mend or mend_memory(num_together)} ({text})"
    elif not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}"
    write_json(folder / ERROR, {"error": text})


def mend_memory(num_together: int) -> str:
    """Which fields make a trial smaller."""
    fields = "set `tune.micro_batch_size` or `tune.activation_checkpointing`"
    if num_together > 1:
        fields = f"lower `tune.tokens_per_pass` or `tune.domains_per_trial`, or {fields}"
    return fields


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's own class is for GPUs; its allocator of main memory raises a RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
