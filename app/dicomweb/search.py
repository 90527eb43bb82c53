"""QIDO-RS (PS3.18 10.6), answered from Lightbox's own tables.

No query of a client ever reaches Orthanc, whose QIDO returns every patient when a filter is
misspelt. A search always starts from what may be seen: the patients of a `VisiblePatients`, the
studies of a launch session, the one study of a `StudyAccess`.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydicom.datadict import dictionary_VR, tag_for_keyword
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import PatientAccess, StudyAccess, VisiblePatients
from app.errors import Unprocessable
from app.models import Instance, LaunchStudy, Patient, Series, Study, folded

DicomJson = dict[str, Any]

STUDY_MATCHING = (
    "AccessionNumber",
    "ModalitiesInStudy",
    "PatientID",
    "PatientName",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyDescription",
    "StudyID",
    "StudyInstanceUID",
    "StudyTime",
)
SERIES_MATCHING = (
    "BodyPartExamined",
    "Modality",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
)
INSTANCE_MATCHING = ("InstanceNumber", "SOPClassUID", "SOPInstanceUID")
_PAGING = ("limit", "offset", "fuzzymatching", "includefield")
_MOST_ROWS = 1000
_FOLDED = frozenset({"PatientName", "ReferringPhysicianName", "StudyDescription"})
_RANGES = frozenset(
    keyword
    for keyword in (*STUDY_MATCHING, *SERIES_MATCHING)
    if dictionary_VR(keyword) in ("DA", "TM")
)
_POINT: Mapping[str, re.Pattern[str]] = {
    "DA": re.compile(r"[0-9]{8}"),
    "TM": re.compile(r"[0-9]{2}([0-9]{2}([0-9]{2}(\.[0-9]{1,6})?)?)?"),
}


@dataclass(frozen=True)
class Search:
    """A parsed QIDO query string: what must match, which page of it, and what was ignored."""

    matching: Mapping[str, str]
    limit: int
    offset: int
    fuzzy: bool = False


@dataclass(frozen=True)
class Found:
    """A page of DICOM JSON rows, and how many rows match in all."""

    rows: list[DicomJson]
    total: int


def parse_search(parameters: Iterable[tuple[str, str]], allowed: Sequence[str]) -> Search:
    """Read a query string against an allow-list of keywords (or their eight-digit tags).

    Raises Unprocessable for an unknown, repeated or unusable parameter: a filter that would be
    ignored must not look as if it had been applied.
    """
    tags = {f"{tag_for_keyword(keyword):08X}": keyword for keyword in allowed}
    matching: dict[str, str] = {}
    paging = {"limit": 101, "offset": 0}
    seen: set[str] = set()
    fuzzy = False
    for name, value in parameters:
        keyword = tags.get(name.upper(), name)
        if keyword in seen and keyword != "includefield":
            raise Unprocessable("A parameter of this search is given more than once.")
        seen.add(keyword)
        if keyword in paging:
            if not (value.isascii() and value.isdigit() and len(value) <= 6):
                raise Unprocessable(f"`{keyword}` must be a number from 0 to 999999.")
            paging[keyword] = int(value)
        elif keyword == "fuzzymatching":
            fuzzy = value.lower() == "true"
        elif keyword == "includefield":
            continue  # every attribute that is kept is returned
        elif keyword not in allowed:
            raise Unprocessable(
                f"This search does not know one of its parameters. Known: {', '.join(allowed)}, "
                f"{', '.join(_PAGING)}."
            )
        elif value:
            matching[keyword] = _checked(keyword, value)
    return Search(matching, min(paging["limit"], _MOST_ROWS), paging["offset"], fuzzy)


def _checked(keyword: str, value: str) -> str:
    """A value that can be matched. Raises Unprocessable."""
    if not value.isprintable():
        raise Unprocessable(f"`{keyword}` holds control characters.")
    if keyword in _RANGES:
        point = _POINT[dictionary_VR(keyword)]
        first, dash, last = value.partition("-")
        if not (first or last) or any(each and not point.fullmatch(each) for each in (first, last)):
            form = "YYYYMMDD" if point is _POINT["DA"] else "HHMMSS"
            raise Unprocessable(f"`{keyword}` must be {form}, or a range: {form}-{form}.")
        return first + dash + last
    return value


# ---------------------------------------------------------------------------------- studies


async def visible_studies(window: VisiblePatients, search: Search) -> tuple[Found, list[Study]]:
    """The studies of visible patients that match, newest first; also as rows of ours."""
    query = (
        select(Study)
        .join(Patient, col(Patient.id) == col(Study.patient_id))
        .where(window.condition, *_conditions(window.session, search))
    )
    page = query.order_by(col(Study.study_date).desc(), col(Study.study_instance_uid))
    studies = (await window.session.exec(page.limit(search.limit).offset(search.offset))).all()
    total = search.offset + len(studies)
    if len(studies) == search.limit or (search.offset and not studies):
        counted = query.with_only_columns(sa.func.count()).order_by(None)
        total = int(await window.session.scalar(counted) or 0)
    return Found(await _study_rows(window.session, studies), total), list(studies)


async def session_studies(access: PatientAccess, search: Search) -> Found:
    """The studies of a launch session that match; anything else of the patient is not there."""
    query = (
        select(Study)
        .join(LaunchStudy, col(LaunchStudy.study_instance_uid) == col(Study.study_instance_uid))
        .where(
            LaunchStudy.ctx == access.ctx,
            Study.patient_id == access.patient.id,
            *_conditions(access.session, search),
        )
        .order_by(col(Study.study_date).desc(), col(Study.study_instance_uid))
    )
    studies = (await access.session.exec(query)).all()
    page = studies[search.offset : search.offset + search.limit]
    return Found(await _study_rows(access.session, page), len(studies))


def _conditions(session: AsyncSession, search: Search) -> list[sa.ColumnElement[bool]]:
    """What the matching keys ask, over the columns of `Study` (PS3.4 C.2.2.2)."""
    columns: Mapping[str, Any] = {
        "AccessionNumber": Study.accession_number,
        "PatientID": Study.dicom_patient_id,
        "PatientName": Study.folded_name,
        "ReferringPhysicianName": Study.folded_referring_physician,
        "StudyDate": Study.study_date,
        "StudyDescription": Study.folded_description,
        "StudyID": Study.study_id,
        "StudyTime": Study.study_time,
    }
    found: list[sa.ColumnElement[bool]] = []
    for keyword, wanted in search.matching.items():
        if keyword == "StudyInstanceUID":
            found.append(col(Study.study_instance_uid).in_(_uids(wanted)))
        elif keyword == "ModalitiesInStudy":
            of_modality = select(Series.study_instance_uid).where(
                _like(session, col(Series.modality), wanted)
            )
            found.append(col(Study.study_instance_uid).in_(of_modality))
        elif keyword in _RANGES:
            found += _within(col(columns[keyword]), wanted)
        else:
            text = folded(wanted) if keyword in _FOLDED else wanted
            found.append(_like(session, col(columns[keyword]), text))
    return found


def _within(column: Any, wanted: str) -> list[sa.ColumnElement[bool]]:
    """Range matching (PS3.4 C.2.2.2.5); an absent value is in no range."""
    first, dash, last = wanted.partition("-")
    if not dash:
        # A time of less precision stands for all in it.
        return [column != "", column.between(first, _last_in(first))]
    limits: list[sa.ColumnElement[bool]] = [column != ""]
    if first:
        limits.append(column >= first)
    if last:
        limits.append(column <= _last_in(last))
    return limits


def _last_in(text: str) -> str:
    """The last time in one of less precision (or a date), in the order of any collation."""
    return text + "235959.999999"[len(text) :]


def _like(session: AsyncSession, column: Any, wanted: str) -> sa.ColumnElement[bool]:
    """Single value and wildcard matching (PS3.4 C.2.2.2.1, .4): `*` and `?`, case counts."""
    if "*" not in wanted and "?" not in wanted:
        equal: sa.ColumnElement[bool] = column == wanted
        return equal
    if session.get_bind().dialect.name == "sqlite":
        # `[` would be a character class to GLOB, and is none to DICOM.
        glob: sa.ColumnElement[bool] = column.op("GLOB", is_comparison=True)(
            wanted.replace("[", "[[]")
        )
        return glob
    escaped = re.sub(r"([\\%_])", r"\\\1", wanted)
    like: sa.ColumnElement[bool] = column.like(
        escaped.replace("*", "%").replace("?", "_"), escape="\\"
    )
    return like


async def _study_rows(session: AsyncSession, studies: Sequence[Study]) -> list[DicomJson]:
    uids = [each.study_instance_uid for each in studies]
    modalities: dict[str, set[str]] = {uid: set() for uid in uids}
    series_counts = dict.fromkeys(uids, 0)
    instance_counts = dict.fromkeys(uids, 0)
    if uids:
        series = await session.exec(
            select(Series.study_instance_uid, Series.modality).where(
                col(Series.study_instance_uid).in_(uids)
            )
        )
        for uid, modality in series:
            series_counts[uid] += 1
            if modality:
                modalities[uid].add(modality)
        counted = await session.exec(
            select(Instance.study_instance_uid, sa.func.count())
            .where(col(Instance.study_instance_uid).in_(uids))
            .group_by(col(Instance.study_instance_uid))
        )
        for uid, count in counted:
            instance_counts[uid] = count
    return [
        _study_row(
            each,
            sorted(modalities[each.study_instance_uid]),
            series_counts[each.study_instance_uid],
            instance_counts[each.study_instance_uid],
        )
        for each in studies
    ]


def _study_row(
    study: Study, modalities: list[str], series_count: int, instance_count: int
) -> DicomJson:
    """The attributes of PS3.18 table 10.6.3-3 that are kept."""
    return _row(
        study.attributes,
        SpecificCharacterSet="ISO_IR 192",
        StudyDate=study.study_date,
        StudyTime=study.study_time,
        AccessionNumber=study.accession_number,
        # Never empty: OHIF takes a study without modalities for a missing one.
        ModalitiesInStudy=modalities or ["OT"],
        StudyDescription=study.study_description,
        PatientName=study.patient_name,
        PatientID=study.dicom_patient_id,
        PatientBirthDate=study.patient_birth_date,
        PatientSex=study.patient_sex,
        StudyInstanceUID=study.study_instance_uid,
        NumberOfStudyRelatedSeries=series_count,
        NumberOfStudyRelatedInstances=instance_count,
    )


# ----------------------------------------------------------------------- series and instances


async def study_series(session: AsyncSession, access: StudyAccess, search: Search) -> Found:
    """The series of the access's study that match, by SeriesNumber."""
    counts = (
        sa.select(sa.func.count())
        .where(col(Instance.series_instance_uid) == col(Series.series_instance_uid))
        .correlate(Series)
        .scalar_subquery()
    )
    found = await session.exec(
        select(Series, counts).where(Series.study_instance_uid == access.study_instance_uid)
    )
    series = sorted(found.all(), key=lambda each: _number_order(each[0].series_number))
    rows = [
        _row(
            each.attributes,
            SpecificCharacterSet="ISO_IR 192",
            Modality=each.modality or "OT",
            SeriesDescription=each.series_description,
            StudyInstanceUID=each.study_instance_uid,
            SeriesInstanceUID=each.series_instance_uid,
            SeriesNumber=each.series_number,
            NumberOfSeriesRelatedInstances=count,
        )
        for each, count in series
    ]
    return _page(rows, search)


