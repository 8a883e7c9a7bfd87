"""The HTTP face: routes, keys, and one JSON form for every error. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from rc_ray import __version__
from rc_ray.serve.catalogue import DomainCatalogue, Limits, Query, find_domain
from rc_ray.serve.schemas import (
    DomainInfo,
    DomainList,
    ErrorBody,
    Health,
    RankRequest,
    RankResponse,
    RequestError,
    explain,
)

API_KEYS_VARIABLE = "RC_RAY_API_KEYS"
_BEARER = HTTPBearer(auto_error=False, description=f"A key of {API_KEYS_VARIABLE}")
_BYTES_PER_ENTRY = 2048
_BYTES_BESIDE_ENTRIES = 65536

_STATUS_TEXTS = {
    404: "no such path; the interface is described at /docs",
    405: "this path does not take that method; the interface is described at /docs",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The body is not JSON",
        401: "No valid API key",
        404: "Unknown domain",
        413: "The body is too large",
        422: "A field is wrong; the text names it",
        503: "Busy, or a replica is starting; try again",
    }.items()
}
# The console is one file: nothing may be loaded from, or sent to, another host.
_CONSOLE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def api_key_digests(text: str | None = None) -> tuple[bytes, ...]:
    """SHA-256 of the comma-separated API keys in `RC_RAY_API_KEYS`, or in `text`.

    The service is handed digests, so that the keys themselves lie in no cluster record.
    """
    text = os.environ.get(API_KEYS_VARIABLE, "") if text is None else text
    keys = (key.strip() for key in text.split(","))
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys if key)


def make_api(
    *,
    catalogues: Mapping[str, DomainCatalogue],
    infos: Sequence[DomainInfo],
    limits: Limits,
    rank: Callable[[Query], Awaitable[RankResponse]],
    key_digests: Sequence[bytes] = (),
) -> FastAPI:
    """The application around anything that ranks queries.

    Args:
        catalogues: by domain.
        infos: what `GET /v1/domains` shows.
        limits: bounds of a request.
        rank: answers one query; raises `RequestError` with the status to reply.
        key_digests: SHA-256 of the accepted API keys; none opens the service to this machine only.
    """
    app = FastAPI(
        title="RecCocktail",
        version=__version__,
        description="Ranks items for a user's history, for many domains on one language model.",
        redoc_url=None,
    )
    max_body = _BYTES_BESIDE_ENTRIES + _BYTES_PER_ENTRY * (
        limits.max_history + limits.max_candidates
    )
    console = resources.files("rc_ray.serve").joinpath("console.html").read_text(encoding="utf-8")

    def authorize(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        _check_key(request, credentials, key_digests)

    @app.middleware("http")
    async def bound_body(
        request: Request, following: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        if request.method in ("POST", "PUT", "PATCH"):
            length = request.headers.get("content-length", "")
            if not length.isascii() or not length.isdigit():
                return _error(411, "send the body with a Content-Length header")
            if int(length) > max_body:
                return _error(
                    413, f"the body has {length} bytes, the limit is {max_body}; send fewer entries"
                )
        return await following(request)

    @app.post("/v1/rank", responses=_ERRORS, dependencies=[Depends(authorize)])
    async def rank_items(request: RankRequest) -> RankResponse:
        """Order candidates, or the whole catalogue, for a history."""
        catalogue = find_domain(catalogues, request.domain)
        return await rank(catalogue.resolve(request, limits))

    @app.get("/v1/domains", responses={401: _ERRORS[401]}, dependencies=[Depends(authorize)])
    async def list_domains() -> DomainList:
        """The served domains, how they are scored, and some items to try."""
        return DomainList(domains=list(infos))

    @app.get("/healthz")
    async def health() -> Health:
        """Answers when the application takes requests."""
        return Health(status="ok", domains=sorted(catalogues))

    @app.get("/", include_in_schema=False)
    async def show_console() -> HTMLResponse:
        return HTMLResponse(console, headers=_CONSOLE_HEADERS)

    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return _error(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = list(error.errors())
        if problems and problems[0]["type"] == "json_invalid":
            reason = problems[0].get("ctx", {}).get("error", "malformed")
            return _error(
                400, f"the body is not JSON: {reason} (character {problems[0]['loc'][-1]})"
            )
        return _error(422, "; ".join(explain(problem) for problem in problems[:5]))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, _STATUS_TEXTS.get(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return _error(500, "the service failed on this request; its log says why")


def _check_key(
    request: Request,
    credentials: HTTPAuthorizationCredentials | None,
    key_digests: Sequence[bytes],
) -> None:
    if not key_digests:
        if _is_loopback(request):
            return
        raise RequestError(
            f"without API keys the service answers this machine only; set {API_KEYS_VARIABLE} "
            "where it is deployed",
            status=401,
        )
    given = credentials.credentials if credentials is not None else ""
    digest = hashlib.sha256(given.encode()).digest()
    # Every key is compared, in constant time: the reply's time tells nothing about any of them.
    matches = [hmac.compare_digest(digest, known) for known in key_digests]
    if not any(matches):
        raise RequestError(
            "no valid API key; send one as `Authorization: Bearer <key>`", status=401
        )


def _is_loopback(request: Request) -> bool:
    if request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return request.client.host in ("localhost", "testclient")


def _error(status: int, text: str) -> JSONResponse:
    # Unpaired surrogates are legal in JSON escapes but not in UTF-8.
    clean = text.encode("utf-8", "replace").decode("utf-8")
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(ErrorBody(error=clean).model_dump(), status_code=status, headers=headers)
