"""The page at `/`: files, no build step, nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SCRIPTS = ("page", "canvas", "dom", "filters", "map", "results", "service", "state")
FILES = {
    "/": "index.html",
    "/icon.svg": "icon.svg",
    **{f"/{name}": name for name in ("page.css", "parts.css", *(f"{script}.js" for script in SCRIPTS))},
}


def add_page(app: FastAPI) -> None:
    folder = files("embeddings_pipeline.serve") / "page"
    for path, name in FILES.items():
        kind = KINDS[name[name.rindex(".") :]]
        app.add_api_route(
            path, _giving((folder / name).read_bytes(), kind), include_in_schema=False, response_model=None
        )


def _giving(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return give
