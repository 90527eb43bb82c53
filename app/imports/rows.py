"""What the database knows of imports: every change in a transaction of its own, and numbered.

The database, not a process, remembers how far an import has come: whichever process is killed,
another goes on from here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import Database, utcnow
from app.errors import Conflict, TooManyRequests, Unavailable
from app.identity import Principal, Role, Scope
from app.imports.tus import Announced
from app.models import PENDING, SPOOLED, FileState, Import, ImportFile, ImportState

LEASE = timedelta(seconds=15)  # a process that says nothing for so long has died
MOST_OPEN = 20  # imports of one person at a time


@dataclass(frozen=True)
class Key:
    """Which file: of which import, its number, and which entry of an archive (0: itself)."""

    import_id: UUID
    number: int
    entry: int = 0


class Rows:
    """The imports. One per app."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, import_id: UUID) -> Import | None:
        async with self._database.session() as session:
            return await session.get(Import, import_id)

    async def file(self, key: Key) -> ImportFile | None:
        async with self._database.session() as session:
            return await session.get(ImportFile, (key.import_id, key.number, key.entry))

    async def counts(self, import_id: UUID) -> dict[str, int]:
        """How many files there are in each state."""
        async with self._database.session() as session:
            return (await counts(session, [import_id])).get(import_id, {})

    # ------------------------------------------------------------------------- what comes in

    async def create(self, new: Import) -> Import:
        """A new import, or the open one of the same caller, key, target and number of files.

        Raises TooManyRequests.
        """
        async with self._database.writing_session() as session:
            theirs = select(Import).where(
                Import.actor == new.actor, Import.state == ImportState.OPEN.value
            )
            opened = (await session.exec(theirs)).all()
            for each in opened:
                same = (each.order_id, each.patient_id, each.file_count)
                if each.key == new.key != "" and same == (
                    *(new.order_id, new.patient_id),
                    new.file_count,
                ):
                    return each
            if len(opened) >= MOST_OPEN:
                raise TooManyRequests(
                    f"You have {len(opened)} imports open. End one, or cancel it.", 60
                )
            session.add(new)
            await session.commit()
        return new

    async def announce(
        self, import_id: UUID, principal: Principal, file: Announced, most_bytes: int
    ) -> ImportFile:
        """The row of a file that is to come; the one that is there for the same content.

        From now on the import is taken in for `principal`, as their newest token says. Raises
        Conflict for an import that is over or has all its files, Unavailable where the spool
        folder has no room: then it is to be tried again.
        """
        async with self._database.writing_session() as session:
            found = await _fed(session, import_id, principal)
            there = (
                await session.exec(
                    select(ImportFile).where(
                        ImportFile.import_id == import_id,
                        ImportFile.sha256 == file.sha256,
                        ImportFile.entry == 0,
                    )
                )
            ).first()
            if there is not None:
                if there.size != file.size:
                    raise Conflict("A file of this digest was announced with another size.")
                await session.commit()
                return there
            sent, last = (
                await session.exec(
                    select(sa.func.count(), sa.func.max(ImportFile.number)).where(
                        ImportFile.import_id == import_id, ImportFile.entry == 0
                    )
                )
            ).one()
            if sent >= found.file_count:
                raise Conflict(f"The import was to have {found.file_count} files; it has them.")
            await _refuse_full(session, file.size, most_bytes)
            row = ImportFile(
                import_id=import_id,
                number=(last or 0) + 1,
                name=file.name,
                size=file.size,
                sha256=file.sha256,
                state=FileState.RECEIVING.value,
                seq=found.seq,
            )
            session.add(row)
            await session.commit()
            return row

    async def feed(self, import_id: UUID, principal: Principal) -> None:
        """More of a file is about to come. Raises Conflict for an import that is over."""
        async with self._database.writing_session() as session:
            await _fed(session, import_id, principal)
            await session.commit()

    async def forget(self, key: Key) -> bool:
        """Remove a file that has not come whole. False: it has, or is not there."""
        async with self._database.writing_session() as session:
            gone = await session.exec(
                sa.delete(ImportFile).where(
                    *_is(key), col(ImportFile.state) == FileState.RECEIVING.value
                )
            )
            await session.commit()
            return gone.rowcount == 1

    # -------------------------------------------------------------------------- how far it is

    async def change(
        self, key: Key, *, only: Sequence[FileState], if_open: bool = False, **columns: Any
    ) -> bool:
        """Change a file that is in one of the states `only`; with `if_open`, only while its import
        is open. False: it was not changed."""
        async with self._database.writing_session() as session:
            seq = await _next(session, key.import_id, if_open=if_open)
            if seq is None:
                return False
            changed = await session.exec(
                sa.update(ImportFile)
                .where(*_is(key), col(ImportFile.state).in_([each.value for each in only]))
                .values(**columns, seq=seq, changed_at=utcnow())
            )
            if changed.rowcount != 1:
                return False
            await session.commit()
            return True

    async def entry(self, key: Key, name: str, size: int) -> ImportFile | None:
        """The row of an archive's entry, made if it is not there; None: the import is over."""
        async with self._database.writing_session() as session:
            there = await session.get(ImportFile, (key.import_id, key.number, key.entry))
            if there is not None:
                return there
            seq = await _next(session, key.import_id, if_open=True)
            if seq is None:
                return None
            row = ImportFile(
                import_id=key.import_id,
                number=key.number,
                entry=key.entry,
                name=name[-255:],
                size=size,
                state=FileState.RECEIVED.value,
                seq=seq,
            )
            session.add(row)
            await session.commit()
            return row

    async def end(self, import_id: UUID, state: ImportState, reason: str) -> bool:
        """End an open import before its time; what is about to be stored is still finished.
        False: it was over."""
        async with self._database.writing_session() as session:
            over = await session.exec(_ended(import_id, state, reason))
            seq = await _next(session, import_id) if over.rowcount == 1 else None
            if seq is None:
                return False
            open_files = (FileState.RECEIVING.value, FileState.RECEIVED.value)
            await session.exec(
                sa.update(ImportFile)
                .where(
                    col(ImportFile.import_id) == import_id, col(ImportFile.state).in_(open_files)
                )
                .values(state=FileState.CANCELLED.value, seq=seq, changed_at=utcnow())
            )
            await session.commit()
            return True

    async def finish(self, import_id: UUID) -> bool:
        """The import is done if all its files are at their end. Was it so?"""
        async with self._database.writing_session() as session:
            row = await session.get(Import, import_id)
            mine = col(ImportFile.import_id) == import_id
            waiting = await session.scalar(
                sa.select(sa.func.count()).where(
                    mine, col(ImportFile.state).in_([each.value for each in SPOOLED])
                )
            )
            sent = await session.scalar(
                sa.select(sa.func.count()).where(mine, col(ImportFile.entry) == 0)
            )
            if row is None or row.state != ImportState.OPEN or waiting or sent != row.file_count:
                return False
            await session.commit()
            over = await session.exec(_ended(import_id, ImportState.DONE, ""))
            if over.rowcount != 1 or await _next(session, import_id) is None:
                return False
            await session.commit()
            return True

    async def waiting(self, import_id: UUID, limit: int) -> list[ImportFile]:
        """Files that were sent and are to be taken in, in the order they came."""
        query = (
            select(ImportFile)
            .where(
                ImportFile.import_id == import_id,
                ImportFile.entry == 0,
                col(ImportFile.state).in_([each.value for each in PENDING]),
            )
            .order_by(col(ImportFile.number))
            .limit(limit)
        )
        async with self._database.session() as session:
            return list((await session.exec(query)).all())

    async def unsettled(self) -> list[ImportFile]:
        """Files that were sent and have, or may have, bytes in the spool folder."""
        query = select(ImportFile).where(
            ImportFile.entry == 0,
            col(ImportFile.state).in_([each.value for each in SPOOLED]),
        )
        async with self._database.session() as session:
            return list((await session.exec(query)).all())

    # ---------------------------------------------------------------------- who works on them

    async def claim(self, process: str, limit: int) -> list[UUID]:
        """Take imports that have files to be taken in and that no living process works on."""
        now = utcnow()
        free = sa.and_(
            col(Import.due_at) <= now,
            sa.or_(col(Import.claimed_by) == "", col(Import.leased_until) < now),
        )
        async with self._database.session() as session:
            query = select(Import.id).where(_pending(), free).order_by(col(Import.created_at))
            found = (await session.exec(query.limit(limit))).all()
        taken = []
        for import_id in found:
            async with self._database.writing_session() as session:
                claimed = await session.exec(
                    sa.update(Import)
                    .where(col(Import.id) == import_id, free)
                    .values(claimed_by=process, leased_until=now + LEASE)
                )
                await session.commit()
            if claimed.rowcount == 1:
                taken.append(import_id)
        return taken

    async def renew(self, import_id: UUID, process: str) -> bool:
        """Is the claim still ours? Then it is for another while."""
        return await self._claimed(import_id, process, leased_until=utcnow() + LEASE)

    async def release(self, import_id: UUID, process: str, due_at: datetime) -> None:
        await self._claimed(import_id, process, claimed_by="", due_at=due_at)

    async def _claimed(self, import_id: UUID, process: str, **columns: Any) -> bool:
        async with self._database.writing_session() as session:
            changed = await session.exec(
                sa.update(Import)
                .where(col(Import.id) == import_id, col(Import.claimed_by) == process)
                .values(**columns)
            )
            await session.commit()
            return changed.rowcount == 1

    async def unclaim_all(self) -> None:
        """Nobody else can be at work: on SQLite there is one process."""
        async with self._database.writing_session() as session:
            await session.exec(sa.update(Import).values(claimed_by=""))
            await session.commit()

    async def idle(self, since: datetime) -> list[UUID]:
        """Open imports that nothing was sent to since then, and that wait for nothing else."""
        query = select(Import.id).where(
            Import.state == ImportState.OPEN.value, col(Import.fed_at) < since, sa.not_(_pending())
        )
        async with self._database.session() as session:
            return list((await session.exec(query)).all())

    async def forget_old(self, before: datetime) -> None:
        """Remove imports that ended before then; their files' names say who was imported."""
        async with self._database.writing_session() as session:
            old = sa.select(col(Import.id)).where(col(Import.ended_at) < before)
            await session.exec(sa.delete(ImportFile).where(col(ImportFile.import_id).in_(old)))
            await session.exec(sa.delete(Import).where(col(Import.ended_at) < before))
            await session.commit()


