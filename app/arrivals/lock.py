"""One follower among the processes of an app: who has the database's lock.

On PostgreSQL a session advisory lock on a connection of its own, which the server gives up when
the process, or its host, dies. On SQLite there is one process.
"""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

LOCK_NUMBER = 5_107_202_606  # any, the same in all processes
# A host that is silent for half a minute has died.
_KEEPALIVES = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=4"


class Leadership:
    """Held or not, by this process."""

    def __init__(self, url: str) -> None:
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

    async def held(self) -> bool:
        """Is it this process's, now? Taken if it is free. Raises SQLAlchemyError, OSError."""
        if self._engine is None:
            return True
        try:
            if self._connection is not None:
                # A lost connection has lost the lock.
                await self._connection.execute(sa.text("SELECT 1"))
                return True
            connection = await self._engine.connect()
            taken = await connection.scalar(
                sa.text("SELECT pg_try_advisory_lock(:number)"), {"number": LOCK_NUMBER}
            )
            if taken:
                self._connection = connection
                return True
            await connection.close()
        except (sa.exc.SQLAlchemyError, OSError):
            await self.give_up()
            raise
        return False

    async def give_up(self) -> None:
        """Let another process have it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.invalidate()
                await connection.close()
            except (sa.exc.SQLAlchemyError, OSError):
                pass  # it is gone, and the lock with it
        if self._engine is not None:
            await self._engine.dispose()
