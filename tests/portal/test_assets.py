"""The fetched assets: pinned, checked, rebased, and what happens when they are wrong or absent."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from portal import assets
from portal.assets import AssetsError, Package


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_changed_package_is_not_opened(tmp_path: Path) -> None:
    tarball(tmp_path / "htmx.org-4.0.1.tgz", {"package/dist/htmx.min.js": b"evil()"})
    with pytest.raises(AssetsError, match="sha512"):
        assets.check(assets.HTMX, tmp_path)
    with pytest.raises(AssetsError, match="no tarball"):
        assets.check(Package("@ohif/app", "3.13.2", "x"), tmp_path)


def test_a_package_can_not_write_outside(tmp_path: Path) -> None:
    found = tarball(tmp_path / "x.tgz", {"../../outside.txt": b"x"})
    with pytest.raises(tarfile.TarError):
        assets.unpack(found, tmp_path / "in")
    assert not (tmp_path / "outside.txt").exists()


def test_rebasing_moves_absolute_addresses_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text('__webpack_require__.p = "/";')
    (tmp_path / "a.css").write_text("b{background:url(/x.png)} c{background:url(//cdn/x)}")
    (tmp_path / "index.html").write_text('<a href="/x"><script>window.PUBLIC_URL="/"</script>')
    found = assets.rebase(tmp_path)
    assert found == {".js": 1, ".css": 1, ".html": 2}
    assert (tmp_path / "a.js").read_text() == '__webpack_require__.p = "/viewer/";'
    assert "url(//cdn/x)" in (tmp_path / "a.css").read_text()
    assert len(assets.inline_script_hashes((tmp_path / "index.html").read_text())) == 1


def test_current_is_decided_by_the_recipe(tmp_path: Path) -> None:
    assert not assets.is_current(tmp_path)
    (tmp_path / "manifest.json").write_text("no json")
    assert assets.read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": assets.recipe()}))
    assert assets.is_current(tmp_path) and not assets.build(tmp_path)


@pytest.mark.skipif(not assets.is_current(), reason="the assets are not made: python -m portal.assets")
def test_the_made_assets_name_no_other_host_and_are_compressed() -> None:
    viewer = assets.ASSETS / "viewer"
    html = (viewer / "index.html").read_text()
    assert 'src="/viewer/app.bundle' in html and 'src="/app' not in html
    assert not (viewer / "app-config.js").exists() and not list(viewer.rglob("*.map"))
    bundle = next(viewer.glob("app.bundle.*.js"))
    packed = bundle.with_name(bundle.name + ".gz")
    assert packed.stat().st_size < bundle.stat().st_size / 4
    manifest = assets.read_manifest()
    assert manifest is not None
    assert manifest["script_hashes"] == assets.inline_script_hashes(html)
