"""Adapters: in memory, folded, on disk and in plain PEFT are the same update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    MambaConfig,
    PhiConfig,
    PretrainedConfig,
)

from rc_ray.core.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    LoraPair,
    load_adapter,
    save_adapter,
)
from rc_ray.core.loading import choose_dtype, load_language_model, model_without_weights
from rc_ray.core.merging import concatenate, uniform_weights
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.errors import ArtifactError
from tests.tiny import make_model

TOKENS = torch.tensor([[5, 9, 40, 77, 3, 60], [8, 8, 21, 90, 11, 2]])
PROJECTIONS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.v_proj": (16, 32),
    "mlp.down_proj": (32, 48),
}


def random_adapter(seed: int, rank: int = 3, scale: float = 0.7, layers: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"model.layers.{layer}.{name}": LoraPair(
                a=torch.randn(rank, fan_in, generator=generator) * 0.2,
                b=torch.randn(fan_out, rank, generator=generator) * 0.2,
                scale=scale,
            )
            for layer in range(layers)
            for name, (fan_out, fan_in) in PROJECTIONS.items()
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(folder: Path) -> LanguageModel:
    return load_language_model(folder, torch.float32)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=TOKENS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_one_adapter_at_weight_one_is_that_adapter_in_plain_peft(
    lm: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(1)
    bare = logits(lm)
    names = AdapterMix([adapter]).modules
    with lm.using(AdapterMix([adapter])):
        plain = logits(lm)
    with lm.using(AdapterMix([adapter], torch.ones(len(names), 1))):
        weighted = logits(lm)
    with lm.folded(adapter):
        folded = logits(lm)
    save_adapter(tmp_path / "adapter", adapter, "tiny")
    bare_model = AutoModelForCausalLM.from_pretrained(folder)
    peft = PeftModel.from_pretrained(bare_model, tmp_path / "adapter")
    with torch.no_grad():
        reference = peft.eval()(input_ids=TOKENS).logits
    assert not close(bare, plain)
    assert close(plain, weighted)
    assert close(plain, folded)
    assert close(plain, reference)
    assert torch.equal(bare, logits(lm))  # nothing is left behind


def test_concatenation_is_the_weighted_sum_in_plain_peft(
    lm: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    adapters = [
        random_adapter(1, rank=3, scale=0.7),
        random_adapter(2, rank=5, scale=1.3, layers=1),
    ]
    mix = AdapterMix(adapters)
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(len(mix.modules), 2, generator=generator), dim=-1)
    rows = dict(zip(mix.modules, weights.tolist(), strict=True))
    merged = concatenate(adapters, rows)
    for name, pair in merged.modules.items():
        expected = sum(
            weight * adapter.modules[name].scale * adapter.modules[name].b @ adapter.modules[name].a
            for weight, adapter in zip(rows[name], adapters, strict=True)
            if name in adapter.modules
        )
        assert torch.allclose(pair.scale * pair.b @ pair.a, expected, atol=1e-6)
    with lm.using(mix.with_weights(weights)):
        live = logits(lm)
    save_adapter(tmp_path / "adapter", merged, "tiny")
    with lm.folded(load_adapter(tmp_path / "adapter")):
        folded = logits(lm)
    bare_model = AutoModelForCausalLM.from_pretrained(folder)
    peft = PeftModel.from_pretrained(bare_model, tmp_path / "adapter")
    with torch.no_grad():
        reference = peft.eval()(input_ids=TOKENS).logits
    assert close(live, folded)
    assert close(live, reference)


def test_mixes_add_up_and_leave_nothing_behind(lm: LanguageModel) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    one, two = random_adapter(1), random_adapter(2)
    with lm.using(AdapterMix([one, two])):
        expected = logits(lm)
    with lm.using(AdapterMix([one])), lm.using(AdapterMix([two])):
        assert close(logits(lm), expected)
    linears = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    assert not any("forward" in vars(linear) for linear in linears)
    # A linear layer with a way of its own keeps it.
    linear = lm.model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.ones(2, 48)
    plain = linear(x)
    mix = AdapterMix([one])
    linear.__class__ = Doubled
    with lm.using(mix):
        found = linear(x)
    linear.__class__ = torch.nn.Linear
    assert close(found, 2 * plain + mix.update("model.layers.0.mlp.down_proj", x))


def test_uniform_weights_cover_layers_of_any_adapter() -> None:
    adapters = [random_adapter(1), random_adapter(2, layers=1)]
    rows = uniform_weights(adapters)
    assert set(rows) == set(adapters[0].modules)
    assert set(map(tuple, rows.values())) == {(0.5, 0.5)}
    with pytest.raises(ValueError, match="needs 2 weights"):
        concatenate(adapters, {})


def test_reads_what_peft_writes(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        PeftLoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"down_proj": 10},
            use_rslora=True,
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reference = model.eval()(input_ids=TOKENS).logits
    adapter = load_adapter(tmp_path)
    scales = {name.rpartition(".")[2]: pair.scale for name, pair in adapter.modules.items()}
    assert scales["q_proj"] == pytest.approx(6 / 4**0.5)
    assert scales["down_proj"] == pytest.approx(10 / 2**0.5)
    with lm.using(AdapterMix([adapter])):
        assert close(logits(lm), reference)


def test_a_truncated_file_is_a_plain_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(1), "tiny")
    path = tmp_path / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: damaged or cut short"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("peft_type", "IA3", "peft_type is IA3"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    save_adapter(tmp_path, random_adapter(1), "tiny")
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(ArtifactError, match=message):
        load_adapter(tmp_path)


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    adapter = random_adapter(1)
    next(iter(adapter.modules.values())).b[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="not finite"):
        save_adapter(tmp_path, adapter, "tiny")


def test_an_adapter_of_another_model_is_refused(lm: LanguageModel) -> None:
    pair = LoraPair(torch.zeros(2, 32), torch.zeros(32, 2), 1.0)
    other = Adapter({"model.layers.7.self_attn.q_proj": pair})
    with pytest.raises(ArtifactError, match="another model"), lm.using(AdapterMix([other])):
        pass


def test_missing_model_and_adapter_are_plain_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model here"):
        load_language_model(tmp_path, torch.float32)
    with pytest.raises(ArtifactError, match="missing"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(1), "tiny")
    assert load_adapter(tmp_path, "tiny").modules
    with pytest.raises(ArtifactError, match="trained on tiny, the experiment says large"):
        load_adapter(tmp_path, "large")


def test_one_stalled_product_does_not_decide_the_precision(monkeypatch) -> None:
    """The first fp32 product takes 100 s, all others 1 s: bf16 is not the faster."""
    ends = iter([100.0, *[1.0] * 99])
    now = [0.0, False]

    def clock() -> float:
        if now[1]:
            now[0] += next(ends)
        now[1] = not now[1]
        return now[0]

    monkeypatch.setattr("rc_ray.core.loading.time.perf_counter", clock)
    assert choose_dtype("auto") is torch.float32


def test_auto_takes_a_precision_that_works() -> None:
    assert choose_dtype("float32") is torch.float32
    assert choose_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(hidden_size=8, num_hidden_layers=1), "MambaForCausalLM has layers"),
        (
            Lfm2Config(hidden_size=64, num_hidden_layers=2, full_attn_idxs=[1]),
            r"has layers \(conv\) through which",
        ),
    ],
)
def test_layers_that_carry_a_state_are_refused(
    tmp_path: Path, config: PretrainedConfig, message: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        model_without_weights(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            GraniteConfig,
            {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
            r"\(embedding_multiplier, logits_scaling\)",
        ),
        (CohereConfig, {"logit_scale": 0.0625}, r"\(logit_scale\)"),
        (Gemma2Config, {"final_logit_softcapping": 30.0}, r"\(final_logit_softcapping\)"),
        (PhiConfig, {}, r"\(a bias of the output projection\)"),
        (GraniteConfig, {}, ""),
        (Gemma2Config, {"final_logit_softcapping": None}, ""),
    ],
)
def test_models_that_alter_logits_or_embeddings_are_refused(
    tmp_path: Path, kind: type[PretrainedConfig], settings: dict[str, float], message: str
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    kind(**small, **heads, **settings).save_pretrained(tmp_path)
    if message:
        with pytest.raises(ArtifactError, match=message):
            model_without_weights(tmp_path)
    else:
        model_without_weights(tmp_path)
