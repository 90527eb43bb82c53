"""DICOMweb for the viewer (PS3.18 10), read-only, cut to what one launch session may see.

Searches are answered from Lightbox's own tables: no query of a client ever reaches Orthanc, whose
QIDO returns every patient when a filter is misspelt. Metadata is Orthanc's, checked row by row,
with its URLs rewritten. Pixels and bulk data are sent by the edge: this module only names the
Orthanc route, which is built from the ids of an instance that came in through our own checks.
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from app.access import PatientAccess
from app.errors import NotFound, OrthancUnavailable, Unprocessable
from app.linking import StudySummary, series_instances, study_instance
from app.models import Instance
from app.orthanc import Orthanc

DicomJson = dict[str, Any]


@dataclass(frozen=True)
class SendFile:
    """Bytes for the edge to send: the internal location, and the type to send them as."""

    location: str
    media_type: str


# ---------------------------------------------------------------- search (PS3.18 10.6)

STUDY_MATCHING = (
    "AccessionNumber",
    "ModalitiesInStudy",
    "PatientID",
    "PatientName",
    "StudyDate",
    "StudyDescription",
    "StudyInstanceUID",
)
SERIES_MATCHING = ("Modality", "SeriesInstanceUID", "SeriesNumber")
_PAGING = ("limit", "offset", "fuzzymatching", "includefield")


@dataclass(frozen=True)
class Search:
    """A parsed QIDO query string: what must match, and which page of the matches."""

    matching: Mapping[str, str]
    limit: int
    offset: int


def parse_search(parameters: Iterable[tuple[str, str]], allowed: Sequence[str]) -> Search:
    """Read a query string against an allow-list of keywords (or their eight-digit tags).

    Raises Unprocessable for an unknown, repeated or unusable parameter: a filter that would be
    ignored must not look as if it had been applied.
    """
    tags = {f"{tag_for_keyword(keyword):08X}": keyword for keyword in allowed}
    matching: dict[str, str] = {}
    paging = {"limit": 101, "offset": 0}
    seen: set[str] = set()
    for name, value in parameters:
        keyword = tags.get(name.upper(), name)
        if keyword in seen and keyword != "includefield":
            raise Unprocessable("A parameter of this search is given more than once.")
        seen.add(keyword)
        if keyword in paging:
            if not (value.isascii() and value.isdigit() and len(value) <= 6):
                raise Unprocessable(f"`{keyword}` must be a number from 0 to 999999.")
            paging[keyword] = int(value)
        elif keyword in _PAGING:
            continue  # every attribute we have is returned, and matching is never fuzzy
        elif keyword not in allowed:
            raise Unprocessable(
                f"This search does not know one of its parameters. Known: {', '.join(allowed)}, "
                f"{', '.join(_PAGING)}."
            )
        elif value:
            matching[keyword] = value
    return Search(matching, min(paging["limit"], 1000), paging["offset"])


def search_studies(studies: Iterable[StudySummary], search: Search) -> list[DicomJson]:
    """The rows of a study search among these studies."""
    return _page([study_row(each) for each in studies], search)


def search_series(study: StudySummary, search: Search) -> list[DicomJson]:
    """The rows of a series search in one study."""
    rows = []
    for each in study.series:
        row = Dataset()
        row.StudyInstanceUID = study.study.study_instance_uid
        row.SeriesInstanceUID = each.series.series_instance_uid
        row.Modality = each.series.modality or "OT"
        row.SeriesDescription = each.series.series_description
        row.SeriesNumber = each.series.series_number
        row.NumberOfSeriesRelatedInstances = each.instance_count
        rows.append(row)
    return _page(rows, search)


def study_row(summary: StudySummary) -> Dataset:
    """The attributes of PS3.18 table 10.6.3-3 that we keep."""
    study, row = summary.study, Dataset()
    row.SpecificCharacterSet = "ISO_IR 192"
    row.StudyDate = study.study_date
    row.StudyTime = study.study_time
    row.AccessionNumber = study.accession_number
    # Never empty: OHIF takes a study without modalities for a missing one.
    row.ModalitiesInStudy = list(summary.modalities) or ["OT"]
    row.StudyDescription = study.study_description
    row.PatientName = study.patient_name
    row.PatientID = study.dicom_patient_id
    row.PatientBirthDate = study.patient_birth_date
    row.PatientSex = study.patient_sex
    row.StudyInstanceUID = study.study_instance_uid
    row.NumberOfStudyRelatedSeries = len(summary.series)
    row.NumberOfStudyRelatedInstances = summary.instance_count
    return row


def _page(rows: Iterable[Dataset], search: Search) -> list[DicomJson]:
    found = [
        row
        for row in rows
        if all(_matches(keyword, row, wanted) for keyword, wanted in search.matching.items())
    ]
    page = found[search.offset : search.offset + search.limit]
    return [row.to_json_dict() for row in page]


def _matches(keyword: str, row: Dataset, wanted: str) -> bool:
    """PS3.18 8.3.4 / PS3.4 C.2.2.2: UID list, date range, wildcard and single value matching."""
    value = row.get(keyword)
    values = [str(each) for each in value] if isinstance(value, MultiValue) else [str(value or "")]
    if keyword.endswith("UID"):
        return values[0] in wanted.replace("\\", ",").split(",")
    if keyword == "StudyDate" and "-" in wanted:
        first, _, last = wanted.partition("-")
        return values[0] != "" and (first or "0") <= values[0] <= (last or "9")
    if keyword == "PatientName":
        values, wanted = [each.casefold() for each in values], wanted.casefold()
    # `[` would be a character class to fnmatch, and is none to DICOM.
    return any(fnmatch.fnmatchcase(each, wanted.replace("[", "[[]")) for each in values)


# ---------------------------------------------------------------- metadata (PS3.18 10.4.1.1.2)


async def series_metadata(
    access: PatientAccess, orthanc: Orthanc, series_instance_uid: str, root: str
) -> bytes:
    """The DICOM JSON of a series of the access's study, as UTF-8.

    Only instances that came in through our checks are in it, and only if Orthanc says of each
    that it is of this study and this patient. BulkDataURIs point below `root`.

    Raises NotFound, Conflict where the archive holds the study under two patients,
    OrthancUnavailable.
    """
    known = await series_instances(access, series_instance_uid)
    if not known:
        raise NotFound("The study has no such series.")
    study = access.study
    assert study is not None
    await access.release()
    await orthanc.refuse_shared(study.study_instance_uid, study.orthanc_id)
    answer = await orthanc.series_metadata(study.study_instance_uid, series_instance_uid)
    expected = {
        "0020000D": study.study_instance_uid,
        "0020000E": series_instance_uid,
        "00100020": study.dicom_patient_id,
    }
    return await anyio.to_thread.run_sync(_checked_metadata, answer, expected, known, root)


def _checked_metadata(
    answer: bytes, expected: Mapping[str, str], known: set[str], root: str
) -> bytes:
    try:
        rows = json.loads(answer)
    except ValueError as error:
        raise OrthancUnavailable("The image archive's metadata can't be read.") from error
    if not isinstance(rows, list):
        raise OrthancUnavailable("The image archive's metadata can't be read.")
    kept = [
        row
        for row in rows
        if isinstance(row, dict)
        and all(_value(row, tag) == value for tag, value in expected.items())
        and _value(row, "00080018") in known
    ]
    for row in kept:
        base = f"{root}/studies/{expected['0020000D']}/series/{expected['0020000E']}"
        _rewrite_urls(row, f"{base}/instances/{_value(row, '00080018')}")
    return json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()


def _value(row: DicomJson, tag: str) -> str:
    """The first value of an element, stripped as DICOM pads; empty where there is none."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return str(values[0]).strip() if isinstance(values, list) and values else ""


