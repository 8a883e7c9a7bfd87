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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rc_ray.artifacts import read_json, sha256_file, write_json, write_text
from rc_ray.core.adapters import Adapter, first_line, load_adapter, save_adapter
from rc_ray.core.validation import BestSoFar
from rc_ray.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Raise when a checkpoint takes another form."""
STATE_FILE = "state.json"
"""Comes last, and vouches for the other files."""
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
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    write_json(
        folder / STATE_FILE,
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
    state = read_json(folder / STATE_FILE)
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
