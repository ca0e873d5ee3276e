"""Limits on requests: how many at once, how large, which pictures. Request bodies stay in memory."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ExifTags, Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from .settings import Kind, Limits

# The first bytes of the file types that can be allowed.
SIGNATURES: dict[Kind, tuple[bytes, ...]] = {
    "jpeg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*"),
}
PNG_EXIF = (b"eXIf", b"Raw profile type exif")
ENVELOPE = 16384  # bytes that a multipart body may add to a picture


class Refused(Exception):
    """A request that is answered with an error: the HTTP status, the reason in words, further headers."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Upload(NamedTuple):
    """An encoded picture, its type (a key of SIGNATURES), and its size as displayed."""

    content: bytes
    kind: str
    width: int
    height: int


class Slots:
    """Limits how many requests with a picture or a change of the catalogue are processed at once.

    They are counted before their bodies are read, which limits the memory for all of them.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Occupy one slot. Raises Refused (429) if all are taken."""
        if self.taken >= self.limit:
            raise Refused(429, f"{self.limit} requests are already in progress; try again in a second", {"Retry-After": "1"})
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def check_parameters(request: Request) -> None:
    """Raises Refused (422) for a misspelled parameter in the URL, which would otherwise be silently ignored."""
    allowed = [field.alias for field in request.scope["route"].dependant.query_params]
    unknown = [name for name in request.query_params if name not in allowed]
    # Endpoints without parameters ignore them, as monitors and caches append their own.
    if allowed and unknown:
        raise Refused(422, f"'{unknown[0]}' is not a parameter in this URL; allowed are {', '.join(allowed)}")


async def read_upload(request: Request, limits: Limits) -> Upload:
    """Read the picture in a request. Raises Refused: 413, 415 or 422, with the reason."""
    content = await _read_picture(request, limits)
    request.state.upload_bytes = len(content)
    return await asyncio.to_thread(check_picture, content, limits)


async def _read_picture(request: Request, limits: Limits) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/"):
        return b"".join([chunk async for chunk in _chunks(request, limits.upload_bytes, limits)])
    if kind != "multipart/form-data":
        came = f"the content type is '{kind}'" if kind else "the request has no content type"
        raise Refused(
            415,
            f"{came}; send a form with the file 'image' (curl -F image=@photo.jpg), or the picture itself as image/jpeg",
        )
    chunks = _chunks(request, limits.upload_bytes + ENVELOPE, limits)
    parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=0)
    parser.spool_max_size = limits.upload_bytes + ENVELOPE + 1  # never rolls over to a file on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        text = error.message if isinstance(error, MultiPartException) else "it cannot be read"
        raise Refused(
            422,
            f"bad form: {text.rstrip('.')}. The form may hold one file, 'image'; settings go into the URL, as in /search?k=5",
        ) from error
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise Refused(422, "the form holds no file 'image'; type curl -F image=@photo.jpg")
    content = await image.read()
    if len(content) > limits.upload_bytes:
        raise _too_large(limits)
    return content


async def _chunks(request: Request, most: int, limits: Limits) -> AsyncGenerator[bytes, None]:
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise _too_large(limits)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the upload is over {limits.upload_bytes:,} bytes; shrink the picture first")


async def drain(request: Request) -> None:
    """Keep reading for up to a second what a refused client still sends, as many read the response only after that."""
    waiting = request.headers.get("expect", "").lower() == "100-continue"  # reading would invite the client to send
    if request.method == "POST" and not waiting and not getattr(request.state, "body_read", False):
        try:
            async with asyncio.timeout(1):
                while (message := await request.receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except (TimeoutError, ClientDisconnect):
            pass


def check_picture(content: bytes, limits: Limits) -> Upload:
    """Check the header of an encoded picture, without decoding any pixels.

    Raises Refused: 413 for too many pixels, 415 for a file type that is not allowed, 422 if the header cannot be read.
    """
    allowed = ", ".join(limits.kinds)
    kind = next((name for name, starts in SIGNATURES.items() if content.startswith(starts)), None)
    if kind == "webp" and content[8:12] != b"WEBP":
        kind = None
    if not content:
        raise Refused(422, "the picture is empty (0 bytes)")
    if kind is None or kind not in limits.kinds:
        raise Refused(415, f"this is {'not a picture of a known type' if kind is None else kind}; allowed are {allowed}")
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as image:
            width, height = image.size
            small = width * height <= limits.pixels
            # Pillow decodes a PNG to look for an orientation, which may come after the pixels.
            marked = small and (kind != "png" or any(mark in content for mark in PNG_EXIF))
            turned = marked and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Image.DecompressionBombError as error:
        raise Refused(413, f"the picture has more than {limits.pixels:,} pixels; shrink it first") from error
    except Exception as error:  # Pillow's plugins raise anything from OSError to SyntaxError and struct.error
        if isinstance(error, MemoryError):
            raise
        raise Refused(422, f"the {kind} file is broken: its header cannot be read") from error
    if not small:
        raise Refused(413, f"the picture is {width} x {height}, over {limits.pixels:,} pixels; shrink it first")
    return Upload(content, kind, *((height, width) if turned else (width, height)))
