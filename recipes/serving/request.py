"""Requests to the service: an image is read within bounds and classified, or refused with a reason."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from synthkit import standalone
from synthkit.recipes.serving.live_bundle import Current

if TYPE_CHECKING:
    from starlette.requests import Request

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded. Others that Pillow reads start programs (EPS) or hold further images (ICO)."""

_MAX_FIELDS = 8


@dataclass(frozen=True)
class Limits:
    """Bounds on the work that clients can cause.

    Attributes:
        body_bytes: largest request body.
        pixels: largest image, width times height.
        waiting: most requests in work and in the queue.
        jobs: images that are decoded and classified at the same time.
        seconds: how long a client may take to send a request's body.
    """

    body_bytes: int = 10 * 2**20
    pixels: int = 25_000_000
    waiting: int = 32
    jobs: int = 2
    seconds: float = 20.0


class Refusal(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        reason: the cause, for the client.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


@dataclass(frozen=True)
class Answer:
    """The class of one image, as `synthkit predict` gives it for the same file.

    Attributes:
        label: the class, or "unknown" below the bundle's threshold.
        score: its probability.
        top: (label, probability) of the most probable classes.
        set: labels that are likely enough to be right; None where the bundle has no conformal threshold.
        version: of the bundle.
        precision: of the model.
    """

    label: str
    score: float
    top: list[list[Any]]
    set: list[str] | None
    version: int
    precision: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for the response; without `set` where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def number_of_labels(request: Request) -> int:
    """Number of labels that a request asks for by `?top=N`; 3 by default.

    Raises:
        Refusal: 400 for anything but a whole number from 1.
    """
    text = request.query_params.get("top", "3")
    if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) > 0):
        raise Refusal(400, f"top must be a whole number from 1 to 999999, got {text[:40]!r}")
    return int(text)


async def image_bytes(request: Request, limits: Limits) -> bytes:
    """The image file that a request carries: its body, or the one file of a multipart form.

    Raises:
        Refusal: 400, 408 or 413.
    """
    import anyio

    try:
        with anyio.fail_after(limits.seconds):
            body = await _body(request, limits.body_bytes)
    except TimeoutError:
        reason = f"the body did not arrive within {limits.seconds:g} s"
        raise Refusal(408, reason, {"Connection": "close"}) from None
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body = await _uploaded(request, body)
    if not body:
        raise Refusal(400, "no image: send one as the request's body, or as the file of a multipart form")
    return body


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body; the server throws away what a refused client still sends."""
    too_large = Refusal(413, f"the body is larger than {max_bytes} bytes; send a smaller image")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def _uploaded(request: Request, body: bytes) -> bytes:
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(
            max_files=1, max_fields=_MAX_FIELDS, max_part_size=len(body)
        ) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            return await files[0].read() if files else b""
    except HTTPException as error:
        raise Refusal(400, f"this multipart form cannot be read: {error.detail}") from None


def classify(current: Current, data: bytes, top: int, max_pixels: int) -> Answer:
    """Classify one image.

    Args:
        current: the bundle.
        data: content of the image file.
        top: number of labels.
        max_pixels: largest image, width times height.

    Raises:
        Refusal: 413, 415 or 422: too many pixels, no image, or a broken one.
    """
    _check_head(data, max_pixels)
    try:
        image = standalone.open_image(io.BytesIO(data))
    except standalone.UnusableImage as error:
        raise Refusal(422, f"this image cannot be decoded: {error}") from None
    bundle = current.bundle
    logits = bundle.logits(bundle.preprocessing(image)[np.newaxis])
    ranked = standalone.prediction("", logits[0], bundle.labels, len(bundle.labels))
    prediction = standalone.decided(ranked, current.confidence, top)
    return Answer(
        prediction["label"],
        prediction["score"],
        prediction["top"],
        prediction.get("set"),
        bundle.facts.version,
        bundle.precision,
    )


def _check_head(data: bytes, max_pixels: int) -> None:
    """Refuse by the file's head alone a file that is no image or too large to decode."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    # The warning is raised where warnings are errors.
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refusal(413, f"the image has more than {max_pixels} pixels; send a smaller one") from None
    except Exception:  # decoders raise whatever a broken head provokes
        raise Refusal(415, f"not an image that this service reads ({', '.join(FORMATS)})") from None
    if width * height > max_pixels:
        raise Refusal(
            413, f"the image has {width}x{height} pixels, more than {max_pixels} in all; send a smaller one"
        )
