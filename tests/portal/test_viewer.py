"""The viewer itself, in a real browser over a real archive: every kind of image that the region sends shows
under the portal's own policies, and one person's priors are that person's. `SCREENSHOTS=folder` keeps what
was seen."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy
import pydicom
import pytest
import uvicorn
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from archive.archive import Archive, ArchiveSettings
from archive.ledger import Ledger
from portal import assets
from portal.app import create_app
from portal.settings import PortalSettings
from tests.datasets import Instance, instance_of, make_instance, make_study
from tests.portal.portals import HASH, PASSWORD, USERS, ArchiveSource, provenance, take_in

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT_S = 90.0
SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"

playwright_api = pytest.importorskip("playwright.sync_api")
image_module = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no chromium here"),
    pytest.mark.skipif(not assets.is_current(), reason="the assets are not made: python -m portal.assets"),
]


def sample(name: str) -> Instance:
    """One of pydicom's files as a study of its own."""
    dataset = pydicom.dcmread(SAMPLES / name)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.StudyDescription = name
    return instance_of(dataset, str(dataset.file_meta.TransferSyntaxUID))


def volume(slices: int = 12) -> list[Instance]:
    """A CT of a sphere, slice by slice, with the geometry that a volume needs."""
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    z, y, x = numpy.mgrid[0:slices, 0:64, 0:64]
    inside = (x - 32) ** 2 + (y - 32) ** 2 + ((z - slices / 2) * 5) ** 2 < 24**2
    values = numpy.where(inside, 1_100 + 10 * (x % 8), 24).astype("<u2")
    return [
        make_instance(
            study_uid=study, series_uid=series, number=i + 1, rows=64, columns=64,
            PixelData=values[i].tobytes(), PixelSpacing=[1, 1], SliceThickness=5, FrameOfReferenceUID=frame,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 5 * i],
            RescaleIntercept=-1_024, RescaleSlope=1, WindowCenter=40, WindowWidth=400,
        )
        for i in range(slices)
    ]  # fmt: skip


@dataclass
class Seen:
    """A signed-in browser before a portal, and what went wrong in it."""

    base: str
    page: playwright_api.Page  # type: ignore[name-defined]
    archive: Archive
    ledger: Ledger
    hosts: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def open(self, study_uid: str, query: str = "") -> None:
        self.errors.clear()
        self.page.goto(f"{self.base}/viewer/viewer?StudyInstanceUIDs={study_uid}{query}")

    def pixels(self, name: str = "") -> NDArray[numpy.uint8]:
        """What the first viewport shows, without its overlays at the edges."""
        shot = self.page.locator(".viewport-element").first.screenshot(timeout=WAIT_S * 1_000)
        if name and os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=str(Path(os.environ["SCREENSHOTS"]) / f"{name}.png"))
        picture = numpy.asarray(image_module.open(BytesIO(shot)).convert("RGB"))
        rows, columns = picture.shape[:2]
        return picture[rows // 8 : rows * 5 // 8, columns // 4 : columns * 3 // 4]

    def until(self, satisfied: Callable[[NDArray[numpy.uint8]], bool], name: str) -> NDArray[numpy.uint8]:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            # The viewer replaces its viewports while it loads.
            with contextlib.suppress(playwright_api.Error):
                found = self.pixels(name)
                if satisfied(found):
                    return found
        raise AssertionError(f"{name}: nothing to see; {self.errors}")


def is_image(picture: NDArray[numpy.uint8]) -> bool:
    return float(picture.std()) > 12 and len(numpy.unique(picture)) > 16


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("viewer")
    ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}")
    for user in USERS:
        ledger.add_user(user, HASH)
    archive = Archive.open(ArchiveSettings(state=folder / "archive", free_bytes_min=0), outbox=False)
    app = create_app(PortalSettings(), ArchiveSource(archive), ledger)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    base = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1_280, "height": 760})
        page.set_default_timeout(WAIT_S * 1_000)
        found = Seen(base, page, archive, ledger)
        page.on("request", lambda r: found.hosts.add(r.url.split("/")[2] if "//" in r.url else ""))
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("console", lambda m: found.errors.append(m.text) if m.type == "error" else None)
        sign_in(found)
        yield found
        browser.close()
    server.should_exit = True
    thread.join()
    archive.close()
    ledger.close()


