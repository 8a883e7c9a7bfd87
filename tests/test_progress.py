"""The console on a terminal and off it, and the reader of half-written JSON lines."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from rc_ray import train
from rc_ray.progress import JsonlTail, Progress, polled
from tests.conftest import Screen


def test_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = JsonlTail(path)
    assert tail.read_new() == []
    path.write_text('{"step": 0}\n{"st')
    assert tail.read_new() == [{"step": 0}]
    assert tail.read_new() == []
    with path.open("a") as file:
        file.write('ep": 1}\nnot json\n[1]\n{"step": 2}\n')
    assert tail.read_new() == [{"step": 1}, {"step": 2}]


def test_tail_starts_again_when_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    tail = JsonlTail(path)
    assert len(tail.read_new()) == 2
    path.write_text('{"step": 0}\n')
    assert tail.read_new() == [{"step": 0}]


def test_lines_are_sparse_off_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, interval_s=1000.0) as console:
        console.stage("train [x]")
        task = console.task("spirit", 100)
        for step in range(1, 101):
            task.update(step, loss=2.0 / step)
        task.update(100, loss=9.0)
        console.note("done in [bold]")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "train [x]"
    assert lines[1].startswith("  spirit  100/100  ")
    assert "loss 0.02" in lines[1]
    assert lines[2] == "  done in [bold]"
    assert "\x1b" not in stream.getvalue()


def test_polled_looks_once_more_at_the_end() -> None:
    seen: list[int] = []
    with polled(lambda: seen.append(1), every_s=60):
        pass
    assert seen == [1]


PROGRAM = """
import os
from rc_ray.progress import Progress
with Progress() as console:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    task = console.task("spirit", 2)
    task.update(1, loss=1.5)
    console.note("half way")
    task.update(2, loss=0.5)
    print("swallowed")
"""


def test_a_note_steers_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as console:
        console.note("the title \x1b[2J[bold] is odd\nand\xa0\x07 two lines")
    assert stream.getvalue() == "  the title \ufffd[2J[bold] is odd\nand\xa0\ufffd two lines\n"


def test_the_console_outlives_a_redirected_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert "half way" in done.stdout
    assert "2/2" in done.stdout
    assert "swallowed" not in done.stdout + done.stderr


LIVE = """
from rich.text import Text
from rc_ray.progress import Progress
with Progress() as console:
    steps = iter(range(1000))
    with console.live(lambda: Text(f"table after {next(steps)}")):
        console.note("above the table")
    console.note("below it")
"""


def on_a_terminal(program: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return b"".join(chunks).decode()


def test_a_terminal_gets_a_live_table_and_other_streams_do_not() -> None:
    text = on_a_terminal(LIVE)
    assert text.count("table after") >= 2
    assert "above the table" in text
    assert "\x1b[?25h" in text  # the cursor is back
    done = subprocess.run(
        [sys.executable, "-c", LIVE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n") == ["  above the table", "  below it", ""]


def test_a_terminal_gets_a_live_bar() -> None:
    text = on_a_terminal(PROGRAM)
    assert "\x1b[" in text
    assert "2/2" in text
    assert "loss 0.5" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_notes_of_a_run_that_stopped_are_not_told_again(screen: Screen, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    row = {"step": 3, "loss": 1.5, "tokens_per_s": 10.0}
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"note": "old news"}, row)))
    with train._shown(path, 8, screen.console), path.open("a") as file:
        file.write(json.dumps({"note": "fresh news"}) + "\n")
    assert "fresh news" in screen.text
    assert "old news" not in screen.text
    assert "4/8" in screen.text


def test_work_that_was_over_at_the_first_look_has_no_speed() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as console:
        console.task("a mix", 2).update(2, entropy=2.1)
    assert stream.getvalue() == "  a mix  2/2  entropy 2.1\n"
