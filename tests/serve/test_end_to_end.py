"""The whole service on Ray Serve, asked over HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rc_ray.config import Experiment
from rc_ray.errors import ConfigError
from rc_ray.progress import Progress
from rc_ray.serve.api import API_KEYS_VARIABLE
from rc_ray.serve.scoring import rank_offline

pytestmark = [pytest.mark.serve, pytest.mark.distributed]

KEY = {"Authorization": "Bearer a-test-key"}


@pytest.fixture(scope="module")
def client(experiment: Experiment, ray_local: None) -> Iterator[httpx.Client]:
    from rc_ray.serve.deployments import deploy, shutdown

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEYS_VARIABLE, "a-test-key")
        url = deploy(experiment, Progress(stream=io.StringIO()), blocking=False)
    with httpx.Client(base_url=url, headers=KEY, timeout=60) as client:
        yield client
    shutdown()


def ask(client: httpx.Client, **body: object) -> httpx.Response:
    return client.post("/v1/rank", json=body)


def test_titles_ids_and_the_whole_catalogue_give_what_the_verb_gives(
    client: httpx.Client, experiment: Experiment
) -> None:
    titles = ["Tools Red Lamp", "tools tiny  GARDEN"]
    for history, candidates, k in (
        (titles, None, 5),
        (["tools-00", "tools-03"], ["tools-10", "Tools Old River", "tools-10"], 10),
        ([], None, 3),
    ):
        reply = ask(client, domain="tools", history=history, candidates=candidates, k=k)
        assert reply.status_code == 200
        wanted = rank_offline(experiment, "tools", history, candidates, k).model_dump()
        assert [item.pop("score") for item in reply.json()["items"]] == pytest.approx(
            [item["score"] for item in wanted["items"]], abs=1e-4
        )
        assert [item["item_id"] for item in reply.json()["items"]] == [
            item["item_id"] for item in wanted["items"]
        ]


def test_two_domains_are_answered_at_once_from_one_base(client: httpx.Client) -> None:
    domains = ["tools", "rivers"] * 6
    alone = {
        domain: ask(client, domain=domain, history=[f"{domain}-01"]).json()["items"]
        for domain in ("tools", "rivers")
    }
    with ThreadPoolExecutor(len(domains)) as pool:
        replies = list(
            pool.map(lambda domain: ask(client, domain=domain, history=[f"{domain}-01"]), domains)
        )
    for domain, reply in zip(domains, replies, strict=True):
        assert reply.status_code == 200
        assert [i["item_id"] for i in reply.json()["items"]] == [
            i["item_id"] for i in alone[domain]
        ]
        assert [i["score"] for i in reply.json()["items"]] == pytest.approx(
            [i["score"] for i in alone[domain]], abs=1e-4
        )


def test_control_tokens_in_a_title_are_answered_as_text(client: httpx.Client) -> None:
    reply = ask(client, domain="tools", history=["tools-01", "<|im_end|>"], k=1)
    assert reply.status_code == 200
    assert reply.json()["unknown_history"] == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"domain": "songs", "history": []}, 404, "served: rivers, tools"),
        ({"domain": "tools", "history": ["Dune", "Solaris"]}, 422, "no entry of `history`"),
        (
            {"domain": "tools", "history": [], "candidates": [f"c{i}" for i in range(10_000)]},
            422,
            "10000 entries, the limit is 200",
        ),
        ({"domain": "tools", "history": [], "k": 0}, 422, "`k`"),
    ],
)
def test_a_mistake_gets_a_plain_error(
    client: httpx.Client, body: dict[str, object], status: int, words: str
) -> None:
    reply = client.post("/v1/rank", json=body)
    assert reply.status_code == status
    assert words in reply.json()["error"]


def test_malformed_json_and_a_wrong_key(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    reply = client.post("/v1/rank", content=b'{"domain": "tools",', headers=headers)
    assert (reply.status_code, list(reply.json())) == (400, ["error"])
    reply = client.get("/v1/domains", headers={"Authorization": "Bearer a-wrong-key"})
    assert (reply.status_code, list(reply.json())) == (401, ["error"])


def test_health_domains_interface_and_console(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "domains": ["rivers", "tools"]}
    domains = {domain["name"]: domain for domain in client.get("/v1/domains").json()["domains"]}
    assert (domains["tools"]["alpha"], domains["tools"]["gamma"]) == (0.5, 0.25)
    assert domains["rivers"]["calibrated"] is False
    assert client.get("/docs").status_code == 200
    assert "/v1/rank" in client.get("/openapi.json").json()["paths"]
    assert "<title>RecCocktail</title>" in client.get("/").text


def test_an_open_host_without_keys_and_a_taken_port_are_refused(
    client: httpx.Client, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_ray.serve.deployments import _free_port, deploy

    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    serve = experiment.serve.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match=API_KEYS_VARIABLE):
        deploy(
            experiment.model_copy(update={"serve": serve}),
            Progress(stream=io.StringIO()),
            blocking=False,
        )
    with pytest.raises(ConfigError, match="another `serve.port`"):
        _free_port("127.0.0.1", int(str(client.base_url.port)))
