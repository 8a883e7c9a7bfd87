"""Where the checkpoints of a run lie: the newest whole one, on any file system that pyarrow knows.

What a checkpoint is made of, see `rc_ray.checkpoints`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rc_ray.checkpoints import STATE_FILE, check_files
from rc_ray.core.adapters import first_line
from rc_ray.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run."""

    name: str | None
    """None where there are only damaged ones."""
    state: Mapping[str, Any]
    """The contents of its `state.json`."""
    notes: tuple[str, ...]
    """What was passed over, and why."""

    @property
    def num_steps_done(self) -> int:
        return int(self.state["num_steps_done"])


class CheckpointStore:
    """The checkpoints of one run on any file system that pyarrow knows.

    Args:
        storage: an absolute path or a URI, e.g. `s3://bucket/folder`.
        run_name: the folder in it that holds the run's checkpoints.

    Raises:
        ConfigError: pyarrow does not know the file system.
    """

    def __init__(self, storage: str, run_name: str) -> None:
        self.filesystem, path = _open_storage(storage)
        self.path = f"{path.rstrip('/')}/{run_name}"
        self._scratch = f"rc-ray-checkpoint-{run_name}-"

    def check_writable(self) -> None:
        """Make the run's folder.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise _unusable(self.path, error) from None

    def newest(self) -> Found | None:
        """The whole checkpoint with the most steps; None where there is nothing at all."""
        notes: list[str] = []
        for num_steps, name in self._by_steps():
            try:
                return Found(name, self._state_of(name), tuple(notes))
            except ArtifactError as error:
                problem = first_line(error).replace("; run the stage again with --force", "")
            steps = f"of step {num_steps} " if num_steps >= 0 else ""
            notes.append(f"passed over a checkpoint {steps}that is not whole: {problem}")
        return Found(None, {"num_steps_done": 0}, tuple(notes)) if notes else None

    def _state_of(self, name: str) -> dict[str, Any]:
        """The contents of a checkpoint's `state.json`; ArtifactError where it is not whole."""
        try:
            with self.fetched(name) as folder:
                return check_files(folder)
        except (OSError, KeyError, AttributeError) as error:
            raise ArtifactError(first_line(error)) from None

    def _is_whole(self, name: str) -> bool:
        try:
            self._state_of(name)
        except ArtifactError:
            return False
        return True

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A local copy of a checkpoint for the length of the block."""
        from pyarrow.fs import LocalFileSystem, copy_files

        folder = self.scratch_dir()
        try:
            copy_files(
                f"{self.path}/{name}",
                str(folder),
                source_filesystem=self.filesystem,
                destination_filesystem=LocalFileSystem(),
            )
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def scratch_dir(self) -> Path:
        """A new folder for a checkpoint among this node's temporary files."""
        return Path(tempfile.mkdtemp(prefix=f"{self._scratch}{os.getpid()}-"))

    def clear_scratch(self) -> None:
        """Remove the folders of this run whose processes were killed on this node."""
        for folder in Path(tempfile.gettempdir()).glob(f"{self._scratch}*"):
            pid = folder.name.removeprefix(self._scratch).partition("-")[0]
            if pid.isdecimal() and not _is_alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)

    def forget(self, keep: int | None) -> None:
        """Remove what the run has left, or all but its newest checkpoints and every other file.

        Ray's own record of the checkpoints goes too. It is not written in one stroke, so that a
        killed driver may leave half of it, which Ray would refuse to start from.

        Args:
            keep: whole checkpoints to keep; None removes all.
        """
        from pyarrow.fs import FileSelector, FileType

        kept: set[str] = set()
        for _, name in self._by_steps():
            if len(kept) < (keep or 0) and self._is_whole(name):
                kept.add(name)
        selector = FileSelector(self.path, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.type == FileType.Directory:
                if info.base_name not in kept:
                    self.filesystem.delete_dir(info.path)
            else:
                self.filesystem.delete_file(info.path)

    def _by_steps(self) -> list[tuple[int, str]]:
        """Steps done and names, the most steps first; before them those of unknown steps, -1."""
        from pyarrow.fs import FileSelector, FileType

        found = []
        for info in self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True)):
            if info.type != FileType.Directory or not info.base_name.startswith("checkpoint"):
                continue
            try:
                with self.filesystem.open_input_stream(f"{info.path}/{STATE_FILE}") as file:
                    num_steps = int(json.loads(file.read())["num_steps_done"])
            except (OSError, ValueError, KeyError, TypeError):
                num_steps = -1
            found.append((num_steps, info.base_name))
        return sorted(found, key=lambda one: (one[0] < 0, *one), reverse=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _open_storage(storage: str) -> tuple[FileSystem, str]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(storage)
    except (ArrowInvalid, OSError, ValueError) as error:
        raise _unusable(storage, error) from None
    return filesystem, path


def _unusable(storage: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"`train.checkpoint_storage`: {storage} cannot be used: {first_line(error)}; give an "
        "absolute path or a URI like s3://bucket/folder, or null for the run folder"
    )
