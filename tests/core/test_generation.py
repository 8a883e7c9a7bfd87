"""The paper's objective: greedy titles and the entropy of their first tokens, by a plainer path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rc_ray.core.generation import GeneratedBatch, generate
from rc_ray.core.model import AdapterMix
from rc_ray.core.predictions import UnlabeledPrompt
from rc_ray.core.ranking import Ranker
from tests.core.small_catalogue import PROMPTS, make_ranker
from tests.core.test_model import random_adapter


@pytest.fixture(scope="module", params=["sequence", "instruct"])
def ranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    folder = tmp_path_factory.mktemp("model")
    return make_ranker(folder, style=request.param)


def texts_of(ranker: Ranker) -> list[list[int]]:
    prompts = [*PROMPTS[:2], UnlabeledPrompt(PROMPTS[2].history[:1], (1, 5))]
    return [ranker.prompt_tokens(prompt.history, prompt.candidates) for prompt in prompts]


def token_by_token(ranker: Ranker, text: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """The title, and the entropy of each of its tokens; the whole text is read for each token."""
    end = ranker.renderer.terminator
    title: list[int] = []
    entropies = []
    while len(title) < num_tokens and title[-len(end) :] != end:
        logits = ranker.lm.model(input_ids=torch.tensor([[*text, *title]])).logits[0, -1].double()
        p = logits.softmax(-1)
        entropies.append(-(p * p.log()).sum())
        title.append(int(logits.argmax()))
    return title, torch.stack(entropies)


def test_greedy_titles_end_where_they_should(ranker: Ranker) -> None:
    texts = texts_of(ranker)
    with torch.no_grad():
        expected = [tuple(token_by_token(ranker, text, 6)[0]) for text in texts]
    assert generate(ranker, texts, 6) == expected
    assert {len(title) for title in generate(ranker, texts, 1)} == {1}


def test_a_title_ends_with_its_terminator(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of(ranker)
    whole = generate(ranker, texts, 6)
    assert len(whole[0]) == 6
    monkeypatch.setattr(ranker.renderer, "terminator", list(whole[0][:2]))
    assert generate(ranker, texts, 6)[0] == whole[0][:2]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_entropy_and_slopes_are_those_of_token_by_token(
    ranker: Ranker, micro_batch_size: int | None
) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    mix = AdapterMix(adapters)
    weights = torch.full((len(mix.modules), 2), 0.5)
    batch = GeneratedBatch(
        ranker, PROMPTS[:3], num_tokens=4, micro_batch_size=micro_batch_size, shared_layers=0
    )
    acting = weights.clone().requires_grad_(True)
    with ranker.lm.using(mix.with_weights(acting)):
        outcome = batch.backward()
    reference = weights.clone().requires_grad_(True)
    with ranker.lm.using(mix.with_weights(reference)):
        texts = [ranker.prompt_tokens(p.history, p.candidates) for p in PROMPTS[:3]]
        loss = torch.stack([token_by_token(ranker, text, 4)[1].mean() for text in texts]).mean()
        loss.backward()
    assert outcome.entropy == pytest.approx(float(loss), abs=1e-4)
    assert acting.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(acting.grad, reference.grad, atol=1e-4, rtol=1e-3)
    assert float(reference.grad.abs().max()) > 1e-2
    assert outcome.num_reliable == 3
