"""The gateway's own part of DICOMweb: searches, metadata checked, URLs rewritten, bulk paths."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import dicomweb
from app.dicomweb import SERIES_MATCHING, STUDY_MATCHING, Search, parse_search
from app.errors import OrthancUnavailable, Unprocessable
from app.linking import SeriesSummary, StudySummary
from app.models import Series, Study

STUDY, SERIES, INSTANCE = "1.2.3", "1.2.3.4", "1.2.3.4.5"


def summary(uid: str = STUDY, modalities: Sequence[str] = ("CT",), **values: Any) -> StudySummary:
    sane = {
        "patient_name": "Doe^Jane",
        "study_date": "20250102",
        "study_description": "CT test [thin]",
        "accession_number": "A-1",
        "dicom_patient_id": "MRN-1",
    }
    study = Study(study_instance_uid=uid, patient_id=uuid4(), orthanc_id="-", **{**sane, **values})
    series = [
        Series(
            series_instance_uid=f"{uid}.{n}",
            study_instance_uid=uid,
            modality=modality,
            series_number=n,
        )
        for n, modality in enumerate(modalities)
    ]
    return StudySummary(study, (), tuple(SeriesSummary(each, 2) for each in series))


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
            [("includefield", "00081030"), ("includefield", "all"), ("fuzzymatching", "true")],
            Search({}, 101, 0),
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
    ],
    ids=str,
)
def test_a_search_that_would_ask_for_more_is_refused(query: list[tuple[str, str]]) -> None:
    with pytest.raises(Unprocessable):
        parse_search(query, STUDY_MATCHING)


def test_a_series_search_knows_its_own_parameters() -> None:
    with pytest.raises(Unprocessable, match="Modality"):
        parse_search([("StudyInstanceUID", "9.9.9")], SERIES_MATCHING)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=4))
def test_no_query_raises_anything_else(query: list[tuple[str, str]]) -> None:
    try:
        search = parse_search(query, STUDY_MATCHING)
    except Unprocessable:
        return
    assert 0 <= search.limit <= 1000
    assert search.offset >= 0
    assert set(search.matching) <= set(STUDY_MATCHING)


# ------------------------------------------------------------------------------------- matching

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
    ("PatientID", "MRN-?", True),
    ("PatientID", "MRN-??", False),
    ("PatientID", "MRN-1,MRN-2", False),
    ("PatientID", "*", True),
    ("PatientName", "doe^jane", True),
    ("PatientName", "DOE*", True),
    ("PatientName", "Jane", False),
    ("PatientName", "*jane", True),
    ("AccessionNumber", "A-1", True),
    ("AccessionNumber", "A-[0-9]", False),
    ("AccessionNumber", "a-1", False),
    ("StudyDescription", "CT test [[]thin]", False),
    ("StudyDescription", "*[thin]", True),
    ("StudyDescription", "*[!x]hin]", False),
    ("StudyDate", "20250102", True),
    ("StudyDate", "2025010?", True),
    ("StudyDate", "20250101-20250103", True),
    ("StudyDate", "20250102-20250102", True),
    ("StudyDate", "-20250101", False),
    ("StudyDate", "20250103-", False),
    ("StudyDate", "-", True),
    ("ModalitiesInStudy", "CT", True),
    ("ModalitiesInStudy", "SR", True),
    ("ModalitiesInStudy", "MR", False),
    ("ModalitiesInStudy", "C?", True),
]


@pytest.mark.parametrize(("keyword", "wanted", "expected"), FILTERS)
def test_a_study_matches_as_the_standard_says(keyword: str, wanted: str, expected: bool) -> None:
    rows = dicomweb.search_studies(
        [summary(modalities=("CT", "SR"))], Search({keyword: wanted}, 10, 0)
    )
    assert bool(rows) is expected


def test_a_study_without_a_date_is_in_no_range() -> None:
    for wanted in ("-", "-20991231", "00000000-", "20250102"):
        search = Search({"StudyDate": wanted}, 10, 0)
        assert dicomweb.search_studies([summary(study_date="")], search) == []


def test_limit_and_offset_count_matches_only() -> None:
    studies = [summary(f"1.2.{n}", study_description="ab"[n % 2]) for n in range(10)]

    def uids(limit: int, offset: int) -> list[str]:
        search = Search({"StudyDescription": "b"}, limit, offset)
        found = dicomweb.search_studies(studies, search)
        return [row["0020000D"]["Value"][0] for row in found]

    assert uids(2, 0) == ["1.2.1", "1.2.3"]
    assert uids(2, 2) == ["1.2.5", "1.2.7"]
    assert uids(99, 4) == ["1.2.9"]
    assert uids(0, 0) == uids(5, 5) == []


def test_a_row_of_a_study_has_what_the_viewer_needs() -> None:
    (row,) = dicomweb.search_studies([summary(modalities=("CT", "SR", "CT"))], Search({}, 1, 0))
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
    for modalities in ((), ("",)):
        (row,) = dicomweb.search_studies([summary(modalities=modalities)], Search({}, 1, 0))
        assert row["00080061"]["Value"] == ["OT"]


@pytest.mark.parametrize(
    ("matching", "numbers"),
    [
        ({}, [0, 1, 2]),
        ({"Modality": "CT"}, [0, 2]),
        ({"SeriesNumber": "1"}, [1]),
        ({"SeriesInstanceUID": f"{STUDY}.2"}, [2]),
        ({"SeriesInstanceUID": "9.9"}, []),
    ],
)
def test_series_are_searched_within_the_study(matching: dict[str, str], numbers: list[int]) -> None:
    rows = dicomweb.search_series(summary(modalities=("CT", "SR", "CT")), Search(matching, 9, 0))
    assert [row["00200011"]["Value"][0] for row in rows] == numbers
    assert {row["0020000D"]["Value"][0] for row in rows} <= {STUDY}


# ------------------------------------------------------------------------------------- metadata

ROOT = "/s/ctx/dicom-web"
BASE = f"{ROOT}/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}"
EXPECTED = {"0020000D": STUDY, "0020000E": SERIES, "00100020": "MRN-1"}


def element(value: str, vr: str = "UI") -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}


def metadata_row(**more: Any) -> dict[str, Any]:
    row = {
        "00080018": element(INSTANCE),
        "0020000D": element(STUDY),
        "0020000E": element(SERIES),
        "00100020": element("MRN-1", "LO"),
    }
    return {**row, **more}


def checked(*rows: Any) -> Any:
    answer = json.dumps(list(rows)).encode()
    return json.loads(dicomweb._checked_metadata(answer, EXPECTED, {INSTANCE}, ROOT))


def test_rows_of_the_study_pass() -> None:
    assert checked(metadata_row()) == [metadata_row()]
    padded = metadata_row(**{"00100020": element("MRN-1 ", "LO")})
    assert len(checked(padded)) == 1


@pytest.mark.parametrize(
    "foreign",
    [
        {"00100020": element("MRN-VICTIM", "LO")},
        {"00100020": {"vr": "LO"}},
        {"00100020": {"vr": "LO", "Value": []}},
        {"00100020": {"vr": "LO", "Value": [None]}},
        {"00100020": {"vr": "LO", "Value": "MRN-1"}},
        {"00100020": element("mrn-1", "LO")},
        {"0020000D": element("9.9.9")},
        {"0020000E": element("9.9.9")},
        {"00080018": element("9.9.9")},
        {"00080018": {"vr": "UI"}},
        {"0020000D": None},
    ],
    ids=str,
)
def test_a_row_of_anything_else_is_left_out(foreign: dict[str, Any]) -> None:
    assert checked(metadata_row(**foreign), metadata_row()) == [metadata_row()]


def test_what_is_no_row_is_left_out() -> None:
    assert checked(None, [], "x", 1, {}, metadata_row()) == [metadata_row()]


@pytest.mark.parametrize("answer", [b"", b"<html>", b"{}", b"null", b'[{"a":', b"\xff\xfe", b'"x"'])
def test_metadata_that_is_none_is_not_believed(answer: bytes) -> None:
    with pytest.raises(OrthancUnavailable):
        dicomweb._checked_metadata(answer, EXPECTED, {INSTANCE}, ROOT)


URLS = [
    ("7FE00010", "http://localhost/dicom-web/studies/1/bulk/7fe00010", f"{BASE}/frames"),
    ("7FE00010", "http://orthanc.internal:8042/anything", f"{BASE}/frames"),
    ("00420011", "http://localhost/dicom-web/x/bulk/00420011", f"{BASE}/bulk/00420011"),
    ("00420011", "/relative/bulk/00420011", f"{BASE}/bulk/00420011"),
    ("00420011", "../../9.9.9/series/1/instances/1/bulk/00420011", f"{BASE}/bulk/00420011"),
    (
        "54001010",
        "http://localhost/x/bulk/54000100/1/54001010",
        f"{BASE}/bulk/54000100/1/54001010",
    ),
    ("00420011", "http://localhost/x/bulk/../../../../system", None),
    ("00420011", "http://localhost/x/bulk/00420011/../x", None),
    ("00420011", "http://localhost/x/bulk/00420011?a=b", f"{BASE}/bulk/00420011"),
    ("00420011", "http://localhost/instances/1/file", None),
    ("00420011", "javascript:alert(1)", None),
    ("00420011", "", None),
    ("00420011", 7, None),
]


@pytest.mark.parametrize(("tag", "uri", "expected"), URLS)
def test_every_url_points_at_the_gateway(tag: str, uri: object, expected: str | None) -> None:
    (row,) = checked(metadata_row(**{tag: {"vr": "OB", "BulkDataURI": uri}}))
    assert row[tag].get("BulkDataURI") == expected


def test_urls_in_nested_sequences_are_rewritten() -> None:
    inner: Any = {"54001010": {"vr": "OW", "BulkDataURI": "http://h/bulk/54000100/1/54001010"}}
    for _ in range(20):
        inner = {"00081115": {"vr": "SQ", "Value": [inner, None, "x"]}}
    said = json.dumps(checked(metadata_row(**inner)))
    assert "http://" not in said
    assert f"{BASE}/bulk/54000100/1/54001010" in said


def test_a_sequence_that_is_no_list_is_let_be() -> None:
    row = metadata_row(**{"00081115": {"vr": "SQ", "Value": None}})
    assert checked(row) == [row]


def test_values_are_passed_on_as_they_are() -> None:
    row = metadata_row(**{"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller^Zoë"}]}})
    assert checked(row) == [row]


# ------------------------------------------------------------------------------------ bulk paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("00420011", ["0042-0011"]),
        ("7FE00010", ["7fe0-0010"]),
        ("54000100/1/54001010", ["5400-0100", "0", "5400-1010"]),
        ("54000100/12/54001010", ["5400-0100", "11", "5400-1010"]),
        ("", None),
        ("00420011/", None),
        ("/00420011", None),
        ("54000100/1", None),
        ("54000100/0/54001010", None),
        ("54000100/-1/54001010", None),
        ("54000100/٣/54001010", None),
        ("54000100/1234567/54001010", None),
        ("0042001", None),
        ("004200110", None),
        ("0042001g", None),
        ("００４２００１１", None),
        ("00420011\n", None),
        ("../../sys", None),
        ("../..", None),
        ("00420011/../00420011", None),
        ("/".join(["00420011", "1"] * 17 + ["00420011"]), None),
    ],
)
def test_a_path_of_bulk_data_is_taken_whole_or_not(path: str, expected: list[str] | None) -> None:
    assert dicomweb._bulk_tags(path) == expected


@given(st.text(max_size=40))
def test_what_is_sent_to_orthanc_holds_nothing_but_tags(path: str) -> None:
    tags = dicomweb._bulk_tags(path)
    assert tags is None or set("/".join(tags)) <= set("0123456789abcdef-/")