async def counts(session: AsyncSession, import_ids: Sequence[UUID]) -> dict[UUID, dict[str, int]]:
    """How many files each import has in each state."""
    query = (
        select(ImportFile.import_id, ImportFile.state, sa.func.count())
        .where(col(ImportFile.import_id).in_(import_ids))
        .group_by(col(ImportFile.import_id), col(ImportFile.state))
    )
    found: dict[UUID, dict[str, int]] = {}
    for import_id, state, count in (await session.exec(query)).all():
        found.setdefault(import_id, {})[state] = count
    return found


def principal_json(principal: Principal) -> str:
    """Who they are, to be decided about later. Their token is not kept."""
    scopes = principal.scopes
    return json.dumps(
        {
            "sub": principal.sub,
            "name": principal.name,
            "roles": sorted(principal.roles),
            "site": principal.site,
            "sid": principal.sid,
            "scopes": None
            if scopes is None
            else [[each.level, each.resource, "".join(sorted(each.letters))] for each in scopes],
        }
    )


def read_principal(text: str) -> Principal:
    """Whoever `principal_json` wrote down."""
    said: Mapping[str, Any] = json.loads(text)
    scopes = said["scopes"]
    return Principal(
        sub=said["sub"],
        name=said["name"],
        roles=frozenset(Role(each) for each in said["roles"]),
        site=said["site"],
        sid=said["sid"],
        scopes=None
        if scopes is None
        else frozenset(Scope(level, name, frozenset(letters)) for level, name, letters in scopes),
    )