async def study_instances(
    session: AsyncSession, access: StudyAccess, search: Search, series_uid: str = ""
) -> Found:
    """The instances of the access's study, or of one of its series, that match, by series and
    InstanceNumber. A series that isn't of the study has none."""
    query = select(Instance).where(Instance.study_instance_uid == access.study_instance_uid)
    if series_uid:
        query = query.where(Instance.series_instance_uid == series_uid)
    instances = sorted(
        await session.exec(query),
        key=lambda each: (each.series_instance_uid, *_number_order(each.instance_number)),
    )
    rows = [
        _row(
            each.attributes,
            SpecificCharacterSet="ISO_IR 192",
            SOPClassUID=each.sop_class_uid,
            SOPInstanceUID=each.sop_instance_uid,
            StudyInstanceUID=each.study_instance_uid,
            SeriesInstanceUID=each.series_instance_uid,
            InstanceNumber=each.instance_number,
            Rows=each.rows or None,
            Columns=each.columns or None,
            NumberOfFrames=each.number_of_frames if each.rows else None,
            AvailableTransferSyntaxUID=each.transfer_syntax_uid,
        )
        for each in instances
    ]
    return _page(rows, search)


def _number_order(number: int | None) -> tuple[bool, int]:
    """Those without a number last."""
    return (number is None, number or 0)


