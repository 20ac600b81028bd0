"""The same searches for agents, by the Model Context Protocol: tools at /mcp, stateless, one answer a request."""

from collections.abc import Awaitable
from importlib.metadata import version
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field, ValidationError
from starlette.routing import Route

from embeddings_pipeline.search.arguments import MOST_HITS, Mode
from embeddings_pipeline.serve.answers import ERRORS, as_json, failure_of, told_mistakes
from embeddings_pipeline.serve.requests import LONGEST_QUERY, RecommendRequest, SearchRequest, SimilarRequest
from embeddings_pipeline.serve.service import Service

PATH = "/mcp"
VERSION = version("embeddings-pipeline")
READS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
INSTRUCTIONS = (
    "Search collections of items by meaning and by words, and recommend items. list_collections says which there are, "
    'what hits have, and what `where` may name: {"release_year": {"gte": 2000}, "genres": {"any": ["Drama"]}, "not": '
    '{"director": "Michael Bay"}}.'
)

# Their limits are those of the requests, which say in one line what is wrong.
Query = Annotated[str, Field(description=f"What to look for, in words; at most {LONGEST_QUERY} characters.")]
Collection = Annotated[str | None, Field(description="Left out: the only one, or `items`.")]
K = Annotated[int, Field(description=f"How many items, 1 to {MOST_HITS}.")]
Where = Annotated[dict[str, Any] | None, Field(description="A condition on the collection's filters.")]
ItemKey = Annotated[str | int, Field(description="An item's key, as a hit has it.")]
ItemKeys = Annotated[list[str | int] | None, Field(description="Items' keys, as hits have them.")]
SearchMode = Annotated[
    Mode | None,
    Field(description="By meaning (dense), by words (text: codes, names), or both (hybrid). Left out: what there is."),
]
User = Annotated[str | int | None, Field(description="Whose history to read, if the collection has interactions.")]
Diversity = Annotated[float | None, Field(description="0: the best, however alike; 1: as unlike as can be.")]


def make_agents(service: Service) -> MCPServer:
    """The server of the tools."""
    server = MCPServer(
        "embeddings-pipeline",
        version=VERSION,
        instructions=INSTRUCTIONS,
        subscriptions=False,
        log_level="ERROR",
    )

    @server.tool(annotations=READS, structured_output=False)
    async def list_collections() -> str:
        """The collections that can be searched: what their hits have, their filters with types, their vectors."""
        return await _told(service.collections())

    @server.tool(annotations=READS, structured_output=False)
    async def search(
        query: Query, collection: Collection = None, k: K = 5, where: Where = None, mode: SearchMode = None
    ) -> str:
        """The items that fit a text best, by meaning, by words or both, with payload, the text that fits, and score."""
        fields = {"query": query, "collection": collection, "k": k, "where": where, "mode": mode}
        return await _told(_asked(service, SearchRequest, **fields))

    @server.tool(annotations=READS, structured_output=False)
    async def similar(item_key: ItemKey, collection: Collection = None, k: K = 5, where: Where = None) -> str:
        """The items nearest in meaning to an item, itself left out."""
        return await _told(_asked(service, SimilarRequest, item_key=item_key, collection=collection, k=k, where=where))

    @server.tool(annotations=READS, structured_output=False)
    async def recommend(
        liked: ItemKeys = None,
        disliked: ItemKeys = None,
        user: User = None,
        collection: Collection = None,
        k: K = 5,
        where: Where = None,
        diversity: Diversity = None,
    ) -> str:
        """Items for somebody: near what they liked, away from what they disliked, none that is named here, not all
        alike. Without any of it: what is popular.
        """
        fields = {"liked": liked or [], "disliked": disliked or [], "user": user, "diversity": diversity}
        return await _told(_asked(service, RecommendRequest, collection=collection, k=k, where=where, **fields))

    return server


def routes_of(server: MCPServer, largest_body: int) -> list[Route]:
    """The endpoint. GET would open a stream that nothing is ever said on: POST alone is there."""
    # The gate in front of it looks at hosts, and at keys.
    app = server.streamable_http_app(
        streamable_http_path=PATH, json_response=True, stateless_http=True, max_request_body_size=largest_body, host=""
    )
    [route] = [route for route in app.routes if isinstance(route, Route) and route.path == PATH]
    return [Route(PATH, endpoint=route.endpoint, methods=["POST"], include_in_schema=False)]


async def _asked(
    service: Service, kind: type[SearchRequest] | type[SimilarRequest] | type[RecommendRequest], **fields: Any
) -> dict[str, Any]:
    try:
        request = kind(**fields)
    except ValidationError as error:
        raise ToolError(told_mistakes(error.errors())) from None
    return await service.ask(request)


async def _told(asked: Awaitable[dict[str, Any]]) -> str:
    """The answer as JSON with every digit, or why there is none, in one line."""
    try:
        return as_json(await asked)
    except ERRORS as error:
        raise ToolError(failure_of(error).line) from None
