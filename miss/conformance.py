"""The DICOM Conformance Statement of this release (docs/conformance.md), in the shape of PS3.2 Annex N. Its
tables are the code's own: what is negotiated, which attributes are matched and returned, which statuses are
answered, what each setting bounds. `miss/reference.py` writes the page, and tests/test_docs.py holds that it
is current."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pynetdicom import sop_class as newer_classes

from archive.dataset.charsets import ENCODINGS
from archive.dataset.questions import supported_keys
from archive.model import Level
from archive.settings import describe
from miss.configuration import Process, settings_class
from node import admission
from node.dimse import acceptor, commitments, contexts, pdu, tls
from node.dimse import status as codes
from node.dimse.pdu import Rejection
from node.dimse.services import commitment, find, get, move, mpps, store, worklist

Row = Sequence[str]

HEAD = """\
# DICOM Conformance Statement

Product: **MISS, Medical Image Storage System**, the ward's node and the region's web services.
Implementation class UID `{class_uid}`, implementation version name `{version}`.

The shape is that of PS3.2 Annex N. Its tables are made from the code (`python -m miss.reference`), so that
what stands here is what this release negotiates and answers; what an installation has switched on or off is
in its own settings (`miss settings show`).
"""

INTRODUCTION = """\
## 2 Introduction

**Audience.** Who connects modalities, workstations, information systems and other archives to a node, and
who judges whether they will understand each other.

**Remarks.** Conformance to the standard does not guarantee that two products work together; they are to be
tested together before they are used. What a peer can count on beyond the tables is in
[associations.md](associations.md), [query.md](query.md), [retrieve.md](retrieve.md),
[commitment.md](commitment.md), [worklist.md](worklist.md) and [routing.md](routing.md).

**Terms.** *Node*: the process of one ward, an application entity with one AE title. *Region*: what the
nodes replicate to. *Device*: a peer on the node's list. All others are the standard's.

**References.** DICOM PS3.2 to PS3.8, PS3.10, PS3.15 and PS3.18; RFC 8446, RFC 9325.
"""

MODEL = """\
## 3 Implementation model

### 3.1 Application data flow

```
  modality --C-STORE, N-ACTION--> +------+ --C-STORE, N-ACTION--> archive, workstation (routing rules)
  modality <--N-EVENT-REPORT----- |      | --N-CREATE (availability)--> information system
  modality --C-FIND (worklist)--> | node | --C-STORE sub-operations--> destination of a C-MOVE
  modality --N-CREATE, N-SET----> |      |
  workstation --C-FIND, C-MOVE,   |      | --replication (gRPC, mutual TLS)--> region --DICOMweb--> browser
               C-GET------------> +------+
```

### 3.2 Functional definition

The node's one application entity stores what its devices send, and answers 0000 when it is on disk, not
before. It answers queries about what it holds (for devices with that reach, about the region), sends what
is asked for to devices on its list, commits what it has verified, serves the worklist and takes performed
procedure steps, and forwards by rule. The portal serves DICOMweb over the region or over one node.

### 3.3 Sequencing

Nothing has to come before anything else. A query sees whatever was acknowledged before it. A commitment
that is asked for before the region has a receipt for the instances waits for it.
"""


def page() -> str:
    """The whole statement, as Markdown."""
    head = HEAD.format(class_uid=pdu.IMPLEMENTATION_CLASS_UID, version=pdu.IMPLEMENTATION_VERSION)
    return "\n".join((head, overview(), INTRODUCTION, MODEL, services(), network(), character_sets(),
                      security(), annexes()))


def table(columns: Row, rows: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def name_of(uid: str) -> str:
    """A UID's name in the standard; classes that are newer than the dictionary by their keyword."""
    known = UID_dictionary.get(uid)
    if known is not None and known[0]:
        return f"{known[0]} (retired)" if known[3] else known[0]
    keyword = next((name for name, of in newer_classes._STORAGE_CLASSES.items() if of == uid), "")
    return _spaced(keyword) or "(retired)"


def _spaced(keyword: str) -> str:
    words = ""
    for before, char in zip(" " + keyword, keyword, strict=False):
        words += f" {char}" if char.isupper() and before.islower() else char
    return words


# --- 1 Overview

