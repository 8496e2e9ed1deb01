"""The Central Test Node's programs against a node, and its storage server as a destination. Its archive needs
a MySQL server, and is no peer here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.asking import Asker, retrieve_identifier
from miss.load.sender import Target
from node.dimse import contexts
from tests.commands import miss
from tests.datasets import make_study
from tests.interop.running import (
    AE_TITLE,
    HOST,
    MODALITY,
    RunningNode,
    free_port,
    program,
    run,
    serving,
    written,
)

STORAGE = "CTNSTORE"


def ctn(name: str, node: RunningNode, *options: str, files: tuple[Path, ...] = ()) -> str:
    return run([program(name), "-a", MODALITY, "-c", AE_TITLE, *options, *node.address, *files])


def test_dicom_echo(node: RunningNode) -> None:
    assert "Successful operation" in ctn("dicom_echo", node)


def test_dicom_echo_over_several_associations(node: RunningNode) -> None:
    assert ctn("dicom_echo", node, "-n", "3", "-r", "2").count("Verification Response") >= 6


@pytest.mark.parametrize("options", [(), ("-s", "CT")])
def test_send_image(node: RunningNode, tmp_path: Path, options: tuple[str, ...]) -> None:
    """It takes out what Explicit VR says: other octets, the same values."""
    instances = make_study(3, patient_id="CTN-1")
    said = ctn("send_image", node, "-r", *options, files=tuple(written(tmp_path, instances)))
    assert said.count("Successful operation") >= 3
    sent = {one.sop_instance_uid: one for one in instances}
    for stored, octets in node.stored(instances[0].study_uid, 3):
        one = sent.pop(stored.head.sop_instance_uid)
        held = replace(one, transfer_syntax_uid=stored.head.transfer_syntax_uid, dataset=octets)
        assert held.read() == one.read()
    assert not sent


def test_mwl_query(node: RunningNode) -> None:
    """Whatever is scheduled, the query ends well."""
    assert "Successful operation" in ctn("mwlQuery", node)


def test_simple_storage_is_moved_and_sent_to(node: RunningNode, tmp_path: Path) -> None:
    moved, sent = make_study(3, patient_id="CTN-2"), make_study(2, patient_id="CTN-3")
    port = free_port()
    node.allow(STORAGE, port)
    target = Target(node.place.port, AE_TITLE)
    receiving = tmp_path / "receiving"
    receiving.mkdir()
    ctn("send_image", node, "-q", files=tuple(written(tmp_path / "moved", moved)))
    written(tmp_path / "sent", sent)
    server = [program("simple_storage"), "-s", "-c", STORAGE, "-x", str(receiving), str(port)]
    with serving(server, port, tmp_path, echoes_as=STORAGE):
        asker = Asker(target, contexts.STUDY_ROOT_MOVE)
        assert asker.move(retrieve_identifier(moved[0].study_uid), STORAGE) == 3
        asker.release()
        done = miss("send", tmp_path / "sent", "--to", f"{STORAGE}@{HOST}:{port}")
        assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in receiving.rglob("*") if path.is_file()}
    assert set(files) == {one.sop_instance_uid for one in (*moved, *sent)}
    assert all(files[one.sop_instance_uid].endswith(one.dataset) for one in sent)
