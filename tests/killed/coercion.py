"""The app as a process that dies at one point of a coercion: `... .coercion PORT POINT`.

An empty point lets it live. Points are functions of the app, wrapped: at the first call the process
kills itself with SIGKILL, and nothing runs after that.
"""

import ctypes
import signal
import sys

import uvicorn

from app.arrivals import copies
from app.arrivals.coercion import Coercion
from app.arrivals.linker import Linker
from app.main import create_app
from app.orthanc import Orthanc
from app.settings import Settings
from tests.killed.process import Fuse

BEFORE_THE_LINK = (
    "claiming",  # nothing is done
    "claimed",  # it is on record that the copy is made
    "posting",  # before the first file of the copy is stored
    "posted",  # one is stored, one is not
    "linking",  # all of them are
    "finished",  # in the transaction that links the copy and closes the original
)
AFTER_THE_LINK = ("linked",)
OF_A_REMOVAL = (
    "removing",  # before the first file of the original is deleted
    "removed-one",  # one is deleted, one is not
    "removed",  # both are, and that is not noted
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def install(point: str) -> None:
    """Wrap what the points are."""
    fuse = Fuse(point, 2 if point == "removed" else 1)
    fuse.around(Coercion, "_claim", "claiming", "claimed")
    fuse.around(Orthanc, "store", "posting", "posted")
    fuse.around(Coercion, "_row", after="linking")
    fuse.around(copies, "finish", after="finished")
    fuse.around(Linker, "_write", after="linked")
    if point == "removed":
        fuse.around(Orthanc, "delete_instance", after="removed")
    else:
        fuse.around(Orthanc, "delete_instance", "removing", "removed-one")


def main() -> None:
    port, point = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if point:
        install(point)
    app = create_app(Settings())
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="critical")


if __name__ == "__main__":
    main()
