"""Changed copies: what was asked for changes, and nothing else."""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_charset_files, get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.sequence import Sequence

from app.dicom import Limits, changes_from_json, read_tags, rewrite, scan
from app.errors import Unprocessable

LIMITS = Limits(max_bytes=2**31)
EVERY_SYNTAX = (
    *("MR_small_implicit.dcm", "CT_small.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"),
    *("SC_rgb_jpeg_dcmtk.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm", "rtplan.dcm", "test-SR.dcm"),
    *("waveform_ecg.dcm", "MR_small_padded.dcm", "693_J2KI.dcm", "SC_rgb_small_odd.dcm"),
)


def sample(name: str) -> bytes:
    found = get_charset_files(name)
    path = found[0] if found else get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom no longer ships {name}"
    return Path(path).read_bytes()


def changed(data: bytes, changes: Dataset) -> bytes:
    out = io.BytesIO()
    file = io.BytesIO(data)
    with scan(file, LIMITS) as scanned:
        rewrite(file, out, scanned, changes)
    return out.getvalue()


def parsed(data: bytes) -> Dataset:
    return dcmread(io.BytesIO(data), force=True)


def raw(data: bytes) -> dict[int, tuple[str, bytes]]:
    """tag: VR and bytes of every top-level element, as our own scan finds them."""
    file = io.BytesIO(data)
    with scan(file, LIMITS) as scanned:
        source, found = scanned.source(file), {}
        for element in scanned.elements:
            source.seek(element.header)
            found[element.tag] = (element.vr, source.read(element.end - element.header))
        return found


@pytest.mark.parametrize("name", EVERY_SYNTAX)
def test_only_what_was_asked_for_changes(name: str) -> None:
    data = sample(name)
    changes = changes_from_json(
        {
            "PatientID": "NEW-1",
            "PatientName": "Doe^Jane",
            "StudyDate": None,
            "SeriesNumber": 3,
            "ImageType": ["DERIVED", "SECONDARY"],
            "RescaleSlope": 1.5,
            "ReferringPhysicianName": "",
        }
    )
    result = changed(data, changes)
    after = parsed(result)
    assert (after.PatientID, str(after.PatientName)) == ("NEW-1", "Doe^Jane")
    assert (after.StudyDate, after.SeriesNumber) == ("", 3)
    assert list(after.ImageType) == ["DERIVED", "SECONDARY"]
    assert after.RescaleSlope == 1.5
    assert after["ReferringPhysicianName"].is_empty
    before, now = raw(data), raw(result)
    touched = {int(e.tag) for e in changes}
    lengths = {tag & 0xFFFF0000 for tag in touched}
    assert {t: v for t, v in before.items() if t not in touched | lengths} == {
        t: v for t, v in now.items() if t not in touched
    }
    assert list(now) == sorted(now)
    assert after.file_meta == parsed(data).file_meta
    if "PixelData" in after:
        assert after.PixelData == parsed(data).PixelData


@pytest.mark.parametrize("name", EVERY_SYNTAX)
def test_no_change_is_a_copy(name: str) -> None:
    data = sample(name)
    result = changed(data, Dataset())
    assert raw(result) == raw(data)
    if name != "image_dfl.dcm":
        assert result == data


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"])
def test_the_file_meta_follows_the_instance(name: str) -> None:
    result = parsed(changed(sample(name), changes_from_json({"SOPInstanceUID": "1.2.345"})))
    assert result.SOPInstanceUID == result.file_meta.MediaStorageSOPInstanceUID == "1.2.345"


def test_ascii_files_become_utf_8_when_they_must() -> None:
    data = undeclared(b"Mull")
    result = parsed(changed(data, changes_from_json({"PatientName": "Müller^Zoë=山田"})))
    assert str(result.PatientName) == "Müller^Zoë=山田"
    assert result.SpecificCharacterSet == "ISO_IR 192"


