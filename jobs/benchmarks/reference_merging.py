"""The reference of `merging.py`: a cocktail's weights learned by writing titles.

The procedure of arXiv 2502.08271 and its authors' first code, written anew from the description:
the model writes five titles, greedily, token by token; the whole prompt, padded on the left, is
computed again for each token; the entropy of the next token over the vocabulary counts for the
first five tokens of every title (the count starts anew at the line's end), at most 60 a prompt; the
gradient goes through each of these passes to the weights, lambda = softmax(w), from w = 0 by Adam.

What is made easy for it: each token's gradient is taken at once, so that one pass and not sixty is
held in memory; the output projection sees the last position alone; the products of the adapters are
the project's own. The gradients are the same as without.

Letters: L adapted linear layers, K adapters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter
from rc_ray.core.model import AdapterMix
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import UnlabeledPrompt

NUM_TITLES = 5
NUM_TOKENS = 5
"""Of each generated title whose entropy counts."""
MAX_NEW_TOKENS = 60
QUESTION = "Name the five of these titles that the user chooses next, best first, one a line."

Weights = dict[str, list[float]]
"""By linear layer, one of each adapter."""


class Generating:
    """The reference: entropies of the model's own words, the text read anew for each of them.

    Args:
        ranker: of the domain, in the style of the prompts.
        adapters: what is mixed.
        pad_to: tokens that a text is padded to, on the left; 0 leaves it as it is.
        num_titles: titles that the model writes for a prompt, at most.
    """

    def __init__(
        self,
        ranker: Ranker,
        adapters: Sequence[Adapter],
        *,
        pad_to: int = 0,
        num_titles: int = NUM_TITLES,
    ) -> None:
        self._ranker, self._lm = ranker, ranker.lm
        self._mix = AdapterMix(adapters)
        self._pad_to, self._num_titles = pad_to, num_titles
        (self._line_end,) = self._lm.tokenizer.encode("\n", add_special_tokens=False)

    def learn(
        self,
        prompts: Sequence[UnlabeledPrompt],
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> Iterator[Weights]:
        """The weights after each step; the seed orders the prompts."""
        w = torch.zeros(
            len(self._mix.modules),
            self._mix.num_adapters,
            device=self._lm.device,
            requires_grad=True,
        )
        optimizer = torch.optim.Adam([w], lr=learning_rate)
        order = np.random.default_rng(seed).permutation(len(prompts))
        for start in range(0, len(order), batch_size):
            batch = [prompts[int(i)] for i in order[start : start + batch_size]]
            gradients = [self.gradient(w, self.prompt(prompt)) for prompt in batch]
            w.grad = torch.stack(gradients).mean(dim=0)
            optimizer.step()
            rows = torch.softmax(w.detach(), dim=-1).double().tolist()
            yield dict(zip(self._mix.modules, rows, strict=True))

    def gradient(self, w: Tensor, prompt: Sequence[int]) -> Tensor:
        """(L, K) of the mean entropy of the tokens that count, for one prompt."""
        tokens = list(prompt)
        padding = max(0, self._pad_to - len(tokens))
        total, num_entropies = torch.zeros_like(w), 0
        place = num_titles = 0
        for _ in range(MAX_NEW_TOKENS):
            counts = place < NUM_TOKENS
            with torch.set_grad_enabled(counts):
                mix = self._mix.with_weights(torch.softmax(w, dim=-1))
                with self._lm.using(mix):
                    log_p = torch.log_softmax(self._next_logits(tokens, padding), dim=-1)
                if counts:
                    entropy = -(log_p.exp() * log_p).sum()
                    total += torch.autograd.grad(entropy, w)[0]
                    num_entropies += 1
            tokens.append(int(log_p.argmax()))
            place += 1
            if tokens[-1] == self._line_end:
                num_titles, place = num_titles + 1, 0
            if num_titles == self._num_titles or tokens[-1] == self._lm.tokenizer.eos_token_id:
                break
        return total / num_entropies

    def prompt(self, prompt: UnlabeledPrompt) -> list[int]:
        if self._ranker.renderer.style != "instruct":
            return self._ranker.prompt_tokens(prompt.history, prompt.candidates)
        neutral = self._ranker.renderer.neutralize
        history = " || ".join(map(neutral, prompt.history[-self._ranker.max_titles :]))
        titles = [self._ranker.titles[item] for item in prompt.candidates]
        listed = " || ".join(map(neutral, titles))
        text = f"A user chose, in this order: {history}\nCandidates: {listed}\n{QUESTION}"
        tokenizer = self._lm.tokenizer
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    def _next_logits(self, tokens: Sequence[int], padding: int) -> Tensor:
        """(V,) in fp32, after a text that is padded on the left."""
        length = padding + len(tokens)
        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, padding:] = torch.tensor(tokens)
        mask = (torch.arange(length) >= padding).long()[None]
        places = (torch.arange(length) - padding).clamp(min=0)[None]
        device = self._lm.device
        output = self._lm.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=places.to(device),
            use_cache=False,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[0, -1].float()
        return logits
