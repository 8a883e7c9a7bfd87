"""The base LLM from its folder: with its weights, or their shapes alone; in which precision."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from rc_ray.core.adapters import first_line
from rc_ray.core.model import LanguageModel
from rc_ray.errors import ArtifactError

_SCALED = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping")
"""Settings by which a model alters its embeddings or logits outside its layers and output rows."""
_MIN_TURNS, _MAX_TURNS = 3, 40
"""Of timing a product, see `choose_dtype`."""


def load_language_model(
    folder: Path | str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> LanguageModel:
    """Load a base LLM from a folder in transformers form, frozen and in evaluation mode.

    Raises:
        ArtifactError: the folder is missing, its files are damaged, or its layers are of a kind
            that cannot be used.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder}: no model here (config.json is missing)")
    hf_logging.disable_progress_bar()  # the commands show progress of their own
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the model cannot be loaded: {first_line(error)}") from None
    _check_layers(model, folder)
    model.requires_grad_(False)
    return LanguageModel(model=model.to(device).eval(), tokenizer=tokenizer)


def choose_dtype(setting: str, device: str | torch.device = "cpu") -> torch.dtype:
    """`auto` -> the faster of fp32 and bf16 for a matrix product on this device.

    Processors without bf16 instructions emulate them a hundred times slower, so this is measured.
    """
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _is_bfloat16_faster() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As the experiment file calls it, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _is_bfloat16_faster() -> bool:
    """Time products of one thread, in turns: the shortest of each, for others only lengthen them.

    With several threads each product would wait for the one that shares its core, and a run that is
    started again could choose otherwise.
    """
    matrices = {
        dtype: (torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    shortest = dict.fromkeys(matrices, float("inf"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for x, y in matrices.values():
            x @ y
        for turn in range(_MAX_TURNS):
            for dtype, (x, y) in matrices.items():
                shortest[dtype] = min(shortest[dtype], _seconds_of(x, y))
            if turn >= _MIN_TURNS and shortest[torch.bfloat16] > 4 * shortest[torch.float32]:
                break  # emulated, a hundred times slower: no need to look for long
    finally:
        torch.set_num_threads(num_threads)
    # bf16 costs accuracy: it must be clearly faster, not by a timer's whim.
    return shortest[torch.bfloat16] < 0.7 * shortest[torch.float32]


def _seconds_of(x: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    x @ y
    return time.perf_counter() - start


def model_without_weights(folder: Path | str) -> PreTrainedModel:
    """The layers of a model with nothing in them, to see what a LoRA would find.

    Raises:
        ArtifactError: the folder is missing, its description is damaged, or its layers are of a
            kind that cannot be used.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: the model cannot be loaded: {first_line(error)}") from None
    assert isinstance(model, PreTrainedModel)
    _check_layers(model, folder)
    return model


def _check_layers(model: PreTrainedModel, folder: Path | str) -> None:
    """Refuse layers that carry a state from token to token, whichever mask is given.

    Training and ranking put several texts in one row. They also read single rows of the output
    projection, and ranking begins passes at some layer: whatever a model does to its logits or
    embeddings beside that would be left out, or done twice.
    """
    config = model.config.get_text_config()
    altered = [name for name in _SCALED if getattr(config, name, None) not in (None, 1.0)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        altered.append("a bias of the output projection")
    if altered:
        raise ArtifactError(
            f"{folder}: {type(model).__name__} alters embeddings or logits ({', '.join(altered)}), "
            "which ranking would leave out or do twice; set `model.path` to a model without"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if model._is_stateful or others:
        found = f" ({', '.join(others)})" if others else ""
        raise ArtifactError(
            f"{folder}: {type(model).__name__} has layers{found} through which the texts of a row "
            "would see each other; set `model.path` to a model of attention layers alone"
        )
