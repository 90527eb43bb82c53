"""What is begun in Orthanc is written down before, so that it can be finished or taken back.

A process is alive as long as it holds its lock: on PostgreSQL a session advisory lock on a
connection of its own, which the server gives up when the process, or its host, dies. On SQLite
there is one process.
"""

from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import PatientAccess
from app.audit import AuditTrail, Operation, operations
from app.audit.operations import Note
from app.db import Database
from app.models import Instance, OpenOperation
from app.orthanc import Orthanc, promptly

# A host that is silent for half a minute has died.
_KEEPALIVES = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=4"
_HELD = sa.text("SELECT pg_advisory_xact_lock(:key)")
_TRY = sa.text("SELECT pg_try_advisory_lock(:key)")
_TRY_BRIEFLY = sa.text("SELECT pg_try_advisory_xact_lock(:key)")


class Kind(StrEnum):
    """What an operation does in Orthanc."""

    DELETE = "delete"
    STORE = "store"


async def will_store(
    trail: AuditTrail, access: PatientAccess, orthanc_id: str, *, there_before: bool
) -> None:
    """Commit that this instance is about to be stored. `there_before`: then it is nobody's to
    take back. Raises AuditUnavailable."""
    if access.operation is not None:
        await trail.note(
            Note(access.operation, Kind.STORE.value, orthanc_id, there_before=there_before)
        )


async def will_delete(
    trail: AuditTrail, access: PatientAccess, orthanc_id: str, reason: str
) -> None:
    """Commit that this study is about to be deleted. Raises AuditUnavailable."""
    if access.operation is not None:
        await trail.note(Note(access.operation, Kind.DELETE.value, orthanc_id, detail=reason))


def leave(access: PatientAccess, unsettled: set[Operation]) -> None:
    """What became of it in Orthanc is not known: `app.recovery` finds out."""
    if access.operation is not None:
        operations.settled(access.session, [access.operation])
        unsettled.add(access.operation)


def is_row(operation: Operation) -> sa.ColumnElement[bool]:
    """Its row, as long as nobody took it over."""
    return sa.and_(
        col(OpenOperation.id) == operation.id,
        col(OpenOperation.process) == operation.process,
        col(OpenOperation.state) == operation.state.value,
    )


# ------------------------------------------------------------------------- one at an instance


async def hold(session: AsyncSession, orthanc_id: str) -> None:
    """Until the end of the transaction nobody else links this instance or takes it back. On SQLite
    the turn to write is that."""
    if session.get_bind().dialect.name == "postgresql":
        await (await session.connection()).execute(_HELD, {"key": int(orthanc_id[:8], 16)})


async def take_back(database: Database, orthanc: Orthanc, orthanc_id: str) -> bool:
    """Delete an instance that nobody linked. False: somebody did. Raises OrthancUnavailable."""
    async with database.writing_session() as session:
        await hold(session, orthanc_id)
        linked = sa.select(sa.func.count()).where(col(Instance.orthanc_id) == orthanc_id)
        if await session.scalar(linked):
            return False
        async with promptly():
            await orthanc.delete_instance(orthanc_id)
    return True


# ----------------------------------------------------------------------------- who is alive


class Alive:
    """That this process lives, and whether another does."""

    def __init__(self, url: str, process: str) -> None:
        self._process = process
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None
        if url.startswith("postgresql"):
            self._engine = create_async_engine(
                url,
                poolclass=NullPool,
                isolation_level="AUTOCOMMIT",
                hide_parameters=True,
                connect_args={"options": _KEEPALIVES, "connect_timeout": 5},
            )

    async def dead(self, processes: list[str]) -> list[str]:
        """Which of these other processes have died; says, too, that this one has not. Raises
        SQLAlchemyError, OSError."""
        if self._engine is None:
            return processes
        try:
            connection = await self._connected()
            return [
                each
                for each in processes
                if await connection.scalar(_TRY_BRIEFLY, {"key": _key(each)})
            ]
        except (sa.exc.SQLAlchemyError, OSError):
            await self.end()
            raise

    async def _connected(self) -> AsyncConnection:
        """The connection that holds the lock. A lost one has lost it."""
        assert self._engine is not None
        if self._connection is None:
            connection = await self._engine.connect()
            self._connection = connection
            if not await connection.scalar(_TRY, {"key": _key(self._process)}):
                # Somebody asks at this moment whether we live, or our old connection still does.
                raise sa.exc.TimeoutError("the lock of this process is not free")
        else:
            await self._connection.execute(sa.text("SELECT 1"))
        return self._connection

    async def end(self) -> None:
        """Give the lock up."""
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                await connection.invalidate()
                await connection.close()
        except (sa.exc.SQLAlchemyError, OSError):
            pass  # it is gone, and the lock with it
        if self._engine is not None:
            await self._engine.dispose()


def _key(process: str) -> int:
    return int(process[:15], 16)