# Of each service: its SOP classes, whether the node uses it, whether it provides it.
SERVICES: tuple[tuple[str, tuple[str, ...], bool, bool], ...] = (
    ("Verification", (contexts.VERIFICATION,), True, True),
    ("Query", (contexts.PATIENT_ROOT_FIND, contexts.STUDY_ROOT_FIND, contexts.PATIENT_STUDY_ONLY_FIND),
     False, True),
    ("Retrieve by C-MOVE", (contexts.PATIENT_ROOT_MOVE, contexts.STUDY_ROOT_MOVE,
                            contexts.PATIENT_STUDY_ONLY_MOVE), False, True),
    ("Retrieve by C-GET", (contexts.PATIENT_ROOT_GET, contexts.STUDY_ROOT_GET,
                           contexts.PATIENT_STUDY_ONLY_GET), False, True),
    ("Storage commitment", (contexts.STORAGE_COMMITMENT,), True, True),
    ("Modality worklist", (contexts.WORKLIST_FIND,), False, True),
    ("Performed procedure steps", (contexts.PERFORMED_STEP, contexts.PERFORMED_STEP_RETRIEVE), False, True),
    ("Instance availability notification", (contexts.INSTANCE_AVAILABILITY,), True, False),
)


def overview() -> str:
    rows: list[Row] = [("Storage", f"{len(contexts.STORAGE_CLASSES)} classes, Annex A", "", "yes", "yes")]
    for service, uids, scu, scp in SERVICES:
        rows += [(service, name_of(uid), f"`{uid}`", _yes(scu), _yes(scp)) for uid in uids]
    return ("## 1 Overview\n\n" + table(("service", "SOP class", "UID", "SCU", "SCP"), rows)
            + "\nOver the web: QIDO-RS and WADO-RS (studies, series, instances, metadata, frames, bulk data, "
              "rendered, thumbnails) as origin server. No media application profile, no WADO-URI, no UPS.\n")


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


# --- 4 Services

def statuses(of: Mapping[int, str]) -> str:
    """The statuses that a service answers, as its module has them."""
    return table(("status", "when"), ((f"`{code:04X}`", meaning) for code, meaning in sorted(of.items())))


def services() -> str:
    parts = [SERVED, STORAGE, statuses(store.STATUSES)]
    parts += [QUERY, extended_negotiation(), *(keys(level) for level in Level), MATCHING,
              statuses(find.STATUSES)]
    parts += [RETRIEVE, "C-MOVE:\n", statuses(move.STATUSES), "C-GET:\n", statuses(get.STATUSES)]
    parts += [COMMITMENT, statuses(commitment.STATUSES), "Failure reasons of single instances:\n",
              statuses(_failure_reasons())]
    parts += [WORKLIST, worklist_keys(), statuses(worklist.STATUSES)]
    parts += [PERFORMED, statuses(mpps.STATUSES), NOTIFICATION, WEB]
    return "\n".join(parts)


def _failure_reasons() -> dict[int, str]:
    """What an SCP may report of an instance; a Transaction UID that is in use is refused before that."""
    return {reason: meaning for reason, meaning in commitments.REASONS.items()
            if reason != commitments.DUPLICATE_TRANSACTION}


def extended_negotiation() -> str:
    """What the SOP class extended negotiation of queries asks about, and the answer (PS3.4 C.5.1.1)."""
    return table(("byte", "asks for", "answer", "then"), (
        (str(number), asked, _yes(bool(done)), done or "an answer is as stored")
        for number, (asked, done) in enumerate(find.EXTENDED, 1)))


SERVED = f"""\
## 4 Services

For a service that a device was not given, presentation contexts are refused. Besides what the tables of
statuses say, every service answers `{codes.PROCESSING_FAILURE:04X}` for an error that is not foreseen, and
`{codes.UNRECOGNIZED_OPERATION:04X}` for an operation that is not one of its SOP class or of the role that was
agreed on. Where a query or retrieve is refused with `{codes.DOES_NOT_MATCH:04X}`, Error Comment says why, and
Offending Element names the element if it is for one.
"""

STORAGE = """\
### 4.1 Verification and storage

Storage SCP of level 2 (full): every element is kept, private ones too; digital signatures stay valid (level
3); nothing is coerced, so that an object comes back byte for byte (PS3.4 B.4.1). Every class of Annex A is
taken, in every transfer syntax of Annex B, as it comes; the syntax that a context gets is the first that
the requestor names and the node takes. Private classes and syntaxes are taken where
`dimse.accept_private_classes` says so.

The same instance again is answered 0000 and kept once. Another content under a UID that is here is, by the
device's policy, kept apart and shown to people (0000), refused (0111), or kept as a proposed correction
(0000).

As SCU the node sends for C-MOVE, C-GET and its routing rules, each instance in the transfer syntax that it
was stored in where the peer takes that, else recoded without loss.
"""