def _page(rows: Sequence[DicomJson], search: Search) -> Found:
    found = [
        row
        for row in rows
        if all(_matches(keyword, row, wanted) for keyword, wanted in search.matching.items())
    ]
    return Found(found[search.offset : search.offset + search.limit], len(found))


def _matches(keyword: str, row: DicomJson, wanted: str) -> bool:
    """PS3.4 C.2.2.2: UID list, range, wildcard and single value matching."""
    said = row.get(_TAGS[keyword], {}).get("Value", [])
    values = [str(each) for each in said if each is not None] or [""]
    if keyword.endswith("UID"):
        return any(each in _uids(wanted) for each in values)
    if keyword in _RANGES:
        first, dash, last = wanted.partition("-")
        last = last if dash else first
        return any((first or "0") <= each <= (last or "9") + "~" for each in values)
    # `[` would be a character class to fnmatch, and is none to DICOM.
    return any(fnmatch.fnmatchcase(each, wanted.replace("[", "[[]")) for each in values)


def _uids(wanted: str) -> list[str]:
    """A list of UIDs (PS3.18 8.3.4.1), by comma or backslash."""
    return wanted.replace("\\", ",").split(",")[:_MOST_ROWS]


# ------------------------------------------------------------------------------------- rows

_TAGS: Mapping[str, str] = {
    keyword: f"{tag_for_keyword(keyword):08X}"
    for keyword in (
        *STUDY_MATCHING,
        *SERIES_MATCHING,
        *INSTANCE_MATCHING,
        *("SpecificCharacterSet", "PatientBirthDate", "PatientSex", "Rows", "Columns"),
        *("NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
        *("NumberOfSeriesRelatedInstances", "NumberOfFrames", "AvailableTransferSyntaxUID"),
    )
}
_VRS: Mapping[str, str] = {keyword: dictionary_VR(keyword) for keyword in _TAGS}


def _row(attributes: str, **values: Any) -> DicomJson:
    """DICOM JSON (PS3.18 F.2): the kept attributes and these, by tag; "" and None are empty."""
    row: DicomJson = json.loads(attributes)
    for keyword, value in values.items():
        element: DicomJson = {"vr": _VRS[keyword]}
        if value is not None and value != "":
            several = value if isinstance(value, list) else [value]
            element["Value"] = (
                [_name(each) for each in several] if element["vr"] == "PN" else several
            )
        row[_TAGS[keyword]] = element
    return dict(sorted(row.items()))


def _name(text: str) -> dict[str, str]:
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)
    return {name: group for name, group in groups if group}
