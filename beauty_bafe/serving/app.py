"""The endpoints of the service."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from .access import Access
from .answers import UPLOAD, Answer, Change, Description, Health, SearchAnswer, problems
from .batching import Batcher
from .documents import add_documents
from .limits import Refused, Slots, Upload, check_parameters, drain, read_upload
from .metrics import Metrics
from .middleware import Observed
from .settings import MAX_ANSWERS, Settings
from .shop import Served, Shop, encode_mask

log = logging.getLogger(__name__)
Mask = Annotated[bool, Query(description="Whether to send the mask")]
K = Annotated[int, Query(ge=1, le=MAX_ANSWERS, description="Number of answers; fewer if the catalogue is smaller")]
Threshold = Annotated[
    float | None,
    Query(
        allow_inf_nan=False,
        description="Probability (or score, without calibration) from which the best answer counts as known",
    ),
]
FOLLOW_SECONDS = 1.0  # how often the folder is checked for a new version
DESCRIPTION = (
    "Finds the products of a catalogue in pictures. If the service has a token, changes of the catalogue need the header "
    "Authorization: Bearer TOKEN, and so do searches if the catalogue is private."
)


class Service:
    """The state of the service. `load` loads the shop, in a thread; `failed` is called if that raises."""

    def __init__(
        self, load: Callable[[], Shop], settings: Settings, access: Access, failed: Callable[[BaseException], None]
    ) -> None:
        self._load, self._failed = load, failed
        self.settings, self.limits, self.access = settings, settings.limits, access
        self.metrics, self.slots, self.thumbnails = Metrics(), Slots(settings.limits.queue), Slots(settings.limits.queue)
        self.loaded: Shop | None = None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs from the start of the server until the last request has been answered."""
        self.batcher = Batcher(
            lambda kind, contents: self.shop.answer(kind, contents),
            self.settings.batch.size,
            self.settings.batch.wait_ms,
            self.metrics,
            lambda: self.slots.taken,
        )
        self.changing = asyncio.Lock()
        loading = asyncio.create_task(self._start())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await self.batcher.close()

    async def _start(self) -> None:
        try:
            shop = await asyncio.to_thread(self._load)
        except Exception as error:
            self._failed(error)
            return
        self._note(shop.served)
        self.loaded = shop
        log.info("ready: %d pictures, version %s", len(shop.served.retriever), shop.served.version)
        fault = ""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                self._note(await asyncio.to_thread(shop.refresh))
            except Exception as error:  # the previous version is still served
                if str(error) != fault:
                    fault = str(error)
                    log.error("the new version of the catalogue cannot be loaded; still serving the previous one: %s", fault)

    @property
    def shop(self) -> Shop:
        if self.loaded is None:
            raise Refused(503, "model and index are still loading; try again in a second", {"Retry-After": "1"})
        return self.loaded

    @contextmanager
    def stage(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self.metrics.stage(name, time.perf_counter() - start)

    async def submit(self, request: Request, kind: Hashable) -> tuple[Upload, Any]:
        """The picture in a request, and the result for it. Raises Refused."""
        self.access.check_reading(request)
        _ = self.shop
        with self.slots.acquire(), self.stage("request"):
            async with self._in_time():
                upload = await read_upload(request, self.limits)
                return upload, await self.batcher.submit(kind, upload.content)

    async def thumbnail(self, request: Request, id: str) -> bytes:
        """The thumbnail of a product. Raises Refused."""
        self.access.check_reading(request)
        shop = self.shop
        with self.thumbnails.acquire():
            async with self._in_time():
                return await asyncio.to_thread(shop.thumbnail, id, self.settings.thumbnail)

    async def change(self, request: Request, what: Callable[[Upload | None], Served], with_upload: bool) -> Change:
        """Change the catalogue; changes run one at a time. Raises Refused."""
        with self.slots.acquire(), self.stage("change"):
            async with self._in_time():
                upload = await read_upload(request, self.limits) if with_upload else None
                await self.changing.acquire()
            try:  # no time limit from here on, so that a change is completed
                served = await asyncio.to_thread(what, upload)
            finally:
                self.changing.release()
        self._note(served)
        return Change(version=served.version, pictures=len(served.retriever))

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError as error:
            raise Refused(
                504, f"the request took more than {self.limits.seconds:g} seconds, upload included; try again later"
            ) from error
        except ClientDisconnect as error:
            raise Refused(400, "the connection was closed before the picture was complete") from error

    def _note(self, served: Served) -> None:
        self.metrics.pictures.set(len(served.retriever))
        self.metrics.version.set(int(served.version or 0))


def create_app(
    load: Callable[[], Shop], settings: Settings, access: Access, failed: Callable[[BaseException], None]
) -> FastAPI:
    """The service as an ASGI application; see Service for `load` and `failed`."""
    service = Service(load, settings, access, failed)
    app = FastAPI(
        title="beauty_bafe",
        description=DESCRIPTION,
        lifespan=service.lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(check_parameters)],
    )
    app.add_middleware(Observed, metrics=service.metrics)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        await drain(request)
        return JSONResponse({"detail": error.reason}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> JSONResponse:
        await drain(request)
        faults = [f"{'.'.join(str(part) for part in fault['loc'][1:])}: {fault['msg']}" for fault in error.errors()]
        return JSONResponse({"detail": "; ".join(faults)}, 422)

    @app.post("/search", openapi_extra=UPLOAD, responses=problems(401, 403, 413, 415, 422, 429, 503, 504))
    async def search(
        request: Request, k: K = settings.k, threshold: Threshold = settings.threshold, mask: Mask = False
    ) -> SearchAnswer:
        """Search the catalogue for the product in a picture."""
        start = time.perf_counter()
        upload, found = await service.submit(request, ("search", k))
        answers = [
            Answer(
                id=hit.id,
                score=hit.score,
                probability=hit.probability,
                picture=None if hit.path is None else f"/pictures/{quote(hit.id, safe='')}",
            )
            for hit in found.hits
        ]
        if threshold is None:
            threshold = found.retriever.threshold(settings.known_at)
        best = found.hits[0].score if found.hits[0].probability is None else found.hits[0].probability
        return SearchAnswer(
            answers=answers,
            known=None if threshold is None else best >= threshold,
            threshold=threshold,
            mask=_base64(found.mask, upload) if mask else None,
            version=found.version,
            milliseconds=1e3 * (time.perf_counter() - start),
        )

    @app.post("/describe", openapi_extra=UPLOAD, responses=problems(401, 403, 413, 415, 422, 429, 503, 504))
    async def describe(request: Request, mask: Mask = True) -> Description:
        """The descriptor and the mask of a picture."""
        start = time.perf_counter()
        upload, described = await service.submit(request, ("describe", None))
        return Description(
            descriptor=described.vector.tolist(),
            mask=_base64(described.mask, upload) if mask else None,
            version=described.version,
            milliseconds=1e3 * (time.perf_counter() - start),
        )

    @app.post(
        "/catalogue", status_code=201, openapi_extra=UPLOAD, responses=problems(401, 403, 409, 413, 415, 422, 429, 503, 504)
    )
    async def add(request: Request, id: Annotated[str, Query(min_length=1, max_length=200)]) -> Change:
        """Add a product. Searches that start after the response can find it; its picture is stored in the index folder."""
        access.check_writing(request)
        if id in (".", "..") or not id.isprintable():  # no URL could contain it: browsers drop dots, routes end at a newline
            raise Refused(422, f"{id!r} cannot be an id; use printable characters, and not only dots")
        shop = service.shop

        def change(upload: Upload | None) -> Served:
            assert upload is not None
            return shop.add(id, upload)

        return await service.change(request, change, with_upload=True)

    @app.delete("/catalogue/{id:path}", responses=problems(401, 403, 404, 409, 429, 503, 504))
    async def remove(request: Request, id: str) -> Change:
        """Remove a product. Searches that start after the response do not find it."""
        access.check_writing(request)
        shop = service.shop
        return await service.change(request, lambda _: shop.remove(id), with_upload=False)

    @app.head("/pictures/{id:path}", include_in_schema=False)
    @app.get("/pictures/{id:path}", response_class=Response, responses=problems(401, 403, 404, 429, 503, 504))
    async def picture(request: Request, id: str) -> Response:
        """The thumbnail of a product, as JPEG."""
        content = await service.thumbnail(request, id)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Health:
        """Whether the service is alive."""
        return Health(status="ok")

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=problems(503))
    async def ready() -> Health:
        """Whether model and index are loaded."""
        _ = service.shop
        return Health(status="ok")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and durations for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_documents(app)
    return app


def _base64(mask: np.ndarray | None, upload: Upload) -> str | None:
    return None if mask is None else base64.b64encode(encode_mask(mask, upload.width, upload.height)).decode()
