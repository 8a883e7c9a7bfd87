"""Attention over texts that stand one behind the other in one row, without mask or padding.

A mask for N tokens of several texts has N squared entries, most of them False, and keeps torch from
its causal kernels. Here the row is split, every text attends by itself, and the results are joined.

Letters: B rows, T tokens of one, A query heads, G key and value heads, N tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rc_ray_packed"
"""What `config._attn_implementation` says where `packed_attention` is in use."""
_MAX_TOKENS_IN_FP32 = 384
"""In bf16 torch's kernel for processors takes 2.4 times as long as in fp32 for a text of 60 tokens,
1.2 times for 240, and as long for 600; under a mask 1.9 times for 80 and 1.2 for 300. fp32 is the
more exact besides."""


def install_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model's decoder take `lengths`; passes without it attend as the mask says.

    Returns:
        Whether the model's code lets its attention be replaced; else nothing is changed.
    """
    if not model._supports_attention_backend:
        return False
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
    return bool(model.config._attn_implementation == NAME)


def fits_window(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Whether no text is longer than a window or chunk that attention is confined to."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(max(lengths) <= window for window in found if window is not None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of several texts.

    Args:
        module: the attention layer.
        query: (1, A, N, D).
        key: (1, G, N, D).
        value: (1, G, N, D).
        attention_mask: of no matter where `lengths` is given.
        lengths: of the texts, in tokens; they add up to N. None: one text, or as the mask says.
        kwargs: what transformers passes on.

    Returns:
        (1, N, A, D), and no weights.
    """
    if lengths is None:
        return _attended(module, query, key, value, attention_mask, **kwargs), None
    texts = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    parts = [_attended(module, q, k, v, None, **kwargs) for q, k, v in texts]
    return torch.cat(parts, dim=1), None


def _attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Attention under a mask or, without, causal: (B, A, T, D), (B, G, T, D) twice -> (B, T, A, D).

    Short texts in bf16 attend in fp32 on a processor.
    """
    dtype = query.dtype
    if (
        dtype == torch.bfloat16
        and query.device.type == "cpu"
        and key.shape[2] <= _MAX_TOKENS_IN_FP32
    ):
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    found: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return found.to(dtype)
