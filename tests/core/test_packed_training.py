"""The training step without waste equals the plain one, and makes nothing that it does not need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM

from rc_ray.core.batches import Example, pack
from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.loading import load_language_model
from rc_ray.core.packed_attention import fits_window, packed_attention
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TrainingModule
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.trie import CatalogueTrie
from rc_ray.training_config import TrainingConfig
from tests.core.test_training import make_domain, make_plan
from tests.tiny import make_model

HISTORIES = ((3, 4, 5, 6, 0, 1, 2), (2, 5), (5, 2), (6, 3))  # two of the short ones share a row
FORMS = [("sequence", "trie"), ("brief", "trie"), ("instruct", "trie"), ("instruct", "vocabulary")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_module(folder: Path, *, lora: dict[str, Any] | None = None, **settings: object) -> Any:
    """A module whose LoRA is not zero, its plan and the batch of a step."""
    lm = load_language_model(folder, torch.float32)
    settings = {"batch_size": 6, "lora": {"rank": 2, "alpha": 4, **(lora or {})}, **settings}
    config = make_plan(lm, **settings).config
    domain = replace(make_domain(), train=HISTORIES)
    renderer = PromptRenderer(lm.tokenizer, config.style)
    plan = TrainingPlan([domain], renderer, config, seed=5, num_listed=3)
    model = with_lora(lm.model, plan.config.lora, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return TrainingModule(model, plan.tries, plan.config), plan, plan.batches(0)[0]


def gradients(module: TrainingModule) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_equal_steps(module: TrainingModule, reference: TrainingModule, batch: Any) -> None:
    losses = []
    for one in (module, reference):
        loss = one(batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    got, expected = gradients(module), gradients(reference)
    assert got.keys() == expected.keys()
    assert all("lora_" in name for name in got)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("style", "loss"), FORMS)
def test_without_padding_and_masks_as_with_them(folder: Path, style: str, loss: str) -> None:
    module, _, batch = make_module(folder, style=style, loss=loss)
    reference, _, _ = make_module(folder, style=style, loss=loss)
    assert module.is_packed
    reference.is_packed = False  # the dense mask
    if style == "sequence":
        assert batch.mask is not None
    fuse_lora(module.model)
    assert_equal_steps(module, reference, batch)


def test_the_decoder_reads_no_padding(folder: Path) -> None:
    module, plan, batch = make_module(folder)
    shapes = []
    module.model.get_base_model().get_decoder().embed_tokens.register_forward_hook(
        lambda _, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    module(batch)
    assert shapes == [(1, sum(len(example.tokens) for example in plan.examples(0)))]
    assert batch.input_ids.numel() > shapes[0][1]


def test_a_text_may_end_within_a_title_that_is_cut_short(folder: Path) -> None:
    module, plan, _ = make_module(folder, style="brief", batch_size=1)
    cut = 0
    for step in range(4):
        (example,), (batch,) = plan.examples(step), plan.batches(step)
        assert torch.isfinite(module(batch))
        item, start = example.titles[-1]
        cut += start + len(plan.title_tokens["tools"][item]) > len(example.tokens)
    assert cut > 0


@pytest.mark.parametrize("field", ["sliding_window", "attention_chunk_size"])
def test_packed_attention_is_not_for_texts_longer_than_a_window(folder: Path, field: str) -> None:
    module, _, batch = make_module(folder)
    base = module.model.get_base_model()
    setattr(base.config, field, max(batch.lengths))
    assert fits_window(base, batch.lengths)
    setattr(base.config, field, max(batch.lengths) - 1)
    shapes = []
    module.model.get_base_model().get_decoder().embed_tokens.register_forward_hook(
        lambda _, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    module(batch)
    assert shapes == [(len(batch.lengths), max(batch.lengths))]


@pytest.mark.parametrize("window", [4, 40])
def test_no_layer_looks_past_its_window(window: int) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=window,
            initializer_range=0.3,
        )
    ).eval()
    trie = CatalogueTrie([[4, 7], [4, 8], [5]])
    titles = [[4, 7], [4, 8], [5]]
    examples = [
        Example("shop", (*range(10, 10 + length), *titles[item]), ((item, length),))
        for length, item in ((9, 0), (4, 1), (3, 2))  # the short ones share a row
    ]
    batch = pack(examples, {"shop": trie}, {"shop": titles})
    assert batch.mask is not None
    config = TrainingConfig(loss="vocabulary", batch_size=3)
    module = TrainingModule(model, {"shop": trie}, config)
    got = module(replace(batch, num_global_tokens=1))
    wanted = 0.0
    for example in examples:
        ((item, start),) = example.titles
        with torch.no_grad():
            logits = model(torch.tensor([example.tokens])).logits[0, start - 1 : -1]
        logits = logits.log_softmax(-1)
        wanted -= float(logits[range(len(titles[item])), titles[item]].sum())
    assert got.item() == pytest.approx(wanted, rel=1e-5)


class Wide(TorchDispatchMode):
    """Counts the rows of every tensor that is as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most_rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in tree_leaves(output):
            if isinstance(one, Tensor) and one.dim() > 1 and one.shape[-1] == self.width:
                self.most_rows = max(self.most_rows, one.numel() // self.width)
        return output


@pytest.mark.parametrize(("style", "loss"), [*FORMS, ("sequence", "vocabulary")])
def test_logits_of_the_vocabulary_are_of_supervised_positions_alone(
    folder: Path, style: str, loss: str
) -> None:
    module, plan, batch = make_module(folder, style=style, loss=loss)
    vocabulary = module.model.get_base_model().get_output_embeddings().weight.shape[0]
    supervised = sum(
        len(plan.title_tokens["tools"][item])
        for example in plan.examples(0)
        for item, _ in example.titles
    )
    with Wide(vocabulary) as seen:
        module(batch).backward()
    assert supervised < batch.num_tokens
    assert seen.most_rows == (supervised if loss == "vocabulary" else 0)


def test_no_gradient_flows_below_the_first_adapted_layer(folder: Path) -> None:
    module, _, batch = make_module(folder, lora={"first_layer": 1})
    layers = module.model.get_base_model().get_decoder().layers
    needed = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: needed.append(output.requires_grad))
    module(batch).backward()
    assert needed == [False, True]
    assert all(".layers.1." in name for name in gradients(module))


