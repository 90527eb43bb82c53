"""WADO-RS metadata (PS3.18 10.4.1.1.2): Orthanc's, checked row by row, kept compressed.

Orthanc 1.10 reads every file of a series for it, which takes a tenth of a second and more. So what
it said is checked once, kept in the database, and sent as it is while the study's stamp holds.
BulkDataURIs are kept with a root that stands for whichever the caller's is.
"""

import asyncio
import gzip
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread
import sqlalchemy as sa
from sqlmodel import col, select

from app.access import PatientAccess, StudyAccess
from app.db import Database, insert_if_absent
from app.dicomweb.files import bulk_tags
from app.dicomweb.freshness import Freshness, Known
from app.errors import LightboxError, NotFound, OrthancUnavailable
from app.inert import inert_json
from app.linking import StudySummary
from app.models import Instance, Series, SeriesMetadata
from app.orthanc import Orthanc
from app.settings import MEBIBYTE

DicomJson = dict[str, Any]

logger = logging.getLogger(__name__)

# In JSON a quote inside of a text is escaped: nothing that a file says looks like this.
_KEPT_ROOT = b'"BulkDataURI":"lightbox:/'
_MOST_BYTES = 64 * MEBIBYTE
_CLOSING_SECONDS = 5.0
_LEVEL = 1  # of gzip: a first view waits for it


@dataclass(frozen=True)
class Packed:
    """DICOM JSON, gzipped, and the stamp that it is good for."""

    stamp: str
    body: bytes

    def plain(self) -> bytes:
        """The JSON, as UTF-8."""
        return gzip.decompress(self.body)


@dataclass(frozen=True)
class _Opened:
    study_instance_uid: str
    orthanc_id: str
    dicom_patient_id: str
    generation: str
    instance_count: int


