"""The folder that Orthanc's worklist plugin reads: our files in it, and nobody else's.

Synchronous: from a thread. A file is written beside, then renamed, so that the plugin, which
looks at `*.wl` only, never reads half of one. Names hold the order's UUID, no patient's data.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_OURS = re.compile(rf"lightbox-({_ID})\.wl")
_HALF_WRITTEN = re.compile(rf"\.lightbox-{_ID}\.[0-9a-f]+\.tmp")
_LOCK = ".lightbox.lock"
_FOLDER_MODE = 0o750  # the group is Orthanc's
_FILE_MODE = 0o640
_TOO_OPEN = 0o027


class Busy(OSError):
    """Another process is at the folder now."""


class Unfit(OSError):
    """The folder can't be used; says why."""


@dataclass(frozen=True)
class Changes:
    """What was done to the folder: the orders whose files were written, and removed."""

    written: tuple[UUID, ...] = ()
    removed: tuple[UUID, ...] = ()


_Signature = tuple[int, int, int]


@dataclass
class Folder:
    """One folder. Of each file that it found right it remembers how it looked."""

    path: Path
    _known: dict[UUID, tuple[_Signature, bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the folder where it is missing. Raises Unfit, other OSError."""
        self.path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        mode = self.path.stat().st_mode
        if mode & _TOO_OPEN:
            raise Unfit(
                f"{self.path} is open to others (mode {stat.S_IMODE(mode):04o}): patients' names "
                "stand in it; make it 0750, or narrower, with Orthanc's group."
            )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The turn to write, of all processes that share the folder. Raises Busy at once."""
        lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy("Another process is writing the worklist.") from error
            yield
        finally:
            os.close(lock)  # which ends the lock too

    def apply(self, wanted: Mapping[UUID, bytes], *, read_all: bool = False) -> Changes:
        """Make our files what is wanted, in one's turn; `read_all` believes no memory."""
        if read_all:
            self._known.clear()
        written, removed, right = [], [], set()
        with os.scandir(self.path) as found:
            for each in list(found):
                ours = _OURS.fullmatch(each.name)
                if ours is None:
                    if _HALF_WRITTEN.fullmatch(each.name):
                        Path(each.path).unlink(missing_ok=True)
                    continue
                order_id = UUID(ours[1])
                if order_id not in wanted:
                    self._known.pop(order_id, None)
                    Path(each.path).unlink(missing_ok=True)
                    removed.append(order_id)
                elif self._is_right(order_id, each, wanted[order_id]):
                    right.add(order_id)
        for order_id in sorted(wanted.keys() - right):
            self._write(order_id, wanted[order_id])
            written.append(order_id)
        for order_id in self._known.keys() - wanted.keys():
            del self._known[order_id]
        return Changes(tuple(written), tuple(removed))

    def _is_right(self, order_id: UUID, found: "os.DirEntry[str]", content: bytes) -> bool:
        status = found.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) != _FILE_MODE:
            return False
        if self._known.get(order_id) == (_signature(status), content):
            return True
        if status.st_size != len(content) or Path(found.path).read_bytes() != content:
            return False
        self._known[order_id] = (_signature(status), content)
        return True

    def _write(self, order_id: UUID, content: bytes) -> None:
        half = self.path / f".lightbox-{order_id}.{secrets.token_hex(4)}.tmp"
        whole = self.path / f"lightbox-{order_id}.wl"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(half, flags, _FILE_MODE), "wb") as file:
                os.fchmod(file.fileno(), _FILE_MODE)  # whatever the umask says
                file.write(content)
            half.replace(whole)
        except OSError:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            raise
        self._known[order_id] = (_signature(whole.lstat()), content)


def _signature(status: os.stat_result) -> _Signature:
    return (status.st_ino, status.st_size, status.st_mtime_ns)
