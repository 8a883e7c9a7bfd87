"""A stage of a run folder has one driver at a time; the system lets go of a dead one's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rc_ray.run_lock import RunInUse, only_driver

HOLD = """
import sys, time
from pathlib import Path
from rc_ray.run_lock import only_driver
with only_driver(Path(sys.argv[1]), ["train", "tune"]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_driver_is_told_who_is_at_work(tmp_path: Path, holder) -> None:
    with pytest.raises(RunInUse, match=rf"`tune` in .* process {holder.pid} on \S+ since 20"):
        with only_driver(tmp_path, ["prepare", "tune"]):
            pass
    with only_driver(tmp_path, ["prepare", "evaluate"]):  # nobody else's, the first not kept
        pass
    assert holder.poll() is None


def test_a_killed_driver_holds_nothing(tmp_path: Path, holder) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with only_driver(tmp_path, ["train", "tune"]):
        told = (tmp_path / ".locks" / "tune").read_text()
    assert told.startswith(f"process {os.getpid()} on ")
    assert told.count("\n") == 1
