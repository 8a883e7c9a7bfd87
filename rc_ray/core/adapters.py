"""LoRA adapters: in memory a pair of matrices per linear layer, on disk a PEFT LoRA folder.

Letters: R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rc_ray.errors import ArtifactError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_FOREIGN_FIELDS = {
    "use_dora": "DoRA normalises base and update together",
    "lora_bias": "the update has a bias",
    "bias": "biases of the base were trained",
    "modules_to_save": "whole modules were trained",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "parameters outside linear layers are adapted",
    "layer_replication": "it is for a base with repeated layers",
    "alora_invocation_tokens": "aLoRA acts after its invocation tokens only",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA alters the base's weights",
    "monteclora_config": "MonteCLoRA samples around the update",
    "use_bdlora": "BD-LoRA stores block-diagonal matrices",
    "use_qalora": "QALoRA pools the input",
}
"""Fields of `LoraConfig` under which a LoRA is more or other than `scale * b @ a`."""
_ALTERING_STARTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
"""Values of `init_lora_weights` that take a part out of the base's weights."""
_CONVERSION = dict.fromkeys(
    ("pissa", "olora", "corda", "lora_ga"),
    "save it anew by PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`",
)
_FOREIGN_TENSORS = {
    "lora_embedding_": "a LoRA of an embedding",
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_B.bias": "a bias of the update",
    "trainable_tokens": "trained rows of an embedding",
}
_VELORA = ".lora_velora_"
"""In the names of what VeLoRA's backward pass keeps; its forward pass is a plain LoRA's."""


@dataclass(frozen=True)
class LoraPair:
    """The update `scale * b @ a` of one linear layer."""

    a: Tensor
    """(R, in features)."""
    b: Tensor
    """(out features, R)."""
    scale: float


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs by module name, as `named_modules()` of the base model spells it."""

    modules: dict[str, LoraPair]


def first_adapted_layer(adapters: Sequence[Adapter]) -> int:
    """The lowest decoder layer that any of the adapters changes; 0 where a name tells no layer."""
    found = []
    for adapter in adapters:
        for name in adapter.modules:
            match = re.search(r"\.layers\.(\d+)\.", name)
            found.append(int(match.group(1)) if match else 0)
    return min(found, default=0)


def lora_layers(peft_model: PeftModel) -> dict[str, Any]:
    """The adapted layers by name, in an order that is the same in every process."""
    layers = peft_model.get_base_model().named_modules()
    return {name: layer for name, layer in sorted(layers) if hasattr(layer, "lora_A")}


def lora_matrices(layer: Any) -> dict[str, nn.Parameter]:
    """`lora_A` and `lora_B` of an adapted layer."""
    return {name: getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B")}


def copied(parameter: nn.Parameter) -> Tensor:
    """A matrix in fp32 on the processor."""
    return parameter.detach().to("cpu", torch.float32, copy=True)


def adapter_of(peft_model: PeftModel, read: Callable[[nn.Parameter], Tensor] = copied) -> Adapter:
    """Copy the LoRA matrices off a PEFT model.

    Args:
        peft_model: with one LoRA.
        read: gives a matrix whole and in fp32, called in the order of `lora_layers`.

    Raises:
        ArtifactError: a matrix does not have its layer's shape.
    """
    modules = {}
    for name, layer in lora_layers(peft_model).items():
        a, b = (read(matrix) for matrix in lora_matrices(layer).values())
        rank = int(layer.r["default"])
        wanted = (rank, layer.in_features), (layer.out_features, rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise ArtifactError(
                f"layer {name}: LoRA matrices of shape {tuple(a.shape)} and {tuple(b.shape)}, "
                f"expected {wanted[0]} and {wanted[1]}"
            )
        modules[name] = LoraPair(a=a, b=b, scale=float(layer.scaling["default"]))
    return Adapter(modules)


def save_adapter(folder: Path, adapter: Adapter, base_name: str) -> None:
    """Write an adapter as a PEFT LoRA folder and read it back to prove it.

    Scales that differ between layers are multiplied into `b`, so that any PEFT release loads the
    same update.

    Raises:
        ArtifactError: the adapter is empty or holds a value that is not finite.
    """
    ranks = {name: int(pair.a.shape[0]) for name, pair in adapter.modules.items()}
    if not ranks:
        raise ArtifactError(f"{folder}: an adapter without layers cannot be saved")
    rank = max(ranks.values())
    scales = {pair.scale for pair in adapter.modules.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for name, pair in adapter.modules.items():
        b = pair.b if pair.scale == scale else pair.b * (pair.scale / scale)
        key = f"{_PEFT_PREFIX}{name}"
        tensors[f"{key}.lora_A.weight"] = pair.a.detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = b.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted(adapter.modules),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: scale * r for name, r in ranks.items() if r != rank},
    )
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    check_adapter(load_adapter(folder), folder)


def load_adapter(folder: Path, base_name: str | None = None) -> Adapter:
    """Read a PEFT LoRA folder.

    Args:
        folder: holds it.
        base_name: the base LLM that it must have been trained on; None takes any.

    Raises:
        ArtifactError: files are missing or damaged, the adapter is of a kind that is not a plain
            low-rank update of the base's linear layers (DoRA, biases, fully trained modules, PiSSA
            and whatever else alters the base), or of another base.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename or folder}: missing; no adapter here") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{folder / ADAPTER_CONFIG}: damaged, not JSON") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: damaged or cut short ({first_line(error)}); "
            "run the stage that wrote it again with --force"
        ) from None
    tensors = {key: tensor for key, tensor in stored.items() if _VELORA not in key}
    _refuse_foreign(config, tensors, folder / ADAPTER_CONFIG)
    trained_on = config.get("base_model_name_or_path")
    if base_name is not None and trained_on != base_name:
        raise ArtifactError(
            f"{folder}: trained on {trained_on}, the experiment says {base_name}; set `model.path` "
            "to the former, or run the stage that wrote it again"
        )
    modules = {}
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        name = key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b is None or a.shape[0] != b.shape[1]:
            raise ArtifactError(f"{folder / ADAPTER_WEIGHTS}: {name} has no matching lora_B")
        rank = int(a.shape[0])
        stated = _pattern(config.get("rank_pattern"), name, config.get("r", 8))
        if stated != rank:
            raise ArtifactError(
                f"{folder}: layer {name} has rank {rank}, {ADAPTER_CONFIG} says {stated}; "
                "its scale is unknown"
            )
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        modules[name] = LoraPair(a=a.float(), b=b.float(), scale=float(scale))
    other = sorted(key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    if not modules or len(tensors) != 2 * len(modules):
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: holds more or other than LoRA matrices"
            + (f": {other[0]}" if other else "")
        )
    return Adapter(modules)