def sign_in(seen: Seen) -> None:
    if "/login" not in seen.page.url:
        seen.page.goto(f"{seen.base}/")
    seen.page.fill("#name", "doc")
    seen.page.fill("#password", PASSWORD)
    seen.page.click("main button")


@pytest.mark.parametrize(
    ("name", "coloured"),
    [
        ("CT_small.dcm", False),              # explicit little endian
        ("MR_small_RLE.dcm", False),          # RLE
        ("MR_small_jpeg_ls_lossless.dcm", False),
        ("MR_small_bigendian.dcm", False),    # octets are turned here
        ("examples_jpeg2k.dcm", True),        # JPEG 2000, colour US
        ("examples_ybr_color.dcm", False),    # JPEG baseline, 30 frames of US
        ("SC_rgb_jpeg_dcmtk.dcm", True),      # JPEG baseline, YBR
    ],
)  # fmt: skip
def test_it_shows(seen: Seen, name: str, coloured: bool) -> None:
    instance = sample(name)
    take_in(seen.archive, [instance])
    seen.open(instance.study_uid)
    picture = seen.until(is_image, name)
    if coloured:
        assert numpy.abs(picture[..., 0].astype(int) - picture[..., 2].astype(int)).max() > 100
    assert seen.errors == []
    assert seen.hosts <= {seen.base.removeprefix("http://"), ""}


def test_a_volume_is_cut_in_three_planes(seen: Seen) -> None:
    study = volume()
    take_in(seen.archive, study)
    seen.open(study[0].study_uid, "&hangingProtocolId=mpr")
    seen.page.locator(".viewport-element").nth(2).wait_for()
    seen.until(lambda picture: float(picture.std()) > 12, "mpr")
    assert seen.page.locator(".viewport-element").count() == 3
    assert seen.errors == []


def test_priors_are_one_persons(seen: Seen) -> None:
    """Two hospitals, both with a Patient ID 4711; the panel beside one's study never lists the other's."""
    ours = [
        make_study(1, patient_id="4711", StudyDescription=words)[0] for words in ("Knee left", "Knee right")
    ]
    theirs = make_study(1, patient_id="4711", StudyDescription="Skull of somebody else")
    take_in(seen.archive, ours)
    take_in(seen.archive, theirs, provenance("gaslini/paediatrics", "GASLINI"))
    seen.open(ours[0].study_uid)
    seen.page.get_by_text("Knee right").first.wait_for()
    assert seen.page.get_by_text("Skull of somebody else").count() == 0
    seen.open(theirs[0].study_uid)
    seen.page.get_by_text("Skull of somebody else").first.wait_for()
    seen.until(is_image, "priors")
    assert seen.page.get_by_text("Knee").count() == 0


def test_a_session_that_ended_leads_to_sign_in_and_back(seen: Seen) -> None:
    two = [
        make_study(1, patient_id="4712", StudyDescription=words)[0] for words in ("Hand left", "Hand right")
    ]
    take_in(seen.archive, two)
    seen.open(two[0].study_uid)
    seen.page.get_by_text("Hand right").first.wait_for()
    seen.ledger.end_user_sessions("doc")
    with contextlib.suppress(playwright_api.TimeoutError):  # the viewer may have asked already, and be gone
        seen.page.get_by_text("Hand right").first.click(timeout=5_000)
    seen.page.wait_for_url("**/login?next=*")
    sign_in(seen)
    seen.page.wait_for_url(f"**/viewer/viewer?StudyInstanceUIDs={two[0].study_uid}")
    seen.page.get_by_text("Hand left").first.wait_for()


def test_the_pages_work_in_the_browser(seen: Seen) -> None:
    unique = make_study(1, patient_name="Searched^For", StudyDescription="To be found")
    take_in(seen.archive, unique)
    seen.errors.clear()
    seen.page.goto(f"{seen.base}/studies")
    seen.page.fill("[name=name]", "for searched nobody")
    seen.page.locator(".empty").wait_for()
    seen.page.fill("[name=name]", "searched")
    link = seen.page.get_by_role("link", name="Open To be found")
    link.wait_for()
    assert seen.page.url.endswith("/studies?name=searched")
    link.click()
    seen.until(is_image, "opened from the page")
    seen.page.get_by_text("MISS · Studies").click()
    seen.page.wait_for_url("**/studies")
    assert seen.errors == []
