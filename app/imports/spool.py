"""Where the bytes of imports wait on disk: a folder that nobody else can enter.

A file is `<import>.<number>`. Its size on disk is how much of it has come, so no connection and no
process that ends in the middle leaves a wrong offset behind. Blocking.
"""

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from sqlalchemy.engine import make_url

from app.errors import Conflict

CHUNK_BYTES = 1024 * 1024

_NAME = re.compile(r"([0-9a-f]{32})\.([0-9]{1,9})")


class Spool:
    """The folder, below `parent` and named after the database: another Lightbox on this machine
    has its own. Made when it is opened."""

    def __init__(self, parent: Path, database_url: str) -> None:
        shown = make_url(database_url).render_as_string(hide_password=True)
        self.folder = parent / f"lightbox-imports-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"

    def open(self) -> None:
        """Make the folder, or make sure of the one that is there. Raises RuntimeError where it is
        somebody else's, or others can enter it: what is in it would be read as ours."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise RuntimeError(
                f"{self.folder} must be a folder of Lightbox's own user that nobody else can "
                "enter (0700). Remove it, or set LIGHTBOX_SPOOL_DIR to another place."
            )

    def path(self, import_id: UUID, number: int) -> Path:
        return self.folder / f"{import_id.hex}.{number}"

    def offset(self, import_id: UUID, number: int) -> int:
        """How many bytes of a file are here; 0 where none is."""
        try:
            return self.path(import_id, number).lstat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def writing(self, import_id: UUID, number: int) -> Iterator[BinaryIO]:
        """A file to be added to, by one connection at a time. Raises Conflict."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path(import_id, number), flags, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    "Another connection is still sending this file. Ask again, by HEAD, how much "
                    "of it is here, and go on from there."
                ) from error
            yield file
            file.flush()

    def reading(self, import_id: UUID, number: int) -> BinaryIO | None:
        """A file that is here; None where it isn't."""
        try:
            return self.path(import_id, number).open("rb")
        except FileNotFoundError:
            return None

    def digest(self, import_id: UUID, number: int) -> str:
        """The SHA-256 of a file, in hexadecimal, once it is on the disk for sure."""
        digest = hashlib.sha256()
        with self.path(import_id, number).open("rb") as file:
            os.fsync(file.fileno())
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def remove(self, import_id: UUID, number: int) -> None:
        self.path(import_id, number).unlink(missing_ok=True)

    def held(self) -> list[tuple[UUID, int]]:
        """What is in the folder: import and number. What has no name of ours is removed."""
        found = []
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                found.append((UUID(match[1]), int(match[2])))
            elif not path.is_dir():
                path.unlink(missing_ok=True)
        return found
