"""One driver for each stage of a run folder: two would write into each other's unfinished work."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rc_ray.errors import UserError


class RunInUse(UserError):
    """Another driver works on a stage of this run folder."""


@contextmanager
def only_driver(run_dir: Path, stages: Sequence[str]) -> Iterator[None]:
    """Hold stages of a run folder while the block runs.

    The system lets go of them when the process ends, however it ends. A file system that cannot
    lock files is used without.

    Args:
        run_dir: the run folder; it is made where it is missing.
        stages: names of stages.

    Raises:
        RunInUse: names the stage, and the process, machine and time of who holds it.
        UserError: the run folder cannot be made.
    """
    folder = run_dir / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; `output_dir` names the folder "
            "of run folders"
        ) from None
    with ExitStack() as held:
        for stage in stages:
            # Not emptied at opening: what it says is the other driver's, if that one holds it.
            file = held.enter_context((folder / stage).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunInUse(
                    f"`{stage}` in {run_dir} is being run by {holder}; wait until it ends, stop "
                    "it, or give this run another `name`"
                ) from None
            except OSError:
                continue
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
        yield
