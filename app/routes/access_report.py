"""A patient's report: who saw my images, when, under what right."""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from html import escape
from typing import Annotated

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel

from app.access import Grant, PatientAccess, Subject
from app.audit import Action
from app.db import utcnow
from app.dicomweb.media import accepted
from app.disclosures import ROLES, Entry, Seen, disclosures
from app.errors import NotAcceptable
from app.models import Patient
from app.routes.tables import CSV_HEADERS, CSV_MEDIA_TYPE, csv_head, csv_rows
from app.routes.times import UtcTime
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/patients", tags=["audit"])

JSON_MEDIA_TYPE, HTML_MEDIA_TYPE = "application/json", "text/html"
_OFFERED = (JSON_MEDIA_TYPE, HTML_MEDIA_TYPE, CSV_MEDIA_TYPE)

Report = Annotated[
    PatientAccess, Depends(Grant(Action.ACCESS_REPORT, of=Subject.PATIENT), scope="function")
]


class SeenOut(BaseModel):
    """A study; `StudyDate` and `StudyDescription` are empty where it is gone."""

    StudyInstanceUID: str
    StudyDate: str
    StudyDescription: str
    how: list[str]
    first_at: datetime
    last_at: datetime


class DisclosureOut(BaseModel):
    """What one person did on one day (UTC). `did` counts each thing; `name` where it is known."""

    day: date
    person: str
    name: str
    roles: list[str]
    rights: list[str]
    emergency: bool
    first_at: datetime | None
    last_at: datetime | None
    studies: list[SeenOut]
    did: dict[str, int]
    denied: int

    @classmethod
    def of(cls, entry: Entry) -> "DisclosureOut":
        studies = sorted(entry.studies.values(), key=lambda each: each.first_at)
        return cls(
            day=entry.day,
            person=entry.person,
            name=entry.name,
            roles=sorted(ROLES.get(each, each) for each in entry.roles),
            rights=sorted(entry.rights),
            emergency=entry.emergency,
            first_at=entry.first_at,
            last_at=entry.last_at,
            studies=[_seen_out(each) for each in studies],
            did=dict(sorted(entry.ways.items())),
            denied=entry.denied,
        )


class AccessReportOut(BaseModel):
    """The report; `time_from` (inclusive) and `time_to` (exclusive) are null where open."""

    patient_id: str
    mrn: str
    patient_name: str
    time_from: datetime | None
    time_to: datetime | None
    made_at: datetime
    entries: list[DisclosureOut]


@router.get(
    "/{patient_id}/access-report",
    response_model=AccessReportOut,
    responses={200: {"content": {HTML_MEDIA_TYPE: {}, CSV_MEDIA_TYPE: {}}}},
)
async def read_access_report(
    access: Report,
    request: Request,
    time_from: Annotated[UtcTime | None, Query(alias="from")] = None,
    time_to: Annotated[UtcTime | None, Query(alias="to")] = None,
) -> Response:
    """Who saw the patient's data, by person and day, newest day first. Recorded itself."""
    media_type = _chosen(request)
    entries = await disclosures(access, time_from, time_to)
    patient = access.patient
    report = AccessReportOut(
        patient_id=str(patient.id),
        mrn=patient.mrn,
        patient_name=_name(patient),
        time_from=time_from,
        time_to=time_to,
        made_at=utcnow(),
        entries=[DisclosureOut.of(each) for each in entries],
    )
    vary = {"Vary": "Accept"}
    if media_type == JSON_MEDIA_TYPE:
        return Response(report.model_dump_json(), media_type=media_type, headers=vary)
    suffix = "csv" if media_type == CSV_MEDIA_TYPE else "html"
    headers = {**vary, "Content-Disposition": f'attachment; filename="access-report.{suffix}"'}
    if media_type == CSV_MEDIA_TYPE:
        return Response(_as_csv(report), headers={**headers, **CSV_HEADERS})
    return Response(_as_html(report), headers=headers, media_type="text/html; charset=utf-8")


def _chosen(request: Request) -> str:
    for each in accepted(request.headers.get("accept", "")):
        for media_type in _OFFERED:
            if not each.multipart and each.takes(media_type):
                return media_type
    raise NotAcceptable(f"This is sent as {', '.join(_OFFERED)}.")


def _name(patient: Patient) -> str:
    return f"{patient.first_name} {patient.last_name}".strip()


def _seen_out(seen: Seen) -> SeenOut:
    return SeenOut(
        StudyInstanceUID=seen.study_instance_uid,
        StudyDate=seen.study_date,
        StudyDescription=seen.description,
        how=sorted(seen.how),
        first_at=seen.first_at,
        last_at=seen.last_at,
    )


# --------------------------------------------------------------------------- for handing out

_COLUMNS = (
    *("day", "person", "name", "role", "under what right", "emergency"),
    *("from", "to", "what was done", "images", "refused tries"),
)


def _lines(report: AccessReportOut) -> Iterator[Sequence[str]]:
    for each in report.entries:
        yield (
            each.day.isoformat(),
            each.person,
            each.name,
            ", ".join(each.roles),
            ", ".join(each.rights),
            "yes" if each.emergency else "",
            _clock(each.first_at),
            _clock(each.last_at),
            ", ".join(f"{way} ({n} times)" if n > 1 else way for way, n in each.did.items()),
            "; ".join(_study(seen) for seen in each.studies),
            str(each.denied) if each.denied else "",
        )


def _clock(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%H:%M:%S}"


def _study(seen: SeenOut) -> str:
    """A study as people know it: its day and what it was of."""
    told = seen.StudyDate
    if len(told) == 8:
        told = f"{told[:4]}-{told[4:6]}-{told[6:]}"
    return " ".join(each for each in (told, seen.StudyDescription) if each) or "images now deleted"


def _as_csv(report: AccessReportOut) -> bytes:
    return csv_head(_COLUMNS) + csv_rows(_lines(report))


_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;width:100%}"
    "th,td{border:1px solid #999;padding:4px 6px;text-align:left;vertical-align:top}"
    "th{background:#eee}tr.emergency td{background:#fff3cd}"
)


def _as_html(report: AccessReportOut) -> bytes:
    """One page that needs nothing else, to print; everything in it is text."""
    since = report.time_from.isoformat() if report.time_from else "the beginning"
    until = (report.time_to or report.made_at).isoformat("T", "seconds")
    head = "".join(f"<th>{escape(each)}</th>" for each in _COLUMNS)
    rows = "".join(
        f"<tr{' class=emergency' if entry.emergency else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>\n"
        for entry, line in zip(report.entries, _lines(report), strict=True)
    )
    body = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>"
    if not report.entries:
        body = "<p>Nobody saw anything, and nobody tried.</p>"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Who saw your images</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1>Who saw your images</h1>
<p>{escape(report.patient_name)}, {escape(report.mrn)}. From {escape(since)} to {escape(until)}.
Times are UTC. "Refused tries" were turned away and saw nothing.</p>
{body}
</body></html>
"""
    return page.encode("utf-8", "replace")
