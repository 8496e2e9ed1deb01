"""WADO-RS rendered images and thumbnails (PS3.18 10.4.1.1.3 and 4): JPEG or PNG, windowed here, without any
patient identity in them. What no installed decoder can read is 406, in words."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from archive.dataset import recoding
from archive.errors import CannotUnderstand, InvalidQuery, TooLarge
from archive.model import StoredInstance
from portal import pixels
from portal.context import Context
from portal.dicomweb import accept_of, base_url, locate, reading
from portal.frames import frame_numbers
from portal.negotiate import MediaRange, NotAcceptable, first, forbid_mixture
from portal.pixels import View
from portal.retrieve import PATHS

INSTANCE = PATHS[-1]
NO_ANNOTATION = "The annotation parameter is not supported. The image is rendered without annotations."
FUNCTIONS = frozenset({"linear"})  # the one of PS3.18 8.3.5.1.4 that is drawn here
THUMBNAIL = View(width=128, height=128, quality=80)


class Rendered:
    """The routes below `root`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def routes(self, root: str) -> list[BaseRoute]:
        return [
            Route(f"{root}{INSTANCE}/rendered", self.rendered),
            Route(f"{root}{INSTANCE}/frames/{{frames}}/rendered", self.rendered),
            Route(f"{root}{INSTANCE}/frames/{{frames}}/thumbnail", self.thumbnail),
            *(Route(f"{root}{path}/thumbnail", self.thumbnail) for path in PATHS),
        ]

    async def rendered(self, request: Request) -> Response:
        return await self._picture(request, read_view(request.query_params))

    async def thumbnail(self, request: Request) -> Response:
        view = read_view(request.query_params)
        box = View(view.width or THUMBNAIL.width, view.height or THUMBNAIL.height, quality=THUMBNAIL.quality)
        return await self._picture(request, box)

    async def _picture(self, request: Request, view: View) -> Response:
        ranges = accept_of(request)
        forbid_mixture(ranges)
        media_type = picture_type(ranges)
        numbers = frame_numbers(request.path_params.get("frames", "1"))
        if len(numbers) > 1:
            raise NotAcceptable("one frame at a time is rendered")
        _, found = await locate(self._context, request, "view")
        wait = reading(self._context, found)
        middle = await wait.run(self._context.source.arrived, found[len(found) // 2])
        body = await self._context.decode.run(
            self._render, middle, numbers[0], view, media_type
        )
        headers = {}
        if request.query_params.get("annotation"):
            headers["Warning"] = f"299 {base_url(request)}/dicom-web: {NO_ANNOTATION}"
        return Response(body, media_type=media_type, headers=headers)

    def _render(self, stored: StoredInstance, number: int, view: View, media_type: str) -> bytes:
        bytes_max = self._context.settings.dicomweb.decoded_bytes_max
        if not recoding.can_be_explicit(stored, bytes_max):
            raise NotAcceptable(f"{stored.head.transfer_syntax_uid} can't be decoded here, or is too large")
        with self._context.source.open_payload(stored) as payload:
            try:
                return pixels.picture(payload, stored, number, view, media_type, bytes_max)
            except (CannotUnderstand, TooLarge) as error:
                raise NotAcceptable(f"this image can't be rendered: {error}") from error


def picture_type(ranges: list[MediaRange]) -> str:
    """JPEG is the default, PNG needs no library (W7). A range of octets is how one viewer asks for
    thumbnails."""
    offers = [("image/jpeg", "image/jpeg")] if pixels.can_jpeg() else []
    chosen = first(ranges, [*offers, ("image/png", "image/png")])
    if chosen is None:
        raise NotAcceptable("images are rendered as image/png" + (" or image/jpeg" if offers else ""))
    return chosen[1]


def read_view(parameters: Mapping[str, str]) -> View:
    """The viewport, window and quality of PS3.18 8.3.5; whatever can't be one of them is a 400."""
    try:
        width, height = _box(parameters.get("viewport", ""))
        center, window = _window(parameters.get("window", ""))
        quality = int(parameters.get("quality", "90"))
    except ValueError:
        raise InvalidQuery("viewport is w,h; window is center,width,linear; quality is 1 to 100") from None
    if not 1 <= quality <= 100:
        raise InvalidQuery("quality is 1 to 100")
    return View(width, height, center, window, quality)


def _box(text: str) -> tuple[int | None, int | None]:
    if not text:
        return None, None
    width, height = (int(part) for part in text.split(",")[:2])
    if not (0 < width <= pixels.SIDE_MAX and 0 < height <= pixels.SIDE_MAX):
        raise ValueError(text)
    return width, height


def _window(text: str) -> tuple[float | None, float | None]:
    if not text:
        return None, None
    center_text, width_text, *function = text.split(",")
    center, width = float(center_text), float(width_text)
    if not (abs(center) < 1e9 and 0 < width < 1e9):
        raise ValueError(text)
    if function and function[0].strip().lower() not in FUNCTIONS:
        raise ValueError(text)
    return center, width
