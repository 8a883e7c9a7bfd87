"""The paper's objective: full-vocabulary entropy of the first tokens of greedily generated titles.

RecCocktail (arXiv 2502.08271) generates token by token and reads the whole prompt anew for each
token, with a gradient every time. Here a title is generated once per step with cached keys and
values and without gradients; one pass over prompt and title then gives all its tokens' entropies.
The gradient is the same, since a greedily chosen token has none.

Letters: X prompts, N generated tokens, V vocabulary, L cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rc_ray.core.kv_cache import KeyValueCache
from rc_ray.core.objectives import Outcome, entropy
from rc_ray.core.predictions import UnlabeledPrompt
from rc_ray.core.ranking import Ranker


class GeneratedBatch:
    """Prompts of one step of the optimiser, each to be followed by a title.

    Args:
        ranker: of the domain; its style asks for one title, whose terminator ends it.
        prompts: at least one.
        num_tokens: generated tokens whose entropy counts; fewer where a title is shorter.
        micro_batch_size: prompts whose gradients are held at once; None, all.
        shared_layers: decoder layers that no adapter changes.
    """

    def __init__(
        self,
        ranker: Ranker,
        prompts: Sequence[UnlabeledPrompt],
        *,
        num_tokens: int,
        micro_batch_size: int | None,
        shared_layers: int,
    ) -> None:
        self._ranker = ranker
        texts = [ranker.prompt_tokens(prompt.history, prompt.candidates) for prompt in prompts]
        self._texts = sorted(texts, key=len)  # like lengths together: less padding
        self._num_tokens = num_tokens
        self._micro_batch_size = micro_batch_size or len(texts)
        self._shared_layers = shared_layers

    def backward(self) -> Outcome:
        """Add the slopes of the mean entropy to the weights of the adapters that are active now.

        A prompt's entropy is the mean over its tokens; `mean_prediction_entropy` is that of the
        mean distribution of the first token.
        """
        total, mean_first = 0.0, torch.zeros(())
        for start in range(0, len(self._texts), self._micro_batch_size):
            texts = self._texts[start : start + self._micro_batch_size]
            titles = generate(self._ranker, texts, self._num_tokens)
            with torch.enable_grad():
                logits = self._logits(texts, titles)
                rows = [entropy(one).mean() for one in logits]
                loss = torch.stack(rows).sum() / len(self._texts)
                loss.backward()
            total += loss.item()
            first = torch.stack([one[0].detach().softmax(dim=-1) for one in logits]).sum(dim=0)
            mean_first = mean_first.to(first) + first / len(self._texts)
        spread = float(torch.special.entr(mean_first).sum())
        return Outcome(torch.tensor(total), total, spread, len(self._texts))

    def _logits(
        self, texts: Sequence[Sequence[int]], titles: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Logits (N, V) that chose the tokens of each title, differentiable."""
        lm = self._ranker.lm
        rows = [[*text, *title[:-1]] for text, title in zip(texts, titles, strict=True)]
        input_ids, position_ids, mask = _padded(rows, lm.device)
        with torch.no_grad():
            states = lm.lower_states(self._shared_layers, input_ids, position_ids, mask)
        hidden = lm.upper_hidden(self._shared_layers, states, position_ids, mask)
        spans = [
            hidden[x, len(text) - 1 : len(text) - 1 + len(title)]
            for x, (text, title) in enumerate(zip(texts, titles, strict=True))
        ]
        logits = lm.model.get_output_embeddings()(torch.cat(spans)).float()
        return list(logits.split([len(title) for title in titles]))


@torch.no_grad()
def generate(
    ranker: Ranker, texts: Sequence[Sequence[int]], num_tokens: int
) -> list[tuple[int, ...]]:
    """The most probable next tokens, greedily, up to the end of the title.

    Args:
        ranker: its adapters that are active now count.
        texts: X prompts.
        num_tokens: of each title at most.

    Returns:
        X titles of 1 to `num_tokens` tokens, the terminator included where it came.
    """
    lm, end = ranker.lm, ranker.renderer.terminator
    cache = KeyValueCache(lm.model.config.num_hidden_layers)
    input_ids, position_ids, mask = _padded(texts, lm.device)
    lengths = torch.tensor([len(text) for text in texts], device=lm.device)
    rows = torch.arange(len(texts), device=lm.device)
    hidden = lm.cached_hidden(cache, input_ids, position_ids, mask)[rows, lengths - 1]
    seen = rows.new_ones(input_ids.shape).cumsum(1) <= lengths[:, None]  # (X, L)
    titles: list[list[int]] = [[] for _ in texts]
    running = set(range(len(texts)))
    for step in range(num_tokens):
        chosen = lm.model.get_output_embeddings()(hidden).argmax(dim=-1)  # (X,)
        for x, token in enumerate(chosen.tolist()):
            if x in running:
                titles[x].append(token)
                if titles[x][-len(end) :] == end:
                    running.discard(x)
        if not running or step + 1 == num_tokens:
            break
        seen = torch.cat([seen, seen.new_ones(len(texts), 1)], dim=1)
        hidden = lm.cached_hidden(
            cache, chosen[:, None], lengths[:, None] + step, seen[:, None, None]
        )[:, 0]
    return [tuple(title) for title in titles]


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions (X, T), padded on the right, and a causal mask (X, 1, T, T)."""
    length = max(len(text) for text in texts)
    input_ids = torch.tensor(
        [[*text, *[0] * (length - len(text))] for text in texts], device=device
    )
    position_ids = torch.arange(length, device=device).expand(len(texts), -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return input_ids, position_ids, mask.expand(len(texts), 1, -1, -1)
