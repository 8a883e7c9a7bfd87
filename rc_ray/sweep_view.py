"""What a person sees of a sweep: a live table on a terminal, a line now and then elsewhere.

Everything is read from the trials' folders, so it does not matter on which node a trial runs or
which driver began it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rc_ray import artifacts
from rc_ray.artifacts import MANIFEST
from rc_ray.progress import JsonlTail, Progress, duration, polled
from rc_ray.session import resources_text
from rc_ray.sweep_plan import ERROR, STOPPED, is_finished, read_orders

if TYPE_CHECKING:
    from rc_ray.sweep import Request

State = Literal["waiting", "running", "done", "stopped", "failed"]
STATES: tuple[State, ...] = ("done", "running", "waiting", "stopped", "failed")
_MAX_ROWS = 16
_FIRST_NOTE_S = 20.0
"""Seconds without a running trial before a person is told."""
_LINES_FOR = 8
"""Off a terminal, sweeps of more trials than this get a line of counts, not one per trial."""


@dataclass
class Row:
    """What is known of one trial."""

    domain: str
    label: str
    num_steps: int
    folder: Path
    order: dict[str, Any]
    tail: JsonlTail
    first_mtime: int | None
    """Of its loss curve when the sweep began; its process touches the file when it starts."""
    state: State = "waiting"
    step: int = 0
    loss: float | None = None
    best: str = ""
    first: tuple[float, int] | None = None
    """When the first step of this session was seen, and how many were done."""
    last_line: float = field(default_factory=time.monotonic)

    def seconds_left(self, now: float) -> float | None:
        if self.state != "running" or self.first is None or self.step <= self.first[1]:
            return None
        return (now - self.first[0]) / (self.step - self.first[1]) * (self.num_steps - self.step)


class SweepView:
    """Watches the trials of one sweep.

    Args:
        console: where to show.
        orders: the folder with the orders; those that come later join.
        folders: of the trials that are left at the start.
        num_trials: how many there will be.
        request: what each of a trial's processes asks for.
        free: says what the cluster has free.
        fields: that say what a trial asks for.
    """

    def __init__(
        self,
        console: Progress,
        orders: Path,
        folders: Sequence[Path],
        num_trials: int,
        request: Request,
        free: Callable[[], dict[str, float]] | None = None,
        fields: str = (
            "`tune.cpus_per_trial`, `tune.gpus_per_trial` or `tune.memory_per_trial_gb`"
        ),
    ) -> None:
        self._console = console
        self._orders = orders
        self._num_trials = num_trials
        self._request = request
        self._free = free or _free_resources
        self._fields = fields
        left = set(folders)
        found = read_orders(orders)
        self._known = {path for path, _ in found}
        self.rows = [self._row(order) for _, order in found if Path(order["folder"]) in left]
        self._idle_since = time.monotonic()
        self._next_note_s = _FIRST_NOTE_S
        self._last_line = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the sweep while the block runs."""
        with self._console.live(self.render), polled(self.look):
            yield

    def look(self) -> None:
        """Read what the trials have written since the last call."""
        now = time.monotonic()
        if len(self.rows) < self._num_trials:
            self._join()
        for row in self.rows:
            if row.state in ("waiting", "running"):
                self._look_at(row, now)
        self._tell_if_idle(now)
        if not self._console.is_terminal and now - self._last_line >= self._console.interval_s:
            self._last_line = now
            if self._num_trials > _LINES_FOR:
                self._console.note(self.counts())

    def counts(self) -> str:
        """`done 37, running 4, waiting 59, failed 1`."""
        num = dict.fromkeys(STATES, 0)
        for row in self.rows:
            num[row.state] += 1
        num["waiting"] += max(0, self._num_trials - len(self.rows))
        shown = [state for state in STATES if num[state] or state in STATES[:3]]
        text = ", ".join(f"{state} {num[state]}" for state in shown)
        left = self._seconds_left()
        return text + (f"; about {duration(left)} left" if left else "")

    def render(self) -> Group:
        """The table of the running trials, or of all where they are few, and the counts."""
        now = time.monotonic()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("  domain")
        table.add_column("trial")
        for name in ("step", "loss", "best validation", "left"):
            table.add_column(name, justify="right")
        rows = self.rows
        if len(rows) > _MAX_ROWS:
            rows = [row for row in rows if row.state == "running"][:_MAX_ROWS]
        for row in rows:
            left = row.seconds_left(now)
            table.add_row(
                "  " + escape(row.domain),
                escape(row.label),
                f"{row.step}/{row.num_steps}",
                "" if row.loss is None else f"{row.loss:.4g}",
                row.best,
                row.state if row.state != "running" else "" if left is None else duration(left),
            )
        return Group(table, Text("  " + self.counts()))

    def _row(self, order: dict[str, Any]) -> Row:
        folder = Path(order["folder"])
        path = folder / "metrics.jsonl"
        return Row(
            domain=order["domain"],
            label=order["label"],
            num_steps=order["setting"]["num_steps"],
            folder=folder,
            order=order,
            tail=JsonlTail(path),
            first_mtime=_mtime(path),
        )

    def _join(self) -> None:
        for path in self._orders.glob("*.json"):
            if path not in self._known:
                self._known.add(path)
                self.rows.append(self._row(artifacts.read_json(path)))

    def _look_at(self, row: Row, now: float) -> None:
        path = row.folder / "metrics.jsonl"
        if row.state == "waiting":
            if _mtime(path) in (None, row.first_mtime):
                return
            row.state = "running"
        steps = [one for one in row.tail.read_new() if "step" in one]
        for one in steps:
            if one.get("valid_loss") is not None:
                best = min(one["valid_loss"], float(row.best or "inf"))
                row.best = f"{best:.4g}"
        if steps:
            last = steps[-1]
            row.step, row.num_steps = last["step"] + 1, last.get("num_steps", row.num_steps)
            row.loss = last["loss"] if "loss" in last else last["objective"]  # of a merge
            row.first = row.first or (now, row.step)
        if (row.folder / ERROR).exists():
            row.state = "failed"
        elif (row.folder / STOPPED).exists():
            row.state = "stopped"
        elif is_finished(row.order):
            row.state = "done"
            metrics = artifacts.read_json(row.folder / MANIFEST)["metrics"]
            ndcg, objective = metrics["valid_ndcg"], metrics.get("final_objective")
            row.best = "" if objective is None else f"objective {objective:.4g}"
            row.best = row.best if ndcg is None else f"NDCG {ndcg:.3f}"
        self._tell(row, now)

    def _tell(self, row: Row, now: float) -> None:
        if self._console.is_terminal:
            return
        ended = row.state != "running"
        due = now - row.last_line >= self._console.interval_s
        if not ended and (not due or self._num_trials > _LINES_FOR):
            return
        row.last_line = now
        left = row.seconds_left(now)
        parts = [
            f"{row.domain} {row.label}".strip(),
            f"{row.step}/{row.num_steps}",
            "" if row.loss is None else f"loss {row.loss:.4g}",
            row.best and f"best {row.best}",
            row.state if ended else "" if left is None else f"{duration(left)} left",
        ]
        self._console.note("  ".join(part for part in parts if part))

    def _tell_if_idle(self, now: float) -> None:
        """Say why nothing runs, instead of waiting in silence; ever more rarely."""
        runs = [self._runs(row) for row in self.rows if row.state in ("waiting", "running")]
        waits = not all(runs) or len(self.rows) < self._num_trials
        if any(runs) or not waits:
            self._idle_since, self._next_note_s = now, _FIRST_NOTE_S
            return
        waited = now - self._idle_since
        if waited < self._next_note_s:
            return
        self._next_note_s = 3.0 * waited
        request, free = self._request, self._free()
        asked = resources_text(request.cpus, request.gpus, request.memory)
        there = (
            f"{free.get('CPU', 0.0):g} CPU, {free.get('GPU', 0.0):g} GPU, "
            f"{free.get('memory', 0.0) / 1e9:.1f} GB"
        )
        times = f"{request.num_workers} x " if request.num_workers > 1 else ""
        self._console.note(
            f"no trial has started for {waited:.0f} s: each asks for {times}({asked}), all nodes "
            f"together have {there} free; a worker may still be loading, another job may hold "
            "them, or a node is gone. It starts by itself when there is room; or stop it, lower "
            + ("`tune.num_workers`, " if request.num_workers > 1 else "")
            + f"{self._fields}, and start it again"
        )

    def _runs(self, row: Row) -> bool:
        """Whether a trial has what it asks for; on several workers its first step shows that."""
        if row.state != "running" or self._request.num_workers == 1:
            return row.state == "running"
        return row.first is not None and (row.step > row.first[1] or row.step == row.num_steps)

    def _seconds_left(self) -> float | None:
        """From the steps of this session; None before there are any."""
        now = time.monotonic()
        begun = [row for row in self.rows if row.first is not None]
        done = sum(row.step - row.first[1] for row in begun if row.first is not None)
        if not done or not self.rows:
            return None
        start = min(row.first[0] for row in begun if row.first is not None)
        open_rows = [row for row in self.rows if row.state in ("waiting", "running")]
        left = float(sum(row.num_steps - row.step for row in open_rows))
        mean_steps = sum(row.num_steps for row in self.rows) / len(self.rows)
        left += (self._num_trials - len(self.rows)) * mean_steps
        return left * (now - start) / done if left else None


def _mtime(path: Path) -> int | None:
    """Nanoseconds; None where there is no file. A trial that starts anew removes its curve."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _free_resources() -> dict[str, float]:
    import ray

    free: dict[str, float] = ray.available_resources()
    return free
