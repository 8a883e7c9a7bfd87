"""A linear layer with its LoRA as one autograd function: the inner loop of training and merging.

PEFT runs a LoRA layer as five operations, each of which writes a tensor as large as the layer's
output and keeps some of them for the backward pass. Here the LoRA's products are accumulated into
the base layer's output and into the input's gradient, and the input and its R-wide projection are
all that is kept. Values and gradients are those of PEFT but for the order of summation. Over a base
in bf16 the products of fp32 LoRA matrices run in bf16 too, where PEFT copies the input to fp32; the
matrices and what an optimiser adds to them stay fp32.

Letters: N tokens, I input size, O output size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T, differentiable in x, A and B; W is frozen.

    The tokens may belong to several adapters, one run of neighbours each; the base's product is
    made once for all of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        num_tokens: tuple[int, ...],
        *matrices: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        output = nn.functional.linear(flat, weight, bias)  # (N, O)
        low = [matrix.to(x.dtype) for matrix in matrices]  # A, B, A, B, ...
        down = []
        for part, out, a, b in zip(
            flat.split(num_tokens), output.split(num_tokens), low[::2], low[1::2], strict=True
        ):
            down.append(part @ a.T)  # (N of this adapter, R)
            out.addmm_(down[-1], b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, *low, *down)
        ctx.scale, ctx.shape, ctx.num_tokens = scale, x.shape, num_tokens
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, *saved = ctx.saved_tensors
        sizes, count = ctx.num_tokens, len(ctx.num_tokens)
        low, down = saved[: 2 * count], saved[2 * count :]
        grad = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None  # (N, I)
        grads_x = [None] * count if grad_x is None else grad_x.split(sizes)
        found: list[Tensor] = []
        for k, (part, grad_part) in enumerate(
            zip(flat.split(sizes), grad.split(sizes), strict=True)
        ):
            a, b = low[2 * k], low[2 * k + 1]
            grad_down = grad_part @ b  # (N of this adapter, R)
            found.append((grad_down.T @ part).to(ctx.dtypes[2 * k]).mul_(ctx.scale))  # (R, I)
            found.append((grad_part.T @ down[k]).to(ctx.dtypes[2 * k + 1]).mul_(ctx.scale))
            into = grads_x[k]
            if into is not None:
                into.addmm_(grad_down, a, alpha=ctx.scale)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, None, None, *found


def lora_linear(
    x: Tensor,
    linear: nn.Linear,
    pairs: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    num_tokens: tuple[int, ...],
) -> Tensor:
    """A frozen linear layer, each adapter's low-rank update on its own tokens.

    Args:
        x: (..., I) of N tokens, those of each adapter one after another.
        linear: the base's layer.
        pairs: per adapter A (R, I) and B (O, R).
        scale: of every update.
        num_tokens: of each adapter; they add up to N.

    Returns:
        (..., O), differentiable in `x` and `pairs`.
    """
    matrices = [matrix for pair in pairs for matrix in pair]
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, linear.weight, linear.bias, scale, num_tokens, *matrices
    )
    return output


class _MixedLinear(torch.autograd.Function):
    """x W^T + bias + ((x A^T) * weights) B^T, differentiable in x and in the weights alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        weights: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        output = nn.functional.linear(flat, weight, bias)  # (N, O)
        down = flat @ a.T  # (N, R)
        scaled = down * weights.to(down.dtype)
        output.addmm_(scaled, b.T)
        ctx.save_for_backward(weight, a, b, weights, down)
        ctx.shape = x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, weights, down = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])  # (N, O)
        grad_scaled = grad @ b  # (N, R)
        grad_weights = (grad_scaled.to(weights.dtype) * down).sum(dim=0)  # (R,)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight  # (N, I)
            grad_x.addmm_(grad_scaled.mul_(weights.to(grad_scaled.dtype)), a)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, None, grad_weights


def mixed_linear(x: Tensor, linear: nn.Linear, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """A frozen linear layer and frozen adapters, whose strengths alone are learned.

    Nothing of the input's or the output's size is kept for the backward pass.

    Args:
        x: (..., I).
        linear: the base's layer.
        a: (R, I), the rows of all adapters.
        b: (O, R), their columns, scales multiplied in.
        weights: (R,), of each row.

    Returns:
        (..., O), differentiable in `x` and `weights`.
    """
    output: Tensor = _MixedLinear.apply(  # type: ignore[no-untyped-call]
        x, linear.weight, linear.bias, a, b, weights
    )
    return output


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
        pair = a.weight, b.weight
        return lora_linear(x, base, [pair], scale, (x.numel() // x.shape[-1],))

    return forward