def saved_bytes(module: TrainingModule, batch: Any) -> int:
    """Of the tensors that a forward pass keeps for its backward pass, weights apart."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(batch)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("lora", [{}, {"first_layer": 1}, {"dropout": 0.3}])
def test_activations_that_are_computed_anew_change_memory_alone(
    folder: Path, lora: dict[str, Any]
) -> None:
    module, _, batch = make_module(folder, lora=lora, activation_checkpointing=True)
    reference, _, _ = make_module(folder, lora=lora)
    found = []
    for one in (module, reference):
        one.train()
        fuse_lora(one.model)
        torch.manual_seed(4)  # of dropout
        loss = one(batch)
        loss.backward()
        found.append((loss, gradients(one)))
        one.zero_grad()
    (loss, got), (wanted_loss, wanted) = found
    torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=0)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=0)
    if not lora:
        assert saved_bytes(module, batch) < 0.6 * saved_bytes(reference, batch)


def test_the_next_run_on_the_same_base_does_not_compute_anew(folder: Path) -> None:
    module, plan, _ = make_module(folder, activation_checkpointing=True)
    base = module.model.unload()
    layers = base.get_decoder().layers
    assert all(layer.gradient_checkpointing for layer in layers)
    plain = plan.config.model_copy(update={"activation_checkpointing": False})
    TrainingModule(with_lora(base, plain.lora, seed=0), plan.tries, plain)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_texts_of_any_length_attend_causally_to_themselves_in_bf16() -> None:
    """Against the formula in fp64, text by text: two query heads share one key and value head."""
    torch.manual_seed(0)
    lengths = (3, 500, 40)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, dtype=torch.bfloat16, requires_grad=True)
        for heads in (2, 1, 1)
    )
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True  # what transformers' attention has
    found, _ = packed_attention(layer, query, key, value, None, lengths=lengths, scaling=0.25)
    assert found.dtype == torch.bfloat16
    start = 0
    for length in lengths:
        q, k, v = (x.detach()[0, :, start : start + length].double() for x in (query, key, value))
        scores = 0.25 * q @ k.transpose(1, 2)
        future = torch.ones(length, length).triu(1).bool()
        expected = scores.masked_fill(future, -torch.inf).softmax(-1) @ v  # (A, T, D)
        got = found.detach()[0, start : start + length].transpose(0, 1).double()
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
        start += length
    found.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("length", [40, 500])
def test_rows_under_a_mask_attend_as_it_says_in_bf16(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, dtype=torch.bfloat16) for heads in (2, 1, 1)
    )
    seen = torch.rand(2, 1, length, length) < 0.3
    seen |= torch.eye(length, dtype=torch.bool)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    q, k, v = (x.double() for x in (query, key, value))
    scores = (0.25 * q @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)  # (B, T, A, D)
    masks = (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).bfloat16())
    for mask in masks:
        found, _ = packed_attention(layer, query, key, value, mask, scaling=0.25)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
