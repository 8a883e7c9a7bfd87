"""Best-first search against scoring the whole catalogue, plainly."""

import numpy as np
import pytest
import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.frontier import BranchTree, Frontier
from rc_ray.core.loading import load_language_model
from rc_ray.core.model import AdapterMix
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.search import Found, top_k
from rc_ray.core.trie import CatalogueTrie
from tests.tiny import ADJECTIVES, NOUNS, make_model

TITLES = [
    *(f"{a} {n}" for a in ADJECTIVES for n in NOUNS),
    *("Red", "Red Lamp 2", "Blue Lamp", "Blue Lamp", "Old Piano (1999)", "Zebra crossing ahead"),
]
HISTORIES = [
    ["Old Piano", "Red Lamp", "Zebra crossing ahead"],
    [],
    ["Blue Lamp", "Unheard of", "Grand Ladder"],
    ["Blue Lamp", "Blue Lamp", "Red"],
]


@pytest.fixture(scope="module", params=[0, 1, 2])
def ranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    folder = make_model(tmp_path_factory.mktemp("model"), seed=request.param)
    lm = load_language_model(folder, torch.float32)
    clicks = np.random.default_rng(request.param).integers(0, 30, len(TITLES))
    return Ranker(lm, "tools", TITLES, clicks, PromptRenderer(lm.tokenizer), tokens_per_batch=512)


@pytest.fixture(scope="module")
def empty(ranker: Ranker) -> np.ndarray:
    with torch.no_grad():
        return ranker.empty_log_likelihoods().numpy()


@pytest.fixture(scope="module")
def exact(ranker: Ranker) -> np.ndarray:
    """(users, 2, I) by the path that scores every title."""
    with torch.no_grad():
        whole = ranker.prepare(HISTORIES, [range(len(TITLES))] * len(HISTORIES))
        return np.stack([scores.numpy() for scores in ranker.score(whole)]).astype(np.float64)


LOG_PRIOR = np.log(np.random.default_rng(5).dirichlet(np.ones(len(TITLES))))


ROUNDING = 1e-4


def check(found: Found, scores: np.ndarray, k: int) -> None:
    """Nothing better than the k-th best is missing, nothing worse is there."""
    finite = np.sort(scores[np.isfinite(scores)])[::-1]
    last = finite[min(k, len(finite)) - 1]
    assert found.is_proved
    assert set(np.flatnonzero(scores > last + ROUNDING)) <= set(found.items)
    assert set(found.items) <= set(np.flatnonzero(scores >= last - ROUNDING))
    assert len(set(found.items)) == len(found.items) >= min(k, len(finite))
    assert found.scores == pytest.approx(scores[list(found.items)], abs=ROUNDING)
    assert list(found.scores) == sorted(found.scores, reverse=True)


