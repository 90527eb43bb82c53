"""Whose a study is: each rule, at its edge."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.matching import (
    ArrivedStudy,
    Code,
    Identifier,
    Match,
    OrderCandidate,
    PatientCandidate,
    Request,
    Rule,
    Verdict,
    look_up,
    match,
)
from app.matching.codes import MEANING
from app.matching.rules import MOST_PROPOSALS

PATIENT = PatientCandidate(
    id=UUID(int=1),
    mrn="4711",
    mrn_issuer="HOSP",
    name="Meier^Anna",
    birth_date=date(1980, 5, 17),
    sex="F",
)
ORDER = OrderCandidate(
    id=UUID(int=2),
    patient=PATIENT,
    accession_number="A1001",
    planned_study_instance_uid="2.25.1",
    modality="CT",
    description="CT chest",
    scheduled_at=datetime(2026, 3, 2, 9, tzinfo=UTC),
)
STUDY = ArrivedStudy(
    study_instance_uid="2.25.1",
    patient=Identifier("4711", "HOSP"),
    accession=Identifier("A1001"),
    patient_name="MEIER^ANNA",
    birth_date="19800517",
    sex="F",
    modalities=("CT", "SR"),
    study_date="20260302",
    body_parts=("CHEST",),
)
OWN_UID = replace(STUDY, study_instance_uid="2.25.99")
NO_ORDER = replace(OWN_UID, accession=Identifier())
OTHER = PatientCandidate(
    id=UUID(int=3), mrn="4812", mrn_issuer="HOSP", name="Roe^Jim", birth_date=date(1950, 1, 2)
)
TWIN = replace(OTHER, name="Meier^Berta", birth_date=PATIENT.birth_date, sex="F")


def found(study: ArrivedStudy, *candidates: Any, authority: str = "HOSP") -> Match:
    return match(
        study,
        [each for each in candidates if isinstance(each, OrderCandidate)],
        [each for each in candidates if isinstance(each, PatientCandidate)],
        authority=authority,
    )


def codes(answer: Match) -> set[Code]:
    return {each.code for each in answer.because}


# ------------------------------------------------------------------------------- certain


@pytest.mark.parametrize(
    ("study", "order", "rule"),
    [
        (STUDY, ORDER, Rule.PLANNED_STUDY),
        (OWN_UID, ORDER, Rule.ACCESSION_AND_PATIENT),
        (OWN_UID, replace(ORDER, linked=frozenset({"2.25.99"})), Rule.LINKED_STUDY),
        (replace(STUDY, patient=Identifier()), ORDER, Rule.PLANNED_STUDY),
        (replace(STUDY, patient_name="", birth_date="", sex=""), ORDER, Rule.PLANNED_STUDY),
        (replace(OWN_UID, patient_name=""), ORDER, Rule.ACCESSION_AND_PATIENT),
        (replace(OWN_UID, birth_date=""), ORDER, Rule.ACCESSION_AND_PATIENT),
        (
            OWN_UID,
            replace(ORDER, status="completed", linked=frozenset({"2.25.99"})),
            Rule.LINKED_STUDY,
        ),
    ],
)
def test_one_order_is_certain(study: ArrivedStudy, order: OrderCandidate, rule: Rule) -> None:
    answer = found(study, order)
    assert (answer.verdict, answer.rule) == (Verdict.CERTAIN, rule)
    assert (answer.order_id, answer.patient_id) == (ORDER.id, PATIENT.id)
    assert answer.candidates[0].order_id == ORDER.id


def test_without_an_order_the_patient_is_certain_and_the_orders_are_proposed() -> None:
    answer = found(NO_ORDER, ORDER, OTHER)
    assert (answer.verdict, answer.rule) == (Verdict.CERTAIN, Rule.PATIENT)
    assert (answer.patient_id, answer.order_id) == (PATIENT.id, None)
    assert answer.candidates[0].order_id == ORDER.id


def test_a_study_of_two_orders_is_certain_of_their_patient() -> None:
    linked = replace(ORDER, linked=frozenset({"2.25.99"}))
    other = replace(linked, id=UUID(int=9), accession_number="A2002", planned_study_instance_uid="")
    answer = found(replace(NO_ORDER, owner=PATIENT.id), linked, other)
    assert (answer.patient_id, answer.order_id) == (PATIENT.id, None)
    assert answer.rule is Rule.LINKED_STUDY


def test_more_images_of_a_study_without_order_follow_it() -> None:
    study = replace(NO_ORDER, birth_date="", owner=PATIENT.id)
    assert found(study, PATIENT).rule is Rule.LINKED_STUDY
    assert found(replace(study, owner=None), PATIENT).verdict is Verdict.PROPOSED


# ----------------------------------------------------------------- what a human decides


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"birth_date": "19800715"}, Code.BIRTH_DATE_DIFFERS),
        ({"birth_date": "19800518"}, Code.BIRTH_DATE_NEAR),
        ({"patient_name": "Meier^Hanna"}, Code.NAME_SIMILAR),
        ({"patient_name": "Meier^Berta"}, Code.NAME_OTHER_GIVEN),
        ({"patient_name": "Roe^Jim"}, Code.NAME_DIFFERS),
        ({"patient_name": "Vogel^Anna"}, Code.NAME_OTHER_FAMILY),
        ({"sex": "M"}, Code.SEX_DIFFERS),
        ({"patient": Identifier("4711", "ELSE")}, Code.PATIENT_ID_ISSUER_DIFFERS),
        ({"patient": Identifier("4711", "", "1.2.3")}, Code.PATIENT_ID_ISSUER_DIFFERS),
        ({"patient": Identifier("9999", "HOSP")}, Code.PATIENT_ID_DIFFERS),
        ({"patient": Identifier("4771", "HOSP")}, Code.PATIENT_ID_NEAR),
        ({"patient": Identifier("04711", "HOSP")}, Code.PATIENT_ID_NEAR),
        ({"modalities": ("MR",)}, Code.MODALITY_DIFFERS),
        ({"body_parts": ("KNEE",)}, Code.BODY_PART_DIFFERS),
        ({"under_two_patients": True}, Code.TWO_PATIENTS),
        ({"owner": OTHER.id}, Code.OWNED_BY_ANOTHER),
        ({"requests": (Request(Identifier("A3")),)}, Code.SEVERAL_ACCESSIONS),
    ],
)
@pytest.mark.parametrize("study", [STUDY, OWN_UID], ids=["planned", "accession"])
def test_a_contradiction_waits_for_a_human(
    study: ArrivedStudy, change: dict[str, Any], code: Code
) -> None:
    assert found(study, ORDER).verdict is Verdict.CERTAIN
    answer = found(replace(study, **change), ORDER)
    assert answer.verdict in (Verdict.PROPOSED, Verdict.CONFLICTING)
    assert (answer.patient_id, answer.order_id, answer.rule) == (None, None, None)
    said = {f.code for p in answer.candidates for f in (*p.speaks_for, *p.speaks_against)}
    assert code in said | codes(answer)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "cancelled"},
        {"status": "cancelled", "linked": frozenset({"2.25.1", "2.25.99"})},
        {"status": "completed"},
        {"status": "entered-in-error"},
        {"linked": frozenset({"2.25.7"})},
    ],
)
@pytest.mark.parametrize("study", [STUDY, OWN_UID], ids=["planned", "accession"])
def test_an_order_that_is_closed_is_never_certain(
    study: ArrivedStudy, change: dict[str, Any]
) -> None:
    answer = found(study, replace(ORDER, **change))
    assert answer.verdict is Verdict.PROPOSED
    assert codes(answer) & {Code.ORDER_CANCELLED, Code.ORDER_FULFILLED}


@pytest.mark.parametrize(
    ("study", "verdict"),
    [
        # An identifier says that it is theirs, and the person is another.
        (replace(STUDY, patient_name="Roe^Jim"), Verdict.CONFLICTING),
        (replace(NO_ORDER, patient_name="Roe^Jim"), Verdict.CONFLICTING),
        (replace(STUDY, sex="M"), Verdict.CONFLICTING),
        (replace(STUDY, patient=Identifier("4812", "HOSP")), Verdict.CONFLICTING),
        (replace(OWN_UID, patient=Identifier("4812", "HOSP")), Verdict.CONFLICTING),
        (
            replace(
                OWN_UID,
                patient=Identifier("4812", "HOSP"),
                patient_name="",
                birth_date="",
                sex="",
            ),
            Verdict.CONFLICTING,
        ),
        # A marriage, a slip of the pen.
        (replace(STUDY, patient_name="Vogel^Anna"), Verdict.PROPOSED),
        (replace(STUDY, birth_date="19800518"), Verdict.PROPOSED),
        # The number may be used again.
        (replace(OWN_UID, patient=Identifier()), Verdict.PROPOSED),
    ],
)
def test_another_person_is_a_conflict_and_a_slip_is_not(
    study: ArrivedStudy, verdict: Verdict
) -> None:
    assert found(study, ORDER, OTHER).verdict is verdict


@pytest.mark.parametrize(
    "study",
    [
        replace(OWN_UID, patient_name="", birth_date=""),
        replace(OWN_UID, patient_name="Unknown^Unknown", birth_date="19000101"),
        replace(OWN_UID, patient_name="Meier^A", birth_date=""),
        replace(OWN_UID, patient_name="Meier", birth_date="18000101"),
        replace(OWN_UID, patient=Identifier()),
        replace(OWN_UID, accession=Identifier("A1001", "ELSE")),
        replace(OWN_UID, study_date="20230302"),
        replace(STUDY, patient=Identifier(), birth_date=""),
        replace(STUDY, patient=Identifier(), patient_name="Meier^A"),
        replace(STUDY, accession=Identifier("A1002")),
        replace(STUDY, accession=Identifier("unrelated")),
        replace(NO_ORDER, birth_date=""),
        replace(NO_ORDER, patient_name=""),
        replace(NO_ORDER, patient_name="Meier^A"),
        replace(NO_ORDER, patient=Identifier("4711 ", "hosp")),
        replace(NO_ORDER, patient=Identifier()),
    ],
)
def test_too_little_is_not_certain(study: ArrivedStudy) -> None:
    answer = found(study, ORDER)
    assert (answer.verdict, answer.order_id) == (Verdict.PROPOSED, None)
    assert answer.candidates[0].order_id == ORDER.id


def test_an_accession_number_in_another_notation_names_no_order() -> None:
    """The patient is certain by number, name and birth date; the order is proposed."""
    answer = found(replace(OWN_UID, accession=Identifier("a1001")), ORDER)
    assert (answer.rule, answer.order_id) == (Rule.PATIENT, None)
    assert answer.candidates[0].order_id == ORDER.id


def test_a_stranger_is_unmatched() -> None:
    stranger = ArrivedStudy("2.25.5", patient=Identifier("77", "ELSE"), patient_name="Li^Na")
    answer = found(stranger, ORDER, OTHER)
    assert (answer.verdict, answer.candidates) == (Verdict.UNMATCHED, ())
    assert codes(answer) == {Code.NO_CANDIDATE}


# ------------------------------------------------------------------- among several


def test_an_absent_issuer_is_the_sites_own() -> None:
    study = replace(NO_ORDER, patient=Identifier("4711"))
    elsewhere = replace(OTHER, mrn="4711", mrn_issuer="ELSE")
    assert found(study, PATIENT, elsewhere).patient_id == PATIENT.id
    assert found(study, PATIENT, elsewhere, authority="ELSE").patient_id is None
    assert found(study, PATIENT, authority="").patient_id == PATIENT.id
    assert Code.PATIENT_ID_AMBIGUOUS in codes(found(study, PATIENT, elsewhere, authority=""))


def test_a_patient_without_issuer_is_of_the_sites_own_authority() -> None:
    ours = replace(PATIENT, mrn_issuer="")
    assert found(NO_ORDER, ours).patient_id == PATIENT.id
    assert found(NO_ORDER, ours, authority="").patient_id is None


def test_a_namesake_makes_the_number_alone_too_little() -> None:
    namesake = replace(PATIENT, id=OTHER.id, mrn="4712")
    assert codes(found(NO_ORDER, PATIENT, namesake)) == {Code.NAMESAKE}
    assert found(OWN_UID, ORDER, namesake).verdict is Verdict.CERTAIN


def test_a_name_that_fits_the_twin_better_is_not_certain() -> None:
    twin = replace(TWIN, name="Meier^Anna Luisa")
    study = replace(STUDY, patient_name="Meier^Anna Luisa")
    assert found(study, ORDER).verdict is Verdict.CERTAIN
    assert codes(found(study, ORDER, twin)) == {Code.NAMESAKE}


def test_a_name_that_cannot_be_read_beside_ours_but_is_anothers_is_not_certain() -> None:
    order = replace(ORDER, patient=replace(PATIENT, name="王^小东"))
    study = replace(STUDY, patient_name="Roe^Jim")
    assert found(study, order).verdict is Verdict.CERTAIN
    assert codes(found(study, order, OTHER)) == {Code.NAMESAKE}


def test_one_accession_number_of_two_sites_is_settled_by_the_patient() -> None:
    other = replace(
        ORDER, id=UUID(int=9), patient=OTHER, accession_issuer="B", planned_study_instance_uid=""
    )
    assert found(OWN_UID, ORDER, other).order_id == ORDER.id
    mine = replace(other, patient=PATIENT)
    assert codes(found(OWN_UID, ORDER, mine)) == {Code.NAMES_ANOTHER_ORDER}


def test_an_identifier_that_names_another_order_is_a_doubt() -> None:
    other = replace(
        ORDER, id=UUID(int=9), accession_number="A2002", planned_study_instance_uid="2.25.2"
    )
    assert found(STUDY, ORDER, other).order_id == ORDER.id
    said = replace(STUDY, requests=(Request(study_instance_uid="2.25.2"),))
    assert Code.NAMES_ANOTHER_ORDER in codes(found(said, ORDER, other))
    said = replace(STUDY, accession=Identifier("A2002"))
    assert found(said, ORDER, other).verdict is Verdict.PROPOSED


def test_another_number_of_another_patient_is_a_doubt() -> None:
    study = replace(STUDY, other_patient_ids=(Identifier("4812", "HOSP"),))
    assert found(study, ORDER).verdict is Verdict.CERTAIN
    assert codes(found(study, ORDER, OTHER)) == {Code.NAMES_ANOTHER_PATIENT}


def test_a_merged_number_is_the_patients_until_it_is_given_away_again() -> None:
    order = replace(ORDER, patient=replace(PATIENT, former=(Identifier("4812", "HOSP"),)))
    study = replace(STUDY, patient=Identifier("4812", "HOSP"))
    assert found(study, order).order_id == ORDER.id
    assert found(replace(study, birth_date=""), order).verdict is Verdict.PROPOSED
    assert found(study, order, OTHER).verdict is Verdict.CONFLICTING
    # Nobody can tell whose it is now, where it is two others' by two issuers.
    study = replace(study, patient=Identifier("4812"))
    elsewhere = replace(OTHER, id=UUID(int=8), mrn_issuer="ELSE")
    assert found(study, order, authority="").verdict is Verdict.CERTAIN
    assert found(study, order, OTHER, elsewhere, authority="").order_id is None


def test_two_versions_of_one_patient_are_not_one() -> None:
    assert found(STUDY, ORDER, replace(PATIENT, name="Meier^Anne")).verdict is Verdict.PROPOSED


# ------------------------------------------------------------------------- the answer


def test_an_answer_is_plain_json_with_words() -> None:
    study = replace(STUDY, patient_name="Roe\x00^\u202eJim\ud800", birth_date="19800518")
    answer = json.loads(json.dumps(found(study, ORDER).as_json()))
    assert answer["verdict"] == "conflicting"
    assert answer["patient_id"] is answer["order_id"] is answer["rule"] is None
    assert {each["code"] for each in answer["because"]} == {"name-differs"}
    first = answer["candidates"][0]
    assert first["order_id"] == str(ORDER.id)
    assert 0 <= first["score"] <= 100
    against = {each["code"]: each["words"] for each in first["against"]}
    name = against["name-differs"]
    assert "Meier^Anna" in name
    assert name.isprintable()
    assert "study-planned" in {each["code"] for each in first["for"]}


def test_every_code_has_its_words_and_its_row() -> None:
    assert set(MEANING) == set(Code)
    page = (Path(__file__).parents[2] / "docs" / "matching.md").read_text(encoding="utf-8")
    assert [each for each in Code if f"| `{each}` | {MEANING[each].points} |" not in page] == []


def test_no_more_than_a_screenful_is_proposed() -> None:
    orders = [replace(ORDER, id=UUID(int=100 + n), accession_number=f"X{n}") for n in range(60)]
    answer = found(NO_ORDER, *orders)
    assert len(answer.candidates) == MOST_PROPOSALS
    scores = [each.score for each in answer.candidates]
    assert scores == sorted(scores, reverse=True)


def test_nobody_is_crowded_out_by_the_many_orders_of_another() -> None:
    """A restricted patient among the candidates hides the study from others: it must be there."""
    orders = [replace(ORDER, id=UUID(int=100 + n), accession_number=f"X{n}") for n in range(60)]
    weaker = replace(
        ORDER,
        id=UUID(int=900),
        accession_number="Y",
        patient=replace(ORDER.patient, id=UUID(int=901), sex="O"),
    )
    answer = found(NO_ORDER, *orders, weaker)
    assert weaker.patient.id in {each.patient_id for each in answer.candidates}


@pytest.mark.parametrize("make", [str, lambda text: f"{text[:9]}^{text}"])
def test_absurdly_long_values_take_no_longer(make: Callable[[str], str]) -> None:
    for text in ("\ud800" * 65536, "ﷺ" * 65536, "a\u0301" * 32768, "^=" * 32768, "?" * 65536):
        long = make(text)
        study = ArrivedStudy(
            study_instance_uid=long,
            patient=Identifier(long, long, long),
            other_patient_ids=(Identifier(long, long),) * 500,
            accession=Identifier(long, long),
            requests=(Request(Identifier(long), long),) * 500,
            patient_name=long,
            other_patient_names=(long,) * 500,
            birth_date=long,
            sex=long,
            modalities=(long,) * 50,
            study_date=long,
            body_parts=(long,) * 50,
            stations=(long,) * 50,
            institution=long,
        )
        answer = found(study, *[replace(ORDER, id=UUID(int=n)) for n in range(20)])
        assert answer.verdict in (Verdict.UNMATCHED, Verdict.PROPOSED)
        json.dumps(answer.as_json())
        look_up(study)


def test_days_are_counted_from_the_order() -> None:
    for days, certain in ((30, True), (31, False), (-365, True), (-366, False)):
        made = date(2026, 3, 2) - timedelta(days=days)
        answer = found(replace(OWN_UID, study_date=made.strftime("%Y%m%d")), ORDER)
        assert (answer.verdict is Verdict.CERTAIN) is certain, days
