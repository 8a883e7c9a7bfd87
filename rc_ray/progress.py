"""What a person sees while a stage runs: live bars on a terminal, a line now and then elsewhere.

The console writes to a duplicate of the file descriptor that stdout had when it was made, so a
session may send descriptors 1 and 2 to a log file without silencing it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from rc_ray.errors import printable

_MIN_ELAPSED_S = 0.05


class JsonlTail:
    """Reads what was appended to a JSON-lines file since the last look.

    The file need not exist yet; a last line without its newline is left for the next look, and a
    file that shrank is read from its start again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Rows completed since the last call, oldest first; what is no JSON object is left out."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = []
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a crash can leave half a line in the middle of the file
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows


@contextmanager
def polled(look: Callable[[], None], *, every_s: float = 0.5) -> Iterator[None]:
    """Call `look` from a thread while the block runs, and once more after it."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


class TaskHandle:
    """One bar; `update` may be called as often as one likes."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._description = description
        self._total = total
        self._start = time.monotonic()
        self._start_completed: int | None = None
        self._last_line = self._start
        self._finished = False
        bars = progress._bars_or_none()
        self._id = (
            bars.add_task(escape(description), total=total, details="")
            if bars is not None
            else None
        )

    def update(self, completed: int, **fields: float | str) -> None:
        """Show that `completed` of the total is done.

        Args:
            completed: absolute, not a difference.
            fields: shown beside the bar, e.g. `loss=3.2`; floats with 4 digits.
        """
        if self._finished:
            return
        if self._start_completed is None:
            # Work that was resumed, or done before the first look, says nothing about the speed.
            self._start_completed = completed if completed < self._total else 0
        elapsed = time.monotonic() - self._start
        # Of work whose first look is its last, the time of the look says nothing about the speed.
        rate = (completed - self._start_completed) / elapsed if elapsed > _MIN_ELAPSED_S else 0.0
        parts = [f"{key} {_number(value)}" for key, value in fields.items()]
        if rate > 0:
            parts.insert(0, _rate(rate))
        details = "  ".join(parts)
        self._finished = completed >= self._total
        bars = self._progress._bars_or_none()
        if bars is not None and self._id is not None:
            bars.update(self._id, completed=completed, details=escape(details))
            return
        now = time.monotonic()
        if self._finished or now - self._last_line >= self._progress.interval_s:
            self._last_line = now
            left = ""
            if rate > 0 and not self._finished:
                left = f"  {duration((self._total - completed) / rate)} left"
            self._progress._line(
                f"  {self._description}  {completed}/{self._total}  {details}{left}".rstrip()
            )


class Progress:
    """The one console of a command; a context manager that restores the terminal.

    Args:
        stream: where to write; None duplicates the present stdout.
        interval_s: seconds between the lines of one task when the stream is no terminal.
    """

    def __init__(self, *, stream: TextIO | None = None, interval_s: float = 10.0) -> None:
        self.interval_s = interval_s
        self._owned: TextIO | None = None
        if stream is None:
            stream = self._owned = _duplicate_stdout()
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def stage(self, title: str) -> None:
        """Begin a stage: ends the bars of the one before and prints a heading."""
        self._stop_bars()
        self._console.print(f"[bold]{escape(title)}[/bold]")

    def task(self, description: str, total: int) -> TaskHandle:
        """Begin a piece of work of `total` steps."""
        return TaskHandle(self, description, total)

    def note(self, text: str) -> None:
        """Print a line, above the bars where there are any."""
        self._line(f"  {text}")

    @contextmanager
    def live(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        """Keep on a terminal, below the lines, what `render` gives; nothing elsewhere."""
        if not self.is_terminal:
            yield
            return
        self._stop_bars()
        with Live(
            get_renderable=render,
            console=self._console,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield

    def close(self) -> None:
        """Leave the terminal as it was; the console must not be used afterwards."""
        self._stop_bars()
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _line(self, text: str) -> None:
        self._console.print(escape(printable(text)))

    def _bars_or_none(self) -> Bars | None:
        """The live display, started at its first use; None when the stream is no terminal."""
        if not self._console.is_terminal:
            return None
        if self._bars is None:
            self._bars = Bars(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[details]}"),
                console=self._console,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.start()
        return self._bars

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _duplicate_stdout() -> TextIO | None:
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError, io.UnsupportedOperation):
        return None  # stdout is no file (a test, a notebook): nothing can redirect it either
    sys.stdout.flush()
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", buffering=1)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rate(per_second: float) -> str:
    if per_second >= 1:
        return f"{per_second:,.1f}/s"
    return f"{60 * per_second:.1f}/min"


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
