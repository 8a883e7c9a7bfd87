"""Histories -> tokens, in three styles; titles are untrusted and never become control tokens.

`sequence`: a header line, then the titles of the history, one a line. The same text trains every
title of a history in one pass. `instruct`: the paper's chat prompt (RecCocktail, arXiv 2502.08271):
history and listed candidates in the user turn, the title as the assistant's answer. `brief` is
`sequence` with every title of the history cut after the token that tells it apart from all other
titles of its catalogue; longer titles save more.

Every title is tokenised by itself, so a title is always the same tokens wherever it stands, and a
catalogue's titles form a trie (core/trie.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

Style = Literal["sequence", "brief", "instruct"]

MAX_CACHED_TITLES = 200_000
"""Titles whose tokens a renderer keeps; a service reads titles without end."""


class PromptRenderer:
    """Turns titles into tokens for one tokenizer and one style.

    Args:
        tokenizer: of the base LLM; `instruct` needs its chat template.
        style: `sequence`, `brief` or `instruct`.

    Raises:
        ValueError: the tokenizer has no chat template, or lacks an end-of-turn token (`instruct`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style = "sequence") -> None:
        self.tokenizer = tokenizer
        self.style = style
        self._control_texts = sorted(
            {str(token) for token in tokenizer.added_tokens_encoder if str(token).strip()},
            key=len,
            reverse=True,
        )
        self._control_ids = set(tokenizer.added_tokens_encoder.values())
        self._title = functools.lru_cache(MAX_CACHED_TITLES)(self._title_tokens)
        if style != "instruct":
            # The newline is what tells a title from a longer one that starts alike.
            self.terminator = self._encode("\n")
        else:
            if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
                raise ValueError(
                    "style `instruct` needs a tokenizer with a chat template and an end token; "
                    "this model has none, use style `sequence`"
                )
            self.terminator = [int(tokenizer.eos_token_id)]

    def neutralize(self, text: str) -> str:
        """One line of text in which no control token of the tokenizer is spelled."""
        text = " ".join(text.split())
        changed = True
        while changed:  # breaking one token apart must not let another one form
            changed = False
            for token in self._control_texts:
                if token in text:
                    text = text.replace(token, f"{token[0]} {token[1:]}")
                    changed = True
        return text

    def title(self, title: str) -> tuple[int, ...]:
        """Tokens of one title, its terminator included; never empty, never a control token."""
        return self._title(title)

    def shown(self, title: Sequence[int], telling_depth: int) -> tuple[int, ...]:
        """Tokens of a title as a history shows it.

        Args:
            title: all its tokens, terminator included.
            telling_depth: how many of them tell it apart from the catalogue's other titles.
        """
        cut = max(telling_depth, 1)
        if self.style != "brief" or cut >= len(title) - len(self.terminator):
            return tuple(title)
        return (*title[:cut], *self.terminator)

    def header(self, domain: str) -> list[int]:
        """What a `sequence` or `brief` text begins with."""
        start = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        return start + self._encode(f"{domain.replace('_', ' ')}, in the order chosen:\n")

    def prompt(
        self,
        domain: str,
        history: Sequence[str],
        candidates: Sequence[str] | None = None,
        *,
        shown: Mapping[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> list[int]:
        """Tokens after which the next title is to come.

        Args:
            domain: name of the domain.
            history: titles, oldest first; may be empty.
            candidates: titles listed in an `instruct` prompt; not used by the other styles.
            shown: all tokens of a title -> those that `brief` shows, for the catalogue's titles.
        """
        if self.style != "instruct":
            tokens = self.header(domain)
            for title in history:
                whole = self.title(title)
                tokens.extend((shown or {}).get(whole, whole))
            return tokens
        text = self._instruction(domain, history, candidates)
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return [int(token) for token in self.tokenizer.encode(rendered, add_special_tokens=False)]

    def _instruction(
        self, domain: str, history: Sequence[str], candidates: Sequence[str] | None
    ) -> str:
        chosen = " || ".join(self.neutralize(title) for title in history) or "nothing yet"
        lines = [
            f"A user of {domain.replace('_', ' ')} chose, in this order: {chosen}",
        ]
        if candidates is not None:
            listed = " || ".join(self.neutralize(title) for title in candidates)
            lines.append(f"Candidates: {listed}")
        lines.append("Which title does the user choose next? Answer with the title alone.")
        return "\n".join(lines)

    def _title_tokens(self, title: str) -> tuple[int, ...]:
        body = self._encode(self.neutralize(title))
        if self._control_ids.intersection(body):
            raise ValueError(f"the title {title!r} still holds a control token")
        return (*body, *self.terminator)

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]
