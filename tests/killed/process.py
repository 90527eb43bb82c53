"""The app as a process that dies where it is told to: `python -m tests.killed.process PORT`.

Each line on standard input starts one app, by a fork of this process, which has imported all that
it needs; its answer is the new process' id. Chosen points are functions of the app, wrapped in the
fork: at the n-th call the process kills itself with SIGKILL, and nothing runs after that.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from io import BytesIO
from typing import Any, BinaryIO

import pydicom
import uvicorn
from sqlmodel.ext.asyncio.session import AsyncSession

import app.orthanc as orthanc_module
from app import journal
from app.audit import AuditTrail, Entry, Outcome
from app.dicom import orthanc_id
from app.intake import Intake, Receipt
from app.main import create_app
from app.orthanc import Orthanc, Stored
from app.recovery import Recovery
from app.settings import Settings

POINTS = (
    "granted",  # the grant is committed, nothing is done
    "noted",  # what is about to be stored or deleted is committed
    "posting",  # before POST to Orthanc
    "half-posted",  # while the file is on its way
    "posted",  # Orthanc has answered
    "deleting",  # before DELETE of a study
    "deleted",  # Orthanc has deleted it
    "committing",  # the change and its record, before
    "committed",  # and after
    "taken-back",  # at the next start: Orthanc has deleted, nothing is recorded
)
MUTATIONS = ("no-recovery", "link-first")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Fuse:
    """Kills this process at the n-th call of a point."""

    def __init__(self, point: str, count: int) -> None:
        self._point = point
        self._left = count

    def passed(self, point: str) -> None:
        if point == self._point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        original = getattr(owner, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.passed(before)
            result = await original(*args, **kwargs)
            self.passed(after)
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        """Wrap what the points are."""
        self.around(Orthanc, "store", "posting", "posted")
        self.around(Orthanc, "delete_study", "deleting", "deleted")
        self.around(journal, "will_store", after="noted")
        self.around(journal, "will_delete", after="noted")
        self._around_grants()
        self._around_commits()
        self._in_the_middle_of_a_file()
        if self._point == "taken-back":
            self.around(Orthanc, "delete_instance", after="taken-back")

    def _around_grants(self) -> None:
        record = AuditTrail.record

        async def recording(trail: AuditTrail, *entries: Entry) -> None:
            await record(trail, *entries)
            if any(each.outcome is Outcome.GRANTED and each.operation for each in entries):
                self.passed("granted")

        AuditTrail.record = recording  # type: ignore[method-assign, assignment]

    def _around_commits(self) -> None:
        commit = AsyncSession.commit

        async def committing(session: AsyncSession) -> None:
            is_change = bool(session.sync_session.info.get("audit entries"))
            if is_change:
                self.passed("committing")
            await commit(session)
            if is_change:
                self.passed("committed")

        AsyncSession.commit = committing  # type: ignore[method-assign, assignment]

    def _in_the_middle_of_a_file(self) -> None:
        chunks: Callable[[BinaryIO], AsyncIterator[bytes]] = orthanc_module._chunks
        orthanc_module.CHUNK_BYTES = 256

        async def halved(file: BinaryIO) -> AsyncIterator[bytes]:
            number = 0
            async for chunk in chunks(file):
                yield chunk
                number += 1
                if number == 2:
                    self.passed("half-posted")

        orthanc_module._chunks = halved


def mutate(name: str) -> None:
    """Break the app on purpose: the comparison has to see it."""
    if name == "no-recovery":

        async def nothing(self: Recovery) -> None:
            return

        Recovery.step = nothing  # type: ignore[method-assign]
    elif name == "link-first":
        _link_first()


def _link_first() -> None:
    """Links each file, and stores it afterwards."""
    take, store = Intake.take, Intake._store
    contents: dict[str, bytes] = {}

    async def taking(self: Intake, caller: Any, file: BinaryIO, target: Any) -> Receipt:
        receipt = await take(self, caller, file, target)
        content = BytesIO(contents[receipt.stored.instance_id])
        return replace(receipt, stored=await store(self, content, known=True))

    async def remembering(self: Intake, file: BinaryIO, *, known: bool) -> Stored:
        file.seek(0)
        content = file.read()
        image = pydicom.dcmread(BytesIO(content))
        parts = [image.PatientID, image.StudyInstanceUID, image.SeriesInstanceUID]
        study, series = orthanc_id(*parts[:2]), orthanc_id(*parts)
        instance = orthanc_id(*parts, image.SOPInstanceUID)
        contents[instance] = content
        return Stored(instance, series, study, new=False)

    async def always(self: Orthanc, orthanc_id: str) -> bool:
        return True

    Intake.take = taking  # type: ignore[method-assign]
    Intake._store = remembering  # type: ignore[method-assign]
    Orthanc.holds_instance = always  # type: ignore[method-assign]


def run_app(app: Any, port: int, wanted: dict[str, Any]) -> None:
    """In the fork: until it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if wanted["mutation"]:
        mutate(wanted["mutation"])
    point, count = wanted["point"], wanted["count"]
    if point:
        Fuse(point, count).install()
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="critical")


def main() -> None:
    port = int(sys.argv[1])
    app = create_app(Settings())  # connects to nothing before it is started
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the killed are nobody's to wait for
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                run_app(app, port, json.loads(line))
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
