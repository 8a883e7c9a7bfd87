"""Training checkpoints: one small folder that any engine, ZeRO stage and number of workers reads.

    adapter/                the LoRA in PEFT form, in fp32
    best/                   the best one by validation, where the run validates
    optimizer.safetensors   AdamW's two moments of every LoRA matrix, whole
    metrics.jsonl           a row per step done, where the run keeps them here
    state.json              steps done, the base model, and a digest of every other file

The order of the histories, the crops and the learning rate follow from the seed and the number of
steps done. What `state.json` does not vouch for is no checkpoint: a copy that was cut off, or a
folder whose writer was killed, is passed over for the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rc_ray.artifacts import read_json, sha256_file, write_json, write_text
from rc_ray.core.adapters import Adapter, first_line, load_adapter, save_adapter
from rc_ray.core.validation import BestSoFar
from rc_ray.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from torch import Tensor

FORMAT = 1
"""Raise when a checkpoint takes another form."""
_STATE = "state.json"
_MOMENTS = "optimizer.safetensors"
_METRICS = "metrics.jsonl"
_SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped."""

    num_steps_done: int
    base_name: str
    base_shape: Mapping[str, Any]
    """See `model_shape`."""
    adapter: Adapter
    """In fp32, also where the run trains in bf16."""
    moments: Mapping[str, Tensor]
    """`<layer>.<lora_A or lora_B>.<exp_avg or exp_avg_sq>` -> a tensor shaped like the matrix."""
    best: BestSoFar
    finished: bool = False
    """Whether no step remains, by their number or because validation no longer improves."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Metrics of the steps done."""


def model_shape(config: Any) -> dict[str, Any]:
    """What tells the base model of a checkpoint from another one, of its transformers config.

    A model's folder may describe images too where the loaded model is its text part alone.
    """
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in _SHAPE_FIELDS}


def write_state(folder: Path, state: TrainingState) -> None:
    """Write a checkpoint into a folder of its own; `state.json` comes last and vouches for all.

    Raises:
        ArtifactError: the adapter is empty or holds a value that is not finite.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / "adapter", state.adapter, state.base_name)
    if state.best.adapter is not None:
        save_adapter(folder / "best", state.best.adapter, state.base_name)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.moments.items()}, folder / _MOMENTS
    )
    if state.rows:
        write_text(folder / _METRICS, "".join(json.dumps(row) + "\n" for row in state.rows))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STATE)
    write_json(
        folder / _STATE,
        {
            "format": FORMAT,
            "num_steps_done": state.num_steps_done,
            "base_name": state.base_name,
            "base_shape": dict(state.base_shape),
            "finished": state.finished,
            "best_valid_loss": state.best.loss,
            "best_num_steps": state.best.num_steps,
            "num_validations_since_best": state.best.num_since,
            "files": {str(path.relative_to(folder)): sha256_file(path) for path in files},
        },
    )


def check_files(folder: Path) -> dict[str, Any]:
    """The contents of `state.json`, after a look at every file that it vouches for.

    Raises:
        ArtifactError: a file is missing or damaged, or the checkpoint is of another version.
    """
    state = read_json(folder / _STATE)
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ArtifactError(
            f"{folder}: a checkpoint of form {found}, this version reads form {FORMAT}; run the "
            "stage again with --force"
        )
    for name, digest in state["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise ArtifactError(
                f"{path}: damaged checkpoint ({'differs' if path.exists() else 'missing'}); run "
                "the stage again with --force"
            )
    return dict(state)


def check_model(state: Mapping[str, Any], base_name: str, base_shape: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another base model.

    Args:
        state: the contents of `state.json`.
        base_name: what the run calls its base model.
        base_shape: see `model_shape`.

    Raises:
        ArtifactError: with the difference.
    """
    if state["base_name"] != base_name:
        difference = f"of {state['base_name']}, the experiment says {base_name}"
    else:
        fields = [
            name for name in _SHAPE_FIELDS if state["base_shape"].get(name) != base_shape[name]
        ]
        if not fields:
            return
        difference = ", ".join(
            f"with {name} {state['base_shape'].get(name)}, {base_name} now has {base_shape[name]}"
            for name in fields[:1]
        )
    raise ArtifactError(
        f"the checkpoint is of another model: {difference}; put `model.path` right, or train anew "
        "with --force"
    )


def read_state(folder: Path) -> TrainingState:
    """Read a checkpoint, every file checked against its digest.

    Raises:
        ArtifactError: it is damaged or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = check_files(folder)
    try:
        moments = load_file(folder / _MOMENTS)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / _MOMENTS}: damaged ({first_line(error)})") from None
    loss = state["best_valid_loss"]
    rows = []
    if _METRICS in state["files"]:
        lines = (folder / _METRICS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    return TrainingState(
        num_steps_done=int(state["num_steps_done"]),
        base_name=state["base_name"],
        base_shape=state["base_shape"],
        adapter=load_adapter(folder / "adapter"),
        moments=moments,
        best=BestSoFar(
            loss=loss,
            num_steps=state["best_num_steps"],
            num_since=state["num_validations_since_best"],
            adapter=load_adapter(folder / "best")
            if "best/adapter_config.json" in state["files"]
            else None,
        ),
        finished=state["finished"],
        rows=rows,
    )


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
                with self.filesystem.open_input_stream(f"{info.path}/{_STATE}") as file:
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
