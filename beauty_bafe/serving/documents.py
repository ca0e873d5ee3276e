"""HTML pages: one to try the service, one with its endpoints. Neither loads anything from other servers."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

PAGE, DOCS = (Path(__file__).with_name(name) for name in ("page.html", "docs.html"))
# Nothing from other servers, only the page's own script, and no framing.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src {script}; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def add_documents(app: FastAPI) -> None:
    """Add `GET /`, the page, and `GET /docs`, the endpoints of `app` in plain HTML."""
    from jinja2 import Template

    page = PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Template(DOCS.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY.format(script=f"'sha256-{allowed}'")})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        text = template.render(api=app.openapi())
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.format(script="'none'")})