def _rewrite_urls(item: DicomJson, instance_root: str) -> None:
    """Point every BulkDataURI at our own route; one that isn't the instance's is taken out."""
    waiting = [item]
    while waiting:
        for tag, element in waiting.pop().items():
            if not isinstance(element, dict):
                continue
            uri = element.pop("BulkDataURI", None)
            if isinstance(uri, str):
                path = urlsplit(uri).path
                _, marker, bulk = path.partition("/bulk/")
                if tag == "7FE00010":
                    element["BulkDataURI"] = f"{instance_root}/frames"
                elif marker and _bulk_tags(bulk) is not None:
                    element["BulkDataURI"] = f"{instance_root}/bulk/{bulk}"
            values = element.get("Value")
            if isinstance(values, list):
                waiting += [each for each in values if isinstance(each, dict)]


# ---------------------------------------------------------------- bytes (PS3.18 10.4.1.1)

_VIDEO_TYPES: Mapping[str, str] = {
    # PS3.5 A.4.5 to A.4.9: MPEG-2, MPEG-4 AVC and HEVC
    "1.2.840.10008.1.2.4.100": "video/mpeg",
    "1.2.840.10008.1.2.4.101": "video/mpeg",
    "1.2.840.10008.1.2.4.102": "video/mp4",
    "1.2.840.10008.1.2.4.103": "video/mp4",
    "1.2.840.10008.1.2.4.104": "video/mp4",
    "1.2.840.10008.1.2.4.105": "video/mp4",
    "1.2.840.10008.1.2.4.106": "video/mp4",
    "1.2.840.10008.1.2.4.107": "video/mp4",
    "1.2.840.10008.1.2.4.108": "video/mp4",
}
_UNCOMPRESSED = {
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
}


