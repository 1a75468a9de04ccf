"""The web page and the API's description, from this machine alone: nothing is loaded from another host."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parents[1] / "page"
SWAGGER = Path(str(files("fastapi_swagger"))) / "resources"
# Swagger UI writes style attributes and has pictures in its style sheet.
_DOCS_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_DOCS = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>cat-cluster API</title>
<link rel="icon" href="page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<script defer src="docs/assets/swagger-ui-bundle.js"></script>
<script defer src="docs/start.js"></script>
</head>
<body><div id="api"></div></body>
</html>
"""
_START = """SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
"""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    """Return the web page."""
    index = PAGE / "index.html"
    if not index.is_file():
        raise HTTPException(404, "this installation has no web page; the API is described at /docs")
    return FileResponse(index, headers={"cache-control": "no-cache"})


@router.get("/docs")
async def docs() -> Response:
    """Return the page that shows the API's description."""
    return Response(_DOCS, media_type="text/html", headers={"content-security-policy": _DOCS_POLICY})


@router.get("/docs/start.js")
async def start_docs() -> Response:
    """Return the script that starts that page."""
    return Response(_START, media_type="text/javascript")


class _RevalidatedFiles(StaticFiles):
    """Files that a browser checks each time: after an upgrade none may be of the previous version."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["cache-control"] = "no-cache"
        return response


def mount_files(app: FastAPI) -> None:
    """Serve the files of both pages."""
    app.mount("/page", _RevalidatedFiles(directory=PAGE, check_dir=False), name="page")
    app.mount("/docs/assets", StaticFiles(directory=SWAGGER), name="swagger")
