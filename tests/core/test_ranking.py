"""One-pass scoring against scoring each candidate by itself, plainly."""

import numpy as np
import pytest
import torch

from rc_ray.core import ranking
from rc_ray.core.loading import load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker, best_first, calibrated
from tests.tiny import ADJECTIVES, NOUNS, make_model

TITLES = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS] + ["Red", "Red Lamp 2", "Blue Lamp"]
HISTORIES = [["Old Piano", "Red Lamp"], [], ["Tiny River", "Loud Engine", "Grand Ladder"]]
CANDIDATES = [[0, 42, 43, 7, 20], [5, 0, 30], list(range(len(TITLES)))]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(make_model(tmp_path_factory.mktemp("model")), torch.float32)


NUM_TRAIN = np.arange(len(TITLES)) % 5


def plain_log_likelihood(
    lm: LanguageModel,
    renderer: PromptRenderer,
    history: list[str],
    item: int,
    listed: list[int],
    *,
    with_prior: bool,
) -> float:
    """The definition, with lists of titles in place of a trie and one pass per title."""
    titles = [renderer.title(title) for title in TITLES]
    left = list(range(len(TITLES)))
    for title in history:  # one bearer of each chosen title is gone, unless it is listed
        bearers = [i for i in left if TITLES[i] == title]
        whole = len(listed) == len(TITLES)
        if bearers and (whole or TITLES[bearers[0]] not in [TITLES[i] for i in listed]):
            left.remove(bearers[0])
    prompt = renderer.prompt("tools", history)
    tokens = titles[item]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double()
    total = 0.0
    for depth, token in enumerate(tokens):
        alike = [i for i in left if titles[i][:depth] == tokens[:depth]]
        children = sorted({titles[i][depth] for i in alike})
        if token not in children:
            return -np.inf
        values = logits[len(prompt) + depth - 1][children]
        if with_prior:
            clicks = torch.zeros(len(children), dtype=torch.float64)
            for i in alike:
                clicks[children.index(titles[i][depth])] += float(NUM_TRAIN[i] + 1)
            values = values + clicks.log()
        total += float(torch.log_softmax(values, dim=-1)[children.index(token)])
    return total


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_one_pass_equals_one_by_one(
    lm: LanguageModel, tokens_per_batch: int, with_prior: bool
) -> None:
    renderer = PromptRenderer(lm.tokenizer)
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, renderer, tokens_per_batch=tokens_per_batch)
    with torch.no_grad():
        scores = ranker.log_likelihoods(HISTORIES, CANDIDATES, with_prior=with_prior)
    for history, items, found in zip(HISTORIES, CANDIDATES, scores, strict=True):
        expected = [
            plain_log_likelihood(lm, renderer, history, item, items, with_prior=with_prior)
            for item in items
        ]
        assert found.numpy() == pytest.approx(np.array(expected), abs=1e-4)


@pytest.mark.parametrize("with_prior", [False, True])
def test_a_title_told_again_takes_nothing_from_its_neighbours(
    lm: LanguageModel, with_prior: bool
) -> None:
    """ "Red Lamp" has one bearer, "Blue Lamp" two, and neighbours that begin alike."""
    renderer = PromptRenderer(lm.tokenizer)
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, renderer)
    history = ["Red Lamp", "Blue Lamp"] * 4
    twin, whole = TITLES.index("Red Lamp 2"), list(range(len(TITLES)))
    for items in ([twin, 8, 20], whole):
        with torch.no_grad():
            (found,) = ranker.log_likelihoods([history], [items], with_prior=with_prior)
        expected = [
            plain_log_likelihood(lm, renderer, history, item, items, with_prior=with_prior)
            for item in items
        ]
        assert np.isfinite(expected[items.index(twin)])
        assert found.numpy() == pytest.approx(np.array(expected), abs=1e-4)


def test_long_lists_in_several_rows_give_the_same(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer))
    with torch.no_grad():
        whole = ranker.log_likelihoods(HISTORIES, CANDIDATES)
        monkeypatch.setattr(ranking, "MAX_TREE_NODES", 10)
        split = ranker.log_likelihoods(HISTORIES, CANDIDATES)
    for a, b in zip(whole, split, strict=True):
        assert a.numpy() == pytest.approx(b.numpy(), abs=1e-4)


def test_probabilities_of_distinct_titles_sum_to_one(lm: LanguageModel) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer))
    distinct = {ranker.trie.leaf_of_item[item]: item for item in range(len(TITLES))}
    assert len(distinct) == len(TITLES) - 1  # "Blue Lamp" stands twice
    with torch.no_grad():
        whole = range(len(TITLES))
        both = ranker.score(ranker.prepare([["Old Piano"]], [whole]))[0]
        empty = ranker.empty_log_likelihoods()
    ones = sorted(distinct.values())
    for scores in (*both, *empty):
        assert float(scores[ones].exp().sum()) == pytest.approx(1.0, abs=1e-5)
    piano = TITLES.index("Old Piano")
    assert both[:, piano].tolist() == [-torch.inf, -torch.inf]  # chosen already
    assert torch.isfinite(empty).all()
    assert empty[:, 7].tolist() == empty[:, 44].tolist()


