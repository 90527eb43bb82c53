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
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from pydicom.datadict import dictionary_VR, tag_for_keyword
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import SessionAccess, StudyAccess, VisiblePatients
from app.db import Reader
from app.errors import Unprocessable
from app.models import Instance, LaunchStudy, Patient, Series, Study, folded

DicomJson = dict[str, Any]
Value = TypeVar("Value")

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


async def visible_studies(window: VisiblePatients, search: Search) -> tuple[Found, set[UUID]]:
    """The studies of visible patients that match, newest first; and whose they are."""
    query = await window.only(
        sa.select(col(Study.patient_id), *_study_columns(_dialect(window.session)))
        .join(Patient, col(Patient.id) == col(Study.patient_id))
        .where(*_conditions(window.session, search))
    )
    page = query.order_by(col(Study.study_date).desc(), col(Study.study_instance_uid))
    connection = await window.session.connection()
    rows = (await connection.execute(page.limit(search.limit).offset(search.offset))).all()
    total = search.offset + len(rows)
    if len(rows) == search.limit or (search.offset and not rows):
        counted = query.with_only_columns(sa.func.count())
        total = int(await window.session.scalar(counted) or 0)
    return Found([_study_row(row[1:]) for row in rows], total), {row[0] for row in rows}


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


def _dialect(session: AsyncSession) -> str:
    return session.get_bind().dialect.name


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
    if _dialect(session) == "sqlite":
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


def _study_columns(dialect: str) -> list[Any]:
    """What `_study_row` reads. Modalities come joined by a backslash, which none can hold."""
    joined: Any = sa.func.string_agg if dialect == "postgresql" else sa.func.group_concat
    of_study = col(Series.study_instance_uid) == col(Study.study_instance_uid)
    series = sa.select(sa.func.count()).select_from(Series).where(of_study)
    instances = (
        sa.select(sa.func.count())
        .select_from(Instance)
        .where(col(Instance.study_instance_uid) == col(Study.study_instance_uid))
    )
    modalities = sa.select(joined(col(Series.modality), sa.literal_column("'\\'"))).where(of_study)
    return [
        *(getattr(Study, name) for name in _STUDY_FIELDS),
        modalities.correlate(Study).scalar_subquery().label("modalities"),
        series.correlate(Study).scalar_subquery().label("series_count"),
        instances.correlate(Study).scalar_subquery().label("instance_count"),
    ]


_STUDY_FIELDS = (
    *("study_instance_uid", "attributes", "study_date", "study_time", "accession_number"),
    *("study_description", "patient_name", "dicom_patient_id", "patient_birth_date"),
    "patient_sex",
)


def _study_row(row: Sequence[Any]) -> DicomJson:
    """The attributes of PS3.18 table 10.6.3-3 that are kept."""
    study = dict(zip(_STUDY_FIELDS, row, strict=False))
    modalities, series_count, instance_count = row[len(_STUDY_FIELDS) :]
    return _row(
        study["attributes"],
        SpecificCharacterSet="ISO_IR 192",
        StudyDate=study["study_date"],
        StudyTime=study["study_time"],
        AccessionNumber=study["accession_number"],
        # Never empty: OHIF takes a study without modalities for a missing one.
        ModalitiesInStudy=sorted({*(modalities or "").split("\\")} - {""}) or ["OT"],
        StudyDescription=study["study_description"],
        PatientName=study["patient_name"],
        PatientID=study["dicom_patient_id"],
        PatientBirthDate=study["patient_birth_date"],
        PatientSex=study["patient_sex"],
        StudyInstanceUID=study["study_instance_uid"],
        NumberOfStudyRelatedSeries=series_count,
        NumberOfStudyRelatedInstances=instance_count,
    )


# ------------------------------------------------------- in a session, and in one study


