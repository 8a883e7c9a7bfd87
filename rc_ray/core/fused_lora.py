"""A linear layer with its LoRA as one autograd function: the training step's inner loop.

PEFT runs a LoRA layer as five operations, each of which writes a tensor as large as the layer's
output and keeps some of them for the backward pass. Here the LoRA's products are accumulated into
the base layer's output and into the input's gradient, and the input and its R-wide projection are
all that is kept. Values and gradients are those of PEFT but for the order of summation. Over a base
in bf16 the products of fp32 LoRA matrices run in bf16 too, where PEFT copies the input to fp32; the
matrices and what an optimiser adds to them stay fp32.

Letters: N tokens, I input size, O output size, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T, differentiable in x, A and B; W is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        down = flat @ low_a.T  # (N, R)
        output = nn.functional.linear(flat, weight, bias)  # (N, O)
        output.addmm_(down, low_b.T, alpha=scale)
        ctx.save_for_backward(flat, down, weight, low_a, low_b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        grad_down = grad @ b  # (N, R)
        grad_a = (grad_down.T @ flat).to(ctx.dtypes[0]).mul_(ctx.scale)  # (R, I)
        grad_b = (grad.T @ down).to(ctx.dtypes[1]).mul_(ctx.scale)  # (O, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight  # (N, I)
            grad_x.addmm_(grad_down, a, alpha=ctx.scale)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def fuse_lora(model: PeftModel) -> int:
    """Let every plain LoRA layer of a model in training run as one function.

    Left as they are: layers with dropout, several adapters, a variant such as DoRA, or a frozen
    part that is no plain linear layer. Not for ZeRO-3, whose weights are there only while
    their own modules run.

    Args:
        model: with one trainable LoRA.

    Returns:
        The number of layers that were changed; `unload()` undoes it.
    """
    num_fused = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = _fused_forward(layer)
            num_fused += 1
    return num_fused


def _is_plain(layer: LoraLayer) -> bool:
    names = list(layer.active_adapters)
    return (
        len(names) == 1
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and layer.lora_A[names[0]].bias is None
        and layer.lora_B[names[0]].bias is None
    )


def _fused_forward(layer: LoraLayer) -> Any:
    name = layer.active_adapters[0]
    base, a, b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    scale = float(layer.scaling[name])

    def forward(x: Tensor) -> Tensor:
        result: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, a.weight, b.weight, scale
        )
        return result

    return forward
