"""The files of a study in Orthanc that came past our checks, looked at as an upload is.

Orthanc is never asked to parse them: each is streamed as it is stored, bounded by the scan, and
only then read.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import BinaryIO

import anyio.to_thread

from app.arrivals import facts
from app.dicom import Described, Header, describe, orthanc_id, read_header, read_tags
from app.errors import (
    MalformedDicom,
    NotDicom,
    TooLarge,
    Unprocessable,
)
from app.intake import Intake
from app.intake.records import patient_id_of
from app.intake.take import digest_of, refuse_wide_big_endian
from app.matching import ArrivedStudy
from app.orthanc import Orthanc, Stored

AT_ONCE = 3  # files of one study


class DidNotPassError(Exception):
    """A file did not pass; the text is for who has to decide about the study."""

    def __init__(self, instance_id: str, why: str) -> None:
        super().__init__(why)
        self.instance_id = instance_id
        self.why = why


@dataclass(frozen=True)
class Examined:
    """A file that passed, and where Orthanc has it."""

    header: Header
    described: Described
    stored: Stored
    sha256: str
    says: ArrivedStudy


class Examiner:
    """Looks at files in Orthanc as intake does at uploads. One per app."""

    def __init__(self, intake: Intake, orthanc: Orthanc, spool_dir: str) -> None:
        self._intake = intake
        self._orthanc = orthanc
        self._spool_dir = spool_dir

    async def all(self, study_id: str, instance_ids: Iterable[str]) -> list[Examined]:
        """All of these, a few at once. Raises as `one` does: then nothing of them counts."""
        places = asyncio.Semaphore(AT_ONCE)

        async def look(instance_id: str) -> Examined:
            async with places:
                return await self.one(study_id, instance_id)

        tasks = [asyncio.create_task(look(each)) for each in sorted(instance_ids)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def one(self, study_id: str, instance_id: str) -> Examined:
        """One file. Raises DidNotPassError, NotFound where it has gone, OrthancUnavailable."""
        with TemporaryFile(dir=self._spool_dir) as file:
            try:
                async with self._orthanc.file(instance_id) as chunks:
                    size = 0
                    async for chunk in chunks:
                        size += len(chunk)
                        if size > self._intake.limits.max_bytes:
                            raise TooLarge("The file is larger than an upload may be.")
                        await anyio.to_thread.run_sync(file.write, chunk)
                return await anyio.to_thread.run_sync(self._look, file, study_id, instance_id)
            except (NotDicom, TooLarge, Unprocessable, MalformedDicom) as error:
                raise DidNotPassError(instance_id, error.detail) from error

    def _look(self, file: BinaryIO, study_id: str, instance_id: str) -> Examined:
        """Blocking. The scan is first: nothing parses what it has not bounded."""
        file.seek(0)
        with self._intake.scan(file) as scanned:
            header = read_header(file, scanned)
            described = describe(file, scanned)
            refuse_wide_big_endian(file, scanned)
            says = facts.of_file(header, read_tags(file, scanned))
        sha256 = digest_of(file, "sha256")
        parts = [patient_id_of(header), header.study_instance_uid, header.series_instance_uid]
        stored = Stored(
            instance_id=orthanc_id(*parts, header.sop_instance_uid),
            series_id=orthanc_id(*parts),
            study_id=orthanc_id(*parts[:2]),
            new=True,
        )
        if (stored.study_id, stored.instance_id) != (study_id, instance_id):
            raise DidNotPassError(
                instance_id, "The image archive read other identifiers in a file than Lightbox did."
            )
        return Examined(header, described, stored, sha256, says)