class Searches:
    """The searches that a viewer makes at every opening, by statements that are prepared once:
    among the studies of a session, and in one study. They are small: the matching is done here."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        of_session = (
            sa.select(*_study_columns(reader.dialect_name))
            .join(LaunchStudy, col(LaunchStudy.study_instance_uid) == col(Study.study_instance_uid))
            .where(
                col(LaunchStudy.ctx) == sa.bindparam("ctx", type_=sa.String()),
                col(Study.patient_id) == sa.bindparam("patient_id", type_=sa.Uuid()),
            )
            .order_by(col(Study.study_date).desc(), col(Study.study_instance_uid))
        )
        one = col(Study.study_instance_uid) == _UID
        self._studies = reader.prepare(of_session)
        self._study = reader.prepare(of_session.where(one))
        counts = (
            sa.select(sa.func.count())
            .select_from(Instance)
            .where(col(Instance.series_instance_uid) == col(Series.series_instance_uid))
            .correlate(Series)
            .scalar_subquery()
        )
        self._series = reader.prepare(
            sa.select(
                col(Series.attributes),
                col(Series.modality),
                col(Series.series_description),
                col(Series.series_instance_uid),
                col(Series.series_number),
                counts.label("instance_count"),
            ).where(col(Series.study_instance_uid) == _UID)
        )
        instances: Any = sa.select(
            col(Instance.attributes),
            col(Instance.sop_class_uid),
            col(Instance.sop_instance_uid),
            col(Instance.series_instance_uid),
            col(Instance.instance_number),
            col(Instance.rows),
            col(Instance.columns),
            col(Instance.number_of_frames),
            col(Instance.transfer_syntax_uid),
        ).where(col(Instance.study_instance_uid) == _UID)
        self._instances = reader.prepare(instances)
        self._instances_of_series = reader.prepare(
            instances.where(
                col(Instance.series_instance_uid) == sa.bindparam("series_uid", type_=sa.String())
            )
        )

    async def studies(self, access: SessionAccess, search: Search) -> Found:
        """The studies of a launch session that match, newest first; anything else of the patient
        is not there."""
        values = {"ctx": access.ctx, "patient_id": access.patient_id}
        wanted = search.matching.get("StudyInstanceUID", "")
        if wanted and _uids(wanted) == [wanted]:
            rows = await self._reader.all(self._study, {**values, "uid": wanted})
        else:
            rows = await self._reader.all(self._studies, values)
        return _page([_study_row(each) for each in rows], search)

    async def series(self, access: StudyAccess, search: Search) -> Found:
        """The series of the access's study that match, by SeriesNumber."""
        found = await self._reader.all(self._series, {"uid": access.study_instance_uid})
        rows = [
            _row(
                attributes,
                SpecificCharacterSet="ISO_IR 192",
                Modality=modality or "OT",
                SeriesDescription=description,
                StudyInstanceUID=access.study_instance_uid,
                SeriesInstanceUID=uid,
                SeriesNumber=number,
                NumberOfSeriesRelatedInstances=count,
            )
            for attributes, modality, description, uid, number, count in sorted(
                found, key=lambda each: (*_number_order(each[4]), each[3])
            )
        ]
        return _page(rows, search)

    async def instances(self, access: StudyAccess, search: Search, series_uid: str = "") -> Found:
        """The instances of the access's study, or of one of its series, that match, by series and
        InstanceNumber. A series that isn't of the study has none."""
        values = {"uid": access.study_instance_uid}
        if series_uid:
            values["series_uid"] = series_uid
        statement = self._instances_of_series if series_uid else self._instances
        found = await self._reader.all(statement, values)
        found.sort(key=lambda each: (each[3], *_number_order(each[4]), each[2]))
        if not search.matching:
            # Of thousands, only those that are shown are made.
            return Found(
                [self._instance_row(each, access) for each in _cut(found, search)], len(found)
            )
        return _page([self._instance_row(each, access) for each in found], search)

    @staticmethod
    def _instance_row(row: Sequence[Any], access: StudyAccess) -> DicomJson:
        attributes, sop_class, sop, series, number, height, width, frames, syntax = row
        return _row(
            attributes,
            SpecificCharacterSet="ISO_IR 192",
            SOPClassUID=sop_class,
            SOPInstanceUID=sop,
            StudyInstanceUID=access.study_instance_uid,
            SeriesInstanceUID=series,
            InstanceNumber=number,
            Rows=height or None,
            Columns=width or None,
            NumberOfFrames=frames if height else None,
            AvailableTransferSyntaxUID=syntax,
        )


_UID = sa.bindparam("uid", type_=sa.String())


def _number_order(number: int | None) -> tuple[bool, int]:
    """Those without a number last."""
    return (number is None, number or 0)


def _page(rows: Sequence[DicomJson], search: Search) -> Found:
    found = [
        row
        for row in rows
        if all(_matches(keyword, row, wanted) for keyword, wanted in search.matching.items())
    ]
    return Found(_cut(found, search), len(found))


def _cut(rows: Sequence[Value], search: Search) -> list[Value]:
    return list(rows[search.offset : search.offset + search.limit])


def _matches(keyword: str, row: DicomJson, wanted: str) -> bool:
    """PS3.4 C.2.2.2: UID list, range, wildcard and single value matching."""
    said = row.get(_TAGS[keyword], {}).get("Value", [])
    values = [_text(each) for each in said] or [""]
    if keyword.endswith("UID"):
        return any(each in _uids(wanted) for each in values)
    if keyword in _FOLDED:
        wanted, values = folded(wanted), [folded(each) for each in values]
    if keyword in _RANGES:
        first, dash, last = wanted.partition("-")
        last = last if dash else first
        return any((first or "0") <= each <= (last or "9") + "~" for each in values)
    # `[` would be a character class to fnmatch, and is none to DICOM.
    return any(fnmatch.fnmatchcase(each, wanted.replace("[", "[[]")) for each in values)


def _text(value: Any) -> str:
    """A value as it is matched; of a name all groups."""
    if isinstance(value, dict):
        groups = [value.get(name, "") for name in _GROUPS]
        return "=".join(groups).rstrip("=")
    return "" if value is None else str(value)


def _uids(wanted: str) -> list[str]:
    """A list of UIDs (PS3.18 8.3.4.1), by comma or backslash."""
    return wanted.replace("\\", ",").split(",")[:_MOST_ROWS]


# ------------------------------------------------------------------------------------- rows

_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
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
    groups = zip(_GROUPS, text.split("="), strict=False)
    return {name: group for name, group in groups if group}
