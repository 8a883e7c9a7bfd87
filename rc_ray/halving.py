"""Asynchronous successive halving, each domain by itself: losses of two domains do not compare.

Ray does not save a scheduler's state. Every validation stands in its trial's folder, so a domain's
halving is built again from there whenever a sweep starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from rc_ray import artifacts
from rc_ray.curves import read_metrics
from rc_ray.sweep_plan import STOPPED, orders_of

VALID_LOSS = "valid_loss"
NUM_STEPS = "num_steps_done"


@dataclass(frozen=True)
class _Known:
    """A trial as the halving knows it, by its folder: the same one after every restart."""

    trial_id: str


class HalvingPerDomain(FIFOScheduler):  # type: ignore[misc]
    """Ray's ASHA scheduler once per domain; a stopped trial's folder says so.

    Args:
        orders: the folder with the orders of the sweep's trials.
        settings: of `AshaConfig`.
    """

    def __init__(self, orders: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self._orders = orders
        self._settings = settings
        self._of: dict[str, _Halving] = {}

    # Results that wait in a buffer would be judged late.
    _supports_buffered_results = False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Before the trial runs: its coming validations are not yet in its folder.
        self.prepare(artifacts.read_json(Path(trial.config["trial"])))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if VALID_LOSS not in result or NUM_STEPS not in result:
            return str(self.CONTINUE)
        order = artifacts.read_json(Path(trial.config["trial"]))
        decision = self.judge(order, result[NUM_STEPS], result[VALID_LOSS])
        if decision == self.STOP:
            artifacts.write_json(
                Path(order["folder"]) / STOPPED,
                {
                    "scheduler": self._settings,
                    "num_steps": result[NUM_STEPS],
                    "valid_loss": result[VALID_LOSS],
                },
            )
        return decision

    def prepare(self, order: dict[str, Any]) -> None:
        """Take in what the trials of the order's domain have validated so far, on the same data."""
        domain = order["domain"]
        if domain in self._of:
            return
        halving = self._of[domain] = _Halving(self._settings)
        seen = []
        for _, other in orders_of(self._orders, domain, order["inputs"]):
            folder = Path(other["folder"])
            rows = read_metrics(folder / "metrics.jsonl")
            if (folder / artifacts.MANIFEST).exists():
                rows = rows[:-1]  # a trial's last validation is never judged
            for row in rows:
                if row.get(VALID_LOSS) is not None and not _is_last(other, row["step"] + 1):
                    seen.append((row["step"] + 1, folder.name, row[VALID_LOSS]))
        # By step: a lower rung is filled before a higher one, as it was.
        for num_steps, name, valid_loss in sorted(seen):
            halving.judge(name, num_steps, valid_loss)

    def judge(self, order: dict[str, Any], num_steps: int, valid_loss: float) -> str:
        """CONTINUE or STOP for a trial that has just validated; one at its end just ends."""
        if _is_last(order, num_steps):
            return str(self.CONTINUE)
        self.prepare(order)
        name = Path(order["folder"]).name
        return self._of[order["domain"]].judge(name, num_steps, valid_loss)


def _is_last(order: dict[str, Any], num_steps: int) -> bool:
    return bool(num_steps >= order["setting"]["num_steps"])


class _Halving:
    """Ray's ASHA over one domain's trials."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._asha = ASHAScheduler(
            time_attr=NUM_STEPS,
            metric=VALID_LOSS,
            mode="min",
            # A trial ends by itself, so none is stopped for having come to the end.
            max_t=2**31,
            stop_last_trials=False,
            grace_period=settings["grace_period"],
            reduction_factor=settings["reduction_factor"],
        )
        self._added: set[str] = set()

    def judge(self, name: str, num_steps: int, valid_loss: float) -> str:
        trial = _Known(name)
        if name not in self._added:
            self._added.add(name)
            self._asha.on_trial_add(None, trial)
        result = {NUM_STEPS: num_steps, VALID_LOSS: valid_loss}
        return str(self._asha.on_trial_result(None, trial, result))