def undeclared(name: bytes) -> bytes:
    """A file without SpecificCharacterSet whose ReferringPhysicianName is `name`."""
    made = Dataset()
    made.add(DataElement(0x00080018, "UI", "1.2"))
    made.ReferringPhysicianName = "A" * len(name)
    made.PatientName = "Doe"
    out = io.BytesIO()
    made.save_as(out, implicit_vr=False, little_endian=True)
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    return b"\0" * 128 + b"DICM" + meta + out.getvalue().replace(b"A" * len(name), name)


def test_other_text_than_ascii_is_not_reinterpreted() -> None:
    data = undeclared(b"M\xfcll")
    with pytest.raises(Unprocessable, match="PatientName"):
        changed(data, changes_from_json({"PatientName": "Zoë"}))
    # Where it is replaced itself, nothing else stands in the way.
    both = changes_from_json({"PatientName": "Zoë", "ReferringPhysicianName": "Müll"})
    assert str(parsed(changed(data, both)).ReferringPhysicianName) == "Müll"
    ascii_only = parsed(changed(data, changes_from_json({"PatientName": "Zoe"})))
    assert "SpecificCharacterSet" not in ascii_only


def test_text_that_hides_as_un_counts_too() -> None:
    data = undeclared(b"M\xfcll")
    assert data.count(b"PN\x04\0M") == 1
    hidden = data.replace(b"PN\x04\0M", b"UN\0\0\x04\0\0\0M")
    with pytest.raises(Unprocessable, match="PatientName"):
        changed(hidden, changes_from_json({"PatientName": "Zoë"}))
    file = io.BytesIO(hidden)
    assert read_tags(file, scan(file, LIMITS))["ReferringPhysicianName"] == "Müll"


