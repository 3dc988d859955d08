"""What is taken from a request for a translation: its query, and its images from the body or a form."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import UploadFile

from models.errors import RequestError, nearest

PARAMETERS = ("to", "source", "seed", "attributes", "strength", "format", "n")
_URL_WORDS = ("url", "image_url", "uri", "href")


def check_query(request: Request) -> None:
    """Refuse parameters that do not exist or are given twice.

    Raises:
        RequestError: E_PARAMETER; E_URL_UNSUPPORTED, for the address of an image.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name in _URL_WORDS:
            raise _no_urls()
        if name not in PARAMETERS:
            raise RequestError(f"unknown parameter '{name[:64]}'", code="E_PARAMETER", hint=nearest(name, PARAMETERS))
        if names.count(name) > 1:
            raise RequestError(f"parameter '{name}' is given twice", code="E_PARAMETER", hint="give it once")


def parse_attributes(text: str | None) -> dict[str, float] | None:
    """`Smiling=1,Young=0` → {"Smiling": 1.0, "Young": 0.0}; None for nothing.

    Raises:
        RequestError: E_ATTRIBUTE.
    """
    if not text:
        return None
    found = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            found[name] = float(value) if equals else 1.0
        except ValueError:
            message = f"attribute '{name[:64]}' has the value '{value[:64]}'"
            raise RequestError(
                message, code="E_ATTRIBUTE", hint="write NAME=0 or NAME=1, separated by commas"
            ) from None
    return found


async def images(request: Request) -> tuple[bytes, bytes | None]:
    """The image and the reference of a request, from a multipart form or as the body itself.

    Raises:
        RequestError: E_REQ_EMPTY, E_PARAMETER, E_URL_UNSUPPORTED.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        body = await request.body()
        if not body:
            hint = "send the image's bytes as the body, or a form with the field 'image'"
            raise RequestError("the request has no body", code="E_REQ_EMPTY", hint=hint)
        return body, None
    found: dict[str, bytes] = {}
    async with request.form(max_files=2, max_fields=2, max_part_size=4096) as form:
        for name, value in form.multi_items():
            if name in _URL_WORDS:
                raise _no_urls()
            if name not in ("image", "reference"):
                message = f"unknown form field '{name[:64]}'"
                raise RequestError(message, code="E_PARAMETER", hint="the fields are 'image' and 'reference'")
            if name in found:
                raise RequestError(f"form field '{name}' is given twice", code="E_PARAMETER", hint="send one file")
            if not isinstance(value, UploadFile):
                hint = "send the image's bytes as a file"
                raise RequestError(f"form field '{name}' is not a file", code="E_PARAMETER", hint=hint)
            found[name] = await value.read()
    if not found.get("image"):
        hint = "send a file in the field 'image'"
        raise RequestError("the form has no image", code="E_REQ_EMPTY", hint=hint)
    return found["image"], found.get("reference")


def _no_urls() -> RequestError:
    hint = "send the image's bytes"
    return RequestError("images are not fetched from addresses", code="E_URL_UNSUPPORTED", hint=hint)