QUERY = """\
### 4.2 Query

Keys are matched as PS3.4 C.2.2.2 has it, by the one engine that QIDO-RS uses too; an answer holds the keys
that were asked for, Query/Retrieve Level, Retrieve AE Title, Instance Availability below the PATIENT level,
and Specific Character Set where it is not ASCII. A key that is not supported does not fail a query: its
answers are FF01. Without extended negotiation a query is hierarchical and dates and times are matched apart.
"""

RETRIEVE = """\
### 4.3 Retrieve

C-MOVE sends to devices of the node's list alone, which have a port there; C-GET in the contexts whose SCP
role the requestor takes; where it takes that role alone, a context that proposes several syntaxes gets a
native one. What a peer does not take as it is stored is recoded without loss, or that sub-operation fails.
The hierarchy of levels is always kept: extended negotiation of a retrieve is not answered. What is not here
any more, or only in the region, is fetched from there first. When the association of a C-MOVE ends, the
sub-operations under way are finished and no more are begun.
"""

COMMITMENT = """\
### 4.4 Storage commitment

Push model, as SCP and, for what is forwarded by rule, as SCU. An instance is committed when its stored
bytes were hashed again and are those that came, and, where the node has a region (`commitment.means`), when
the region has said that it holds them durably too; what is not by `commitment.timeout_s` fails. The report
goes over the same association while that is open, else over a new one in which the node proposes the SCP
role, to where the device listens; it is repeated until it is answered. Requests and reports survive
restarts.
"""

WORKLIST = """\
### 4.5 Modality worklist

From the node's table of scheduled procedure steps ([worklist.md](worklist.md)).
"""

PERFORMED = """\
### 4.6 Modality performed procedure step

N-CREATE and N-SET; a step that is COMPLETED or DISCONTINUED changes no more. What it says is kept, shown,
and used to know when a study is complete.
"""

NOTIFICATION = """\
### 4.7 Instance availability notification

As SCU by rule ([routing.md](routing.md)): N-CREATE when a study is complete, with the availability of each
of its instances and this node's AE title to retrieve them.
"""

WEB = """\
### 4.8 Web services

QIDO-RS: the attributes of 4.2 at the levels of studies, series and instances; `limit`, `offset`,
`includefield`, `fuzzymatching`. WADO-RS: `application/dicom`, frames and bulk data as stored or in Explicit
VR Little Endian, metadata as JSON and XML, rendered images. STOW-RS is not served yet (403).
"""

MATCHING = """\
Single values and wildcards are matched with case, names without case and accents and by component group; a
list of values is for UIDs and codes; ranges of dates and times hold both ends. At the STUDY level Modality
and SOP Class UID are understood as Modalities in Study and SOP Classes in Study. Of a sequence with one
item every key in it has to be met by one stored item.
"""


def keys(level: Level) -> str:
    """The keys of one level, and what they are (PS3.4 C.2.2.1)."""
    rows = ((_path(keyword), _tags(keyword), _vr(keyword), kind.value)
            for keyword, kind in supported_keys(level).items())
    return f"Keys of the {level.value} level:\n\n" + table(("attribute", "tag", "VR", "key"), rows)


def worklist_keys() -> str:
    kinds = {"R": "required", "O": "optional"}
    return table(("attribute", "tag", "VR", "key"),
                 ((_path(keyword), _tags(keyword), _vr(keyword), kinds[kind])
                  for keyword, kind in worklist.KEYS.items()))


def _path(keyword: str) -> str:
    return " > ".join(keyword.split("."))


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise LookupError(keyword)
    return tag


def _tags(keyword: str) -> str:
    tags = (_tag(part) for part in keyword.split("."))
    return " > ".join(f"({tag >> 16:04X},{tag & 0xFFFF:04X})" for tag in tags)


def _vr(keyword: str) -> str:
    return dictionary_VR(_tag(keyword.split(".")[-1]))


# --- 5 Network

