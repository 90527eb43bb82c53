"""Metadata that Orthanc said: rows checked, URLs rewritten, and kept with a root to be put in."""

import gzip
import json
from typing import Any

import pytest

from app.dicomweb import metadata
from app.dicomweb.metadata import Packed
from app.errors import NotFound, OrthancUnavailable

STUDY, SERIES, INSTANCE = "1.2.3", "1.2.3.4", "1.2.3.4.5"
ROOT = "/s/ctx/dicom-web"
BELOW = f"studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}"
BASE = f"{ROOT}/{BELOW}"
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


def kept(*rows: Any) -> bytes:
    return metadata.checked(json.dumps(list(rows)).encode(), EXPECTED, {INSTANCE})


def checked(*rows: Any, root: str = ROOT) -> Any:
    return json.loads(gzip.decompress(metadata._rooted(kept(*rows), root)))


# ---------------------------------------------------------------------------------------- rows


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
        metadata.checked(answer, EXPECTED, {INSTANCE})


def test_values_are_passed_on_as_they_are() -> None:
    row = metadata_row(**{"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller^Zoë"}]}})
    assert checked(row) == [row]


# ------------------------------------------------------------------------------------ addresses

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
    ("00420011", "lightbox://studies/9.9.9/bulk", None),
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


# ---------------------------------------------------------------------------- the root put in


@pytest.mark.parametrize("root", ["/s/other/dicom-web", "https://api.example:8443/x/dicom-web"])
def test_each_caller_gets_addresses_below_their_own_root(root: str) -> None:
    row = metadata_row(**{"7FE00010": {"vr": "OW", "BulkDataURI": "http://h/bulk/7fe00010"}})
    (found,) = checked(row, root=root)
    assert found["7FE00010"]["BulkDataURI"] == f"{root}/{BELOW}/frames"
    assert ROOT not in json.dumps(found)


def test_what_is_kept_names_no_root() -> None:
    row = metadata_row(**{"7FE00010": {"vr": "OW", "BulkDataURI": "http://h/bulk/7fe00010"}})
    said = gzip.decompress(kept(row)).decode()
    assert f'"BulkDataURI":"lightbox:/{BELOW}/frames"' in said
    assert "http" not in said


@pytest.mark.parametrize(
    "text",
    [
        '"BulkDataURI":"lightbox:/',
        '\\"BulkDataURI\\":\\"lightbox:/',
        "BulkDataURI:lightbox:/studies",
        '","BulkDataURI":"lightbox:/x',
    ],
)
def test_a_file_that_talks_like_us_is_not_believed(text: str) -> None:
    """The placeholder is looked for in the JSON's bytes: no value may be taken for it."""
    row = metadata_row(**{"00081030": element(text, "LO"), "00104000": element(text, "LT")})
    assert checked(row) == [row]


# ------------------------------------------------------------------------- studies, instances


def packed(*rows: Any) -> Packed:
    return Packed("stamp", gzip.compress(json.dumps(rows).encode()))


def test_a_study_is_the_rows_of_its_series() -> None:
    first, second = metadata_row(), metadata_row(**{"00080018": element("1.2.9")})
    joined = metadata._joined([packed(first), packed(), packed(second, first)])
    assert json.loads(gzip.decompress(joined)) == [first, second, first]
    assert json.loads(gzip.decompress(metadata._joined([packed(), packed()]))) == []


def test_an_instance_is_its_own_row_alone() -> None:
    other = metadata_row(**{"00080018": element("1.2.9")})
    found = metadata._only(packed(other, metadata_row()), INSTANCE)
    assert json.loads(gzip.decompress(found)) == [metadata_row()]
    with pytest.raises(NotFound):
        metadata._only(packed(other), INSTANCE)
