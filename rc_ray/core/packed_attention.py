"""Attention over texts that stand one behind the other in one row, without mask or padding.

A mask for N tokens of several texts has N squared entries, most of them False, and keeps torch from
its causal kernels. Here the row is split, every text attends by itself, and the results are joined.

Letters: A query heads, G key and value heads, N tokens, D head size.
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


def install_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model's decoder take `lengths`; passes without it stay those of torch's attention.

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
        whole: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[
            0
        ]
        return whole, None
    texts = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    parts = [sdpa_attention_forward(module, *text, None, **kwargs)[0] for text in texts]
    return torch.cat(parts, dim=1), None
