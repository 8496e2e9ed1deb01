"""Specific Character Sets both ways: the standard's own examples, and every text that fits comes back."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archive.dataset.charsets import decoder
from archive.dataset.textencoding import encoder

# PS3.5 annexes H, I, J and K, where they are in them.
EXAMPLES = [
    ("ISO_IR 100", "Buc^Jérôme", b"Buc^J\xe9r\xf4me"),
    ("ISO_IR 101", "Wałęsa", b"Wa\xb3\xeasa"),
    ("ISO_IR 109", "Ĉapelo", b"\xc6apelo"),
    ("ISO_IR 110", "Bērziņš", b"B\xbarzi\xf1\xb9"),
    ("ISO_IR 144", "Люкceмбypг", b"\xbb\xee\xda\x63\x65\xdc\xd1\x79\x70\xd3"),
    ("ISO_IR 126", "Διονυσιος", b"\xc4\xe9\xef\xed\xf5\xf3\xe9\xef\xf2"),
    ("ISO_IR 127", "قباني^لنزار", b"\xe2\xc8\xc7\xe6\xea^\xe4\xe6\xd2\xc7\xd1"),
    ("ISO_IR 138", "שרון^דבורה", b"\xf9\xf8\xe5\xef^\xe3\xe1\xe5\xf8\xe4"),
    ("ISO_IR 148", "Çavuşoğlu", b"\xc7avu\xfeo\xf0lu"),
    ("ISO_IR 166", "นามสกุล", b"\xb9\xd2\xc1\xca\xa1\xd8\xc5"),
    ("ISO_IR 203", "Œuf€", b"\xbcuf\xa4"),
    ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3"),
    ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう",
     b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"),
    ("ISO 2022 IR 13\\ISO 2022 IR 87", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
     b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J"),
    ("\\ISO 2022 IR 87\\ISO 2022 IR 159", "丂山", b"\x1b$(D0!\x1b(B\x1b$B;3\x1b(B"),
    ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동",
     b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"),
    ("\\ISO 2022 IR 58", "Zhang^XiaoDong=张^小东=",
     b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="),
    ("ISO 2022 IR 100\\ISO 2022 IR 144", "Müller Лю é",
     b"M\xfcller \x1b-L\xbb\xee \x1b-A\xe9"),
    ("ISO_IR 192", "Wang^XiaoDong=王^小东", "Wang^XiaoDong=王^小东".encode()),
    ("GB18030", "Wang^XiaoDong=王^小东", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab"),
    ("GBK", "Wang^XiaoDong=王^小东", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab"),
]  # fmt: skip


@pytest.mark.parametrize(("term", "text", "octets"), EXAMPLES, ids=[each[0] for each in EXAMPLES])
def test_names_of_the_standard(term: str, text: str, octets: bytes) -> None:
    encode = encoder(term.encode())
    assert encode(text) == octets
    assert decoder(term.encode())(octets) == text
    assert encode.term == term


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("", "é"), ("ISO_IR 6", "é"), ("ISO_IR 100", "ł"), ("ISO_IR 13", "山"), ("ISO_IR 999", "é"),
        ("\\ISO 2022 IR 87", "홍"), ("\\ISO 2022 IR 87", "丂"), ("\\ISO 2022 IR 149", "뢔"),
        ("\\ISO 2022 IR 58", "한"), ("GBK", "😀"), ("\\ISO 2022 IR 87", "é"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_to(term: str, text: str) -> None:
    assert encoder(term.encode())(text) is None
    assert encoder(term.encode())("plain") == b"plain"


def test_terms_as_they_are_met() -> None:
    for term in ("ISO-IR 100", "ISO IR 100", "iso_ir 100"):
        assert encoder(term.encode()).term == "ISO_IR 100"
    assert encoder(b"ISO 2022 IR 87")("山") == b"\x1b$B;3\x1b(B"  # without the empty first value


STRANGE = [b"ISO 2022 IR 100\\\xff\xff", b"\xff\\ISO 2022 IR 87", b"\\", b"ISO_IR 192\\\xff"]


@given(st.binary(max_size=40) | st.sampled_from(STRANGE), st.text())
@example(b"", "\x1b")
@example(b"ISO_IR 192", "\x1b(Bé")
def test_no_term_is_too_strange(term: bytes, text: str) -> None:
    encode = encoder(term)
    octets = encode(text)
    assert encode.term.isascii()
    if octets is not None:
        assert decoder(encode.term.encode())(octets).count("\ufffd") == text.count("\ufffd")


LETTERS = st.sampled_from("aZ~ ^=\\\n" + "".join(text for _, text, _ in EXAMPLES) + "日本語ｱ丂뷁é")


@given(st.sampled_from([term for term, _, _ in EXAMPLES]), st.text(LETTERS, max_size=12))
@example("ISO 2022 IR 13\\ISO 2022 IR 87", "ｱ山ｱ")
def test_whatever_is_encoded_comes_back(term: str, text: str) -> None:
    octets = encoder(term.encode())(text)
    if octets is not None:
        assert decoder(term.encode())(octets) == text