def test_order_of_candidates_does_not_matter(lm: LanguageModel) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer))
    with torch.no_grad():
        forward = ranker.log_likelihoods([["Old Piano"]], [[3, 9, 27]])[0]
        backward = ranker.log_likelihoods([["Old Piano"]], [[27, 9, 3]])[0]
    assert forward.numpy() == pytest.approx(backward.flip(0).numpy(), abs=1e-5)


def test_only_the_latest_titles_count(lm: LanguageModel) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer), max_titles=1)
    with torch.no_grad():
        long, short, other = ranker.log_likelihoods(
            [["Red Lamp", "Old Piano"], ["Old Piano"], ["Red Lamp"]], [[3, 9, 27]] * 3
        )
    assert long.numpy() == pytest.approx(short.numpy(), abs=1e-5)
    assert long.numpy() != pytest.approx(other.numpy(), abs=1e-3)


def test_instruct_prompts_are_scored_by_the_same_path(lm: LanguageModel) -> None:
    renderer = PromptRenderer(lm.tokenizer, "instruct")
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, renderer)
    with torch.no_grad():
        scores = ranker.log_likelihoods([["Old Piano"]], [[0, 1, 2]])[0]
    assert torch.isfinite(scores).all()


def test_brief_shows_titles_up_to_what_tells_them_apart(lm: LanguageModel) -> None:
    renderer = PromptRenderer(lm.tokenizer, "brief")
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, renderer)
    history = ["Old Piano", "Red Lamp", "Unheard of"]
    # "Red Lamp" begins "Red Lamp 2", so its end is what tells it apart; the last is no item.
    prompt = renderer.header("tools") + lm.tokenizer.encode("Old P\nRed Lamp\nUnheard of\n")
    with torch.no_grad():
        found = ranker.log_likelihoods([history], [[0, 7, 20]])[0]
        for place, item in enumerate((0, 7, 20)):
            tokens = renderer.title(TITLES[item])
            logits = lm.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
            first = sorted({renderer.title(title)[0] for title in TITLES})
            root = torch.log_softmax(logits[len(prompt) - 1][first], dim=-1)
            assert found[place] < root[first.index(tokens[0])] + 1e-4
        whole = ranker.prepare([history], [[0, 7, 20]]).batches[0]
    assert whole.rows[0].prompt == prompt


def test_calibrated_worked_by_hand() -> None:
    scores = calibrated(
        np.array([-1.0, -2.0]), np.array([-0.5, -3.0]), np.array([-4.0, -2.0]), alpha=1, gamma=0.5
    )
    assert scores.tolist() == [-1.0 + 0.5 - 2.0, -2.0 + 3.0 - 1.0]


def test_ties_go_by_item_id() -> None:
    assert best_first(np.array([1.0, 2.0, 1.0, 2.0]), ["d", "c", "a", "b"]) == [3, 1, 2, 0]


@pytest.mark.parametrize("shared_layers", [1, 2])
def test_layers_that_adapters_leave_alone_are_run_once(
    lm: LanguageModel, shared_layers: int
) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer))
    with torch.no_grad():
        whole = ranker.score(ranker.prepare(HISTORIES, CANDIDATES))
        shared = ranker.score(ranker.prepare(HISTORIES, CANDIDATES, shared_layers=shared_layers))
    for a, b in zip(whole, shared, strict=True):
        assert a.numpy() == pytest.approx(b.numpy(), abs=1e-4)


def test_long_requests_do_not_pad_a_full_pass_of_short_ones(lm: LanguageModel) -> None:
    ranker = Ranker(lm, "tools", TITLES, NUM_TRAIN, PromptRenderer(lm.tokenizer))
    histories = [TITLES[i : i + length] for i in range(14) for length in (1, 9)]
    lists = [list(range(i, i + 5)) for i in range(len(histories))]
    prepared = ranker.prepare(histories, lists)
    lengths = [[row.length for row in batch.rows] for batch in prepared.batches]
    assert len(lengths) > 1
    padded = sum(max(rows) * len(rows) for rows in lengths)
    assert padded < 1.2 * sum(map(sum, lengths))
    assert 28 * max(map(max, lengths)) > 1.3 * padded  # what a single pass would read
    with torch.no_grad():
        found = ranker.score(prepared)
        for scores, history, items in zip(found, histories, lists, strict=True):
            (alone,) = ranker.score(ranker.prepare([history], [items]))
            torch.testing.assert_close(scores, alone, atol=1e-4, rtol=0)
    # A few short rows leave a processor idle: they run with longer ones.
    assert len(ranker.prepare(histories[:4], lists[:4]).batches) == 1