def _is(key: Key) -> list[sa.ColumnElement[bool]]:
    return [
        col(ImportFile.import_id) == key.import_id,
        col(ImportFile.number) == key.number,
        col(ImportFile.entry) == key.entry,
    ]


def _pending() -> sa.ColumnElement[bool]:
    """Has the import of the surrounding query files that are to be taken in?"""
    return (
        sa.select(sa.literal(1))
        .where(
            col(ImportFile.import_id) == Import.id,
            col(ImportFile.state).in_([each.value for each in PENDING]),
        )
        .correlate_except(ImportFile)
        .exists()
    )


async def _next(session: AsyncSession, import_id: UUID, *, if_open: bool = False) -> int | None:
    """The number of the next change; until the end of the transaction nobody else gets one."""
    counted = (
        sa.update(Import)
        .where(col(Import.id) == import_id)
        .values(seq=col(Import.seq) + 1)
        .returning(col(Import.seq))
        .execution_options(synchronize_session=False)
    )
    if if_open:
        counted = counted.where(col(Import.state) == ImportState.OPEN.value)
    row = (await session.exec(counted)).first()
    return None if row is None else int(row[0])


async def _fed(session: AsyncSession, import_id: UUID, principal: Principal) -> Import:
    seq = await _next(session, import_id, if_open=True)
    if seq is None:
        raise Conflict("The import is over; nothing more is taken. Make a new one.")
    await session.exec(
        sa.update(Import)
        .where(col(Import.id) == import_id)
        .values(fed_at=utcnow(), principal=principal_json(principal))
    )
    found = await session.get(Import, import_id, populate_existing=True)
    assert found is not None
    return found


async def _refuse_full(session: AsyncSession, size: int, most_bytes: int) -> None:
    held = await session.scalar(
        sa.select(sa.func.coalesce(sa.func.sum(ImportFile.size), 0)).where(
            col(ImportFile.entry) == 0,
            col(ImportFile.state).in_([each.value for each in SPOOLED]),
        )
    )
    if int(held or 0) + size > most_bytes:
        raise Unavailable(
            "There is no room for more files at the moment: those that came before are still "
            "being taken in. Send this one again in a while."
        )


def _ended(import_id: UUID, state: ImportState, reason: str) -> sa.Update:
    return (
        sa.update(Import)
        .where(col(Import.id) == import_id, col(Import.state) == ImportState.OPEN.value)
        .values(state=state.value, reason=reason, ended_at=utcnow())
        .execution_options(synchronize_session=False)
    )
