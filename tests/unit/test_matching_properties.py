"""What holds of every match, whatever the values."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.matching import (
    ArrivedStudy,
    Code,
    Identifier,
    Match,
    OrderCandidate,
    Request,
    Verdict,
    family_keys,
    look_up,
)
from app.matching.codes import MEANING
from app.matching.names import compare, read
from app.matching.numbers import another_notation, date_slip, slip
from tests.adversarial.case import KINDS, Case
from tests.adversarial.people import Maker
from tests.adversarial.tally import decide, one_case

RANDOM_CASES = st.builds(
    lambda words, n: one_case(KINDS[words], f"property {words} {n}"),
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 10**6),
)
ANY_TEXT = st.text(max_size=80) | st.sampled_from(
    [
        "\ud800",
        "=",
        "^",
        "^^^^=^^^^=^^^^",
        "\0",
        "\u202e",
        "ﷺ",
        "\\",
        "19000101",
        "20260230",
        "x" * 600,
    ]
)
NAMES = st.text(
    st.sampled_from("aAbeijnoé ^^=-.?1 ßüÜ山太やヤИван김محمد\u0308\u200b\0"), max_size=24
) | st.sampled_from(
    ["Smith^Baby Girl A", "Smith^Baby Boy", "TRAUMA^1", "Unknown", "Smith^John^^^Jr"]
)
NUMBERS = st.text(st.sampled_from("00123Aa-_ "), max_size=18)
DENIALS: list[Callable[[ArrivedStudy, OrderCandidate], ArrivedStudy]] = [
    lambda study, _: replace(study, patient_name="Zzyx^Quirin"),
    lambda study, _: replace(study, birth_date="19110203"),
    lambda study, order: replace(study, sex="F" if order.patient.sex == "M" else "M"),
    lambda study, _: replace(study, patient=Identifier("QQ-0", "HOSP")),
    lambda study, _: replace(study, patient=replace(study.patient, issuer="NOWHERE")),
    lambda study, _: replace(study, accession=Identifier("QQ-1")),
    lambda study, _: replace(study, modalities=("XA",)),
    lambda study, _: replace(study, under_two_patients=True),
    lambda study, _: replace(study, requests=(*study.requests, Request(Identifier("QQ-2")))),
]


def score(found: Match, order: OrderCandidate) -> int:
    return next((each.score for each in found.candidates if each.order_id == order.id), 0)


@given(RANDOM_CASES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_candidates_does_not_count(case: Case, shuffle: random.Random) -> None:
    orders, patients = list(case.orders), list(case.patients)
    shuffle.shuffle(orders)
    shuffle.shuffle(patients)
    repeated = replace(case, orders=tuple(orders + orders[:2]), patients=tuple(patients))
    assert decide(repeated) == decide(case)


@given(RANDOM_CASES, st.sampled_from(DENIALS), st.integers(0, 20))
@settings(max_examples=300, deadline=None)
def test_a_contradiction_never_makes_certain(
    case: Case, deny: Callable[[ArrivedStudy, OrderCandidate], ArrivedStudy], n: int
) -> None:
    if not case.orders:
        return
    order = case.orders[n % len(case.orders)]
    if deny is DENIALS[5] and case.study.accession.value not in ("", order.accession_number):
        return  # it would take another contradiction away
    before = decide(case)
    after = decide(replace(case, study=deny(case.study, order)))
    assert after.order_id != order.id or before.order_id == order.id
    assert after.patient_id != order.patient.id or before.patient_id == order.patient.id


@given(RANDOM_CASES, st.sampled_from(DENIALS[:4]))
@settings(max_examples=200, deadline=None)
def test_who_is_denied_is_not_certain(
    case: Case, deny: Callable[[ArrivedStudy, OrderCandidate], ArrivedStudy]
) -> None:
    before = decide(case)
    order = next((each for each in case.orders if each.id == before.order_id), None)
    if order is None or (order.patient.sex not in ("M", "F") and deny is DENIALS[2]):
        return
    if deny is DENIALS[1] and order.patient.birth_date is None:
        return
    if deny is DENIALS[0] and not order.patient.name.split("^")[0].isascii():
        return  # can't be read beside it
    if deny is DENIALS[0] and order.patient.name.startswith("TRAUMA"):
        return  # nobody's name
    after = decide(replace(case, study=deny(case.study, order)))
    assert after.verdict is not Verdict.CERTAIN
    assert score(after, order) <= score(before, order)


@given(RANDOM_CASES, st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_somebody_unrelated_never_makes_another_certain(case: Case, seed: int) -> None:
    maker = Maker(random.Random(seed))
    more = maker.order(maker.patient())
    before, after = decide(case), decide(replace(case, orders=(*case.orders, more)))
    assert after.order_id in (before.order_id, None)
    assert after.patient_id in (before.patient_id, None)


@given(RANDOM_CASES, st.sampled_from(sorted(KINDS)), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_other_peoples_candidates_never_make_another_certain(
    case: Case, words: str, seed: int
) -> None:
    """However entangled they are among themselves."""
    others = one_case(KINDS[words], f"others {seed}")
    before = decide(case)
    after = decide(
        replace(case, orders=case.orders + others.orders, patients=case.patients + others.patients)
    )
    assert after.order_id in (before.order_id, None)
    assert after.patient_id in (before.patient_id, None)


@given(RANDOM_CASES)
@settings(max_examples=200, deadline=None)
def test_an_answer_is_consistent(case: Case) -> None:
    found = decide(case)
    certain = found.verdict is Verdict.CERTAIN
    assert (found.patient_id is not None) is (found.rule is not None) is certain
    assert certain or found.order_id is None
    assert found.because
    assert bool(found.candidates) or found.verdict is not Verdict.PROPOSED
    json.dumps(found.as_json(), allow_nan=False).encode()
    for each in found.candidates:
        assert 0 <= each.score <= 100
        assert all(MEANING[one.code].points > 0 for one in each.speaks_for)
        assert all(MEANING[one.code].points <= 0 for one in each.speaks_against)
        assert all(one.words.isprintable() for one in (*each.speaks_for, *each.speaks_against))


@given(NAMES | ANY_TEXT, NAMES | ANY_TEXT)
@settings(max_examples=600, deadline=None)
def test_names_compare_alike_both_ways(a: str, b: str) -> None:
    assert compare(read(a), read(b)) is compare(read(b), read(a))


@given(NAMES | ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_a_name_never_contradicts_itself(name: str) -> None:
    found = compare(read(name), read(name))
    assert found.value not in ("other", "other-given", "other-family")


@given(NUMBERS | ANY_TEXT, NUMBERS | ANY_TEXT)
@settings(max_examples=400, deadline=None)
def test_numbers_compare_alike_both_ways(a: str, b: str) -> None:
    assert slip(a, b) == slip(b, a)
    assert another_notation(a, b) == another_notation(b, a)


@given(st.dates(date(1901, 1, 2)), st.dates(date(1901, 1, 2)))
def test_dates_compare_alike_both_ways(a: date, b: date) -> None:
    assert date_slip(a, b) == date_slip(b, a)


IDENTIFIERS = st.builds(Identifier, ANY_TEXT, ANY_TEXT, ANY_TEXT)


@given(
    RANDOM_CASES,
    st.fixed_dictionaries(
        {},
        optional={
            "study_instance_uid": ANY_TEXT,
            "patient": IDENTIFIERS,
            "other_patient_ids": st.tuples(IDENTIFIERS),
            "accession": IDENTIFIERS,
            "requests": st.tuples(st.builds(Request, IDENTIFIERS, ANY_TEXT)),
            "patient_name": ANY_TEXT,
            "other_patient_names": st.tuples(ANY_TEXT),
            "birth_date": ANY_TEXT,
            "sex": ANY_TEXT,
            "modalities": st.tuples(ANY_TEXT),
            "study_date": ANY_TEXT,
            "body_parts": st.tuples(ANY_TEXT),
            "stations": st.tuples(ANY_TEXT),
            "institution": ANY_TEXT,
        },
    ),
    ANY_TEXT,
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_survived(case: Case, values: dict[str, Any], text: str) -> None:
    order = case.orders[0] if case.orders else None
    changed = replace(case, study=replace(case.study, **values))
    if order:
        patient = replace(order.patient, mrn=text, name=text, sex=text, other_names=(text,))
        odd = replace(order, patient=patient, accession_number=text, modality=text, site=text)
        changed = replace(changed, orders=(odd, *case.orders[1:]))
    found = decide(changed)
    json.dumps(found.as_json())
    assert all(each.code in Code for each in found.because)
    look_up(changed.study)
    family_keys(text)


@given(RANDOM_CASES, st.sampled_from(["in-progress", "completed", "scheduled"]))
@settings(max_examples=300, deadline=None)
def test_what_is_certain_still_is_once_it_is_linked(case: Case, status: str) -> None:
    """It is asked again in the transaction that has linked it: of the same values, the same."""
    found = decide(case)
    if found.verdict is not Verdict.CERTAIN:
        return
    study = replace(case.study, owner=found.patient_id)
    uid = frozenset({study.study_instance_uid})
    orders = tuple(
        replace(each, status=status, linked=each.linked | uid)
        if each.id == found.order_id
        else each
        for each in case.orders
    )
    again = decide(replace(case, study=study, orders=orders))
    assert (again.verdict, again.patient_id) == (Verdict.CERTAIN, found.patient_id)
