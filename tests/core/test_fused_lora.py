"""The fused LoRA layer against PEFT's own, value by value and gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rc_ray.core.fused_lora import fuse_lora, mixed_linear


def tiny() -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=True,
            initializer_range=0.3,
        )
    ).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"])
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):  # zeros would hide half of the gradients
            nn.init.normal_(parameter)
    return model


def loss_and_gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.arange(30).view(3, 10)
    logits = model(input_ids=tokens).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_are_those_of_peft() -> None:
    wanted_loss, wanted = loss_and_gradients(tiny())
    model = tiny()
    assert fuse_lora(model) == 2 * 3
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, wanted_loss)
    assert gradients.keys() == wanted.keys()
    assert len(wanted) == 2 * 3 * 2
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_gradients_in_double_precision_are_those_of_differences() -> None:
    model = tiny().double()
    fuse_lora(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    parameters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_masters_in_fp32_learn_under_a_bf16_base() -> None:
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    fuse_lora(model)
    output = layer(torch.randn(5, 16, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_is_no_plain_lora_is_left_to_peft(setting: dict[str, object]) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **setting))  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    assert fuse_lora(model) == 0


def test_unloading_leaves_the_base_as_it_was() -> None:
    model = tiny()
    tokens = torch.arange(10)[None]
    with model.disable_adapter(), torch.no_grad():
        wanted = model(input_ids=tokens).logits
    fuse_lora(model)
    base = model.unload()
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=tokens).logits, wanted, rtol=0, atol=0)


def test_mixed_linear_by_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for has_bias in (False, True):
        linear = nn.Linear(5, 4, bias=has_bias).double().requires_grad_(False)
        a, b = draw(3, 5), draw(4, 3)
        x, weights = draw(2, 6, 5).requires_grad_(), draw(3).requires_grad_()

        def plain(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return mixed_linear(x, linear, a, b, weights)  # noqa: B023

        folded = linear.weight + b @ torch.diag(weights) @ a
        expected = nn.functional.linear(x, folded, linear.bias)
        torch.testing.assert_close(plain(x, weights), expected)
        assert torch.autograd.gradcheck(plain, (x, weights))
        assert torch.autograd.gradcheck(lambda w: plain(x.detach(), w), (weights,))  # noqa: B023
