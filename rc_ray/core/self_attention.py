"""The network of SASRec and its loss over a whole catalogue.

The blocks are those of RecBole's SASRec (BERT's: layer norm after the residual, GELU, width times
4). A row holds a history's last items behind padding on the left. An item's position counts from
the first item shown, so a prefix is the same to the model in training and in use.

Letters: I items, B rows, T items of a row, H hidden size, P supervised places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rc_ray.baselines_config import SasrecConfig


class SelfAttention(nn.Module):
    """The network: items of a history -> one state per item.

    Args:
        num_items: I.
        config: sizes and dropout.
    """

    def __init__(self, num_items: int, config: SasrecConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.items = nn.Embedding(num_items, size)
        self.positions = nn.Embedding(config.max_length, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, T) item indices, -1 for padding on the left -> (B, T, H)."""
        present = rows >= 0
        positions = (present.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.items(rows.clamp(min=0)) + self.positions(positions)
        hidden = self.dropout(self.norm(hidden))
        causal = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=rows.device)
        mask = causal.tril() & present[:, None, None, :]  # (B, 1, T, T)
        # A padded place sees itself, or its softmax would be over nothing.
        mask = mask | torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        for block in self.blocks:
            hidden = block(hidden, mask)
        states: Tensor = hidden
        return states


class _Block(nn.Module):
    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.rate = config.num_heads, config.dropout
        self.queries_keys_values = nn.Linear(size, 3 * size)
        self.output = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.wide = nn.Linear(size, 4 * size)
        self.narrow = nn.Linear(4 * size, size)
        self.last_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        num_rows, length, size = hidden.shape
        parts = self.queries_keys_values(hidden).view(num_rows, length, 3, self.num_heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, T, H / heads)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=self.rate if self.training else 0.0
        )
        mixed = mixed.transpose(1, 2).reshape(num_rows, length, size)
        hidden = self.norm(hidden + self.dropout(self.output(mixed)))
        wide = F.gelu(self.wide(hidden))
        normed: Tensor = self.last_norm(hidden + self.dropout(self.narrow(wide)))
        return normed


class _FullSoftmax(torch.autograd.Function):
    """Sum of cross-entropies over all items, exact, with the logits of a few places at a time.

    The gradients are made beside the loss, so no logits are kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, items: Tensor, targets: Tensor, places_per_chunk: int
    ) -> Tensor:
        total = states.new_zeros(())
        states_gradient = torch.empty_like(states)
        items_gradient = torch.zeros_like(items)
        for start in range(0, len(states), places_per_chunk):
            chunk = slice(start, start + places_per_chunk)
            logits = states[chunk] @ items.T  # (p, I)
            normalizers = torch.logsumexp(logits, dim=1, keepdim=True)
            chosen = targets[chunk, None]
            total += (normalizers - logits.gather(1, chosen)).sum()
            slopes = logits.sub_(normalizers).exp_()  # softmax, in place
            slopes.scatter_add_(1, chosen, -torch.ones_like(normalizers))
            torch.mm(slopes, items, out=states_gradient[chunk])
            items_gradient.addmm_(slopes.T, states[chunk])
        ctx.save_for_backward(states_gradient, items_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states_gradient, items_gradient = ctx.saved_tensors
        return upstream[0] * states_gradient, upstream[0] * items_gradient, None, None


def full_softmax_loss(states: Tensor, items: Tensor, targets: Tensor, max_logits: int) -> Tensor:
    """Sum of `-log softmax(states @ items.T)[target]`.

    Args:
        states: (P, H).
        items: (I, H).
        targets: (P,) item indices.
        max_logits: logits held at once, one place's I at least; changes memory, not the result.
    """
    loss: Tensor = _FullSoftmax.apply(  # type: ignore[no-untyped-call]
        states, items, targets, max(1, max_logits // max(len(items), 1))
    )
    return loss
