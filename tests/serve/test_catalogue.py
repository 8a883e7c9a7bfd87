import numpy as np
import pytest

from rc_ray.serve.catalogue import DomainCatalogue, Limits, find_domain
from rc_ray.serve.schemas import RankRequest, RequestError

LIMITS = Limits(max_history=4, max_candidates=5, max_titles=2, max_title_characters=10)


@pytest.fixture
def catalogue() -> DomainCatalogue:
    return DomainCatalogue(
        "films",
        ["1", "2", "3", "4", "Alien"],
        ["Alien", "Blade Runner", "Casablanca", "casablanca", "Casablanca"],
        np.array([0, 1, 0, 1, 3]),
    )


def ask(history: list[str], candidates: list[str] | None = None) -> RankRequest:
    return RankRequest(domain="films", history=history, candidates=candidates)


def test_an_id_wins_over_a_title_and_an_exact_title_over_a_loose_one(
    catalogue: DomainCatalogue,
) -> None:
    assert catalogue.find("Alien") == (4,)
    assert catalogue.find("alien") == (0,)
    assert catalogue.find("blade   RUNNER") == (1,)
    assert catalogue.find("Casablanca") == (4, 2), "the most popular bearer first"
    assert catalogue.find("casablanca") == (3,)
    assert catalogue.find("CASABLANCA") == (4, 3, 2)
    assert catalogue.find("Dune") == ()


def test_the_last_titles_count_and_every_bearer_of_a_history_title_is_excluded(
    catalogue: DomainCatalogue,
) -> None:
    query = catalogue.resolve(ask(["1", "Blade Runner", "Casablanca"]), LIMITS)
    assert query.titles == ("Blade Runner", "Casablanca")
    assert query.excluded == {0, 1, 2, 4}
    assert query.candidates is None


def test_a_free_text_title_is_read_but_named(catalogue: DomainCatalogue) -> None:
    query = catalogue.resolve(ask(["1", "Dune, the long version"]), LIMITS)
    assert query.titles == ("Alien", "Dune, the ")
    assert query.unknown_history == ("Dune, the long version",)


def test_a_history_of_unknown_items_is_refused_and_an_empty_one_is_a_new_user(
    catalogue: DomainCatalogue,
) -> None:
    with pytest.raises(RequestError, match="no entry of `history` is known.*'Dune'.*an item id"):
        catalogue.resolve(ask(["Dune", "Solaris"]), LIMITS)
    assert catalogue.resolve(ask([]), LIMITS).titles == ()


def test_repeated_candidates_collapse_and_history_items_may_be_asked_for(
    catalogue: DomainCatalogue,
) -> None:
    query = catalogue.resolve(ask(["1"], ["2", "Blade Runner", "1", "2"]), LIMITS)
    assert query.candidates == (1, 0)
    assert query.excluded == frozenset()


@pytest.mark.parametrize(
    ("history", "candidates", "words"),
    [
        (["1"] * 5, None, "5 entries, the limit is 4"),
        (["1"], ["2"] * 6, "6 entries, the limit is 5"),
        (["1"], [], "`candidates` is empty"),
        (["1"], ["2", "a", "b", "c", "d"], "4 unknown.*'a', 'b', 'c' and 1 more"),
        (["1", "2", "CASABLANCA"], None, "nothing is left"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    catalogue: DomainCatalogue, history: list[str], candidates: list[str] | None, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        catalogue.resolve(ask(history, candidates), LIMITS)
    assert caught.value.status == 422


def test_a_catalogue_above_the_limit_needs_candidates(catalogue: DomainCatalogue) -> None:
    tight = Limits(max_history=4, max_candidates=3, max_titles=2, max_title_characters=10)
    with pytest.raises(RequestError, match="5 items, more than the 3"):
        catalogue.resolve(ask(["1"]), tight)


def test_an_unknown_domain_is_404_and_lists_the_domains(catalogue: DomainCatalogue) -> None:
    with pytest.raises(RequestError, match="'songs'; served: films") as caught:
        find_domain({"films": catalogue}, "songs")
    assert caught.value.status == 404
