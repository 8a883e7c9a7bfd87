"""The base LLM and its LoRA adapters: loading, mixing at run time, folding, PEFT folders.

An adapter on disk is an ordinary PEFT LoRA folder. In memory it is a pair of matrices per linear
layer; any number of adapters act on one shared base through forward hooks.

Letters: B batch, T tokens, H hidden size, R rank, K adapters, L adapted linear layers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rc_ray.config import LoraConfig
from rc_ray.errors import ArtifactError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


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


class AdapterMix:
    """Adapters that act together: per linear layer the sum of `weight * scale * b @ a`.

    Args:
        adapters: K adapters; a layer that an adapter lacks gets nothing from it.
        weights: (L, K), one row per name in `modules`; None gives every adapter weight 1.
            May require a gradient.
    """

    def __init__(self, adapters: Sequence[Adapter], weights: Tensor | None = None) -> None:
        self.modules = sorted({name for adapter in adapters for name in adapter.modules})
        self.num_adapters = len(adapters)
        self.weights = weights
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        self._owner: dict[str, Tensor] = {}
        for name in self.modules:
            owned = [(k, ad.modules[name]) for k, ad in enumerate(adapters) if name in ad.modules]
            self._a[name] = torch.cat([pair.a for _, pair in owned])  # (sum R, in)
            self._b[name] = torch.cat([pair.b * pair.scale for _, pair in owned], dim=1)
            self._owner[name] = torch.tensor(
                [k for k, pair in owned for _ in range(pair.a.shape[0])]
            )
        self._row = {name: row for row, name in enumerate(self.modules)}

    def to(self, device: torch.device, dtype: torch.dtype) -> AdapterMix:
        """Move the matrices; weights stay in their own precision."""
        for store in (self._a, self._b):
            for name in store:
                store[name] = store[name].to(device, dtype)
        self._owner = {name: owner.to(device) for name, owner in self._owner.items()}
        return self

    def with_weights(self, weights: Tensor) -> AdapterMix:
        """The same matrices under other weights (L, K)."""
        other = object.__new__(AdapterMix)
        other.__dict__.update(self.__dict__)
        other.weights = weights
        return other

    def update(self, name: str, x: Tensor) -> Tensor:
        """What the adapters add to the output of linear layer `name`: (..., in) -> (..., out)."""
        down = x @ self._a[name].T  # (..., sum R)
        if self.weights is not None:
            down = down * self.weights[self._row[name]][self._owner[name]].to(down.dtype)
        return down @ self._b[name].T


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base LLM with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @contextmanager
    def using(self, mix: AdapterMix | None) -> Iterator[None]:
        """Let a mix act on the forward passes inside the block; None is the bare base."""
        if mix is None:
            yield
            return
        mix.to(self.device, self.dtype)
        linears = _linears(self.model, mix.modules)
        hooks = []
        for name, linear in linears.items():

            def add(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor:
                return output + mix.update(name, inputs[0])

            hooks.append(linear.register_forward_hook(add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def folded(self, adapter: Adapter | None) -> Iterator[None]:
        """Add an adapter into the weights inside the block, for passes at the base's own cost.

        The original weights are kept and put back bit for bit.
        """
        linears = _linears(self.model, list(adapter.modules)) if adapter else {}
        originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                pair = adapter.modules[name]  # type: ignore[union-attr]
                a, b = (x.to(self.device, torch.float32) for x in (pair.a, pair.b))
                folded = linear.weight.detach().float() + pair.scale * (b @ a)
                linear.weight.data.copy_(folded)
            yield
        finally:
            for name, original in originals.items():
                linears[name].weight.data.copy_(original)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Last hidden states: (B, T) tokens -> (B, T, H). See `decoder_hidden`."""
        return decoder_hidden(self.model, input_ids, position_ids, mask)

    def output_rows(self, vocabulary_ids: Tensor) -> Tensor:
        """(V, H) rows of the output projection, in fp32."""
        return output_rows(self.model, vocabulary_ids)


def decoder_hidden(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states before the output projection.

    Args:
        model: a causal LM, or a PEFT model around one.
        input_ids: (B, T).
        position_ids: (B, T); None counts from 0.
        mask: (B, 1, T, T) bool, True where the row may look; None is plain causal attention,
            under which padding on the right needs no mask.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    output = base.get_decoder()(  # type: ignore[operator]
        input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def output_rows(model: nn.Module, vocabulary_ids: Tensor) -> Tensor:
    """(V, H) rows of a causal LM's output projection, detached, in fp32."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weight: Tensor = base.get_output_embeddings().weight  # type: ignore[operator]
    return weight.detach()[vocabulary_ids.to(weight.device)].float()


def load_language_model(
    folder: Path | str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> LanguageModel:
    """Load a base LLM from a folder in transformers form, frozen and in evaluation mode.

    Raises:
        ArtifactError: the folder is missing or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder}: no model here (config.json is missing)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from None
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
    seconds = {}
    for candidate in (torch.float32, torch.bfloat16):
        x = torch.ones(128, 512, dtype=candidate)
        y = torch.ones(512, 512, dtype=candidate)
        x @ y
        start = time.perf_counter()
        for _ in range(3):
            x @ y
        seconds[candidate] = time.perf_counter() - start
    # bf16 costs accuracy: it must be clearly faster, not by a timer's whim.
    return (
        torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32
    )


def with_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Put a trainable LoRA, seeded, on a frozen model; its parameters are fp32.

    Raises:
        ValueError: a target module is not a linear layer of this model, or `first_layer` leaves
            no layer to adapt.
    """
    num_layers = int(model.config.num_hidden_layers)
    if config.first_layer >= num_layers:
        raise ValueError(
            f"`lora.first_layer` {config.first_layer} leaves nothing to adapt: the model has "
            f"{num_layers} layers"
        )
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    targets = known if config.target_modules == "all-linear" else list(config.target_modules)
    unknown = sorted(set(targets) - set(known))
    if unknown:
        raise ValueError(
            f"`lora.target_modules` names {', '.join(unknown)}; this model has {', '.join(known)}"
        )
    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        layers_to_transform=(
            list(range(config.first_layer, num_layers)) if config.first_layer else None
        ),
    )
    peft_model = get_peft_model(model, peft_config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


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


def load_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder.

    Raises:
        ArtifactError: files are missing or damaged, or the adapter is of a kind that is not a plain
            low-rank update (DoRA, biases, fully trained modules).
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename or folder}: missing; no adapter here") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{folder / ADAPTER_CONFIG}: damaged, not JSON") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: damaged or cut short ({_first_line(error)}); "
            "run the stage that wrote it again with --force"
        ) from None
    _refuse_foreign(config, folder)
    modules = {}
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        name = key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b is None or a.shape[0] != b.shape[1]:
            raise ArtifactError(f"{folder / ADAPTER_WEIGHTS}: {name} has no matching lora_B")
        rank = int(a.shape[0])
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        modules[name] = LoraPair(a=a.float(), b=b.float(), scale=float(scale))
    if not modules or len(tensors) != 2 * len(modules):
        raise ArtifactError(f"{folder / ADAPTER_WEIGHTS}: holds more or other than LoRA matrices")
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


def _refuse_foreign(config: Mapping[str, Any], folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{path}: peft_type is {config.get('peft_type')}, expected LORA")
    refused = {
        "use_dora": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
    }
    for field, present in refused.items():
        if present:
            raise ArtifactError(
                f"{path}: `{field}` is set; only plain low-rank updates can be mixed"
            )


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _linears(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ArtifactError(
                f"the adapter is for another model: there is no linear layer {name}"
            )
        found[name] = module
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
