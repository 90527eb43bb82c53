"""The cases that invite a wrong link, with the truth known: tests.adversarial."""

import random

import pytest

from app.matching import (
    Verdict,
    family_keys,
    look_up,
    match,
)
from tests.adversarial.case import INVISIBLE, KINDS, Case
from tests.adversarial.people import Maker
from tests.adversarial.tally import Row, cases, common_day, tally


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return tally(KINDS, each=50, seed=7)


def total(rows: dict[str, Row]) -> Row:
    row = Row()
    for each in rows.values():
        row += each
    return row


def test_no_case_is_linked_wrongly(rows: dict[str, Row]) -> None:
    assert total(rows).cases >= 4000
    assert {words: row.counts["wrong"] for words, row in rows.items() if row.counts["wrong"]} == {}


def test_what_is_sure_is_linked(rows: dict[str, Row]) -> None:
    """All ordinary studies, however they are written; but an identifier is compared strictly."""
    asked = {"PatientID without its leading zeros"}
    ordinary = [
        words
        for words, make in KINDS.items()
        if make.__module__ == "tests.adversarial.ordinary" and words not in asked
    ]
    assert len(ordinary) > 25
    for words in ordinary:
        counts = rows[words].counts
        assert counts["order"] + counts["patient"] == counts.total(), words


def test_a_common_day_is_linked() -> None:
    day = common_day(1500)
    assert day.counts["wrong"] == 0
    assert (day.counts["order"] + day.counts["patient"]) / day.cases > 0.94


def test_where_a_human_is_asked_the_truth_is_mostly_first(rows: dict[str, Row]) -> None:
    asked = [
        "PatientID mistyped, hits nobody",
        "accession mistyped, hits nobody",
        "name and birth date alone",
        "no PatientID, accession of the order",
        "birth date one slip away",
        "name misspelled",
        "order cancelled",
    ]
    for words in asked:
        assert rows[words].first == rows[words].findable > 0, words


def test_what_no_header_shows_is_told_honestly() -> None:
    """If this fails because it is seen now: well done, change docs/matching.md."""
    unseen = tally(INVISIBLE, each=10)
    assert unseen["A's entry taken for B, nothing put right"].counts["wrong"] == 10


def test_the_truth_is_among_what_is_looked_up() -> None:
    missed = []
    for words, case in cases(KINDS, each=8, seed=3):
        if case.patient and not _looked_up(case):
            missed.append(words)
    # Their values were all put in from another's entry, or there is no value.
    assert len(missed) <= 0.03 * 8 * len(KINDS), sorted(set(missed))


def _looked_up(case: Case) -> bool:
    keys = look_up(case.study)
    known = {each.id: each for each in (*case.patients, *(o.patient for o in case.orders))}
    patient = known[case.patient] if case.patient else None
    assert patient is not None
    by_order = any(
        order.patient.id == patient.id
        and (
            order.planned_study_instance_uid in keys.study_instance_uids
            or order.accession_number in keys.accession_numbers
            or order.linked & set(keys.study_instance_uids)
        )
        for order in case.orders
    )
    numbers = {patient.mrn, *(each.value for each in patient.former)}
    return bool(
        by_order
        or numbers & set(keys.patient_ids)
        or family_keys(patient.name) & set(keys.family_keys)
        or patient.birth_date in keys.birth_dates
    )


def test_two_hundred_candidates_hide_none() -> None:
    maker = Maker(random.Random(5))
    orders = [maker.order(maker.patient()) for _ in range(200)]
    for study in [maker.study(each) for each in orders[:20]]:
        assert match(study, orders, authority="HOSP").verdict is Verdict.CERTAIN
