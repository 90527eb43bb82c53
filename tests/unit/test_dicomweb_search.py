"""QIDO-RS: the question read strictly, and matching as the standard has it."""

import json
from collections.abc import Iterator
from typing import Any, cast
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlmodel import Session, SQLModel, col, delete, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.dicomweb import search
from app.dicomweb.search import (
    INSTANCE_MATCHING,
    SERIES_MATCHING,
    STUDY_MATCHING,
    Search,
    parse_search,
)
from app.errors import Unprocessable
from app.models import Series, Study, folded
from tests.matching import matches

STUDY, SERIES = "1.2.3", "1.2.3.4"

# ---------------------------------------------------------------------------------- the question


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([], Search({}, 101, 0)),
        ([("limit", "5"), ("offset", "7")], Search({}, 5, 7)),
        ([("limit", "0")], Search({}, 0, 0)),
        ([("limit", "999999")], Search({}, 1000, 0)),
        ([("StudyInstanceUID", STUDY)], Search({"StudyInstanceUID": STUDY}, 101, 0)),
        ([("0020000D", STUDY)], Search({"StudyInstanceUID": STUDY}, 101, 0)),
        ([("0020000d", STUDY)], Search({"StudyInstanceUID": STUDY}, 101, 0)),
        ([("00100020", "MRN-1")], Search({"PatientID": "MRN-1"}, 101, 0)),
        ([("PatientName", "")], Search({}, 101, 0)),  # universal matching, PS3.4 C.2.2.2.3
        (
            [("includefield", "00081030"), ("includefield", "all"), ("fuzzymatching", "false")],
            Search({}, 101, 0),
        ),
        ([("fuzzymatching", "true")], Search({}, 101, 0, fuzzy=True)),
        ([("fuzzymatching", "TRUE")], Search({}, 101, 0, fuzzy=True)),
        *(
            ([("StudyDate", each)], Search({"StudyDate": each}, 101, 0))
            for each in ("20250102", "20250102-", "-20250102", "20250102-20250103")
        ),
        *(
            ([("StudyTime", each)], Search({"StudyTime": each}, 101, 0))
            for each in ("10", "1015", "101500", "101500.5", "10-", "-1015", "10-101500.000001")
        ),
    ],
)
def test_a_search_is_read(query: list[tuple[str, str]], expected: Search) -> None:
    assert parse_search(query, STUDY_MATCHING) == expected


@pytest.mark.parametrize(
    "query",
    [
        [("patientid", "MRN-1")],
        [("PATIENTID", "MRN-1")],
        [(" PatientID", "MRN-1")],
        [("PatientId", "MRN-1")],
        [("PatientBirthDate", "19800101")],
        [("00100030", "19800101")],
        [("0x00100020", "MRN-1")],
        [("PatientID", "a"), ("PatientID", "b")],
        [("PatientID", "a"), ("00100020", "b")],
        [("PatientID", ""), ("00100020", "b")],
        [("limit", "1"), ("limit", "1000")],
        [("offset", "0"), ("offset", "1")],
        [("fuzzymatching", "false"), ("fuzzymatching", "true")],
        [("limit", "-1")],
        [("limit", "")],
        [("limit", "1e3")],
        [("limit", "１")],
        [("limit", "1" * 7)],
        [("offset", " 1")],
        [("offset", "٣")],
        [("_method", "DELETE")],
        [("SeriesInstanceUID", SERIES)],
        [("", "x")],
        *(
            [("StudyDate", each)]
            for each in ("-", "2025010?", "2025*", "2025", "202501021", "a", "20250102-x", "--")
        ),
        *([("StudyDate", each)] for each in ("20250102-20250103-20250104", "٢٠٢٥٠١٠٢", "*")),
        *([("StudyTime", each)] for each in ("1", "101", "10:15", "101500.", "1015.5", "-", "*")),
        *([("PatientID", f"a{each}b")] for each in ("\n", "\0", "\x7f", "\u202e", "\\\x01")),
    ],
    ids=str,
)
def test_a_search_that_would_ask_for_more_is_refused(query: list[tuple[str, str]]) -> None:
    with pytest.raises(Unprocessable):
        parse_search(query, STUDY_MATCHING)