@pytest.mark.parametrize(
    ("name", "fits", "lacks"),
    [
        ("chrGerm.dcm", "Jürgen", "山田"),
        ("chrRuss.dcm", "Люкceмбypг", "山田"),
        ("chrH31.dcm", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Jürgen"),
        ("chrKoreanMulti.dcm", "Hong^Gildong=洪^吉洞=홍^길동", "ü"),
        ("chrX1.dcm", "Wang^XiaoDong=王^小東", None),
        ("chrX2.dcm", "Wang^XiaoDong=王^小东", None),
    ],
)
def test_the_files_own_character_set_is_used(name: str, fits: str, lacks: str | None) -> None:
    data = sample(name)
    result = parsed(changed(data, changes_from_json({"PatientName": fits})))
    assert str(result.PatientName) == fits
    assert result.SpecificCharacterSet == parsed(data).SpecificCharacterSet
    if lacks:
        with pytest.raises(Unprocessable, match="character set"):
            changed(data, changes_from_json({"PatientName": lacks}))


def test_sequences_are_written_too() -> None:
    item = Dataset()
    item.LocalNamespaceEntityID = "RIS"
    changes = Dataset()
    changes.IssuerOfAccessionNumberSequence = Sequence([item])
    for name in EVERY_SYNTAX:
        result = parsed(changed(sample(name), changes))
        assert result.IssuerOfAccessionNumberSequence[0].LocalNamespaceEntityID == "RIS"


@pytest.mark.parametrize("tag", [0x00020010, 0x7FE00010, 0x00080005])
def test_some_elements_are_not_for_changing(tag: int) -> None:
    changes = Dataset()
    value: object = b"12" if tag == 0x7FE00010 else "1.2"
    changes.add(DataElement(tag, "OB" if tag == 0x7FE00010 else "UI", value))
    with pytest.raises(Unprocessable, match="can't be changed"):
        changed(sample("CT_small.dcm"), changes)


BAD = {
    "NoSuchKeyword": ("x", "no attribute"),
    "PatientID": ("a\\b", "backslash"),
    "PatientName": ("A" * 70, "64"),
    "SeriesNumber": ("three", "whole number"),
    "InstanceNumber": (True, "whole number"),
    "AcquisitionNumber": (2**40, "from -2147483648"),
    "StudyDate": ("20240230", "calendar"),
    "SeriesDate": ("20240101-20240201", "not a date"),
    "StudyTime": ("25", "VR TM"),
    "SeriesTime": ("10-11", "range"),
    "Modality": ("ct", "VR CS"),
    "StudyInstanceUID": ("1.2.", "not a UID"),
    "AccessionNumber": ("1" * 17, "16"),
    "StudyDescription": (["a", "b"], "not a list"),
    "PixelSpacing": ([1], "takes 2 values"),
    "SliceThickness": (float("nan"), "finite"),
    "PatientComments": ("a\x00b", "U+0000"),
    "InstitutionName": ("a\u202eb", "U+202E"),
    "PatientSex": (1, "takes text"),
    "ImageType": ([None, "X"], "takes text"),
    "Rows": (3, "how the content is to be read"),
    "PixelData": ("x", "pixels"),
    "SpecificCharacterSet": ("ISO_IR 100", "encoded"),
    "TransferSyntaxUID": ("1.2", "file"),
    "OtherPatientIDsSequence": ([], "sequences"),
    "ICCProfile": ("x", "binary"),
    "PatientBirthName": ({"Alphabetic": "x"}, "an object"),
}


@pytest.mark.parametrize("keyword", BAD)
def test_a_bad_change_is_named(keyword: str) -> None:
    value, problem = BAD[keyword]
    with pytest.raises(Unprocessable) as caught:
        changes_from_json({keyword: value})
    (error,) = caught.value.extra["errors"]
    assert error["keyword"] == keyword
    assert problem in error["problem"]


def test_all_bad_changes_are_named_and_escaped() -> None:
    tags: Mapping[str, object] = {k: v for k, (v, _) in BAD.items()} | {"\u202ex": 1}
    with pytest.raises(Unprocessable) as caught:
        changes_from_json(tags)
    assert len(caught.value.extra["errors"]) == len(tags)
    assert caught.value.detail.isprintable()


@pytest.mark.parametrize(
    ("keyword", "value", "stored"),
    [
        ("SliceThickness", 2.5, 2.5),
        ("SliceThickness", "1e-3", 0.001),
        ("SliceThickness", 1 / 3, pytest.approx(1 / 3)),
        ("PixelSpacing", [0.5, "0.5"], [0.5, 0.5]),
        ("SeriesNumber", "12", 12),
        ("PatientComments", "a\r\nb\\c", "a\r\nb\\c"),
        ("ImageType", ["ORIGINAL", "PRIMARY"], ["ORIGINAL", "PRIMARY"]),
        ("StudyTime", "101112.5", "101112.5"),
        ("ImageType", [], None),
    ],
)
@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_implicit.dcm"])
def test_values_round_trip(name: str, keyword: str, value: object, stored: object) -> None:
    result = changed(sample(name), changes_from_json({keyword: value}))
    file = io.BytesIO(result)
    assert read_tags(file, scan(file, LIMITS))[keyword] == stored
    assert keyword in parsed(result)


@pytest.mark.parametrize("name", EVERY_SYNTAX)
def test_tags_agree_with_pydicom_and_are_json(name: str) -> None:
    file = io.BytesIO(sample(name))
    with scan(file, LIMITS) as scanned, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags = read_tags(file, scanned)
        json.dumps(tags, allow_nan=False)
        compare(tags, parsed(file.getvalue()))


def compare(tags: Mapping[str, object], theirs: Dataset) -> None:
    for element in theirs:
        if element.tag & 0xFFFF == 0:
            continue
        key = element.keyword or f"{element.tag >> 16:04X},{element.tag & 0xFFFF:04X}"
        ours = tags[key]
        if isinstance(ours, dict):
            assert list(ours) == ["bytes"]
        elif element.VR == "SQ":
            assert isinstance(ours, list)
            assert len(ours) == len(element.value)
            for mine, item in zip(ours, element.value, strict=True):
                compare(mine, item)
        elif element.is_empty:
            assert ours is None
        elif element.VR in ("LO", "SH", "UI", "CS", "DA", "PN") and element.VM == 1:
            assert ours == (str(element.value).strip() or None)
        elif element.VR in ("IS", "US", "UL", "DS") and element.VM == 1:
            assert ours == element.value


def test_what_is_large_or_binary_is_said_to_be_there() -> None:
    file = io.BytesIO(sample("CT_small.dcm"))
    assert read_tags(file, scan(file, LIMITS))["PixelData"] == {"bytes": 32768}
