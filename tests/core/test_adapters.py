"""Adapters that PEFT made: those that act like plain LoRAs act alike here, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rc_ray.core.adapters import ADAPTER_WEIGHTS, Adapter, LoraPair, load_adapter, save_adapter
from rc_ray.core.compression import compressed
from rc_ray.core.loading import load_language_model
from rc_ray.core.merging import merge_fixed
from rc_ray.core.model import AdapterMix
from rc_ray.errors import ArtifactError
from rc_ray.mix_config import FixedMix
from tests.core.test_model import PROJECTIONS, TOKENS
from tests.tiny import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def write(folder: Path, target: Path, config: Any) -> PeftModel:
    """An adapter with random matrices, as PEFT saves it."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(target)
    return model


def act_alike(folder: Path, target: Path) -> bool:
    """PEFT's forward pass on what it loads, and this project's on what it loads."""
    bare = AutoModelForCausalLM.from_pretrained(folder)
    reference = logits(PeftModel.from_pretrained(bare, target))
    lm = load_language_model(folder, torch.float32)
    with lm.using(AdapterMix([load_adapter(target)])):
        found = logits(lm.model)
    unadapted = logits(lm.model)
    assert float((found - unadapted).abs().max()) > 1e-2
    return torch.allclose(found, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
        {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 1}},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\..*": 7, "q_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 20, "down_proj": 3},
        },
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 9},
            "alpha_pattern": {"down_proj": 10},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
        {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
        {"target_modules": ["q_proj"], "velora_config": {}},
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
        {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_plain_loras_act_as_in_peft(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    write(folder, tmp_path, PeftLoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings))
    assert act_alike(folder, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"`use_dora` is set \(DoRA"),
        ({"lora_bias": True}, "`lora_bias` is set"),
        ({"bias": "lora_only"}, "`bias` is set"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is set"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices` is set"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "`layer_replication` is set"),
        ({"alora_invocation_tokens": [5]}, "`alora_invocation_tokens` is set"),
        ({"kasa_config": {}}, "`kasa_config` is set"),
        ({"init_lora_weights": "pissa"}, "is pissa: PiSSA alters .*weight_conversion"),
        ({"init_lora_weights": "pissa_niter_2"}, "is pissa_niter_2: PiSSA alters"),
        ({"init_lora_weights": "olora"}, "is olora: OLoRA alters"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A .a LoRA of an emb"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_other_loras_are_refused_by_name(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"target_modules": ["q_proj"], **settings}
    write(folder, tmp_path, PeftLoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **given))
    with pytest.raises(ArtifactError, match=message) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_starts_that_need_more_than_peft_are_refused_by_name(
    folder: Path, tmp_path: Path, start: str
) -> None:
    """PEFT makes these with a data set or bitsandbytes; the saved field is what tells them."""
    path = tmp_path / "adapter_config.json"
    write(folder, tmp_path, PeftLoraConfig(r=4, target_modules=["q_proj"]))
    path.write_text(
        path.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"')
    )
    with pytest.raises(ArtifactError, match=f"is {start}: .* alters"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (LoKrConfig(target_modules=["q_proj"]), "LOKR"),
        (VeraConfig(target_modules=["q_proj"]), "VERA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_are_refused_by_name(
    folder: Path, tmp_path: Path, config: Any, kind: str
) -> None:
    write(folder, tmp_path, config)
    with pytest.raises(ArtifactError, match=f"peft_type is {kind}, expected LORA"):
        load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_pissa_adapter_acts_as_it_did(folder: Path, tmp_path: Path) -> None:
    """PEFT's own conversion: [A, A_0] and [B, -B_0] on the base as it was."""
    torch.manual_seed(0)
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        init_lora_weights="pissa",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trained = logits(model)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    lm = load_language_model(folder, torch.float32)
    adapter = load_adapter(tmp_path / "converted")
    with lm.using(AdapterMix([adapter])):
        found = logits(lm.model)
    assert not torch.allclose(logits(lm.model), trained, atol=1e-2)
    assert torch.allclose(found, trained, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_of_the_output_projection_is_refused(folder: Path, tmp_path: Path) -> None:
    """Rows of that projection are read past its hooks, and its weights may be the embedding's."""
    model = write(folder, tmp_path, PeftLoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ArtifactError, match=r"holds more or other .*lm_head\.base_layer"):
        load_adapter(tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = load_adapter(tmp_path)
    lm = load_language_model(folder, torch.float32)
    for acting in (lm.using(AdapterMix([adapter])), lm.folded(adapter)):
        with pytest.raises(ArtifactError, match="output projection lm_head"), acting:
            pass


def test_tensors_that_are_no_lora_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path, PeftLoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / ADAPTER_WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(3, 3)}, path)
    with pytest.raises(ArtifactError, match=r"holds more or other .*lm_head\.weight"):
        load_adapter(tmp_path)


def test_a_rank_that_the_config_does_not_state_is_refused(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path, PeftLoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(ArtifactError, match=r"q_proj has rank 4, adapter_config.json says 8"):
        load_adapter(tmp_path)


def uneven(seed: int, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Adapter:
    """Another rank and scale in every layer."""
    generator = torch.Generator().manual_seed(seed)
    names = [(f"model.layers.{k}.{n}", shape) for k in range(2) for n, shape in PROJECTIONS.items()]
    return Adapter(
        {
            name: LoraPair(
                a=torch.randn(ranks[k % len(ranks)], fan_in, generator=generator) * 0.2,
                b=torch.randn(fan_out, ranks[k % len(ranks)], generator=generator) * 0.2,
                scale=scales[k % len(scales)],
            )
            for k, (name, (fan_out, fan_in)) in enumerate(names)
        }
    )


def test_what_is_saved_acts_alike_in_plain_peft(folder: Path, tmp_path: Path) -> None:
    one = uneven(1, (2, 5, 3), (0.7, 1.5))
    other = uneven(2, (4, 1), (1.1,))
    made = {
        "uneven": one,
        "linear": merge_fixed([one, other], FixedMix(method="linear"), 0),
        "knots": merge_fixed([one, other], FixedMix(method="knots"), 0),
        "ties": merge_fixed([one, other], FixedMix(method="ties"), 0),
        "dare": merge_fixed([one, other], FixedMix(method="dare_ties"), 0, rank=3),
        "compressed": compressed(one, 3)[0],
    }
    lm = load_language_model(folder, torch.float32)
    for name, adapter in made.items():
        save_adapter(tmp_path / name, adapter, "tiny")
        assert act_alike(folder, tmp_path / name), name
        with lm.using(AdapterMix([adapter])):
            before = logits(lm.model)
        with lm.folded(load_adapter(tmp_path / name)):
            folded = logits(lm.model)
        assert torch.allclose(before, folded, atol=1e-4), name
        # vLLM reads one rank and one scale: lora_alpha / r must be every layer's.
        scales = {round(pair.scale, 6) for pair in load_adapter(tmp_path / name).modules.values()}
        assert len(scales) == 1, name
