"""A ranker of 42 titles under the tiny model, and prompts of eight users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rc_ray.core.adapters import Adapter
from rc_ray.core.loading import load_language_model
from rc_ray.core.predictions import UnlabeledPrompt
from rc_ray.core.prompts import PromptRenderer, Style
from rc_ray.core.ranking import Ranker
from tests.tiny import ADJECTIVES, NOUNS, make_model

TITLES = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
PROMPTS = [
    UnlabeledPrompt((TITLES[i], TITLES[i + 7]), tuple(range(i, i + 12))) for i in range(0, 24, 3)
]


def make_ranker(
    folder: Path, titles: list[str] = TITLES, style: Style = "sequence", **settings: int
) -> Ranker:
    lm = load_language_model(make_model(folder), torch.float32)
    renderer = PromptRenderer(lm.tokenizer, style)
    return Ranker(lm, "tools", titles, np.arange(len(titles)), renderer, **settings)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(
        {n: replace(pair, scale=pair.scale * factor) for n, pair in adapter.modules.items()}
    )
