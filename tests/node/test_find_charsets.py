"""Character sets in keys and answers: our own octets, DCMTK's findscu and pynetdicom (F7)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID
from pynetdicom import AE

from archive.dataset.charsets import decoder
from archive.dataset.textencoding import encoder
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, STUDY_ROOT_FIND
from tests.datasets import make_instance
from tests.node.finding import find, identifier
from tests.node.serving import AE_TITLE
from tests.node.storing import Storing, storing
from tests.peers import dcmtk

# Specific Character Set, name as stored, and a key with a wildcard.
NAMES = [
    ("ISO_IR 100", "Müller^Jörg", "Mül*"),
    ("ISO_IR 101", "Wałęsa^Lech", "Wałę*"),
    ("ISO_IR 109", "Ĉapelo^Ĝojo", "Ĉapel?^Ĝ*"),
    ("ISO_IR 110", "Bērziņš^Jānis", "Bērz*"),
    ("ISO_IR 144", "Люкceмбypг", "Люк*"),
    ("ISO_IR 126", "Διονυσιος", "Διον*"),
    ("ISO_IR 127", "قباني^لنزار", "قباني*"),
    ("ISO_IR 138", "שרון^דבורה", "שרון*"),
    ("ISO_IR 148", "Çavuşoğlu^Işıl", "Çavuş*"),
    ("ISO_IR 166", "นามสกุล^ชื่อ", "นาม*"),
    ("ISO_IR 203", "Œuvre^€", "Œuv*"),
    ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ", "ﾔﾏ*"),
    ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう", "*=山*"),
    ("ISO 2022 IR 13\\ISO 2022 IR 87", "ｽｽﾞｷ^ﾊﾅｺ=鈴木^花子=すずき^はなこ", "*=鈴木*=すず*"),
    ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동", "*=*=홍*"),
    ("\\ISO 2022 IR 58", "Zhang^XiaoDong=张^小东", "*=张*"),
    ("ISO 2022 IR 100\\ISO 2022 IR 144", "Jäger^Пётр", "*Пётр"),
    ("GB18030", "Wang^XiaoDong=王^小东", "*=王*"),
    ("GBK", "Li^Lei=李^雷", "*=李?雷"),
    ("ISO_IR 192", "Đặng^Thị=鄧", "Đặng*"),
]
NOT_OF_PYDICOM = ("ISO_IR 203", "\\ISO 2022 IR 58")
NOT_OF_DCMTK = ("ISO_IR 203", "\\ISO 2022 IR 87", "ISO 2022 IR 13\\ISO 2022 IR 87")  # where it uses iconv
IDS = [term for term, _, _ in NAMES]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storing]:
    """A study for each name, stored in its character set."""
    with storing(tmp_path_factory.mktemp("find")) as running:
        for number, (term, name, _) in enumerate(NAMES):
            instance = make_instance(patient_id=f"P{number}", study_uid=f"1.2.{number}",
                                     patient_name="*" * 60, SpecificCharacterSet=term.split("\\"))
            octets = encoder(term.encode())(name)
            assert octets is not None
            padded = octets.ljust(60)
            changed = instance.dataset.replace(b"*" * 60, padded)
            assert len(padded) == 60 and changed != instance.dataset
            object.__setattr__(instance, "dataset", changed)
            assert running.send(instance) == [0]
        yield running


def name_of(answer: Dataset) -> tuple[str, str]:
    """The character set of an answer and the name in it, decoded by us: pydicom knows no ISO_IR 203, and
    leaves the escape sequences of ISO 2022 IR 58 in the text."""
    told = answer.SpecificCharacterSet
    term = told if isinstance(told, str) else "\\".join(told)
    return term, decoder(term.encode())(answer.get_item(0x00100010).value).rstrip()


def asked(term: str, key: str) -> Dataset:
    query = identifier("STUDY", PatientID="", StudyInstanceUID="")
    query.SpecificCharacterSet = term.split("\\")
    query.add_new(0x00100010, "PN", encoder(term.encode())(key))
    return query


@pytest.mark.parametrize(("term", "name", "key"), NAMES, ids=IDS)
@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE])
def test_a_key_in_each_character_set_and_the_answer_in_the_same(
    served: Storing, term: str, name: str, key: str, syntax: str
) -> None:
    _, (one,) = find(served, asked(term, key), syntax=syntax)
    assert name_of(one) == (term, name)


@pytest.mark.parametrize(("term", "name", "key"), NAMES, ids=IDS)
def test_a_key_in_unicode_finds_it_whatever_it_was_stored_in(
    served: Storing, term: str, name: str, key: str
) -> None:
    _, (one,) = find(served, asked("ISO_IR 192", key))
    assert (str(one.PatientName), one.SpecificCharacterSet) == (name, "ISO_IR 192")


def test_what_does_not_fit_the_askers_set_comes_in_unicode(served: Storing) -> None:
    query = identifier("STUDY", PatientName="", PatientID="")
    query.SpecificCharacterSet = "ISO_IR 100"
    _, found = find(served, query)
    assert {str(one.PatientName): one.get("SpecificCharacterSet") for one in found} == {
        name: "ISO_IR 100" if encoder(b"ISO_IR 100")(name) else "ISO_IR 192" for _, name, _ in NAMES}


@pytest.mark.parametrize(("term", "name", "key"), NAMES, ids=IDS)
def test_findscu(served: Storing, tmp_path: Path, term: str, name: str, key: str) -> None:
    """DCMTK's findscu sends a query file as it is, writes what it gets, and dcmdump reads it as UTF-8."""
    query = asked(term, key)
    query.file_meta = FileMetaDataset()
    query.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE)
    query.file_meta.MediaStorageSOPClassUID = query.file_meta.MediaStorageSOPInstanceUID = UID("1.2")
    query.save_as(tmp_path / "query.dcm", enforce_file_format=True)
    subprocess.run([dcmtk("findscu"), "-S", "-X", "-od", str(tmp_path), "-aet", "CT1", "-aec", AE_TITLE,
                    "127.0.0.1", str(served.port), str(tmp_path / "query.dcm")], check=True, timeout=20,
                   capture_output=True)
    answer, = tmp_path.glob("rsp*.dcm")
    if term in NOT_OF_DCMTK:
        assert name_of(dcmread(answer, force=True)) == (term, name)
        return
    dumped = subprocess.run([dcmtk("dcmdump"), "+U8", "+P", "0010,0010", str(answer)], check=True, timeout=20,
                            capture_output=True).stdout.decode()
    assert f"[{name}]" in dumped


def test_pynetdicom(served: Storing) -> None:
    """pydicom decodes what it gets itself (see `name_of` for what it can't)."""
    ae = AE("CT1")
    ae.add_requested_context(STUDY_ROOT_FIND)
    association = ae.associate("127.0.0.1", served.port, ae_title=AE_TITLE)
    for term, name, key in NAMES:
        answers = [one for _, one in association.send_c_find(asked(term, key), STUDY_ROOT_FIND) if one]
        decoded = [one.PatientName for one in answers] if term not in NOT_OF_PYDICOM else [name]
        assert decoded == [name], term
        assert len(answers) == 1
    association.release()
