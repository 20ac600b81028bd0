"""The endpoints, and the OpenAPI documents, which load nothing from the network."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from embeddings_pipeline.serve.agents import VERSION, make_agents, routes_of
from embeddings_pipeline.serve.answers import ERRORS, Answer, on_error, on_http_error, on_mistakes
from embeddings_pipeline.serve.gate import LARGEST_BODY, Gate
from embeddings_pipeline.serve.looks import add_page
from embeddings_pipeline.serve.maps import MapAnswer, MapRequest
from embeddings_pipeline.serve.requests import (
    CollectionsAnswer,
    ErrorAnswer,
    HitsAnswer,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
)
from embeddings_pipeline.serve.service import Service

DESCRIPTION = "Searches by meaning in the collections of an embeddings-pipeline. Agents find the same as MCP at /mcp."
MISTAKES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": meaning}
    for status, meaning in {
        401: "The key is missing, or another.",
        404: "There is no such collection or item.",
        422: "Something is asked that cannot be.",
        429: "As many searches are under way as may be; see Retry-After.",
        503: "The database or the model cannot be used just now; see Retry-After.",
    }.items()
}


def make_app(service: Service, key: str | None) -> ASGIApp:
    """The whole service, behind its gate."""
    agents = make_agents(service)
    routes = routes_of(agents, LARGEST_BODY)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        async with agents.session_manager.run():
            yield

    app = FastAPIOffline(
        redoc_url=None,
        title="embeddings-pipeline",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if key else [],  # which tells /docs alone: see the gate
    )
    app.router.routes.extend(routes)
    _add_searches(app, service)
    _add_states(app, service)
    add_page(app)
    for kind in ERRORS:
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(Exception, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_mistakes)
    return Gate(app, key, service.metrics)


def _add_searches(app: FastAPI, service: Service) -> None:
    @app.post("/search", response_model=None, responses={200: {"model": HitsAnswer}, **MISTAKES}, tags=["search"])
    async def search(request: SearchRequest) -> Response:
        """The items nearest in meaning to a text, best first."""
        return Answer(await service.ask(request))

    @app.post("/similar", response_model=None, responses={200: {"model": HitsAnswer}, **MISTAKES}, tags=["search"])
    async def similar(request: SimilarRequest) -> Response:
        """The items nearest in meaning to an item, itself left out. It needs no model."""
        return Answer(await service.ask(request))

    @app.post("/recommend", response_model=None, responses={200: {"model": HitsAnswer}, **MISTAKES}, tags=["search"])
    async def recommend(request: RecommendRequest) -> Response:
        """Items for somebody; without anything that they liked, what is popular. It needs no model."""
        return Answer(await service.ask(request))

    @app.post("/map", response_model=None, responses={200: {"model": MapAnswer}, **MISTAKES}, tags=["search"])
    async def map_of(request: MapRequest) -> Response:
        """A sample of the points of a collection's map, and the points of items that are named."""
        return Answer(await service.show(request))

    @app.get(
        "/collections", response_model=None, responses={200: {"model": CollectionsAnswer}, **MISTAKES}, tags=["search"]
    )
    async def collections() -> Response:
        """What may be searched, what hits have, and by what they may be filtered."""
        return Answer(await service.collections())


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=None, tags=["state"])
    async def healthz() -> Response:
        """The process lives."""
        return Answer({"alive": True})

    @app.get("/readyz", response_model=None, responses={503: {"description": "Not now."}}, tags=["state"])
    async def readyz() -> Response:
        """Searches can be answered: the database is there, its schema is this version's, models are loaded."""
        state = service.readiness.state
        parts = {"database": state.database, "schema": state.schema, "models": state.models}
        return Answer({"ready": state.ready, **parts}, 200 if state.ready else 503)

    @app.get("/metrics", response_model=None, tags=["state"])
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
