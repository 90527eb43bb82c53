"""Value types: what they take, what they refuse, and how they name it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dicom import (
    PatientIdentifier,
    new_uid,
    orthanc_id,
    parse_code,
    parse_date,
    parse_short_text,
    parse_text,
    parse_uid,
    person_name,
    quoted,
)


@pytest.mark.parametrize("uid", ["0", "1.2.840.10008.1.2", "1.02.3", "1" * 64])
def test_uids(uid: str) -> None:
    assert parse_uid(uid) == uid


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1.",
        ".1",
        "1..2",
        "1.2\n",
        " 1.2",
        "1.2\0",
        "1.a",
        "1/2",
        "1" * 65,
        "1.\u0661",
        "²",
    ],
)
def test_what_is_no_uid(text: str) -> None:
    with pytest.raises(ValueError, match="UID"):
        parse_uid(text)


def test_new_uids_are_uids_and_differ() -> None:
    uids = {parse_uid(new_uid()) for _ in range(100)}
    assert len(uids) == 100
    assert all(uid.startswith("2.25.") for uid in uids)


def test_patient_identifiers() -> None:
    assert PatientIdentifier(" 12 ", " H ") == PatientIdentifier("12", "H")
    assert PatientIdentifier("a") != PatientIdentifier("A")
    assert PatientIdentifier("1", "A") != PatientIdentifier("1")
    assert str(PatientIdentifier("12345")) == "12345"
    assert str(PatientIdentifier("12345", "HOSP")) == "12345 (issuer HOSP)"


@pytest.mark.parametrize(
    "value", ["", "  ", "a\\b", "a\nb", "a\x7fb", "a\u202eb", "a\u200bb", "1" * 65]
)
def test_what_is_no_patient_identifier(value: str) -> None:
    with pytest.raises(ValueError, match="identifier"):
        PatientIdentifier(value)
    if value.strip():
        with pytest.raises(ValueError, match="issuer"):
            PatientIdentifier("1", value)


def test_person_names() -> None:
    assert person_name("Doe", "Jane") == "Doe^Jane"
    assert person_name(" Doe ", "") == "Doe"
    assert person_name("", "Jane") == "^Jane"


@pytest.mark.parametrize("last", ["a^b", "a=b", "a\\b", "a\nb", "a\u202eb", "x" * 65, ""])
def test_what_is_no_person_name(last: str) -> None:
    with pytest.raises(ValueError, match="name"):
        person_name(last, "")


def test_orthanc_ids() -> None:
    # printf '12345|1.2.3' | sha1sum
    assert orthanc_id("12345", "1.2.3") == "89ec6378-dd54857e-a1581506-9ae2f179-533111e7"
    assert orthanc_id("Müller") == "cd2562f4-b5ecc3e0-2e669737-fde72b4c-a6f2039f"


def test_other_values() -> None:
    assert parse_short_text(" A1 ") == "A1"
    assert parse_text("") == ""
    assert parse_code("CT ") == "CT"
    assert parse_date("2024.02.29") == parse_date("20240229 ") == "20240229"


@pytest.mark.parametrize(
    ("check", "bad", "said"),
    [
        (parse_short_text, "1" * 17, "at most 16"),
        (parse_text, "1" * 65, "at most 64"),
        (parse_code, "ct", "not a code"),
        (parse_code, "CT\n", "not a code"),
        (parse_date, "20230229", "calendar"),
        (parse_date, "2024.0229", "not a date"),
        (parse_date, "20240229\n", "not a date"),
        (parse_date, "\u0662\u0660240229", "not a date"),
    ],
)
def test_other_values_refused(check: Callable[[str], str], bad: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(bad)


@given(st.text())
def test_quotes_are_safe_to_print(text: str) -> None:
    assert quoted(text).isprintable()


@given(st.text())
def test_checks_raise_nothing_but_printable_value_errors(text: str) -> None:
    said = []
    for check in (parse_uid, parse_date, parse_code, parse_text, PatientIdentifier):
        try:
            check(text)
        except ValueError as error:
            said.append(str(error))
    assert "".join(said).isprintable()
