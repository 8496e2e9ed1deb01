"""Which contexts are taken, and how they are planned."""

from __future__ import annotations

import pynetdicom.sop_class as known
import pytest
from pydicom._uid_dict import UID_dictionary
from pydicom.uid import AllTransferSyntaxes

from node.dimse import contexts, pdu
from node.dimse.contexts import EXPLICIT_LITTLE, IMPLICIT_LITTLE, Offer, Permitted, ServiceName

CT = "1.2.840.10008.5.1.4.1.1.2"
EVERY_SERVICE = Permitted(frozenset(ServiceName))
PRIVATE = "1.3.12.2.1107.5.9.1"


def answer(*proposed: tuple[str, tuple[str, ...]], offer: Offer | None = None,
           permitted: Permitted = EVERY_SERVICE) -> list[tuple[int, str]]:
    request = pdu.AssociateRequest("A", "B", tuple(
        pdu.ProposedContext(2 * n + 1, *context) for n, context in enumerate(proposed)))
    accept, agreed = contexts.negotiate(request, offer or Offer(), permitted, 16384)
    assert sorted(agreed) == [c.id for c in accept.contexts if c.result == 0]
    return [(c.result, c.transfer_syntax if c.result == 0 else "") for c in accept.contexts]


def test_first_proposed_syntax_that_we_take_is_chosen() -> None:
    jpip = "1.2.840.10008.1.2.4.94"
    assert answer((CT, (jpip, EXPLICIT_LITTLE, IMPLICIT_LITTLE))) == [(0, EXPLICIT_LITTLE)]
    assert answer((CT, (IMPLICIT_LITTLE, EXPLICIT_LITTLE))) == [(0, IMPLICIT_LITTLE)]


def test_results_3_and_4_and_the_others_are_accepted() -> None:
    """32."""
    unserved = "1.2.840.10008.5.1.4.34.6.1"  # unified procedure steps
    assert answer((unserved, (IMPLICIT_LITTLE,)), (CT, ("1.2.840.10008.1.2.4.94",)), (CT, (EXPLICIT_LITTLE,)),
                  ("1.2.3.4", (IMPLICIT_LITTLE,)), (CT, ()), ("", (IMPLICIT_LITTLE,))) == [
        (3, ""), (4, ""), (0, EXPLICIT_LITTLE), (3, ""), (4, ""), (3, "")]


def test_a_service_that_the_device_may_not_use_is_refused() -> None:
    """45."""
    permitted = Permitted(frozenset((ServiceName.ECHO, ServiceName.STORE)))
    assert answer((contexts.STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)), (CT, (IMPLICIT_LITTLE,)),
                  permitted=permitted) == [(1, ""), (0, IMPLICIT_LITTLE)]


def test_a_device_has_sop_classes_and_transfer_syntaxes_of_its_own() -> None:
    """32: of storage alone; verification and queries are allowed by service."""
    mr = "1.2.840.10008.5.1.4.1.1.4"
    permitted = Permitted(frozenset(ServiceName), frozenset((CT,)), frozenset((EXPLICIT_LITTLE,)))
    assert answer((mr, (EXPLICIT_LITTLE,)), (CT, (IMPLICIT_LITTLE,)),
                  (CT, (IMPLICIT_LITTLE, EXPLICIT_LITTLE)), (contexts.VERIFICATION, (IMPLICIT_LITTLE,)),
                  (contexts.STUDY_ROOT_FIND, (IMPLICIT_LITTLE,)), permitted=permitted) == [
        (3, ""), (4, ""), (0, EXPLICIT_LITTLE), (0, IMPLICIT_LITTLE), (0, IMPLICIT_LITTLE)]


def test_private_classes_and_syntaxes_by_the_switch() -> None:
    proposed = ((PRIVATE, (EXPLICIT_LITTLE,)), (CT, ("1.2.840.113619.5.2",)),
                ("1.2.840.10008.5.1.4.1.1.999", (EXPLICIT_LITTLE,)))
    assert [result for result, _ in answer(*proposed)] == [3, 4, 3]
    assert [result for result, _ in answer(*proposed, offer=Offer(private=True))] == [0, 0, 0]
    # The switch opens no service that is not storage, and nothing that is no UID.
    for uid in ("1.2.840.10008.5.1.4.34.6.1", "1.2.840.10008.5.1.1.1", "1.2.3/4", "1.2.840.10008.99.1"):
        assert answer((uid, (EXPLICIT_LITTLE,)), offer=Offer(private=True)) == [(3, "")], uid


def test_every_storage_class_and_syntax_of_the_standard() -> None:
    for name, uid in known._STORAGE_CLASSES.items():
        assert uid in contexts.STORAGE_CLASSES, name
    for uid, (name, kind, _, _, _) in UID_dictionary.items():
        if kind == "SOP Class" and "Image Storage" in name:
            assert uid in contexts.STORAGE_CLASSES, name
    for uid in ("1.2.840.10008.1.3.10", "1.2.840.10008.1.20.1", "1.2.840.10008.1.1",
                contexts.STUDY_ROOT_FIND):
        assert uid not in contexts.STORAGE_CLASSES
    taken = {uid for uid in AllTransferSyntaxes if uid in contexts.STORAGE_SYNTAXES}
    assert len(AllTransferSyntaxes) - len(taken) == sum("JPIP" in uid.name or "SMPTE" in uid.name
                                                         for uid in AllTransferSyntaxes)
    assert len(contexts.STORAGE_CLASSES) > 180


def test_identifiers_need_no_codec() -> None:
    deflated = "1.2.840.10008.1.2.1.99"
    assert answer((contexts.STUDY_ROOT_FIND, (deflated, EXPLICIT_LITTLE))) == [(0, EXPLICIT_LITTLE)]


def test_role_selection_is_answered_for_what_is_accepted() -> None:
    request = pdu.AssociateRequest("A", "B", (pdu.ProposedContext(1, CT, (EXPLICIT_LITTLE,)),),
                                   roles=(pdu.Role(CT, True, True), pdu.Role("1.2.3", True, True)))
    accept, _ = contexts.negotiate(request, Offer(), EVERY_SERVICE, 16384)
    assert accept.roles == (pdu.Role(CT, True, False),)


@pytest.mark.parametrize(("count", "sets"),
                         [(0, []), (1, [1]), (128, [128]), (129, [128, 1]), (300, [128, 128, 44])])
def test_plan(count: int, sets: list[int]) -> None:
    pairs = [(f"1.2.{n}", EXPLICIT_LITTLE) for n in range(count)]
    planned = contexts.plan([*pairs, *pairs])
    assert [len(one) for one in planned] == sets
    assert [c.abstract_syntax for one in planned for c in one] == [uid for uid, _ in pairs]
    for one in planned:
        assert [c.id for c in one] == list(range(1, 2 * len(one), 2))


def test_an_answer_that_was_not_asked_for_counts_as_refused() -> None:
    proposed = (pdu.ProposedContext(1, CT, (EXPLICIT_LITTLE,)),
                pdu.ProposedContext(3, CT, (IMPLICIT_LITTLE,)))
    answers = (pdu.AnsweredContext(1, 0, IMPLICIT_LITTLE), pdu.AnsweredContext(3, 0, IMPLICIT_LITTLE),
               pdu.AnsweredContext(5, 0, IMPLICIT_LITTLE))
    assert list(contexts.agreed(proposed, answers)) == [3]