def test_each_level_knows_its_own_parameters() -> None:
    with pytest.raises(Unprocessable, match="Modality"):
        parse_search([("StudyInstanceUID", "9.9.9")], SERIES_MATCHING)
    with pytest.raises(Unprocessable, match="SOPClassUID"):
        parse_search([("Modality", "CT")], INSTANCE_MATCHING)


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    """It may be a patient's, and stands in logs."""
    for query in ([("x", "Doe^Jane")], [("Doe^Jane", "x")], [("StudyDate", "Doe^Jane")]):
        with pytest.raises(Unprocessable) as refused:
            parse_search(query, STUDY_MATCHING)
        assert "Doe" not in refused.value.detail


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=4))
def test_no_query_raises_anything_else(query: list[tuple[str, str]]) -> None:
    try:
        found = parse_search(query, STUDY_MATCHING)
    except Unprocessable:
        return
    assert 0 <= found.limit <= 1000
    assert found.offset >= 0
    assert set(found.matching) <= set(STUDY_MATCHING)


# ---------------------------------------------------------------------------- matching of studies


@pytest.fixture(scope="module")
def tables() -> Iterator[Session]:
    """SQLite in memory; tests/live holds PostgreSQL against the same reference."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def study(**values: Any) -> Study:
    """A study as intake keeps it."""
    sane = {
        "study_instance_uid": STUDY,
        "patient_name": "Doe^Jane",
        "study_date": "20250102",
        "study_time": "101500",
        "study_description": "CT test [thin]",
        "accession_number": "A-1",
        "dicom_patient_id": "MRN-1",
        "study_id": "S_1%",
    }
    kept = {**sane, **values}
    referring = kept.pop("referring", "Smith^Ann")
    attributes: dict[str, Any] = {"00200010": {"vr": "SH", "Value": [kept["study_id"] or None]}}
    if referring:
        attributes["00080090"] = {"vr": "PN", "Value": [{"Alphabetic": referring}]}
    return Study(
        patient_id=uuid4(),
        orthanc_id="-",
        folded_name=folded(kept["patient_name"]),
        folded_description=folded(kept["study_description"]),
        folded_referring_physician=folded(referring),
        **{"attributes": json.dumps(attributes), **kept},
    )


def found_by_sql(
    tables: Session, keyword: str, wanted: str, row: Study, modalities: tuple[str, ...] = ()
) -> bool:
    tables.exec(delete(Study))
    tables.exec(delete(Series))
    tables.add(row)
    uid = row.study_instance_uid
    tables.add_all(
        [
            Series(series_instance_uid=f"{uid}.{n}", study_instance_uid=uid, modality=modality)
            for n, modality in enumerate(modalities)
        ]
    )
    tables.flush()
    conditions = search._conditions(cast(AsyncSession, tables), Search({keyword: wanted}, 10, 0))
    found = tables.exec(select(col(Study.study_instance_uid)).where(*conditions)).all()
    tables.rollback()
    return bool(found)


def found_in_row(keyword: str, wanted: str, row: Study, modalities: tuple[str, ...] = ()) -> bool:
    """What a launch session does, whose few studies are matched one by one."""
    values = (*(getattr(row, name) for name in search._STUDY_FIELDS), "\\".join(modalities), 1, 1)
    return search._matches(keyword, search._study_row(values), wanted)


FILTERS = [
    ("StudyInstanceUID", STUDY, True),
    ("StudyInstanceUID", f"9.9.9,{STUDY}", True),
    ("StudyInstanceUID", f"9.9.9\\{STUDY}", True),
    ("StudyInstanceUID", "1.2.33", False),
    ("StudyInstanceUID", "1.2.*", False),
    ("StudyInstanceUID", "*", False),
    ("PatientID", "MRN-1", True),
    ("PatientID", "mrn-1", False),
    ("PatientID", "MRN-*", True),
    ("PatientID", "mrn-*", False),
    ("PatientID", "MRN-?", True),
    ("PatientID", "MRN-??", False),
    ("PatientID", "MRN-1,MRN-2", False),
    ("PatientID", "*", True),
    ("PatientName", "doe^jane", True),
    ("PatientName", "DOE*", True),
    ("PatientName", "doe^jane^^", True),
    ("PatientName", "Jane", False),
    ("PatientName", "*jane", True),
    ("ReferringPhysicianName", "SMITH*", True),
    ("ReferringPhysicianName", "ann*", False),
    ("AccessionNumber", "A-1", True),
    ("AccessionNumber", "A-[0-9]", False),
    ("AccessionNumber", "A-[0-9]*", False),
    ("AccessionNumber", "a-1", False),
    ("StudyID", "S_1%", True),
    ("StudyID", "S?1?", True),
    ("StudyID", "%*", False),
    ("StudyID", "_*", False),
    ("StudyID", "*_1*", True),
    ("StudyID", "*\\*", False),
    ("StudyDescription", "CT test [[]thin]", False),
    ("StudyDescription", "*[thin]", True),
    ("StudyDescription", "ct TEST*", True),
    ("StudyDescription", "*[!x]hin]", False),
    ("StudyDate", "20250102", True),
    ("StudyDate", "20250101-20250103", True),
    ("StudyDate", "20250102-20250102", True),
    ("StudyDate", "-20250102", True),
    ("StudyDate", "20250102-", True),
    ("StudyDate", "-20250101", False),
    ("StudyDate", "20250103-", False),
    ("StudyDate", "20250103-20250101", False),
    ("StudyTime", "10", True),
    ("StudyTime", "1015", True),
    ("StudyTime", "101500", True),
    ("StudyTime", "101500.0", False),
    ("StudyTime", "1016", False),
    ("StudyTime", "09-10", True),
    ("StudyTime", "-1015", True),
    ("StudyTime", "-1014", False),
    ("StudyTime", "1015-", True),
    ("StudyTime", "11-", False),
    ("ModalitiesInStudy", "CT", True),
    ("ModalitiesInStudy", "SR", True),
    ("ModalitiesInStudy", "MR", False),
    ("ModalitiesInStudy", "C?", True),
    ("ModalitiesInStudy", "ct", False),
]


@pytest.mark.parametrize(("keyword", "wanted", "expected"), FILTERS)
def test_a_study_matches_as_the_standard_says(
    keyword: str, wanted: str, expected: bool, tables: Session
) -> None:
    assert found_by_sql(tables, keyword, wanted, study(), ("CT", "SR")) is expected
    assert found_in_row(keyword, wanted, study(), ("CT", "SR")) is expected


@pytest.mark.parametrize("keyword", ["StudyDate", "StudyTime"])
def test_what_has_no_date_or_time_is_in_no_range(keyword: str, tables: Session) -> None:
    bare = {"study_date": "", "study_time": ""}
    wanted = ("-20991231", "00010101-", "20250102") if keyword == "StudyDate" else ("00-", "-23")
    for each in wanted:
        assert not found_by_sql(tables, keyword, each, study(**bare))
        assert not found_in_row(keyword, each, study(**bare))


def test_several_keys_all_have_to_match(tables: Session) -> None:
    tables.add(study())
    tables.flush()
    for name, expected in (("Doe*", 1), ("Roe*", 0)):
        wanted = Search({"PatientID": "MRN-1", "PatientName": name}, 10, 0)
        conditions = search._conditions(cast(AsyncSession, tables), wanted)
        assert len(tables.exec(select(Study).where(*conditions)).all()) == expected
    tables.rollback()


# A small alphabet finds more: what is wild here, there, or nowhere; case; accents both ways.
TEXT = st.text(alphabet="aAbß*?[]!^-\\%_éE\u0301 ", max_size=6)
COLUMNS = {
    "AccessionNumber": "accession_number",
    "PatientID": "dicom_patient_id",
    "PatientName": "patient_name",
    "ReferringPhysicianName": "referring",
    "StudyDescription": "study_description",
    "StudyID": "study_id",
}
TIMES = st.times().map(lambda at: f"{at:%H%M%S.%f}") | st.times().map(lambda at: f"{at:%H%M%S}")
DATES = st.dates().map(lambda day: f"{day.year:04}{day:%m%d}")


@given(st.sampled_from(sorted(COLUMNS)), TEXT.filter(bool), TEXT)
@settings(max_examples=300)
def test_sql_matches_text_as_the_reference_does(
    tables: Session, keyword: str, wanted: str, value: str
) -> None:
    expected = matches(keyword, wanted, [value])
    row = study(**{COLUMNS[keyword]: value})
    assert found_in_row(keyword, wanted, row) is expected
    assert found_by_sql(tables, keyword, wanted, row) is expected


@given(st.data())
@settings(max_examples=300)
def test_sql_finds_the_ranges_that_the_reference_finds(
    tables: Session, data: st.DataObject
) -> None:
    keyword = data.draw(st.sampled_from(["StudyDate", "StudyTime"]))
    values = DATES if keyword == "StudyDate" else TIMES
    value = data.draw(values)
    cuts = [8] if keyword == "StudyDate" else [2, 4, 6]
    near = st.just(value) | values
    first, last = (data.draw(near)[: data.draw(st.sampled_from(cuts))] for _ in range(2))
    for wanted in (first, f"{first}-", f"-{last}", f"{first}-{last}"):
        expected = matches(keyword, wanted, [value])
        row = study(**{"study_date" if keyword == "StudyDate" else "study_time": value})
        assert found_in_row(keyword, wanted, row) is expected, (wanted, value)
        assert found_by_sql(tables, keyword, wanted, row) is expected, (wanted, value)


# ---------------------------------------------------------------------- series and instances


@given(st.sampled_from(["Modality", "SeriesDescription"]), TEXT.filter(bool), TEXT)
def test_a_row_matches_text_as_the_reference_does(keyword: str, wanted: str, value: str) -> None:
    row = search._row("{}", **{keyword: value})
    assert search._matches(keyword, row, wanted) is matches(keyword, wanted, [value])


ROW = search._row(
    json.dumps(
        {
            "00180015": {"vr": "CS", "Value": [None, "CHEST"]},
            "00400244": {"vr": "DA", "Value": ["20250102"]},
        }
    ),
    Modality="CT",
    SeriesDescription="thin [1]",
    SeriesInstanceUID=SERIES,
    SeriesNumber=12,
    SOPInstanceUID="1.2.3.4.5",
    InstanceNumber=None,
)


@pytest.mark.parametrize(
    ("keyword", "wanted", "expected"),
    [
        ("Modality", "CT", True),
        ("Modality", "ct", False),
        ("Modality", "?T", True),
        ("Modality", "CT,MR", False),
        ("SeriesNumber", "12", True),
        ("SeriesNumber", "1", False),
        ("SeriesNumber", "1*", True),
        ("SeriesInstanceUID", SERIES, True),
        ("SeriesInstanceUID", f"9.9,{SERIES}", True),
        ("SeriesInstanceUID", "1.2.*", False),
        ("SOPInstanceUID", SERIES, False),
        ("SeriesDescription", "thin [1]", True),
        ("SeriesDescription", "thin [[]1]", False),
        ("SeriesDescription", "*[1-9]", False),
        ("BodyPartExamined", "CHEST", True),
        ("BodyPartExamined", "None", False),
        ("BodyPartExamined", "N*", False),
        ("PerformedProcedureStepStartDate", "20250101-", True),
        ("PerformedProcedureStepStartDate", "20250103-", False),
        ("PerformedProcedureStepStartTime", "00-", False),
        ("InstanceNumber", "None", False),
        ("InstanceNumber", "1", False),
        ("InstanceNumber", "*", True),
    ],
)
def test_a_row_matches_as_the_standard_says(keyword: str, wanted: str, expected: bool) -> None:
    assert search._matches(keyword, ROW, wanted) is expected


def test_a_page_counts_matches_only() -> None:
    rows = [search._row("{}", SeriesNumber=n, Modality=("CT", "SR")[n % 2]) for n in range(10)]

    def page(limit: int, offset: int) -> tuple[list[int], int]:
        found = search._page(rows, Search({"Modality": "SR"}, limit, offset))
        return [row["00200011"]["Value"][0] for row in found.rows], found.total

    assert page(2, 0) == ([1, 3], 5)
    assert page(2, 2) == ([5, 7], 5)
    assert page(99, 4) == ([9], 5)
    assert page(0, 0) == page(5, 5) == ([], 5)


# -------------------------------------------------------------------------------------- rows


def test_a_row_of_a_study_has_what_the_viewer_needs() -> None:
    kept = study(study_time="", attributes="{}")
    row = search._study_row(
        (*(getattr(kept, name) for name in search._STUDY_FIELDS), "SR\\CT\\\\SR", 3, 6)
    )
    values = {tag: element.get("Value") for tag, element in row.items()}
    assert values == {
        "00080005": ["ISO_IR 192"],
        "00080020": ["20250102"],
        "00080030": None,
        "00080050": ["A-1"],
        "00080061": ["CT", "SR"],
        "00081030": ["CT test [thin]"],
        "00100010": [{"Alphabetic": "Doe^Jane"}],
        "00100020": ["MRN-1"],
        "00100030": None,
        "00100040": None,
        "0020000D": [STUDY],
        "00201206": [3],
        "00201208": [6],
    }


def test_a_study_without_modalities_says_other() -> None:
    """OHIF takes an empty ModalitiesInStudy for a missing study."""
    fields = [getattr(study(), name) for name in search._STUDY_FIELDS]
    for modalities in (None, "", "\\"):
        row = search._study_row((*fields, modalities, 1, 0))
        assert row["00080061"]["Value"] == ["OT"]


def test_a_name_has_its_groups() -> None:
    row = search._row("{}", PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう")
    assert row["00100010"]["Value"] == [
        {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}
    ]