def check_adapter(adapter: Adapter, folder: Path) -> None:
    """Refuse an adapter with values that are not finite, or empty matrices (a lost ZeRO gather).

    Raises:
        ArtifactError: with the first bad layer.
    """
    for name, pair in adapter.modules.items():
        if pair.a.numel() == 0 or pair.b.numel() == 0:
            raise ArtifactError(f"{folder}: layer {name} of the saved adapter is empty")
        if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
            raise ArtifactError(f"{folder}: layer {name} holds values that are not finite")


def _refuse_foreign(config: Mapping[str, Any], keys: Iterable[str], path: Path) -> None:
    """Refuse by name whatever is not the update `scale * b @ a` of linear layers of the base.

    Starts that leave the base's weights alone (Gaussian, orthogonal, EVA, MiCA) are plain LoRAs,
    and so is one with `fan_in_fan_out`, which says how the base stores its weights.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ArtifactError(
            f"{path}: peft_type is {kind}, expected LORA; `peft.save_as_lora` turns some others "
            "into one, with an error"
        )
    for field, what in _FOREIGN_FIELDS.items():
        if config.get(field) not in (None, False, "none", [], {}):
            raise ArtifactError(
                f"{path}: `{field}` is set ({what}); only plain low-rank updates can be mixed"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    for prefix, name in _ALTERING_STARTS.items():
        if start.startswith(prefix):
            raise ArtifactError(
                f"{path}: `init_lora_weights` is {start}: {name} alters the base's weights, and "
                f"this adapter fits those only; {_CONVERSION.get(prefix, 'train a plain LoRA')}"
            )
    for key in keys:
        for part, what in _FOREIGN_TENSORS.items():
            if part in key:
                raise ArtifactError(
                    f"{path.with_name(ADAPTER_WEIGHTS)}: holds {key} ({what}); only plain low-rank "
                    "updates of linear layers can be mixed"
                )


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
