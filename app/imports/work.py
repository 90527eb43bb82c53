"""Takes in what was received: which import, which process, how many files at once.

A process claims an import for a while and says again and again that it lives; one that was killed
says nothing, and another takes over. Nothing of this is in memory alone.
"""

import asyncio
import logging
from contextlib import suppress
from datetime import datetime, timedelta
from secrets import token_hex
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa

from app.access import Gate
from app.db import utcnow
from app.errors import LightboxError, Unprocessable
from app.imports.rows import Key, Rows
from app.imports.spool import Spool
from app.imports.take import Over, PutOff, Taker
from app.models import PENDING, SPOOLED, FileState, Import, ImportFile, ImportState
from app.orthanc import Orthanc
from app.settings import Settings

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
RENEW_SECONDS = 5.0
RETRY = timedelta(seconds=5)  # after something did not answer
CLAIMS = 4  # imports that a process works on at once
KEPT = timedelta(days=30)  # an import that has ended
UPKEEP_SECONDS = 300.0
LOST = "The bytes of this file are no longer here. Send it again."


class Imports:
    """One per app: `rows`, `spool`, and the worker."""

    def __init__(self, settings: Settings, gate: Gate, orthanc: Orthanc) -> None:
        self.settings = settings
        self.spool = Spool(settings.spool_dir, settings.database_url)
        self.rows = Rows(gate.database)
        self._single = gate.database.engine.dialect.name == "sqlite"
        self._taker = Taker(settings, gate, orthanc, self.rows)
        self._at_once = asyncio.Semaphore(settings.import_parallel)
        self._process = token_hex(16)
        self._woken = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Something was received."""
        self._woken.set()

    async def open(self) -> None:
        """Before anything is received: the folder, and what a killed process left in it. Raises
        RuntimeError."""
        await anyio.to_thread.run_sync(self.spool.open)
        if self._single:
            await self.rows.unclaim_all()
        await self._clean()
        for each in await self.rows.unsettled():
            await self.settle(each)

    async def run(self) -> None:
        """Until cancelled. Nothing that goes wrong ends it."""
        kept_up = utcnow()
        try:
            while True:
                self._woken.clear()
                try:
                    await self._claim()
                    if (utcnow() - kept_up).total_seconds() > UPKEEP_SECONDS:
                        kept_up = utcnow()
                        await self._upkeep()
                except Exception as error:
                    logger.error("imports do not go on, will try again", exc_info=error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), POLL_SECONDS)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def settle(self, file: ImportFile) -> ImportFile:
        """A file that came whole is received, once its digest is what was said; the row as it is
        now. Raises Unprocessable where the bytes are others: then it begins anew."""
        key = Key(file.import_id, file.number)
        if file.state != FileState.RECEIVING:
            return file
        offset = await anyio.to_thread.run_sync(self.spool.offset, *_place(key))
        if offset != file.size:
            return file
        if file.size == 0:
            await self._reject(key, Unprocessable("The file is empty."))
        elif await anyio.to_thread.run_sync(self.spool.digest, *_place(key)) != file.sha256:
            await anyio.to_thread.run_sync(self.spool.remove, *_place(key))
            raise Unprocessable(
                "The bytes that came have another SHA-256 than was announced. They were thrown "
                "away; send the file again from its beginning."
            )
        else:
            await self.rows.change(key, only=(FileState.RECEIVING,), state=FileState.RECEIVED.value)
            self.wake()
        return await self.rows.file(key) or file

    async def end(self, import_id: UUID, state: ImportState, reason: str) -> bool:
        """End an open import, and give its room back. False: it was over."""
        if not await self.rows.end(import_id, state, reason):
            return False
        await self._clean()
        return True

    async def _reject(self, key: Key, error: LightboxError) -> None:
        await self.rows.change(
            key,
            only=SPOOLED,
            state=FileState.REFUSED.value,
            error=error.detail,
            error_status=error.status,
            error_type=error.slug,
        )
        await anyio.to_thread.run_sync(self.spool.remove, *_place(key))
        await self.rows.finish(key.import_id)

    # ------------------------------------------------------------------------------- the work

    async def _claim(self) -> None:
        free = CLAIMS - len(self._running)
        if free <= 0:
            return
        for import_id in await self.rows.claim(self._process, free):
            task = asyncio.create_task(self._held(import_id))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _held(self, import_id: UUID) -> None:
        """Work on an import for as long as it is ours."""
        due = utcnow()
        work = asyncio.create_task(self._work(import_id))
        renewing = asyncio.create_task(self._renew(import_id))
        try:
            await asyncio.wait({work, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                due = work.result()
            else:
                logger.warning("import %s is another process's by now", import_id)
        except Exception as error:
            logger.error("import %s does not go on, will try again", import_id, exc_info=error)
            due = utcnow() + RETRY
        finally:
            for task in (work, renewing):
                task.cancel()
            await asyncio.gather(work, renewing, return_exceptions=True)
            with suppress(sa.exc.SQLAlchemyError, OSError):  # then the lease ends by itself
                await self.rows.release(import_id, self._process, due)
            self.wake()

    async def _renew(self, import_id: UUID) -> None:
        """Returns when the claim is lost."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                if not await self.rows.renew(import_id, self._process):
                    return
            except (sa.exc.SQLAlchemyError, OSError) as error:
                logger.warning("a claim was not renewed: %s", type(error).__name__)

    async def _work(self, import_id: UUID) -> datetime:
        """Take in what is there; when to look again."""
        while True:
            found = await self.rows.find(import_id)
            files = await self.rows.waiting(import_id, self.settings.import_parallel)
            if found is None or not files:
                await self.rows.finish(import_id)
                return utcnow()
            done = await asyncio.gather(*(self._file(found, each) for each in files))
            if not all(done):
                return utcnow() + RETRY

    async def _file(self, found: Import, row: ImportFile) -> bool:
        """One file that was sent, to its end. False: it is put off."""
        key = Key(row.import_id, row.number)
        async with self._at_once:
            file = await anyio.to_thread.run_sync(self.spool.reading, *_place(key))
            if file is None:
                # The disk was emptied behind our back.
                await self.rows.change(key, only=PENDING, state="receiving", error=LOST)
                return True
            with file:
                try:
                    await self._taker.file(found, key, file)
                except PutOff as error:
                    logger.warning("a file of an import waits: %s", error.__cause__)
                    return False
                except Over:
                    await self.rows.change(key, only=PENDING, state=FileState.CANCELLED.value)
            await anyio.to_thread.run_sync(self.spool.remove, *_place(key))
        return True

    # ----------------------------------------------------------------------------- the folder

    async def _clean(self) -> None:
        """Remove what belongs to no import that is under way."""
        held = await anyio.to_thread.run_sync(self.spool.held)
        needed = {(each.import_id, each.number) for each in await self.rows.unsettled()}
        for place in held:
            if place not in needed:
                await anyio.to_thread.run_sync(self.spool.remove, *place)

    async def _upkeep(self) -> None:
        now = utcnow()
        for import_id in await self.rows.idle(
            now - timedelta(hours=self.settings.import_idle_hours)
        ):
            await self.end(import_id, ImportState.CANCELLED, "Nothing was sent for too long.")
        await self.rows.forget_old(now - KEPT)
        await self._clean()


def _place(key: Key) -> tuple[UUID, int]:
    return key.import_id, key.number