class Metadata:
    """What is kept, in the database for all processes and in memory for this one."""

    def __init__(self, database: Database, orthanc: Orthanc, freshness: Freshness) -> None:
        self._database = database
        self._orthanc = orthanc
        self._freshness = freshness
        self._memory: OrderedDict[tuple[str, str], Packed] = OrderedDict()
        self._held_bytes = 0
        self._making: dict[str, asyncio.Task[Packed]] = {}
        self._ahead: set[asyncio.Task[None]] = set()
        self._one_ahead = asyncio.Lock()
        self._closing = False

    async def series(self, access: StudyAccess, series_uid: str, root: str) -> Packed:
        """The metadata of a series of the access's study, its BulkDataURIs below `root`.

        Only instances that came in through our checks are in it, and only if Orthanc says of each
        that it is of this study and this patient. Raises NotFound; Conflict where the archive
        holds the study under two patients; OrthancUnavailable.
        """
        return await self._series(access, series_uid, root)

    async def _series(self, study: Known, series_uid: str, root: str) -> Packed:
        stamp = await self._freshness.stamp(study)
        key = (series_uid, root)
        packed = self._memory.get(key)
        if packed is not None and packed.stamp == stamp:
            self._memory.move_to_end(key)
            return packed
        making = self._making.get(f"{series_uid} {stamp}")
        if making is None:
            # Of many requests at once one makes it, and goes on if its client goes away.
            making = asyncio.create_task(self._kept(study, series_uid, stamp))
            self._making[f"{series_uid} {stamp}"] = making
            making.add_done_callback(lambda _: self._making.pop(f"{series_uid} {stamp}", None))
        kept = await asyncio.shield(making)
        packed = Packed(stamp, await anyio.to_thread.run_sync(_rooted, kept.body, root))
        self._remember(key, packed)
        return packed

    def make_ready(self, access: PatientAccess, opened: Sequence[StudySummary], root: str) -> None:
        """Begin with what a viewer that was just launched for the access's patient will ask for.
        Nobody waits for it, and nobody gets it but by an access of their own."""
        for summary in opened:
            assert summary.study.patient_id == access.patient.id
            study = _Opened(
                study_instance_uid=summary.study.study_instance_uid,
                orthanc_id=summary.study.orthanc_id,
                dicom_patient_id=summary.study.dicom_patient_id,
                generation=summary.study.generation,
                instance_count=summary.instance_count,
            )
            for each in summary.series:
                task = asyncio.create_task(
                    self._ready(study, each.series.series_instance_uid, root)
                )
                self._ahead.add(task)
                task.add_done_callback(self._ahead.discard)

    async def _ready(self, study: "_Opened", series_uid: str, root: str) -> None:
        # One after the other: whoever is waiting for the archive goes first.
        async with self._one_ahead:
            if self._closing:
                return
            try:
                await self._series(study, series_uid, root)
            except (LightboxError, sa.exc.SQLAlchemyError) as error:
                logger.info("metadata was not made ready: %s", type(error).__name__)

    async def settled(self) -> None:
        """Return when nothing is being made ready any more."""
        await asyncio.gather(*self._ahead)

    async def close(self) -> None:
        """Begin nothing more, and return when what is under way has ended."""
        self._closing = True
        for _ in range(2):  # what is made ready, and what that has begun
            under_way = {*self._ahead, *self._making.values()}
            if under_way:
                await asyncio.wait(under_way, timeout=_CLOSING_SECONDS)

    async def study(self, access: StudyAccess, root: str) -> Packed:
        """The metadata of all series of the access's study. Raises as `series` does."""
        async with self._database.session() as session:
            found = await session.exec(
                select(Series.series_instance_uid)
                .where(Series.study_instance_uid == access.study_instance_uid)
                .order_by(col(Series.series_number), col(Series.series_instance_uid))
            )
            uids = found.all()
        parts = [await self.series(access, uid, root) for uid in uids]
        if not parts:
            raise NotFound("The study has no images.")
        return Packed(parts[0].stamp, await anyio.to_thread.run_sync(_joined, parts))

    async def instance(
        self, access: StudyAccess, series_uid: str, sop_uid: str, root: str
    ) -> Packed:
        """The metadata of one instance. Raises as `series` does."""
        packed = await self.series(access, series_uid, root)
        return Packed(packed.stamp, await anyio.to_thread.run_sync(_only, packed, sop_uid))

    def _remember(self, key: tuple[str, str], packed: Packed) -> None:
        former = self._memory.pop(key, None)
        self._held_bytes += len(packed.body) - (len(former.body) if former else 0)
        self._memory[key] = packed
        while self._held_bytes > _MOST_BYTES:
            _, oldest = self._memory.popitem(last=False)
            self._held_bytes -= len(oldest.body)

    async def _kept(self, study: Known, series_uid: str, stamp: str) -> Packed:
        async with self._database.session() as session:
            kept = await session.get(SeriesMetadata, series_uid)
            known = set(
                await session.exec(
                    select(Instance.sop_instance_uid).where(
                        Instance.series_instance_uid == series_uid,
                        Instance.study_instance_uid == study.study_instance_uid,
                    )
                )
            )
            if not known:
                raise NotFound("The study has no such series.")
            if kept is not None and kept.stamp == stamp:
                return Packed(stamp, kept.body)
        answer = await self._orthanc.series_metadata(study.study_instance_uid, series_uid)
        expected = {
            "0020000D": study.study_instance_uid,
            "0020000E": series_uid,
            "00100020": study.dicom_patient_id,
        }
        body = await anyio.to_thread.run_sync(checked, answer, expected, known)
        try:
            await self._keep(study, series_uid, stamp, body)
        except sa.exc.IntegrityError as error:
            # Nothing of a study outlives its deletion.
            raise NotFound("The study was deleted at this moment.") from error
        return Packed(stamp, body)

    async def _keep(self, study: Known, series_uid: str, stamp: str, body: bytes) -> None:
        async with self._database.writing_session() as session:
            await session.exec(
                sa.delete(SeriesMetadata).where(
                    col(SeriesMetadata.series_instance_uid) == series_uid
                )
            )
            await session.exec(
                insert_if_absent(
                    session,
                    SeriesMetadata,
                    series_instance_uid=series_uid,
                    study_instance_uid=study.study_instance_uid,
                    stamp=stamp,
                    body=body,
                )
            )
            await session.commit()


def checked(answer: bytes, expected: Mapping[str, str], known: set[str]) -> bytes:
    """Orthanc's answer, without what isn't ours, its URLs rewritten; gzipped.

    Raises OrthancUnavailable where it can't be read.
    """
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
        base = f"lightbox:/studies/{expected['0020000D']}/series/{expected['0020000E']}"
        _rewrite_urls(row, f"{base}/instances/{_value(row, '00080018')}")
    return gzip.compress(inert_json(kept), _LEVEL)


def _rooted(body: bytes, root: str) -> bytes:
    plain = gzip.decompress(body)
    return gzip.compress(
        plain.replace(_KEPT_ROOT, b'"BulkDataURI":"' + root.encode() + b"/"), _LEVEL
    )


def _joined(parts: list[Packed]) -> bytes:
    rows = [plain for part in parts if (plain := part.plain().strip()[1:-1])]
    return gzip.compress(b"[" + b",".join(rows) + b"]", _LEVEL)


def _only(packed: Packed, sop_uid: str) -> bytes:
    rows = [row for row in json.loads(packed.plain()) if _value(row, "00080018") == sop_uid]
    if not rows:
        raise NotFound("The study has no such instance.")
    return gzip.compress(inert_json(rows), _LEVEL)


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
                elif marker and bulk_tags(bulk) is not None:
                    element["BulkDataURI"] = f"{instance_root}/bulk/{bulk}"
            values = element.get("Value")
            if isinstance(values, list):
                waiting += [each for each in values if isinstance(each, dict)]
