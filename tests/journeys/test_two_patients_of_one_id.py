"""Two hospitals both use Patient ID 123: two people, and the priors of one never show the other."""

from __future__ import annotations

from tests.cluster import GALLIERA, RADIOLOGY, Cluster, qido, value
from tests.datasets import make_study

STUDY_UID, ISSUER = "0020000D", "00100021"


def test_equal_ids_of_two_hospitals_stay_two_people(cluster: Cluster) -> None:
    anna = make_study(2, patient_id="123", patient_name="Verdi^Anna")
    prior = make_study(1, patient_id="123", patient_name="Verdi^Anna", StudyDate="20240301")
    bruno = make_study(2, patient_id="123", patient_name="Neri^Bruno")
    cluster.send(anna + prior, RADIOLOGY)
    cluster.send(bruno, GALLIERA)
    cluster.settle()
    of_anna, of_bruno = {anna[0].study_uid, prior[0].study_uid}, {bruno[0].study_uid}
    with cluster.browser() as browser:
        found = qido(browser, "/studies", PatientID="123", includefield="IssuerOfPatientID")
        issuers = {value(entry, STUDY_UID): value(entry, ISSUER) for entry in found}
        assert {uid: issuers[uid] for uid in of_anna} == dict.fromkeys(of_anna, "SAN-MARTINO")
        assert {uid: issuers[uid] for uid in of_bruno} == dict.fromkeys(of_bruno, "GALLIERA")
        for opened, person in ((anna[0], of_anna), (prior[0], of_anna), (bruno[0], of_bruno)):
            # What the viewer asks for priors carries the bare Patient ID, below the root of the opened study.
            priors = qido(browser, f"/for/{opened.study_uid}/studies", PatientID="123", limit="101")
            assert {value(entry, STUDY_UID) for entry in priors} == person
            everything = qido(browser, f"/for/{opened.study_uid}/studies", limit="101")
            assert {value(entry, STUDY_UID) for entry in everything} == person


def test_issuer_is_not_written_into_what_is_stored(cluster: Cluster) -> None:
    from tests.cluster import dataset_of, retrieve

    study = make_study(1, patient_id="123-B")
    cluster.send(study, RADIOLOGY)
    cluster.settle()
    with cluster.browser() as browser:
        got = retrieve(browser, f"/studies/{study[0].study_uid}")
    assert [dataset_of(part) for part in got] == [study[0].dataset]