@pytest.mark.parametrize("prior_in_trie", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_search_equals_scoring_every_title(
    ranker: Ranker, empty: np.ndarray, exact: np.ndarray, k: int, prior_in_trie: bool
) -> None:
    for alpha in (0.0, 0.5, 1.0):
        for gamma in (0.0, 1.0):
            added = gamma * LOG_PRIOR - alpha * empty[int(prior_in_trie)]
            for exact_nodes in (0, 10_000):
                found = top_k(
                    ranker,
                    HISTORIES,
                    k,
                    alpha=alpha,
                    gamma=gamma,
                    prior_in_trie=prior_in_trie,
                    empty=empty,
                    log_prior=LOG_PRIOR,
                    exact_nodes=exact_nodes,
                )
                for one, scores in zip(found, exact[:, int(prior_in_trie)], strict=True):
                    check(one, scores + added, k)


def search(ranker: Ranker, k: int = 5, **options: int) -> list[Found]:
    """By raw likelihood, never in one pass."""
    nothing = np.zeros((2, len(TITLES)))
    return top_k(
        ranker,
        HISTORIES,
        k,
        alpha=0.0,
        gamma=0.0,
        prior_in_trie=False,
        empty=nothing,
        log_prior=nothing[0],
        exact_nodes=0,
        **options,
    )


def test_chosen_titles_never_come_again(ranker: Ranker) -> None:
    first, second, third, fourth = search(ranker, k=100)
    shown = [{TITLES[item] for item in found.items} for found in (first, second, third, fourth)]
    assert not shown[0] & set(HISTORIES[0])
    assert shown[1] == set(TITLES)
    assert shown[2] == set(TITLES) - {"Grand Ladder"}  # of "Blue Lamp" two bearers are left
    assert shown[3] == set(TITLES) - {"Red"}


def test_titles_alike_tie_and_come_in_the_order_of_their_numbers(ranker: Ranker) -> None:
    found = search(ranker, k=100)[0]
    alike = [item for item, title in enumerate(TITLES) if title == "Blue Lamp"]
    places = [found.items.index(item) for item in alike]
    assert places == list(range(places[0], places[0] + 3))
    assert len(set(found.scores[places])) == 1
    cut = search(ranker, k=places[0] + 1)[0]  # the k-th best is one of the three
    assert cut.items == found.items[: places[0] + 3]


@pytest.mark.parametrize("max_nodes", [0, 1, 7, 20])
def test_a_search_cut_short_says_so(ranker: Ranker, exact: np.ndarray, max_nodes: int) -> None:
    for found, scores in zip(search(ranker, max_nodes=max_nodes), exact[:, 0], strict=True):
        assert not found.is_proved
        assert found.num_nodes_read <= max_nodes
        assert found.scores == pytest.approx(scores[list(found.items)], abs=ROUNDING)


@pytest.mark.parametrize("tokens_per_batch", [1, 400, 100_000])
def test_users_who_wait_for_memory_lose_nothing(
    ranker: Ranker,
    exact: np.ndarray,
    tokens_per_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranker, "tokens_per_batch", tokens_per_batch)
    for found, scores in zip(search(ranker, k=40), exact[:, 0], strict=True):
        check(found, scores, 40)
    best = search(ranker, k=1)
    assert all(
        one.num_nodes_read < search_all.num_nodes_read
        for one, search_all in zip(best, search(ranker, k=100), strict=True)
    )


def test_adapters_count(ranker: Ranker, exact: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(3)
    pair = LoraPair(
        a=torch.randn(2, 32, generator=generator),
        b=torch.randn(32, 2, generator=generator),
        scale=1,
    )
    adapter = Adapter({"model.layers.1.self_attn.q_proj": pair})
    everything = [range(len(TITLES))] * len(HISTORIES)
    for active in (ranker.lm.using(AdapterMix([adapter])), ranker.lm.folded(adapter)):
        with active, torch.no_grad():
            scores = ranker.log_likelihoods(HISTORIES, everything)
            found = search(ranker)
        for one, own, bare in zip(found, scores, exact[:, 0], strict=True):
            check(one, own.double().numpy(), 5)
            finite = np.isfinite(bare)
            assert np.abs(own.numpy()[finite] - bare[finite]).max() > 0.01


@pytest.mark.parametrize("titles", [["Red", "Red"], ["Red", "Blue"], ["a Lamp", "a River"]])
def test_tiny_catalogues(ranker: Ranker, titles: list[str]) -> None:
    small = Ranker(ranker.lm, "tools", titles, np.zeros(2), ranker.renderer)
    with torch.no_grad():
        expected = small.log_likelihoods([["Old"]], [range(2)])[0].double().numpy()
    for exact_nodes in (0, 100):
        nothing = np.zeros((2, 2))
        found = top_k(
            small, [["Old"]], 1, alpha=0, gamma=0, prior_in_trie=False, empty=nothing,
            log_prior=nothing[0], exact_nodes=exact_nodes,
        )  # fmt: skip
        check(found[0], expected, 1)
        assert len(found[0].items) == (2 if titles[0] == titles[1] else 1)


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_never_lies(seed: int) -> None:
    """Random tries under random log probabilities, read node by node, against plain sums."""
    rng = np.random.default_rng(seed)
    titles = [(*rng.integers(0, 3, rng.integers(1, 6)).tolist(), 9) for _ in range(60)]
    trie = CatalogueTrie(titles)
    tree = BranchTree.of(trie)
    corrections = np.round(rng.normal(0, 3, len(titles)), 1)
    best_below = tree.best_below(corrections)
    for edge in range(len(trie.edge_columns)):
        below = [i for i, p in enumerate(trie.paths) if edge in [d[2] for d in p.decisions]]
        assert best_below[edge] == max(corrections[below])
    read_tokens = sum(map(len, tree.chains))
    assert read_tokens == len({node for path in trie.paths for node in path.nodes})

    log_probs = np.round(np.log(rng.random(len(trie.edge_columns))), 1)  # rounded, so some tie
    log_probs[rng.random(len(log_probs)) < 0.05] = -np.inf
    scores = corrections + [sum(log_probs[d[2]] for d in path.decisions) for path in trie.paths]
    for k in (1, 3, 10):
        frontier = Frontier(tree, corrections, best_below, k)
        while not frontier.is_proved:
            for node, prefix in frontier.best(int(rng.integers(1, 8)), 10_000):
                edges = np.arange(tree.first_edge[node], tree.first_edge[node + 1])
                frontier.extend(edges, prefix + log_probs[edges])
        items, found = frontier.found()
        finite = np.sort(scores[np.isfinite(scores)])[::-1]
        last = finite[min(k, len(finite)) - 1]
        clear = set(np.flatnonzero(scores > last + 1e-9))
        assert clear <= set(items) <= set(np.flatnonzero(scores > last - 1e-9))
        assert found == pytest.approx(scores[list(items)], abs=1e-9)