async def frame(
    access: PatientAccess, series_instance_uid: str, sop_instance_uid: str, number: int
) -> SendFile:
    """One frame, numbered from 1, in the transfer syntax it is stored in (PS3.18 10.4.1.1.6).

    Raises NotFound.
    """
    instance = await study_instance(access, series_instance_uid, sop_instance_uid)
    if not 1 <= number <= instance.number_of_frames:
        raise NotFound("The instance has no such frame.")
    return SendFile(
        location=f"/_orthanc/instances/{instance.orthanc_id}/frames/{number - 1}/raw",
        media_type=_frame_type(instance),
    )


def _frame_type(instance: Instance) -> str:
    # Orthanc hands out every uncompressed frame inflated and in little endian. Named big endian,
    # it would be shown as a plausible, wrong picture.
    syntax = instance.transfer_syntax_uid
    named = "1.2.840.10008.1.2.1" if syntax in _UNCOMPRESSED else syntax
    return f"application/octet-stream; transfer-syntax={named}"


async def rendered(
    access: PatientAccess, series_instance_uid: str, sop_instance_uid: str, viewport: str
) -> SendFile:
    """The first frame as JPEG, fitted into a viewport `width,height` (PS3.18 8.3.5.1.3); video
    as the video it is.

    Raises NotFound, Unprocessable.
    """
    instance = await study_instance(access, series_instance_uid, sop_instance_uid)
    video = _VIDEO_TYPES.get(instance.transfer_syntax_uid)
    if video is not None:
        return SendFile(f"/_orthanc/instances/{instance.orthanc_id}/frames/0/raw", video)
    query = ""
    if viewport:
        width, comma, height = viewport.partition(",")
        if not comma or not _is_pixels(width) or not _is_pixels(height):
            raise Unprocessable("`viewport` must be `width,height` in pixels, each 1 to 4096.")
        query = f"?width={int(width)}&height={int(height)}"
    return SendFile(
        f"/_orthanc-image/instances/{instance.orthanc_id}/frames/0/rendered{query}", "image/jpeg"
    )


async def bulk_data(
    access: PatientAccess, series_instance_uid: str, sop_instance_uid: str, path: str
) -> SendFile:
    """The bytes of one element, `ggggeeee` or `ggggeeee/item/ggggeeee` with items from 1
    (PS3.18 10.4.1.1.5, as Orthanc numbers them). Raises NotFound.
    """
    instance = await study_instance(access, series_instance_uid, sop_instance_uid)
    tags = _bulk_tags(path)
    if tags is None or tags[0] == "7fe0-0010":
        # Pixels are asked for by the frame; Orthanc would list their fragments here.
        raise NotFound("The instance has no such bulk data.")
    pdf = tags == ["0042-0011"] and instance.sop_class_uid == "1.2.840.10008.5.1.4.1.1.104.1"
    return SendFile(
        location=f"/_orthanc/instances/{instance.orthanc_id}/content/{'/'.join(tags)}",
        media_type="application/pdf" if pdf else "application/octet-stream",
    )


def _bulk_tags(path: str) -> list[str] | None:
    """`54000100/1/54001010` as Orthanc's `/content` names it: `5400-0100/0/5400-1010`."""
    parts = path.split("/")
    if len(parts) % 2 == 0 or len(parts) > 2 * 16 + 1:
        return None
    tags = []
    for index, part in enumerate(parts):
        if index % 2:
            if not (part.isascii() and part.isdigit() and len(part) <= 6 and int(part) >= 1):
                return None
            tags.append(str(int(part) - 1))
        else:
            if len(part) != 8 or any(digit not in "0123456789abcdefABCDEF" for digit in part):
                return None
            tags.append(f"{part[:4]}-{part[4:]}".lower())
    return tags


def _is_pixels(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= 4096
