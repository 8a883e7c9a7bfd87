"""The HTTP face around a ranker that answers in catalogue order: no model, no Ray."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rc_ray.serve.api import api_key_digests, make_api
from rc_ray.serve.catalogue import DomainCatalogue, Limits, Query
from rc_ray.serve.schemas import RankedItem, RankResponse, RequestError

CATALOGUE = DomainCatalogue("films", ["1", "2"], ["Alien", "<b>Blade</b>"], np.array([3, 5]))
LIMITS = Limits(max_history=3, max_candidates=20, max_titles=2, max_title_characters=50)


async def rank(query: Query) -> RankResponse:
    if query.titles == ("Alien", "Alien"):
        raise RequestError("too many requests are waiting; try again", status=503)
    if query.k == 999:
        raise ZeroDivisionError
    item = RankedItem(item_id="1", title="Alien", score=0.5, rank=1)
    return RankResponse(domain="films", system="cocktail", items=[item], unknown_history=[])


def make_client(keys: str = "", host: str = "127.0.0.1") -> TestClient:
    info = CATALOGUE.describe(
        system="cocktail",
        alpha=1.0,
        gamma=0.5,
        prior_in_trie=True,
        calibrated=False,
        calibration="It is so.",
    )
    app = make_api(
        catalogues={"films": CATALOGUE},
        infos=[info],
        limits=LIMITS,
        rank=rank,
        key_digests=api_key_digests(keys),
    )
    return TestClient(app, raise_server_exceptions=False, client=(host, 50000))


@pytest.fixture(scope="module")
def client() -> TestClient:
    return make_client()


BODY = {"domain": "films", "history": ["Alien"]}


def test_a_good_request(client: TestClient) -> None:
    reply = client.post("/v1/rank", json=BODY)
    assert reply.status_code == 200
    assert reply.json()["items"] == [{"item_id": "1", "title": "Alien", "score": 0.5, "rank": 1}]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"k": 0}, 422, "`k`: input should be greater than or equal to 1"),
        ({"k": 1001}, 422, "`k`: input should be less than or equal to 1000"),
        ({"k": "5"}, 422, "`k`: input should be a valid integer"),
        ({"k": True}, 422, "`k`"),
        ({"history": ["Alien", 7]}, 422, "`history.1`: input should be a valid string"),
        ({"history": ["x" * 501]}, 422, "`history.0`: string should have at most 500"),
        ({"history": [" "]}, 422, "`history.0`"),
        ({"history": ["\ud800"]}, 422, "`history.0`"),
        ({"history": None}, 422, "`history`"),
        ({"history": ["Alien"] * 4}, 422, "4 entries, the limit is 3"),
        ({"history": ["Dune"]}, 422, "no entry of `history` is known"),
        ({"candidates": ["Dune"]}, 422, "unknown in the domain films: 'Dune'"),
        ({"candidates": ["1"] * 21}, 422, "21 entries, the limit is 20"),
        ({"domain": "songs"}, 404, "unknown domain 'songs'; served: films"),
        ({"user": "u1"}, 422, "unknown field `user`; known: domain, history, candidates, k"),
        ({"history": ["Alien", "Alien"]}, 503, "try again"),
        ({"k": 999}, 500, "its log says why"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    client: TestClient, change: dict[str, object], status: int, words: str
) -> None:
    body = json.dumps({**BODY, **change})
    reply = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert words in reply.json()["error"]
    assert "\n" not in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"domain": ', 400, "not JSON"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 120_000, 413, "limit"),
        (b"[" * 90_000, 400, ""),
        (b"[]", 422, "JSON object"),
        (b"", 422, "JSON object"),
        (b'{"domain": "films", "history": [], "k": NaN}', 422, "`k`"),
        (b'{"domain": "films"}', 422, "`history` is missing"),
    ],
)
def test_a_body_that_is_no_request(
    client: TestClient, body: bytes, status: int, words: str
) -> None:
    reply = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert words in reply.json()["error"]


def test_a_body_without_a_length_is_refused(client: TestClient) -> None:
    reply = client.post("/v1/rank", content=iter([b"{}"]))
    assert reply.status_code == 411


def test_keys(client: TestClient) -> None:
    guarded = make_client(keys="first, second,")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic second"}):
        for reply in (
            guarded.post("/v1/rank", json=BODY, headers=headers),
            guarded.get("/v1/domains", headers=headers),
        ):
            assert reply.status_code == 401
            assert "API key" in reply.json()["error"]
    good = {"Authorization": "Bearer second"}
    assert guarded.post("/v1/rank", json=BODY, headers=good).status_code == 200
    assert guarded.get("/healthz").status_code == 200


def test_without_keys_only_this_machine_is_answered() -> None:
    assert make_client(host="::1").get("/v1/domains").status_code == 200
    far = make_client(host="203.0.113.9")
    assert far.get("/v1/domains").status_code == 401
    assert "RC_RAY_API_KEYS" in far.post("/v1/rank", json=BODY).json()["error"]
    assert far.get("/healthz").status_code == 200


def test_domains_health_interface_and_console(client: TestClient) -> None:
    domain = client.get("/v1/domains").json()["domains"][0]
    assert (domain["name"], domain["num_items"], domain["system"]) == ("films", 2, "cocktail")
    assert (domain["alpha"], domain["gamma"], domain["calibrated"]) == (1.0, 0.5, False)
    assert domain["calibration"] == "It is so."
    assert [example["item_id"] for example in domain["examples"]] == ["2", "1"]
    assert client.get("/healthz").json() == {"status": "ok", "domains": ["films"]}
    assert set(client.get("/openapi.json").json()["paths"]) == {
        "/v1/rank",
        "/v1/domains",
        "/healthz",
    }
    assert client.get("/docs").status_code == 200
    assert client.get("/nowhere").json()["error"].startswith("no such path")
    assert client.get("/v1/rank").status_code == 405


def test_the_console_writes_titles_as_text_only_and_loads_nothing(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for risky in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http"):
        assert risky not in page.text