def network() -> str:
    told = {doc.key: doc for doc in describe(settings_class(Process.NODE))}
    listed = [key for key in told if key.startswith(("dimse.", "retrieve.", "commitment.", "worklist."))
              and told[key].type in ("int", "float", "str", "bool")]
    defaults: list[Row] = [(f"`{key}`", told[key].default or "-",
                            told[key].help + (f" ({told[key].unit})" if told[key].unit else ""))
                           for key in listed]
    return "\n".join((NETWORK, "### 5.2 Rejections\n", rejections(),
                      "### 5.3 Defaults of what is configured\n",
                      table(("setting", "default", "meaning"), defaults)))


NETWORK = f"""\
## 5 Network

### 5.1 Associations

One application entity over TCP (IPv4 and IPv6), plain on one port and TLS on another. As acceptor it admits
the devices of its list alone, by AE title, address, transport and certificate, each for the services that
it was given. It negotiates any maximum length, SCP/SCU role selection (PS3.7 D.3.3.4), an asynchronous
operations window for who asks for one (D.3.3.3), extended negotiation (D.3.3.5) and user identity
(D.3.3.7). Identifiers are taken in {", ".join(name_of(uid) for uid in
sorted(contexts.IDENTIFIER_SYNTAXES))}. As requestor it proposes a context for each SOP class and transfer
syntax that it has to send, asks for a window, and opens further associations where 128 contexts do not
suffice. A peer that is silent inside a message, or too slow, is cut; the timers are below. Application
context name `{pdu.APPLICATION_CONTEXT}`.
"""


def rejections() -> str:
    """Every A-ASSOCIATE-RJ that is sent, with its reason (PS3.8 Table 9-21)."""
    sent: tuple[tuple[Rejection, str], ...] = (
        (admission.CALLING_AE_NOT_RECOGNIZED, "the device is not on the list, disabled, elsewhere, or without"
                                              " the transport, certificate or user that it needs"),
        (admission.CALLED_AE_NOT_RECOGNIZED, "it called another AE title"),
        (acceptor.APPLICATION_CONTEXT_NOT_SUPPORTED, "another application context than DICOM's"),
        (acceptor.PROTOCOL_VERSION_NOT_SUPPORTED, "not version 1 of the protocol"),
        (acceptor.TEMPORARY_CONGESTION, "the list of devices can't be read just now"),
        (admission.LOCAL_LIMIT_EXCEEDED, "the node, or this device, has as many associations as it may"),
    )
    return table(("result/source/reason", "when"), ((f"`{one.triple}`", why) for one, why in sent))


# --- 6 Character sets, 7 Security, annexes

def character_sets() -> str:
    terms = ", ".join(f"`{term}`" for term in sorted(ENCODINGS) if term)
    return f"""\
## 6 Character sets

Read in requests and in what is stored, and written in answers: the default repertoire, {terms}. An answer
is in the character set of its request where all of it can be written so, else in `ISO_IR 192`. What is
stored is never converted.
"""


def security() -> str:
    suites = ", ".join(f"`{suite}`" for suite in tls.SUITES_1_2.split(":"))
    return f"""\
## 7 Security

Secure transport connection profile "BCP 195 RFC 8996, 9325" (PS3.15 B.12): TLS 1.3, and TLS 1.2 with
{suites}. Client certificates are required unless `dimse.tls.client_certificates` says otherwise; a
certificate of the region's device authority names the AE titles that may use it, one of another authority
is pinned to its device. User identity (username, username and passcode; PS3.7 D.3.3.7) by
`dimse.user_identity`. Every association, admitted or not, is in the connection log (PS3.15 A.5.3.7). See
[dicom-tls.md](dicom-tls.md).
"""


def annexes() -> str:
    classes = sorted(contexts.STORAGE_CLASSES, key=lambda uid: (name_of(uid), uid))
    syntaxes = sorted(contexts.STORAGE_SYNTAXES, key=lambda uid: [int(part) for part in uid.split(".")])
    return "\n".join((
        "## Annex A: storage SOP classes\n",
        "SCP of all of them; SCU of whichever is stored.\n",
        table(("SOP class", "UID"), ((name_of(uid), f"`{uid}`") for uid in classes)),
        "## Annex B: transfer syntaxes of storage\n",
        table(("transfer syntax", "UID"), ((name_of(uid), f"`{uid}`") for uid in syntaxes)),
        "## Annex C: attributes\n",
        "No attribute is created, coerced or removed in what is stored; no private attribute is written. "
        "The issuer that is in force for a Patient ID (of the data set, else the device's, else the ward's) "
        "appears in answers to queries, never in a retrieved object. No SOP class is extended or "
        "specialized, none is private.\n",
    ))
