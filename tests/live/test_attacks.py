"""Ways in that nobody should have: raw requests through the real edge, app and Orthanc.

`mallory` is a clinician of one patient, and a technologist of one at another site; the victim's
studies are nobody's business of theirs. Each row of the tables below is sent as it stands, with
the cookie of a launch session and with a bearer token, while the victim's own doctor has just
looked at the images, so that the edge keeps them. Of each:

- no byte that is the victim's comes back: no identifier, name, UID or pixel;
- what reaches Orthanc is one of the few requests in `CANONICAL`, with no header of a client, and
  never about the victim;
- each request that the app decided is on record exactly once, and each that it did not see stands
  in the edge's log with its status.
"""

import base64
import gzip
import json
import re
import secrets
import struct
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pydicom
import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from app.demo.stack import AppServer, Edge, OrthancServer, free_port
from tests.images import ct_image
from tests.lightbox import Opened, signed
from tests.live.conftest import Edged, Full, edged, environment_of, unique
from tests.live.wire import Answer, Recorded, Recorder, Reply, recording, send

UIDS = ("study_instance_uid", "series_instance_uid", "sop_instance_uid")
EVIL = "evil.example"
"""A host that must never be named in an answer."""
CUT = "cut-here"
OCTETS = "Accept: application/octet-stream; transfer-syntax=*"

ORTHANC_ID = "[0-9a-f]{8}(?:-[0-9a-f]{8}){4}"
UID = r"[0-9.]{1,64}"
CANONICAL = re.compile(
    rf"(?:GET /instances/{ORTHANC_ID}/(?:file|metadata|attachments/dicom/md5"
    r"|content/[0-9a-f]{4}-[0-9a-f]{4}|frames/[0-9]{1,6}/raw"
    r"|frames/[0-9]{1,6}/rendered(?:\?[a-z0-9=&.+-]+)?)"
    rf"|GET /studies/{ORTHANC_ID}/statistics"
    rf"|GET /dicom-web/studies/{UID}/series/{UID}/metadata"
    rf"|GET /dicom-web/studies/{UID}/series/{UID}/instances/{UID}/frames/[0-9]{{1,6}}"
    rf"|DELETE /(?:instances|studies)/{ORTHANC_ID}"
    r"|POST /tools/lookup|POST /instances|GET /system|GET /statistics) HTTP/1\.[01]"
)
KNOWN_HEADERS = {
    "host",
    "authorization",
    "accept",
    "accept-encoding",
    "connection",
    "user-agent",
    "content-type",
    "content-length",
}
ACCEPTED = (
    re.compile(r"|\*/\*|application/dicom\+json|image/(?:jpeg|png)"),
    re.compile(
        r'multipart/related; type="application/octet-stream"; '
        r"transfer-syntax=1\.2\.840\.10008\.1\.2\.1"
    ),
)


# ---------------------------------------------------------------------------------- who is who


@dataclass(repr=False)
class Study:
    """One image and its names. `pixels` are of no other study, nor is any of the `words`."""

    mrn: str
    words: list[str]
    pixels: bytes
    patient: Any
    order: Any
    image: Any  # what the upload answered
    content: bytes

    @property
    def uid(self) -> str:
        return str(self.image["study_instance_uid"])

    @property
    def path(self) -> str:
        return f"/studies/{self.uid}"

    @property
    def series(self) -> str:
        return f"{self.path}/series/{self.image['series_instance_uid']}"

    @property
    def instance(self) -> str:
        return f"{self.series}/instances/{self.image['sop_instance_uid']}"

    @property
    def frame(self) -> str:
        return f"{self.instance}/frames/1"

    @property
    def orthanc_id(self) -> str:
        return str(self.image["orthanc_instance_id"])

    @property
    def names(self) -> list[str]:
        """Whatever names it."""
        kept = self.image
        return [
            *(self.mrn, str(self.patient["id"]), str(self.order["id"]), self.uid),
            *(kept["series_instance_uid"], kept["sop_instance_uid"], self.orthanc_id),
            *(kept["orthanc_study_id"], *self.words),
        ]

    @property
    def marks(self) -> list[bytes]:
        """What must not be seen: its names and pixels, these also as DICOM JSON has them."""
        return [
            *(name.encode() for name in self.names),
            self.pixels,
            base64.b64encode(self.pixels * 3)[:32],
        ]


def marked(mrn: str, words: Sequence[str], pixels: bytes, **values: Any) -> bytes:
    """An image with `words` in its descriptions, and `pixels` again and again."""
    name, description, comment = words
    return ct_image(
        patient_id=mrn,
        PatientName=name,
        StudyDescription=description,
        SeriesDescription=description,
        PatientComments=comment,
        Modality="XA",
        StudyDate="20240404",
        PixelData=pixels * 32,
        **values,
    )


async def make_study(
    caller: Edged, *, sub: str, site: str = "", former: Study | None = None
) -> Study:
    """A patient of `sub`, and an image; with `former`, one more of their studies."""
    mrn = former.mrn if former else unique("MRN")
    words = [f"{unique('quarry')}^Vera", unique("secret"), unique("comment")]
    patient: Any = former.patient if former else await caller.patient(mrn, last_name=words[0][:-5])
    order = await caller.order(patient, requested_by=sub, **({"site": site} if site else {}))
    pixels = secrets.token_bytes(16)
    content = marked(mrn, words, pixels)
    answer = await caller.upload(content, role="service", order_id=order["id"])
    assert answer.status_code == 200, answer.text
    return Study(mrn, words, pixels, patient, order, answer.json(), content)


@dataclass
class Way:
    """One of the two ways in: a root of DICOMweb at its origin, and what opens it."""

    name: str
    port: int
    root: str
    credential: str  # a header line

    def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        """A request below the root, with the credential."""
        return self.ask(self.root + path, self.credential, *headers, method=method)

    def ask(self, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
        """A request for any path, with these headers alone."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: localhost:{self.port}", "X-Request-ID: @ID@"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        lines += [*headers, "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


@dataclass(repr=False)
class Scene:
    """Everything that stands and everybody who is there."""

    full: Full
    caller: Edged
    recorder: Recorder
    mallory: str
    doctor: str
    mine: Study
    second: Study  # of the same patient
    theirs: Study
    others: Study  # the patient of mallory as a technologist elsewhere
    site: str
    my_session: Opened
    my_second: Opened
    their_session: Opened
    ways: dict[str, Way]
    log: "Log"
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def way(self) -> Way:
        """The bearer's."""
        return self.ways["bearer"]

    def outcomes(self, request_id: str) -> list[tuple[str, str]]:
        """`(action, outcome)` of each record of a request, in their order."""
        with self.log.engine.connect() as connection:
            found = connection.execute(
                sa.text(
                    "SELECT action, outcome FROM audit_record WHERE request_id = :id ORDER BY id"
                ),
                {"id": request_id},
            )
            return [(action, outcome) for action, outcome in found]

    def token(self, role: str, sub: str) -> str:
        return f"Authorization: Bearer {self.caller.token(role, sub)}"


@dataclass
class Log:
    """The edge's access log, read on from where it was; and the trail's database."""

    path: Path
    engine: sa.Engine
    offset: int = 0
    lines: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, request_id: str, count: int) -> list[Any]:
        """The lines of a request, when there are `count`: nginx writes after it has answered."""
        deadline = time.monotonic() + 60
        while len(self.lines.get(request_id, [])) < count:
            assert time.monotonic() < deadline, f"{request_id} is not in the edge's log"
            self._read()
        return self.lines[request_id]

    def _read(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                entry = json.loads(line)
                self.lines.setdefault(entry["request_id"], []).append(entry)


@contextmanager
def standing(full: Full, recorder: Recorder, state: Path) -> Iterator[Full]:
    """An app and an edge of our own on the shared database, with the recorder before Orthanc."""
    viewer_files, spool = state / "viewer", state / "spool"
    for folder in (viewer_files, spool):
        folder.mkdir()
    (viewer_files / "index.html").write_text("<!doctype html><title>the viewer</title>")
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    orthanc = OrthancServer(
        state / "never-started",
        username=full.archive.server.username,
        password=full.archive.server.password,
        http_port=recorder.port,
        dicom_port=None,
    )
    settings = full.settings.model_copy(
        update={
            "api_base_url": f"http://localhost:{api_port}",
            "viewer_base_url": f"http://localhost:{viewer_port}",
            "orthanc_url": orthanc.url,
            "spool_dir": spool,
        }
    )
    app = AppServer(app_port, environment_of(settings), state_dir=state / "app")
    edge = Edge(
        state / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    with app, edge:
        yield Full(settings, full.archive, app, edge, full.database)


@pytest.fixture(scope="module")
def watched(
    full: Full, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Full, Recorder]]:
    orthanc = full.archive.server
    assert isinstance(orthanc, OrthancServer)
    with (
        recording(orthanc) as recorder,
        standing(full, recorder, tmp_path_factory.mktemp("attacked")) as each,
    ):
        yield each, recorder


@pytest.fixture(scope="module")
async def scene(watched: tuple[Full, Recorder]) -> AsyncIterator[Scene]:
    """The victim's doctor has just looked at everything; what they saw is kept at the edge."""
    full, recorder = watched
    mallory, doctor, site = unique("mallory"), unique("doctor"), unique("site")
    engine = sa.create_engine(full.database.sync_owner)
    async with edged(full.settings) as caller:
        mine = await make_study(caller, sub=mallory)
        second = await make_study(caller, sub=mallory, former=mine)
        theirs = await make_study(caller, sub=doctor)
        others = await make_study(caller, sub="nobody", site=site)
        opened = [
            await caller.open(f"/order/{mine.order['id']}", sub=mallory),
            await caller.open(f"/{second.uid}", sub=mallory),
            await caller.open(f"/{theirs.uid}", sub=doctor),
        ]
        made = Scene(
            full=full,
            caller=caller,
            recorder=recorder,
            mallory=mallory,
            doctor=doctor,
            mine=mine,
            second=second,
            theirs=theirs,
            others=others,
            site=site,
            my_session=opened[0],
            my_second=opened[1],
            their_session=opened[2],
            ways=ways_of(full, caller, mallory, opened[0]),
            log=Log(full.edge.access_log_path, engine),
        )
        # Own requests are granted once and counted from then on.
        for way in made.ways.values():
            assert send(way.port, way.get(mine.frame, OCTETS)).status == 200
        look_at_everything(made)
        recorder.taken()
        yield made
    engine.dispose()


def ways_of(full: Full, caller: Edged, sub: str, opened: Opened) -> dict[str, Way]:
    """How `sub` gets in, both ways."""
    token = f"Authorization: Bearer {caller.token('clinician', sub)}"
    root = f"/s/{opened.ctx}/dicom-web"
    return {
        "bearer": Way("bearer", full.edge.api_port, "/dicom-web", token),
        "cookie": Way("cookie", full.edge.viewer_port, root, f"Cookie: {opened.cookie}"),
    }


def look_at_everything(scene: Scene) -> None:
    """As the victim's doctor, who sees it all: what the attacks look for can be found."""
    theirs, seen = scene.theirs, b""
    ways = ways_of(scene.full, scene.caller, scene.doctor, scene.their_session)
    for way in ways.values():
        for _ in range(2):  # the second time it is kept
            frame = send(way.port, way.get(theirs.frame, OCTETS))
            assert frame.status == 200
            assert frame.body == theirs.pixels * 32
        for path in ("", "/metadata", "/series", "/instances", "/thumbnail"):
            reply = send(way.port, way.get(theirs.path + path))
            assert reply.status == 200, path
            seen += reply.body
        assert send(way.port, way.get(f"{theirs.instance}/rendered")).status == 200
        comment = send(way.port, way.get(f"{theirs.instance}/bulk/00104000"))
        assert comment.body.strip() == theirs.words[2].encode()
    shown = (theirs.mrn, theirs.uid, *(theirs.image[each] for each in UIDS[1:]), *theirs.words)
    assert [name for name in shown if name.encode() not in seen] == []


def kept_locations(scene: Scene) -> list[str]:
    """Under which internal addresses the edge keeps what the doctor saw: the stamps in them are
    told to nobody."""
    found = []
    for path in (scene.full.edge.state_dir / "kept").rglob("*"):
        if path.is_file():
            key = re.search(rb"\nKEY: \S*(-kept/\S+)", path.read_bytes())
            if key and scene.theirs.orthanc_id.encode() in key[1]:
                kind = "-image" if b"/rendered" in key[1] else ""
                found.append(f"/_orthanc{kind}{key[1].decode()}")
    assert len(found) >= 2, "the edge keeps nothing"
    return sorted(found)


# ---------------------------------------------------------------------------------- the rows

Make = Callable[[Scene, Way], bytes]
REFUSED = (400, 404)
BOTH = ("bearer", "cookie")


@dataclass(frozen=True)
class Row:
    """`request` has `@ID@` where its id goes; `@ID@-in` is the id of one that is hidden inside of
    it, and that nobody may ever see.

    `own`: it asks for what mallory may see, and must not get more. `unrecorded`: there is nothing
    to decide. `records`: the outcomes, where they are neither one denial nor, for `own`, a grant,
    which may be on record already. `echo`: it may hear the names that it said itself.
    """

    category: str
    name: str
    request: Make
    statuses: tuple[int, ...] = REFUSED
    ways: tuple[str, ...] = BOTH
    own: bool = False
    unrecorded: bool = False
    records: tuple[tuple[str, ...], ...] = ()
    echo: bool = False
    method: str = "GET"


def strike(scene: Scene, way: Way, row: Row) -> Reply:
    """Send a row, and hold all three against what came of it."""
    request_id = unique("attack")
    scene.counts[row.category] += 1
    scene.recorder.taken()
    request = row.request(scene, way).replace(b"@ID@", request_id.encode())
    reply = send(way.port, request, method=row.method)
    assert reply.status in row.statuses, reply.raw[:600]
    assert_nothing_leaks(scene, reply, request if row.echo else b"")
    for each in scene.recorder.taken():
        assert_canonical(scene, each)
    for answer in reply.answers:
        assert_on_record(scene, row, answer)
    if row.category == "smuggling":
        after = send(way.port, way.get(scene.mine.frame, OCTETS))
        assert (after.status, after.body) == (200, scene.mine.pixels * 32)
        assert f"{request_id}-in".encode() not in reply.raw
        assert f"{request_id}-in" not in scene.log.lines
        assert scene.outcomes(f"{request_id}-in") == []
    return reply


def assert_nothing_leaks(
    scene: Scene, reply: Reply, said: bytes = b"", of: Study | None = None
) -> None:
    seen = reply.raw + b"".join(each.body for each in reply.answers)
    for answer in reply.answers:
        if answer.header("content-encoding") == "gzip" and answer.body:
            seen += gzip.decompress(answer.body)
    leaked = [mark for mark in (of or scene.theirs).marks if mark in seen and mark not in said]
    assert leaked == [], reply.raw[:600]
    assert EVIL.encode() not in seen, reply.raw[:600]
    for answer in reply.answers:
        internal = (b"Orthanc", f"127.0.0.1:{scene.recorder.port}".encode())
        found = [each for each in internal if answer.status >= 400 and each in answer.body]
        assert found == [], answer.body[:600]


def assert_canonical(scene: Scene, each: Recorded) -> None:
    """Orthanc was asked as Lightbox asks, in nobody's name but its own, and not for the victim."""
    assert CANONICAL.fullmatch(each.line), each
    headers = [(name.lower(), value) for name, value in each.headers]
    assert {name for name, _ in headers} <= KNOWN_HEADERS, each
    orthanc = scene.full.archive.server
    assert isinstance(orthanc, OrthancServer)
    assert [v for name, v in headers if name == "authorization"] == [orthanc.authorization]
    for name, value in headers:
        if name == "host":
            assert value in ("orthanc", f"127.0.0.1:{scene.recorder.port}"), each
        if name == "accept":
            assert any(pattern.fullmatch(value) for pattern in ACCEPTED), each
    for name in scene.theirs.names:
        assert name not in each.line, each
        assert not each.line.startswith("POST /tools") or name.encode() not in each.body, each
    if each.line.startswith("POST /instances"):
        planted = (scene.theirs.mrn, scene.theirs.uid, scene.theirs.image["series_instance_uid"])
        assert [name for name in planted if name.encode() in each.body] == []


def assert_on_record(scene: Scene, row: Row, answer: Answer) -> None:
    request_id = answer.header("x-request-id")
    if answer.status < 200:
        return
    assert request_id, answer
    (line,) = scene.log.of(request_id, 1)
    assert line["status"] == answer.status
    outcomes = [outcome for _, outcome in scene.outcomes(request_id)]
    if not line["upstream_status"] or row.unrecorded:
        assert outcomes == [], "it was refused at the edge, or decides nothing"
    elif row.records:
        if row.category == "payload":  # of thousands of parts that fare alike, one stands for all
            outcomes = list(dict.fromkeys(outcomes))
        assert tuple(outcomes) in row.records, line
    elif row.own:
        assert outcomes in ([], ["granted"], ["granted", "done"], ["granted", "failed"])
    else:
        assert outcomes == ["denied"], line


def path_row(name: str, path: str, **more: Any) -> Row:
    """A path below the root; `{t}` is the victim's study, `{m}` one of mine, `{s}` and `{f}` the
    rest of the way to the victim's series and frame."""

    def request(scene: Scene, way: Way) -> bytes:
        return way.get(filled(scene, path), OCTETS)

    return Row("path", name, request, **more)


def filled(scene: Scene, text: str) -> str:
    mine, theirs = scene.mine, scene.theirs
    return (
        text.replace("{t}", theirs.uid)
        .replace("{m}", mine.uid)
        .replace("{s}", theirs.series.removeprefix(theirs.path))
        .replace("{f}", theirs.frame.removeprefix(theirs.path))
        .replace("{i}", theirs.instance.removeprefix(theirs.path))
        .replace("{ms}", mine.series.removeprefix(mine.path))
        .replace("{mf}", mine.frame.removeprefix(mine.path))
        .replace("{mrn}", theirs.mrn)
        .replace("{mymrn}", mine.mrn)
        .replace("{name}", theirs.words[0].replace("^", "%5E"))
        .replace("{prefix}", theirs.words[0].partition("^")[0])
        .replace("{tctx}", scene.their_session.ctx)
        .replace("{mctx}", scene.my_session.ctx)
        .replace("{oid}", theirs.orthanc_id)
    )


PLAIN = [
    path_row(f"as it is{path}", "/studies/{t}" + path)
    for path in (
        *("", "/metadata", "/series", "/instances", "/thumbnail", "{s}", "{s}/metadata"),
        *("{s}/instances", "{s}/thumbnail", "{f}", "{f}/rendered", "{f}/thumbnail", "{f},1,1"),
        *("{s}/rendered", "{i}", "{i}/rendered", "{i}/frames", "{i}/bulk/00104000"),
        *("{s}/instances/1.2.3", "{f}?x=1", "/metadata?includefield=all", "/rendered"),
    )
]
UNICODE_DIGITS = quote("١.٢.٨٤٠")
PATHS = [
    path_row("dots", "/studies/{m}/../{t}/metadata", statuses=(404,)),
    path_row("dots twice", "/studies/{m}/metadata/../../{t}/metadata", statuses=(404,)),
    path_row("one dot", "/studies/./{t}/metadata", statuses=(404,)),
    path_row("encoded dots", "/studies/{m}/%2e%2e/{t}/metadata", statuses=(404,)),
    path_row("half encoded dots", "/studies/{m}/.%2E/{t}/metadata", statuses=(404,)),
    path_row("dots encoded twice", "/studies/{m}/%252e%252e/{t}/metadata", statuses=(404,)),
    path_row("encoded slash", "/studies/{m}/..%2f{t}/metadata", statuses=(404,)),
    path_row("encoded slashes only", "/studies%2F{t}%2Fmetadata", statuses=(404,)),
    path_row("slash encoded twice", "/studies/{m}%252f..%252f{t}", statuses=(404,)),
    path_row("backslash", "/studies/{m}\\..\\{t}/metadata", statuses=(404,)),
    path_row("encoded backslash", "/studies/{m}/..%5c{t}/metadata", statuses=(404,)),
    path_row("overlong dots", "/studies/{m}/%c0%ae%c0%ae/{t}/metadata"),
    path_row("overlong slash", "/studies/{m}/..%c0%af{t}/metadata"),
    path_row("two slashes", "/studies//{t}/metadata", statuses=(404,)),
    path_row("two slashes at the end", "/studies/{t}//", statuses=(404,)),
    path_row("semicolon", "/studies/{t};x=1/metadata", statuses=(404,)),
    path_row("semicolon dots", "/studies/{m}/..;/{t}/metadata", statuses=(404,)),
    path_row("semicolon UIDs", "/studies/{m};{t}/metadata", statuses=(404,)),
    path_row("other case", "/STUDIES/{t}/METADATA", statuses=(404,)),
    path_row("slash at the end", "/studies/{t}/", statuses=(404,)),
    path_row("slash after metadata", "/studies/{t}/metadata/", statuses=(404,)),
    path_row("slash after the frame", "/studies/{t}{f}/", statuses=(404,)),
    path_row("an extension", "/studies/{t}/metadata.json", statuses=(404,)),
    path_row("control character", "/studies/{t}/\x01metadata", statuses=(400,)),
    path_row("tab", "/studies/{t}\t/metadata", statuses=(400,)),
    path_row("delete", "/studies/{t}\x7f/metadata", statuses=(400,)),
    path_row("space", "/studies/{t} /metadata", statuses=(0, 400, 505)),
    path_row("encoded control", "/studies/{t}%01/metadata", statuses=(404,)),
    path_row("encoded line end", "/studies/{t}%0d%0aX-Y:%20z/metadata", statuses=(404,)),
    path_row("NUL", "/studies/{t}\x00/metadata", statuses=(400,)),
    path_row("encoded NUL", "/studies/{t}%00/metadata", statuses=(400,)),
    path_row("encoded NUL in the query", "/studies/{t}/metadata?x=%00", statuses=(400,)),
    path_row("raw UTF-8", "/studies/{t}\xc2\xb2/metadata", statuses=(400,)),
    path_row("Unicode digits", "/studies/" + UNICODE_DIGITS + "/metadata", statuses=(404,)),
    path_row("wide digit", "/studies/{t}%EF%BC%91/metadata", statuses=(404,)),
    path_row("encoded digit", "/studies/%31{t}/metadata", statuses=(404,)),
    path_row("UID list, comma", "/studies/{m},{t}/metadata", statuses=(404,)),
    path_row("UID list, encoded comma", "/studies/{m}%2C{t}/metadata", statuses=(404,)),
    path_row("UID list, encoded backslash", "/studies/{m}%5C{t}/metadata", statuses=(404,)),
    path_row("UID list, series", "/studies/{m}{ms},{s}/metadata", statuses=(404,)),
    path_row("dot after the UID", "/studies/{t}./metadata", statuses=(404,)),
    path_row("zero before the UID", "/studies/0{t}/metadata", statuses=(404,)),
    path_row("space after the UID", "/studies/{t}%20/metadata", statuses=(404,)),
    path_row("plus after the UID", "/studies/{t}+/metadata", statuses=(404,)),
    path_row("any UID", "/studies/*/metadata", statuses=(404,)),
    path_row("quoted UID", "/studies/%22{t}%22/metadata", statuses=(404,)),
    path_row("SQL", "/studies/{t}'%20OR%201=1--/metadata", statuses=(404,)),
    path_row("fragment", "/studies/{t}/metadata#x"),
    path_row("fragment over mine", "/studies/{t}/metadata#/../../{m}/metadata"),
    path_row("long UID", "/studies/" + "1" * 9000 + "/metadata", statuses=(404,)),
    path_row("long UID behind it", "/studies/{t}" + "0" * 60 + "/metadata", statuses=(404,)),
    path_row("longer than a line", "/studies/" + "1" * 40000, statuses=(414,)),
    path_row("a thousand segments", "/studies/{t}" + "/a" * 4000, statuses=(404,)),
    path_row("frame zero", "/studies/{t}" + "{s}/instances/1.2/frames/0", statuses=(404,)),
    path_row("frame list", "/studies/{t}{f}," + "1," * 500 + "1", statuses=(404,)),
    path_row("my frames, Unicode", "/studies/{m}{mf}%D9%A1", statuses=(404,)),
    path_row("my frames, none", "/studies/{m}{mf},", statuses=(404,), own=True),
    path_row("my frames, too many", "/studies/{m}{mf}" + ",1" * 1001, statuses=(404,), own=True),
    path_row("my frames, negative", "/studies/{m}{mf},-1", statuses=(404,), own=True),
    path_row("my frames, beyond", "/studies/{m}{mf}9", statuses=(404,), own=True),
    path_row("my frames, plus", "/studies/{m}{mf},+1", statuses=(404,), own=True),
    path_row("bulk dots", "/studies/{t}{s}/instances/1.2/bulk/../bulk/00100010", statuses=(404,)),
    path_row("a patient", "/patients/{mrn}", statuses=(404,)),
    path_row("all series", "/series", statuses=(404,)),
    path_row("all instances", "/instances?PatientID={mrn}", statuses=(404,)),
    path_row("all bulk", "/bulkdata/{t}", statuses=(404,)),
    path_row("Orthanc's own", "/instances/{oid}/file", statuses=(404,)),
    path_row("WADO-URI", "/?requestType=WADO&studyUID={t}&contentType=application/dicom"),
    path_row("capabilities", "/", statuses=(404,)),
]
WHOLE_PATHS = [
    Row(
        "path",
        f"whole path {path}",
        lambda scene, way, path=path: way.ask(filled(scene, path), way.credential),  # type: ignore[misc]
        statuses=(404,),
    )
    for path in (
        *("//dicom-web/studies/{t}/metadata", "/DICOM-WEB/studies/{t}", "/dicom-web/../dicom-web"),
        *("/dicom-web;/studies/{t}", "/dicom-web%2fstudies/{t}", "/./dicom-web/studies/{t}"),
        *("/s/{tctx}/../{mctx}/dicom-web/studies/{t}", "/s/{mctx}/../{tctx}/dicom-web/studies"),
        *("/s/{mctx}%2f..%2f{tctx}/dicom-web/studies", "/s/{mctx}//dicom-web/studies/{t}"),
        *("/api/../dicom-web/studies/{t}", "/api/%2e%2e/dicom-web/studies/{t}/metadata"),
        *("/docs/..%2fdicom-web/studies/{t}", "/wado?requestType=WADO&studyUID={t}"),
        *("/_orthanc/instances/{oid}/file", "/_orthanc/instances/{oid}/frames/0/raw"),
        *("/_orthanc", "/_orthanc/system", "/%5forthanc/instances/{oid}/file"),
        *("/_ORTHANC/instances/{oid}/file", "/x/../_orthanc/instances/{oid}/file"),
        *("//_orthanc/instances/{oid}/file", "/_orthanc;/instances/{oid}/file"),
        *("/_orthanc-kept/0123456789abcdef/instances/{oid}/frames/0/raw", "/_problem", "/_page"),
        *("/_orthanc-image-kept/0123456789abcdef/instances/{oid}/frames/0/rendered", "/_ohif/"),
        *("/_ohif/index.html", "/_ohif/../nginx.conf", "/assets/../nginx.conf", "/nginx.conf"),
        *("/instances/{oid}/file", "/studies", "/app/explorer.html", "/tools/find", "/system"),
    )
]
FORMS = [
    Row(
        "path",
        "absolute form",
        lambda scene, way: way.get(scene.theirs.path).replace(
            b"GET /", f"GET http://localhost:{way.port}/".encode(), 1
        ),
        statuses=(404,),
    ),
    Row(
        "path",
        "absolute form, Orthanc's host",
        lambda scene, way: way.ask(
            f"http://127.0.0.1:{scene.recorder.port}/instances/{scene.theirs.orthanc_id}/file",
            way.credential,
        ),
        statuses=(404,),
    ),
    Row(
        "path",
        "absolute form, another host's",
        lambda scene, way: way.ask(f"http://{EVIL}{way.root}{scene.theirs.path}", way.credential),
        statuses=(404,),
    ),
    Row(
        "path",
        "authority form",
        lambda scene, way: way.ask(f"127.0.0.1:{scene.recorder.port}", way.credential),
        statuses=(400, 404),
    ),
    Row(
        "path",
        "HTTP/0.9",
        lambda scene, way: f"GET {way.root}{scene.theirs.path}\r\n".encode(),
        statuses=(0, 400),
    ),
    Row(
        "path",
        "HTTP/1.0 without a host",
        lambda scene, way: (
            f"GET {way.root}{scene.theirs.path}/metadata HTTP/1.0\r\nX-Request-ID: @ID@\r\n"
            f"{way.credential}\r\n\r\n"
        ).encode(),
        statuses=(404,),
    ),
    Row(
        "path",
        "HTTP/9.9",
        lambda scene, way: way.get(scene.theirs.path).replace(b"HTTP/1.1", b"HTTP/9.9"),
        statuses=(400, 505),
    ),
    Row(
        "path",
        "two spaces",
        lambda scene, way: way.get(scene.theirs.path).replace(b"GET ", b"GET  ", 1),
    ),
    Row(
        "path",
        "what is kept, a frame by its name",
        lambda scene, way: way.ask(kept_locations(scene)[-1], way.credential),
        statuses=(404,),
    ),
    Row(
        "path",
        "what is kept, a picture by its name",
        lambda scene, way: way.ask(kept_locations(scene)[0], way.credential),
        statuses=(404,),
    ),
    Row(
        "path",
        "what is kept, by its name and encoded",
        lambda scene, way: way.ask(
            kept_locations(scene)[-1].replace("_", "%5F", 1), way.credential
        ),
        statuses=(404,),
    ),
]


# ------------------------------------------------------------------------------------- searches


def query_row(query: str, statuses: tuple[int, ...] = (200, 422), **more: Any) -> Row:
    """A search of studies; `{...}` as in `path_row`."""
    return Row(
        "search",
        query[:60] or "no filter",
        lambda scene, way: way.get("/studies" + filled(scene, query)),
        **{"statuses": statuses, "own": True, **more},
    )


SEARCHES = [
    query_row("", (200,)),
    query_row("?", (200,)),
    query_row("?&&&"),
    query_row("?PatientID={mrn}", (200,)),
    query_row("?patientid={mymrn}", (422,)),
    query_row("?PATIENTID={mymrn}", (422,)),
    query_row("?%50atientID={mrn}", (200,)),
    query_row("?PatientID%20={mrn}", (422,)),
    query_row("?PatientID[]={mrn}", (422,)),
    query_row("?PatientID={mymrn}&PatientID={mrn}", (422,)),
    query_row("?PatientID={mymrn}&00100020={mrn}", (422,)),
    query_row("?00100020={mrn}", (200,)),
    query_row("?0010,0020={mrn}", (422,)),
    query_row("?(0010,0020)={mrn}", (422,)),
    query_row("?0x00100020={mrn}", (422,)),
    query_row("?00100020.00100010=*", (422,)),
    query_row("?00081110.0020000D={t}", (422,)),
    query_row("?PatientID=*", (200,)),
    query_row("?PatientID=%2A", (200,)),
    query_row("?PatientID=%25", (200,)),
    query_row("?PatientID=_", (200,)),
    query_row("?PatientID=[A-Z]*", (200,)),
    query_row("?PatientID=%5C", (200,)),
    query_row("?PatientID=*%5C", (200,)),
    query_row("?PatientID={mymrn}%5C{mrn}", (200,)),
    query_row("?PatientID={mymrn},{mrn}", (200,)),
    query_row("?PatientID={mymrn}'%20OR%20'1'='1", (200,)),
    query_row("?PatientID={mymrn}%27%29%20UNION%20SELECT%20*%20FROM%20patient--", (200,)),
    query_row("?PatientID=", (200,)),
    query_row("?PatientName=", (200,)),
    query_row("?PatientName=*", (200,)),
    query_row("?PatientName={name}", (200,)),
    query_row("?PatientName=quarry*", (200,)),
    query_row("?PatientName=" + "*a" * 3000 + "b", (200,)),
    query_row("?StudyDescription=" + "?" * 4000, (200,)),
    query_row("?StudyInstanceUID={t}", (200,)),
    query_row("?StudyInstanceUID={m},{t}", (200,)),
    query_row("?StudyInstanceUID={m}%5C{t}", (200,)),
    query_row("?StudyInstanceUID=*", (200,)),
    query_row("?StudyInstanceUID=", (200,)),
    query_row("?StudyInstanceUID=" + "1.2," * 3500, (200,)),
    query_row("?StudyInstanceUID={m}&0020000d={t}", (422,)),
    query_row("?StudyDate=-", (422,)),
    query_row("?StudyDate=00000000-99999999", (200,)),
    query_row("?StudyDate=20240404", (200,)),
    query_row("?StudyDate=2024*", (422,)),
    query_row("?StudyDate=%D9%A2%D9%A0240404", (422,)),
    query_row("?StudyTime=000000-", (200,)),
    query_row("?ModalitiesInStudy=XA", (200,)),
    query_row("?ModalitiesInStudy=*", (200,)),
    query_row("?Modality=XA", (422,)),
    query_row("?limit=0", (200,)),
    query_row("?limit=-1", (422,)),
    query_row("?limit=1e9", (422,)),
    query_row("?limit=999999999999999999999", (422,)),
    query_row("?limit=%D9%A1", (422,)),
    query_row("?limit=%EF%BC%91", (422,)),
    query_row("?limit=+1", (422,)),
    query_row("?limit=", (422,)),
    query_row("?limit=1&limit=1000", (422,)),
    query_row("?limit=999999&offset=0", (200,)),
    query_row("?offset=-1", (422,)),
    query_row("?offset=999999", (200,)),
    query_row("?offset=1;PatientID={mrn}", (422,)),
    query_row("?includefield=all", (200,)),
    query_row("?includefield=all&includefield=00100010&includefield=*", (200,)),
    query_row("?includefield=PatientComments,00104000", (200,)),
    query_row("?fuzzymatching=true&PatientName=quarr", (200,)),
    query_row("?emptyvaluematching=true&PatientID=", (422,)),
    query_row("?multiplevaluematching=true&PatientID={mymrn},{mrn}", (422,)),
    query_row("?PatientID={mymrn};PatientID={mrn}", (200,)),
    query_row("?PatientID=a+b&StudyDescription=+", (200,)),
    query_row("?PatientName=%0a", (422,)),
    query_row("?PatientName=%0a%5C", (200, 422)),
    query_row("?PatientName=%ff%fe", (200, 422)),
    query_row("?PatientName=%ed%a0%80", (200, 422)),
    query_row("?PatientName=%F0%9F%92%A3", (200, 422)),
    query_row("?PatientName=%", (200,)),
    query_row("?=%3D&=x", (422,)),
    query_row("?PatientID=%00", (400,)),
    query_row("?PatientID\x01=x", (400,)),
    query_row("?patient_id={mrn}&mrn={mrn}", (422,)),
    query_row("?orderBy=PatientID", (422,)),
    query_row("?" + "&".join(f"x{n}=1" for n in range(2000)), (422,)),
    query_row("?" + "includefield=all&" * 800, (200,)),
    query_row("/?PatientID={mrn}", (404,), own=False),
    query_row("%3fPatientID={mrn}", (404,), own=False),
    query_row("/{m}/series?StudyInstanceUID={t}", (422,)),
    query_row("/{m}/series?SeriesInstanceUID=*", (200,)),
    query_row("/{m}/series?SeriesDescription=" + "*a" * 3000 + "b", (200,)),
    query_row("/{m}/series?0020000D={t}", (422,)),
    query_row("/{m}/instances?SeriesInstanceUID={t}", (422,)),
    query_row("/{m}/instances?SOPInstanceUID=*&offset=1", (200,)),
    query_row("/{m}{s}/instances", (200,)),
    query_row("/{m}{s}/instances?limit=1000&includefield=all", (200,)),
    query_row("/{t}/series?SeriesInstanceUID=*", (404,), own=False),
    query_row("/{t}/instances?limit=0", (404,), own=False),
    query_row("/*/series", (404,), own=False),
    query_row("/,/series", (404,), own=False),
    query_row("//series", (404,), own=False),
]
"""A search that answers shows only what is mine, whatever it asks."""

PREDICATES = [
    ("PatientID={}", "{mrn}", "MRN-nobody-here"),
    ("00100020={}", "{mrn}", "MRN-nobody-here"),
    ("PatientName={}", "{name}", "nobody"),
    ("PatientName={}*", "{prefix}", "nobody"),
    ("PatientName=*{}*", "{prefix}", "nobody"),
    ("PatientID={}?", "{mrn}", "MRN-nobody-her"),
    ("StudyInstanceUID={}", "{t}", "1.2.3"),
    ("StudyInstanceUID={{m}},{}", "{t}", "1.2.3"),
    ("StudyInstanceUID={}&limit=0", "{t}", "1.2.3"),
    ("StudyInstanceUID={}&offset=1", "{t}", "1.2.3"),
    ("StudyInstanceUID={{m}},{}&offset=1&limit=1", "{t}", "1.2.3"),
    ("StudyInstanceUID={}&ModalitiesInStudy=XA", "{t}", "1.2.3"),
    ("StudyInstanceUID={}&StudyDate=20240404", "{t}", "1.2.3"),
]
"""What a search says of the victim's own value, it says of one that nobody has."""


# ---------------------------------------------------------------------------------- cross-object


def cross_row(name: str, path: Callable[[Scene], str], *headers: str, **more: Any) -> Row:
    more = {"statuses": (404,), "own": True, **more}
    return Row(
        "cross-object", name, lambda scene, way: way.get(path(scene), OCTETS, *headers), **more
    )


def below(study: Study, what: str) -> str:
    """The path of its "series", "instance" or "frame", without that of the study."""
    path: str = getattr(study, what)
    return path.removeprefix(study.path)


CROSS = [
    *(
        cross_row(
            f"my study, their series{end}",
            lambda scene, end=end: scene.mine.path + below(scene.theirs, "series") + end,  # type: ignore[misc]
            "Accept: */*",
        )
        for end in ("", "/metadata", "/thumbnail")
    ),
    *(
        cross_row(
            f"my study, their instance{end}",
            lambda scene, end=end: scene.mine.path + below(scene.theirs, "instance") + end,  # type: ignore[misc]
            "Accept: */*",
        )
        for end in (
            *("", "/metadata", "/frames/1", "/frames/1/rendered", "/rendered", "/thumbnail"),
            *("/bulk/00104000", "/bulk/7fe00010"),
        )
    ),
    *(
        cross_row(
            f"my series, their instance{end}",
            lambda scene, end=end: (  # type: ignore[misc]
                f"{scene.mine.series}/instances/{scene.theirs.image['sop_instance_uid']}{end}"
            ),
            "Accept: */*",
        )
        for end in ("", "/metadata", "/frames/1", "/rendered", "/bulk/00104000")
    ),
    cross_row(
        "their series, my instance",
        lambda scene: (
            f"{scene.theirs.series}/instances/{scene.mine.image['sop_instance_uid']}/frames/1"
        ),
        own=False,
    ),
    cross_row(
        "their study, my series and instance",
        lambda scene: scene.theirs.path + below(scene.mine, "frame"),
        own=False,
    ),
    cross_row(
        "my study, the series of my other one",
        lambda scene: scene.mine.path + below(scene.second, "series") + "/metadata",
        "Accept: */*",
    ),
    cross_row(
        "an ETag of anything",
        lambda scene: scene.theirs.frame,
        "If-None-Match: *",
        own=False,
    ),
    cross_row("a range of it", lambda scene: scene.theirs.frame, "Range: bytes=0-15", own=False),
    cross_row(
        "as multipart",
        lambda scene: scene.theirs.frame,
        'Accept: multipart/related; type="application/octet-stream"; transfer-syntax=*',
        own=False,
    ),
    Row(
        "cross-object",
        "HEAD",
        lambda scene, way: way.get(scene.theirs.frame, OCTETS, method="HEAD"),
        statuses=(404,),
        method="HEAD",
    ),
    Row(
        "cross-object",
        "their session, my cookie",
        lambda scene, way: way.ask(
            f"/s/{scene.their_session.ctx}/dicom-web{scene.theirs.frame}", way.credential, OCTETS
        ),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "their session, my cookie, a search",
        lambda scene, way: way.ask(
            f"/s/{scene.their_session.ctx}/dicom-web/studies", way.credential
        ),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "their session, no cookie",
        lambda scene, way: way.ask(f"/s/{scene.their_session.ctx}/dicom-web/studies"),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "their session's state, my cookie",
        lambda scene, way: way.ask(f"/s/{scene.their_session.ctx}/status", way.credential),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "my session, the cookie of my other one",
        lambda scene, way: way.ask(
            way.root + scene.mine.frame, f"Cookie: {scene.my_second.cookie}", OCTETS
        ),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "their session, a bearer token of theirs",
        lambda scene, way: way.ask(
            f"/s/{scene.their_session.ctx}/dicom-web{scene.theirs.frame}",
            scene.token("clinician", scene.doctor),
            OCTETS,
        ),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "a session's root at the API origin",
        lambda scene, way: way.ask(
            f"/s/{scene.my_session.ctx}/dicom-web{scene.mine.frame}",
            f"Cookie: {scene.my_session.cookie}",
        ),
        statuses=(404,),
        ways=("bearer",),
    ),
    Row(
        "cross-object",
        "a session's cookie at the API origin",
        lambda scene, way: way.ask(
            way.root + scene.mine.frame, f"Cookie: {scene.my_session.cookie}"
        ),
        statuses=(401,),
        ways=("bearer",),
    ),
    Row(
        "cross-object",
        "the API's root at the viewer origin",
        lambda scene, way: way.ask(
            f"/dicom-web{scene.theirs.path}", scene.token("clinician", scene.doctor)
        ),
        statuses=(404,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "the API at the viewer origin",
        lambda scene, way: way.ask("/api/v1/patients", scene.token("service", "service")),
        statuses=(404,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "a session that never was",
        lambda scene, way: way.ask(f"/s/{'x' * 22}/dicom-web/studies", way.credential),
        statuses=(401,),
        ways=("cookie",),
    ),
    Row(
        "cross-object",
        "another thing of a session",
        lambda scene, way: way.ask(f"/s/{scene.their_session.ctx}/studies", way.credential),
        statuses=(404,),
        ways=("cookie",),
        unrecorded=True,  # no route, nothing to decide
    ),
]


# ----------------------------------------------------------------------------------------- HTTP


def http_row(name: str, request: Make, statuses: tuple[int, ...] = (404,), **more: Any) -> Row:
    return Row("HTTP", name, request, statuses=statuses, **more)


def header_row(line: str, **more: Any) -> Row:
    """A header on the way to the victim's study."""
    return http_row(
        f"with {line[:50]}",
        lambda scene, way: way.get(scene.theirs.path + "/metadata", filled(scene, line)),
        **{"statuses": (404,), **more},
    )


def own_header_row(line: str, path: str = "{mine}", **more: Any) -> Row:
    """A header on the way to a study of mine: it changes nothing."""
    return http_row(
        f"to mine with {line[:50]}",
        lambda scene, way: way.get(
            f"{scene.mine.path}/metadata" if path == "{mine}" else filled(scene, path),
            filled(scene, line),
        ),
        **{"statuses": (200,), "own": True, **more},
    )


HOSTILE = (
    *("X-HTTP-Method-Override: DELETE", "X-HTTP-Method: PUT", "X-Method-Override: DELETE"),
    *("X-Original-URL: /dicom-web/studies/{t}/metadata", "X-Rewrite-URL: /dicom-web/studies/{t}"),
    *("X-Original-URI: /_orthanc/instances/{oid}/file", "X-Forwarded-Uri: /studies/{t}"),
    *("X-Accel-Redirect: /_orthanc/instances/{oid}/file", "X-Sendfile: /etc/passwd"),
    *("X-Accel-Buffering: no", "X-Accel-Expires: 1000", f"X-Forwarded-Host: {EVIL}"),
    *(f"Forwarded: host={EVIL};proto=https;for=127.0.0.1", f"X-Forwarded-Server: {EVIL}"),
    *("X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: gopher", "X-Forwarded-Prefix: /evil"),
    *("X-Real-IP: 127.0.0.1", "True-Client-IP: 127.0.0.1", "X-Lightbox-Origin: api"),
    *("X-Lightbox-Origin: viewer", "X-Remote-User: doctor", "Remote-User: admin"),
    *("Proxy: http://evil.example/", "Proxy-Authorization: Basic bGlnaHRib3g6eA==", "TE: trailers"),
    *("Via: 1.1 127.0.0.1", "Max-Forwards: 0", "X-Request-ID: other", f"Origin: http://{EVIL}"),
    *(f"Referer: http://{EVIL}/", "Content-Type: application/dicom", "Accept-Language: x"),
    *("Cache-Control: only-if-cached", "Pragma: no-cache", "If-None-Match: *, *", "If-Match: *"),
    *("If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT", "If-Range: *", "Range: bytes=0-"),
    *("Range: bytes=-1,0-0,1-1", "Upgrade: websocket", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    *("Expect: 100-continue", "Accept-Encoding: gzip, br", "Accept-Charset: utf-16", "DNT: 1"),
)
DUPLICATES = {
    "two Authorization, mine first": lambda scene, way: way.get(
        scene.theirs.path, "Authorization: Bearer x.y.z"
    ),
    "two Authorization, mine last": lambda scene, way: way.ask(
        way.root + scene.theirs.path, "Authorization: Bearer x.y.z", way.credential
    ),
    "two Cookie lines": lambda scene, way: way.get(
        scene.theirs.path, "Cookie: lightbox=" + "x" * 43
    ),
    "two Cookie lines, mine last": lambda scene, way: way.ask(
        way.root + scene.theirs.path, "Cookie: lightbox=" + "x" * 43, way.credential
    ),
    "two cookies of one name": lambda scene, way: way.ask(
        way.root + scene.theirs.path,
        f"{way.credential}; lightbox=x",
    ),
    "two Host": lambda scene, way: way.get(scene.theirs.path, f"Host: {EVIL}"),
    "two X-Request-ID": lambda scene, way: way.get(scene.theirs.path, "X-Request-ID: @ID@-2"),
    "two Range": lambda scene, way: way.get(
        scene.theirs.frame, "Range: bytes=0-1", "Range: bytes=2-3"
    ),
    "Basic": lambda scene, way: way.ask(
        way.root + scene.theirs.path, "Authorization: Basic bGlnaHRib3g6bGlnaHRib3g="
    ),
    "a token in the query": lambda scene, way: way.ask(
        f"{way.root}{scene.theirs.path}?access_token={scene.caller.token('service')}"
    ),
    "a token in a cookie": lambda scene, way: way.ask(
        way.root + scene.theirs.path, f"Cookie: Authorization={scene.caller.token('service')}"
    ),
    "a folded Authorization": lambda scene, way: way.ask(
        way.root + scene.theirs.path, way.credential.replace(" ", "\r\n ", 1)
    ),
    "a space before the colon": lambda scene, way: way.ask(
        way.root + scene.theirs.path, way.credential.replace(":", " :", 1)
    ),
    "NUL in a header": lambda scene, way: way.get(scene.theirs.path, "X-A: \x00"),
    "a bare CR in a header": lambda scene, way: way.get(scene.theirs.path, "X-A: b\rX-C: d"),
    "a header without a name": lambda scene, way: way.get(scene.theirs.path, ": x"),
    "a header without a colon": lambda scene, way: way.get(scene.theirs.path, "X-A"),
    "a header of 70 kB": lambda scene, way: way.get(scene.theirs.path, "X-A: " + "x" * 70_000),
    "a thousand headers": lambda scene, way: way.get(
        scene.theirs.path, *(f"X-{n}: y" for n in range(1000))
    ),
    "a cookie of 12 kB": lambda scene, way: way.ask(
        way.root + scene.theirs.path, "Cookie: lightbox=" + "x" * 12_000
    ),
    "a cookie that is no text": lambda scene, way: way.ask(
        way.root + scene.theirs.path, 'Cookie: lightbox=\xff\xfe"\\303'
    ),
    "underscores": lambda scene, way: way.get(scene.theirs.path, "X_Lightbox_Origin: api"),
    "bare LF": lambda scene, way: way.get(scene.theirs.path).replace(b"\r\n", b"\n"),
    "no host": lambda scene, way: way.get(scene.theirs.path).replace(
        f"Host: localhost:{way.port}\r\n".encode(), b""
    ),
    "a host with a path": lambda scene, way: way.get(scene.theirs.path).replace(
        b"Host: localhost", b"Host: localhost/../x"
    ),
}


def hidden(scene: Scene, way: Way) -> bytes:
    """A whole request, which must be taken for a body; as one it would be on record."""
    return way.get(scene.theirs.frame, OCTETS).replace(b"@ID@", b"@ID@-in")


def framed(
    *lines: str, method: str = "POST", after: str = "", chunk: bool = False, path: str = ""
) -> Make:
    """A request whose body is another; `lines` say, or lie, how long it is. `{n}` is right."""

    def request(scene: Scene, way: Way) -> bytes:
        inner = hidden(scene, way)
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner) if chunk else inner
        body = after.encode() + body
        head = [
            f"{method} {way.root}{path or scene.theirs.path} HTTP/1.1",
            *(f"Host: localhost:{way.port}", "X-Request-ID: @ID@", way.credential),
            *(line.replace("{n}", str(len(body))) for line in lines),
        ]
        return "\r\n".join([*head, "", ""]).encode("latin-1") + body

    return request


CLOSE = "Connection: close"
SMUGGLED = {
    "CL.TE": framed("Content-Length: {n}", "Transfer-Encoding: chunked", after="0\r\n\r\n"),
    "TE.CL": framed("Transfer-Encoding: chunked", "Content-Length: 4", chunk=True),
    "TE.TE": framed("Transfer-Encoding: chunked", "Transfer-Encoding: x", after="0\r\n\r\n"),
    "an unknown TE": framed("Transfer-Encoding: xchunked", "Content-Length: {n}"),
    "TE with identity": framed("Transfer-Encoding: chunked, identity", after="0\r\n\r\n"),
    "TE with a tab": framed("Transfer-Encoding:\tchunked", "Content-Length: 5", after="0\r\n\r\n"),
    "TE with a space": framed("Transfer-Encoding : chunked", "Content-Length: {n}"),
    "TE folded": framed("Transfer-Encoding:\r\n chunked", "Content-Length: {n}"),
    "TE with VT": framed("Transfer-Encoding: \x0bchunked", "Content-Length: {n}"),
    "two CL": framed("Content-Length: {n}", "Content-Length: 0"),
    "two equal CL": framed("Content-Length: {n}", "Content-Length: {n}"),
    "a list of CL": framed("Content-Length: {n}, 0"),
    "a signed CL": framed("Content-Length: +{n}"),
    "a negative CL": framed("Content-Length: -1"),
    "a hexadecimal CL": framed("Content-Length: 0x10"),
    "an enormous CL": framed("Content-Length: 99999999999999999999"),
    "a chunk size that overflows": framed(
        "Transfer-Encoding: chunked", CLOSE, after="FFFFFFFFFFFFFFFFF\r\n"
    ),
    "a chunk size with a sign": framed("Transfer-Encoding: chunked", CLOSE, after="-1\r\n"),
    "bare LF in chunks": framed("Transfer-Encoding: chunked", CLOSE, after="1\nx\n0\n\nZZ"),
}
BODIES = {
    "a body behind GET": framed("Content-Length: {n}", CLOSE, method="GET"),
    "a chunked body behind GET": framed(
        "Transfer-Encoding: chunked", CLOSE, method="GET", chunk=True
    ),
}
METHODS = ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "TRACK", "PROPFIND", "CONNECT", "MOVE")

HTTP = [
    *(
        http_row(
            method,
            lambda scene, way, method=method: way.get(scene.theirs.path, method=method),  # type: ignore[misc]
            (400, 405),
        )
        for method in (*METHODS, "get", "GETT", "QUERY", "PURGE")
    ),
    http_row("POST to a study", lambda s, w: w.get(s.theirs.path, method="POST"), (403, 405)),
    http_row(
        "POST to metadata", lambda s, w: w.get(s.theirs.path + "/metadata", method="POST"), (405,)
    ),
    http_row(
        "_method in the query",
        lambda s, w: w.get(s.theirs.path + "?_method=DELETE", method="POST"),
        (403, 405),
    ),
    http_row(
        "_method in the query of mine",
        lambda s, w: w.get(s.mine.path + "/metadata?_method=DELETE"),
        (422,),
        own=True,
    ),
    *(header_row(line, statuses=(400, 404, 417)) for line in HOSTILE),
    *(own_header_row(line, statuses=(200, 304, 412)) for line in HOSTILE),
    *(
        own_header_row(line, "/studies/{m}{mf}", statuses=(200, 206, 304, 406, 412, 416))
        for line in HOSTILE
    ),
    own_header_row(
        "Range: bytes=" + ",".join(f"{n}-{n}" for n in range(1500)),
        "/studies/{m}{mf}",
        statuses=(200, 206, 416),
    ),
    own_header_row("Range: bytes=" + "0-," * 4000, "/studies/{m}{mf}", statuses=(200, 206, 416)),
    own_header_row("Range: bytes=9999999999999999999999-", "/studies/{m}{mf}", statuses=(200, 416)),
    own_header_row("Range: bytes=0-0", "/studies/{m}{mf}", statuses=(200, 206)),
    own_header_row("Accept: " + "a/b," * 3500, statuses=(406,)),
    own_header_row('Accept: ;;;,,,"', statuses=(200, 406)),
    own_header_row('Accept: multipart/related; type="' + "\\" * 9000, statuses=(406,)),
    own_header_row("Accept: multipart/related; a*=x; a*0=y", statuses=(406,)),
    own_header_row("Accept: */*; q=\xb9", statuses=(200, 406)),
    own_header_row("If-None-Match: " + 'W/"x",' * 2500),
    *(
        http_row(name, request, (400, 401, 404, 431), echo=False)
        for name, request in DUPLICATES.items()
    ),
    http_row(
        "two at once",
        lambda s, w: (
            w.get(s.theirs.path).replace(b"Connection: close\r\n", b"")
            + w.get(s.theirs.frame, OCTETS).replace(b"@ID@", b"@ID@-2")
        ),
    ),
    http_row(
        "Host spoofed",
        lambda s, w: w.get(s.mine.path + "/metadata").replace(
            f"localhost:{w.port}".encode(), EVIL.encode()
        ),
        (200,),
        own=True,
    ),
    http_row(
        "Host spoofed, a search",
        lambda s, w: w.get("/studies").replace(f"localhost:{w.port}".encode(), EVIL.encode()),
        (200,),
        own=True,
    ),
    http_row(
        "Host spoofed, the description",
        lambda s, w: w.ask("/openapi.json").replace(f"localhost:{w.port}".encode(), EVIL.encode()),
        (200,),
        ways=("bearer",),
        unrecorded=True,
    ),
    http_row(
        "Host spoofed, the viewer",
        lambda s, w: w.ask(f"/viewer?StudyInstanceUIDs={s.theirs.uid}&ctx=x").replace(
            f"localhost:{w.port}".encode(), EVIL.encode()
        ),
        (403,),
        ways=("cookie",),
        unrecorded=True,
    ),
    http_row(
        "an unknown code",
        lambda s, w: w.ask(f"/viewer?launch={'x' * 43}&StudyInstanceUIDs={s.theirs.uid}"),
        (404,),
        ways=("cookie",),
    ),
]

SMUGGLING = [
    *(Row("smuggling", name, each, (0, 400, 403, 405, 413)) for name, each in SMUGGLED.items()),
    *(Row("smuggling", name, each, (0, 400, 404, 413)) for name, each in BODIES.items()),
]
ALL = [*PLAIN, *PATHS, *WHOLE_PATHS, *FORMS, *SEARCHES, *CROSS, *HTTP, *SMUGGLING]
CASES = [(way, row) for row in ALL for way in row.ways]


@pytest.mark.parametrize(
    ("way", "row"), CASES, ids=[f"{row.category}-{row.name}-{way}" for way, row in CASES]
)
async def test_nothing_of_the_victims(way: str, row: Row, scene: Scene) -> None:
    strike(scene, scene.ways[way], row)


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize(("query", "known", "unknown"), PREDICATES, ids=str)
async def test_a_search_is_no_oracle(
    query: str, known: str, unknown: str, way: str, scene: Scene
) -> None:
    scene.counts["oracle"] += 1
    told = []
    for value in (known, unknown):
        asked = query.format(value)
        reply = send(scene.ways[way].port, scene.ways[way].get("/studies?" + filled(scene, asked)))
        assert_nothing_leaks(scene, reply)
        (answer,) = reply.answers
        hidden_in = {"date", "x-request-id"}
        headers = [each for each in answer.headers if each[0] not in hidden_in]
        told.append((answer.status, headers, answer.body))
    assert told[0] == told[1]
    assert told[0][0] == 200


# ----------------------------------------------------------------------------------------- cache


def etag(reply: Reply) -> str:
    return reply.answers[-1].header("etag")


def everything(study: Study) -> list[tuple[str, str]]:
    """What a viewer has asked of a study, and may ask again, with its Accept."""
    parts = 'Accept: multipart/related; type="application/octet-stream"; transfer-syntax=*'
    return [
        (study.frame, OCTETS),
        (study.frame, parts),
        (f"{study.frame}/rendered", "Accept: image/png"),
        (f"{study.instance}/rendered", "Accept: image/jpeg"),
        (f"{study.series}/rendered", "Accept: */*"),
        (f"{study.path}/rendered", "Accept: */*"),
        (f"{study.instance}/frames", "Accept: */*"),
        (f"{study.instance}/thumbnail", "Accept: */*"),
        (f"{study.path}/thumbnail", "Accept: */*"),
        (f"{study.instance}/bulk/00104000", "Accept: */*"),
        (f"{study.instance}/metadata", "Accept: */*"),
        (f"{study.series}/metadata", "Accept: */*"),
        (f"{study.path}/metadata", "Accept: */*"),
        (f"{study.path}/series", "Accept: */*"),
        (f"{study.path}/instances", "Accept: */*"),
        (study.instance, "Accept: */*"),
        (study.path, "Accept: */*"),
    ]


async def end_care(scene: Scene, study: Study) -> None:
    path = f"/patients/{study.patient['id']}/care-team/{scene.mallory}"
    await scene.caller.must("service", "DELETE", path)


async def cancel_order(scene: Scene, study: Study) -> None:
    await end_care(scene, study)
    path = f"/orders/{study.order['id']}"
    await scene.caller.must("service", "PATCH", path, json={"status": "cancelled"})


async def delete_study(scene: Scene, study: Study) -> None:
    path = f"/dicom/studies/{study.uid}?reason=a+mistake"
    await scene.caller.must("service", "DELETE", path)


@pytest.mark.parametrize("end", [end_care, cancel_order, delete_study])
async def test_what_was_seen_is_not_seen_again(end: Callable[..., Any], scene: Scene) -> None:
    """The right ends, or the study; addresses, ETags and what the edge keeps are worth nothing."""
    study = await make_study(scene.caller, sub=scene.doctor)
    care = f"/patients/{study.patient['id']}/care-team/{scene.mallory}"
    await scene.caller.must("service", "PUT", care, json={})
    opened = await scene.caller.open(f"/order/{study.order['id']}", sub=scene.mallory)
    ways = ways_of(scene.full, scene.caller, scene.mallory, opened)
    replays = []
    for way in ways.values():
        for path, accept in everything(study):
            for _ in range(2):
                seen = send(way.port, way.get(path, accept))
                assert seen.status == 200, path
            known = f"If-None-Match: {etag(seen)}" if etag(seen) else "X-Nothing: x"
            if etag(seen):
                assert send(way.port, way.get(path, accept, known)).status == 304, path
            replays += [(way, path, accept, extra) for extra in (known, "If-None-Match: *")]
            replays.append((way, path, accept, "Range: bytes=0-15"))
        metadata = json.loads(send(way.port, way.get(f"{study.series}/metadata")).body)
        assert study.frame.rpartition("/")[0] in json.dumps(metadata), "no BulkDataURI"
    await end(scene, study)
    scene.recorder.taken()
    for way, path, accept, extra in replays:
        scene.counts["cache"] += 1
        reply = send(way.port, way.get(path, accept, extra))
        assert reply.status == (404 if way.name == "bearer" else 403), (way.name, path, extra)
        assert_nothing_leaks(scene, reply, of=study)
    assert scene.recorder.taken() == []


async def test_pixels_that_were_replaced_are_never_seen_again(scene: Scene) -> None:
    """Deleted, and sent again with the same UIDs: nothing that was kept answers for it."""
    study = await make_study(scene.caller, sub=scene.mallory)
    pixels = study.pixels
    former: dict[tuple[str, str, str], Reply] = {}
    for turn in range(4):
        opened = await scene.caller.open(f"/order/{study.order['id']}", sub=scene.mallory)
        ways = ways_of(scene.full, scene.caller, scene.mallory, opened)
        for way in ways.values():
            for path, accept in everything(study):
                scene.counts["cache"] += 1
                key = (way.name, path, accept)
                extra = []
                if key in former and etag(former[key]):
                    extra = [f"If-None-Match: {etag(former[key])}"]
                reply = send(way.port, way.get(path, accept, *extra))
                assert reply.status == 200, (turn, key)
                shows_pixels = "rendered" in path or "thumbnail" in path
                if key in former and shows_pixels:
                    assert reply.body != former[key].body, (turn, key)
                if path == study.frame and accept == OCTETS:
                    assert reply.body == pixels * 32
                former[key] = reply
        await delete_study(scene, study)
        pixels = bytes((turn * 50 + n * 3) % 256 for n in range(16))
        uids = {
            "study_uid": study.uid,
            "series_uid": study.image["series_instance_uid"],
            "sop_uid": study.image["sop_instance_uid"],
        }
        content = marked(study.mrn, study.words, pixels, **uids)
        answer = await scene.caller.upload(content, role="service", order_id=study.order["id"])
        assert (answer.status_code, answer.json()["status"]) == (200, "uploaded")


# ---------------------------------------------------------------------------------------- writes

RELATED = f'Content-Type: multipart/related; type="application/dicom"; boundary={CUT}'
Files = Callable[[Scene], Sequence[bytes]]


def parts_of(*files: bytes) -> bytes:
    head = f"--{CUT}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    return b"".join(head + each + b"\r\n" for each in files) + f"--{CUT}--\r\n".encode()


def technologist(scene: Scene) -> str:
    """The token of mallory as a technologist at the other site."""
    claims = {"sub": scene.mallory, "roles": ["technologist"], "site": scene.site}
    return f"Authorization: Bearer {signed(scene.full.settings, **claims)}"


def stow_row(
    name: str,
    files: Files,
    statuses: tuple[int, ...],
    *records: tuple[str, ...],
    path: str = "/studies",
    category: str = "write",
) -> Row:
    def request(scene: Scene, way: Way) -> bytes:
        body = parts_of(*files(scene))
        headers = (technologist(scene), RELATED)
        return way.ask(way.root + filled(scene, path), *headers, method="POST", body=body)

    return Row(category, name, request, statuses, ("bearer",), records=records, echo=True)


def upload_row(
    name: str,
    files: Files,
    statuses: tuple[int, ...],
    *records: tuple[str, ...],
    address: str = "upload",
    field: str = "file",
    category: str = "write",
    fields: Callable[[Scene], dict[str, str]] = lambda scene: {},
) -> Row:
    def request(scene: Scene, way: Way) -> bytes:
        body = b""
        for key, value in fields(scene).items():
            head = f'--{CUT}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n'
            body += f"{head}{value}\r\n".encode()
        for each in files(scene):
            head = f'--{CUT}\r\nContent-Disposition: form-data; name="{field}"; filename="../a.dcm"'
            body += head.encode() + b"\r\n\r\n" + each + b"\r\n"
        body += f"--{CUT}--\r\n".encode()
        kind = f"Content-Type: multipart/form-data; boundary={CUT}"
        headers = (technologist(scene), kind)
        return way.ask(f"/api/v1/dicom/{address}", *headers, method="POST", body=body)

    return Row(category, name, request, statuses, ("bearer",), records=records, echo=True)


def own(scene: Scene, **values: Any) -> bytes:
    """A file of mallory's patient elsewhere."""
    return ct_image(patient_id=scene.others.mrn, **values)


def planted(scene: Scene, *which: str, **values: Any) -> bytes:
    """A file of mallory's patient, with the victim's UIDs."""
    image = scene.theirs.image
    uids = {
        "study_uid": image["study_instance_uid"],
        "series_uid": image["series_instance_uid"],
        "sop_uid": image["sop_instance_uid"],
    }
    return own(scene, **{key: uids[key] for key in which}, **values)


def misnamed(scene: Scene) -> bytes:
    """A file whose meta information names the victim's instance."""
    image = pydicom.dcmread(BytesIO(own(scene)))
    image.file_meta.MediaStorageSOPInstanceUID = scene.theirs.image["sop_instance_uid"]
    out = BytesIO()
    image.save_as(out)
    return out.getvalue()


def named_twice(scene: Scene, first: str, second: str) -> bytes:
    """A file with two PatientIDs, one after the other."""
    content = ct_image(patient_id="X" * 8)
    start = content.index(b"\x10\x00\x20\x00LO")
    elements = b""
    for each in (first, second):
        value = each.encode() + b" " * (len(each) % 2)
        elements += b"\x10\x00\x20\x00LO" + struct.pack("<H", len(value)) + value
    return content[:start] + elements + content[start + 16 :]


FAILED, DENIED, STORED = ("granted", "failed"), ("denied",), ("granted", "done")
UNREAD = ("failed",)  # nobody could say whose it is
GUISES = {
    "as it is": "{}",
    "padded": "{}  ",
    "padded before": "  {}",
    "tab": "{}\t",
    "NUL padded": "{}\0\0",
    "NUL inside": "{}\0x",
    "in lower case": "lower",
    "HL7 components": "{}^^^&1.2&ISO",
    "two values": "{}\\{}",
    "zero width": "{}\u200b",
    "wide letters": "wide",
    "wildcard": "MRN*",
    "like": "MRN-%",
}


def guise(mrn: str, how: str) -> str:
    if how == "lower":
        return mrn.lower()
    if how == "wide":
        return "".join(chr(ord(each) + 0xFEE0) for each in mrn)
    return how.format(mrn, mrn)


def disguised(scene: Scene, how: str) -> bytes:
    name = guise(scene.theirs.mrn, how)
    values = {} if name.isascii() else {"SpecificCharacterSet": "ISO_IR 192"}
    return ct_image(patient_id="X" * 4, **values).replace(
        b"\x10\x00\x20\x00LO\x04\x00XXXX", element_of(name), 1
    )


def element_of(name: str) -> bytes:
    value = name.encode()
    value += b" " * (len(value) % 2)
    return b"\x10\x00\x20\x00LO" + struct.pack("<H", len(value)) + value


WRITES = [
    *(
        stow_row(
            f"planted {' and '.join(which)}",
            lambda scene, which=which: [planted(scene, *which)],  # type: ignore[misc]
            (409,),
            FAILED,
        )
        for which in (
            *(("study_uid",), ("series_uid",), ("sop_uid",), ("study_uid", "series_uid")),
            ("study_uid", "series_uid", "sop_uid"),
        )
    ),
    *(
        stow_row(
            f"the victim's PatientID {name}",
            lambda scene, how=how: [disguised(scene, how)],  # type: ignore[misc]
            (400, 409),
            DENIED,
            UNREAD,
        )
        for name, how in GUISES.items()
    ),
    stow_row(
        "the victim's PatientID of another issuer",
        lambda scene: [ct_image(patient_id=scene.theirs.mrn, IssuerOfPatientID="ELSEWHERE")],
        (409,),
        DENIED,
    ),
    stow_row(
        "my PatientID of another issuer",
        lambda scene: [own(scene, IssuerOfPatientID="ELSEWHERE")],
        (409,),
        DENIED,
    ),
    stow_row("the victim's own file", lambda scene: [scene.theirs.content], (409,), DENIED),
    stow_row(
        "two patients in one body",
        lambda scene: [ct_image(patient_id=scene.theirs.mrn), own(scene)],
        (202,),
        (*DENIED, *STORED),
    ),
    stow_row(
        "two patients in one study",
        lambda scene: [
            own(scene, study_uid=(uid := generate_uid(None))),
            ct_image(patient_id=scene.theirs.mrn, study_uid=uid),
            own(scene, study_uid=uid),
        ],
        (202,),
        (*STORED, *DENIED, *STORED),
    ),
    stow_row(
        "my SOPInstanceUID, other bytes",
        lambda scene: [
            own(
                scene,
                study_uid=scene.others.uid,
                series_uid=scene.others.image["series_instance_uid"],
                sop_uid=scene.others.image["sop_instance_uid"],
            )
        ],
        (409,),
        FAILED,
    ),
    stow_row(
        "my SOPInstanceUID in another study",
        lambda scene: [own(scene, sop_uid=scene.others.image["sop_instance_uid"])],
        (409,),
        FAILED,
    ),
    stow_row(
        "my SeriesInstanceUID in another study",
        lambda scene: [own(scene, series_uid=scene.others.image["series_instance_uid"])],
        (409,),
        FAILED,
    ),
    stow_row("the file meta names the victim's", lambda scene: [misnamed(scene)], (202,), STORED),
    stow_row(
        "named twice, mine first",
        lambda scene: [named_twice(scene, scene.others.mrn, scene.theirs.mrn)],
        (400, 409),
        UNREAD,
        DENIED,
    ),
    stow_row(
        "named twice, mine last",
        lambda scene: [named_twice(scene, scene.theirs.mrn, scene.others.mrn)],
        (400, 409),
        UNREAD,
        DENIED,
    ),
    stow_row(
        "to the victim's study",
        lambda scene: [own(scene)],
        (409,),
        FAILED,
        UNREAD,
        DENIED,
        path="/studies/{t}",
    ),
    stow_row(
        "to the victim's study, of that study",
        lambda scene: [planted(scene, "study_uid")],
        (409,),
        FAILED,
        path="/studies/{t}",
    ),
    stow_row("to a series", lambda scene: [own(scene)], (405,), DENIED, path="/studies/{t}{s}"),
    stow_row(
        "to a path of two", lambda scene: [own(scene)], (404,), UNREAD, path="/studies/{m}/../{t}"
    ),
    stow_row(
        "to an encoded study",
        lambda scene: [own(scene)],
        (404, 405, 422),
        UNREAD,
        DENIED,
        path="/studies/{t}%20",
    ),
    upload_row(
        "to the victim's order",
        lambda scene: [own(scene)],
        (403,),
        DENIED,
        fields=lambda scene: {"order_id": scene.theirs.order["id"]},
    ),
    upload_row(
        "to the victim's patient",
        lambda scene: [own(scene)],
        (403,),
        DENIED,
        fields=lambda scene: {"patient_id": scene.theirs.patient["id"]},
    ),
    upload_row(
        "to the victim's order, coerced",
        lambda scene: [own(scene)],
        (403,),
        DENIED,
        fields=lambda scene: {"order_id": scene.theirs.order["id"], "coerce_patient": "true"},
    ),
    upload_row(
        "to my order and the victim's patient",
        lambda scene: [own(scene)],
        (409,),
        FAILED,
        fields=lambda scene: {
            "order_id": scene.others.order["id"],
            "patient_id": scene.theirs.patient["id"],
        },
    ),
    upload_row(
        "the victim's study to my order, coerced",
        lambda scene: [scene.theirs.content],
        (409,),
        ("granted", "granted", "failed", "failed"),
        ("granted", "granted", "failed"),
        fields=lambda scene: {"order_id": scene.others.order["id"], "coerce_patient": "true"},
    ),
    upload_row(
        "two orders",
        lambda scene: [own(scene)],
        (422,),
        UNREAD,
        fields=lambda scene: {"order_id": scene.others.order["id"] + ","},
    ),
    upload_row("by its PatientID", lambda scene: [scene.theirs.content], (404,), DENIED),
    Row(
        "write",
        "as a clinician",
        lambda scene, way: way.ask(
            "/dicom-web/studies",
            way.credential,
            RELATED,
            method="POST",
            body=parts_of(scene.mine.content),
        ),
        (403,),
        ("bearer",),
    ),
    Row(
        "write",
        "to a session's root",
        lambda scene, way: way.ask(
            way.root + "/studies",
            way.credential,
            RELATED,
            method="POST",
            body=parts_of(b"x"),
        ),
        (405,),
        ("cookie",),
    ),
]


@pytest.mark.parametrize(
    ("way", "row"),
    [(way, row) for row in WRITES for way in row.ways],
    ids=[f"{row.name}-{way}" for row in WRITES for way in row.ways],
)
async def test_nothing_is_written_into_the_victims(way: str, row: Row, scene: Scene) -> None:
    strike(scene, scene.ways[way], row)
    theirs, archive = scene.theirs, scene.full.archive
    assert archive.owners(theirs.uid) == [theirs.mrn]
    (study,) = [each["ID"] for each in archive.find(theirs.uid) if each["Type"] == "Study"]
    instances = archive.ask("GET", f"/studies/{study}/instances").json()
    assert [each["ID"] for each in instances] == [theirs.orthanc_id]
    assert archive.file(theirs.orthanc_id) == theirs.content
    way_of_doctor = ways_of(scene.full, scene.caller, scene.doctor, scene.their_session)["bearer"]
    listed = json.loads(send(way_of_doctor.port, way_of_doctor.get("/studies")).body)
    assert theirs.uid in [each["0020000D"]["Value"][0] for each in listed]


@dataclass(frozen=True)
class Tie:
    """How somebody is tied to a patient by an order, and how that ends for one of two."""

    name: str
    role: str
    order: dict[str, str]
    change: dict[str, str]
    site: str = "main"


TIES = [
    Tie("requested", "clinician", {"requested_by": "@"}, {"requested_by": "somebody"}),
    Tie("attends", "clinician", {"attending": "@"}, {"attending": "somebody"}),
    Tie("reads", "radiologist", {"site": "@"}, {"status": "cancelled"}, "@"),
    Tie("works on", "technologist", {"site": "@"}, {"status": "completed"}, "@"),
]


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.name)
async def test_a_session_has_the_rights_of_its_own_person(tie: Tie, scene: Scene) -> None:
    """Of two who look at a study one loses the right: only their session ends."""
    caller = scene.caller
    patient = await caller.patient(unique("MRN"))
    people, opened, orders = [unique("person"), unique("person")], [], []
    for person in people:
        named = {"requested_by": "nobody", **tie.order}
        named = {key: value.replace("@", person) for key, value in named.items()}
        orders.append(await caller.order(patient, **named))
    answer = await caller.upload(
        ct_image(patient_id=patient["mrn"]), role="service", patient_id=patient["id"]
    )
    image = answer.json()
    uid = image["study_instance_uid"]
    for person in people:
        claims = {"sub": person, "roles": [tie.role], "site": tie.site.replace("@", person)}
        link = await caller.ask(None, "GET", f"/api/v1/dicom/viewer/url/{uid}", claims=claims)
        assert link.status_code == 200, link.text
        page = await caller.viewer.client.get(link.json()["url"])
        caller.viewer.client.cookies.clear()
        ctx = page.headers["location"].partition("ctx=")[2].partition("&")[0]
        cookie = page.headers["set-cookie"].partition(";")[0]
        opened.append(Opened(caller.viewer, link.json(), "", ctx, cookie))
    paths = ["/studies", f"/studies/{uid}/series", f"/studies/{uid}/metadata"]
    for each in opened:
        assert [(await each.get(path)).status_code for path in paths] == [200] * 3
    await caller.must("service", "PATCH", f"/orders/{orders[0]['id']}", json=tie.change)
    scene.counts["cache"] += len(paths)
    for path in paths:
        assert (await opened[0].get(path)).status_code == 403
        assert (await opened[1].get(path)).status_code == 200


# -------------------------------------------------------------------------------------- payloads


def nested(depth: int) -> bytes:
    """An image with sequences in sequences."""
    item = Dataset()
    item.PatientID = "INNER"
    for _ in range(depth):
        outer = Dataset()
        outer.ReferencedStudySequence = [item]
        item = outer
    image = pydicom.dcmread(BytesIO(ct_image(patient_id="@")))
    image.ReferencedStudySequence = item.ReferencedStudySequence
    out = BytesIO()
    image.save_as(out)
    return out.getvalue()


def deflated(size: int) -> bytes:
    """A file in Deflated Explicit VR Little Endian that becomes large."""
    image = pydicom.dcmread(BytesIO(ct_image(patient_id="@")))
    plain = BytesIO()
    pydicom.dcmwrite(plain, image, enforce_file_format=True)
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    head = BytesIO()
    pydicom.dcmwrite(head, image, enforce_file_format=True)
    start = plain.getvalue().index(b"\x08\x00\x16\x00")
    meta_end = len(head.getvalue()) - len(_raw_deflate(plain.getvalue()[start:]))
    dataset = plain.getvalue()[start:-524]
    dataset += b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", size) + bytes(size)
    return head.getvalue()[:meta_end] + _raw_deflate(dataset)


def _raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def with_length(tag: bytes, length: int) -> Callable[[bytes], bytes]:
    """The file, with another length written at an element with a short one."""

    def change(content: bytes) -> bytes:
        start = content.index(tag) + len(tag) + 2
        return content[:start] + struct.pack("<H", length) + content[start + 2 :]

    return change


def with_pixel_length(length: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        start = content.index(b"\xe0\x7f\x10\x00OW\0\0") + 8
        return content[:start] + struct.pack("<I", length) + content[start + 4 :]

    return change


LIES: dict[str, Callable[[bytes], bytes]] = {
    "PatientID of 65534 bytes": with_length(b"\x10\x00\x20\x00", 65534),
    "PatientID of no byte": with_length(b"\x10\x00\x20\x00", 0),
    "PatientID over the next": with_length(b"\x10\x00\x20\x00", 40),
    "an odd length": with_length(b"\x10\x00\x20\x00", 3),
    "the group length": with_length(b"\x02\x00\x10\x00", 4000),
    "pixels of 4 GiB": with_pixel_length(0xFFFFFFFE),
    "pixels of undefined length": with_pixel_length(0xFFFFFFFF),
    "pixels of 2 GiB": with_pixel_length(0x7FFFFFFF),
    "fewer pixels than rows": with_pixel_length(2),
    "no pixel at all": lambda content: content[: content.index(b"\xe0\x7f\x10\x00")],
    "bytes behind": lambda content: content + b"\x08\x00\x16\x00UI\x04\x001.2\0",
    "no preamble": lambda content: content[132:],
    "no meta": lambda content: content[:132] + content[content.index(b"\x08\x00\x16\x00") :],
}


def mine_of(content: bytes, scene: Scene) -> bytes:
    """A prepared file of the patient `@`, made mallory's."""
    return content.replace(element_of("@"), element_of(scene.others.mrn))


def boundary_in_pixels(scene: Scene) -> bytes:
    cut = f"\r\n--{CUT}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    inner = ct_image(patient_id=scene.theirs.mrn)
    pixels = cut + inner
    side = 64
    return own(scene, Rows=side, Columns=side, PixelData=pixels.ljust(side * side * 2, b"\0"))


def huge_rows(scene: Scene) -> bytes:
    return own(scene, Rows=65535, Columns=65535)


def many_frames(scene: Scene) -> bytes:
    return own(scene, NumberOfFrames=2**31 - 1)


def broken_fragments(scene: Scene) -> bytes:
    image = pydicom.dcmread(BytesIO(own(scene)))
    image.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    image.PixelData = encapsulate([b"\xff\xd8 no JPEG \xff\xd9"])
    image["PixelData"].VR = "OB"
    out = BytesIO()
    pydicom.dcmwrite(out, image, enforce_file_format=True)
    return out.getvalue()


UNTAKEN = (400, 409, 413, 415, 422)
ALONE = "Content-Type: application/dicom"
# What is no file at all (a part of another type, a ZIP that can't be opened) is nobody's upload.
SOMETIMES = ((), UNREAD, FAILED, DENIED, STORED)


def raw_stow(
    name: str, body: Callable[[Scene], bytes], statuses: tuple[int, ...] = UNTAKEN, *headers: str
) -> Row:
    def request(scene: Scene, way: Way) -> bytes:
        lines = (technologist(scene), *(headers or (RELATED,)))
        return way.ask(way.root + "/studies", *lines, method="POST", body=body(scene))

    return Row("payload", name, request, statuses, ("bearer",), records=SOMETIMES, echo=True)


NESTED, BOMB = nested(40), deflated(64 * 1024 * 1024)
PAYLOADS = [
    stow_row("nested", lambda scene: [mine_of(NESTED, scene)], (400,), UNREAD, category="payload"),
    upload_row(
        "nested too", lambda scene: [mine_of(NESTED, scene)], (422,), UNREAD, category="payload"
    ),
    stow_row(
        "deflated", lambda scene: [mine_of(BOMB, scene)], (400, 409), UNREAD, category="payload"
    ),
    upload_row("deflated too", lambda scene: [BOMB], (413, 422), UNREAD, category="payload"),
    *(
        stow_row(
            name,
            lambda scene, lie=lie: [lie(own(scene))],  # type: ignore[misc]
            (200, 202, 400, 409),
            *SOMETIMES,
            category="payload",
        )
        for name, lie in LIES.items()
    ),
    *(
        upload_row(
            f"a ZIP of {name}",
            lambda scene, make=make: [make(scene)],  # type: ignore[misc]
            (200, 413, 422),
            *SOMETIMES,
            address="upload-multiple",
            field="files",
            category="payload",
        )
        for name, make in {
            "zeros": lambda scene: zipped({"a.dcm": bytes(64 * 1024 * 1024)}),
            "many": lambda scene: zipped({f"{n}": b"" for n in range(12_000)}),
            "paths": lambda scene: zipped({"../../../tmp/x": b"x", "/etc/passwd": b"y"}),
            "ZIPs": lambda scene: zipped({"a.zip": zipped({"b.zip": zipped({"c": b"x"})})}),
            "half": lambda scene: zipped({"a.dcm": own(scene)})[:-30],
            "the victim's": lambda scene: zipped(
                {"a.dcm": scene.theirs.content}, zipfile.ZIP_STORED
            ),
        }.items()
    ),
    raw_stow("three thousand empty parts", lambda s: parts_of(*[b""] * 3000)),
    raw_stow("three thousand parts of a byte", lambda s: parts_of(*[b"x"] * 3000)),
    raw_stow("no part", lambda s: f"--{CUT}--\r\n".encode()),
    raw_stow("no end", lambda s: parts_of(b"x")[:-8]),
    raw_stow("another boundary", lambda s: parts_of(b"x").replace(CUT.encode(), b"other")),
    raw_stow("a long preamble", lambda s: b"x" * 4_000_000 + parts_of(b"x")),
    raw_stow("a header of 100 kB", lambda s: f"--{CUT}\r\nX: {'y' * 100_000}\r\n\r\n".encode()),
    raw_stow("a part of JSON", lambda s: parts_of(b"{}").replace(b"/dicom\r", b"/dicom+json\r")),
    raw_stow(
        "the boundary in the pixels",
        lambda s: parts_of(boundary_in_pixels(s)),
        (202, 400, 409),
    ),
    raw_stow(
        "no boundary",
        lambda s: b"x",
        UNTAKEN,
        RELATED.partition("; boundary")[0],
    ),
    raw_stow(
        "a boundary of 71",
        lambda s: b"x",
        UNTAKEN,
        f'Content-Type: multipart/related; type="application/dicom"; boundary={"b" * 71}',
    ),
    raw_stow(
        "a boundary in parameters of parameters",
        lambda s: b"x",
        UNTAKEN,
        "Content-Type: multipart/related; type*0*=a; type*=b; boundary*999999999999999999999=x",
    ),
    raw_stow("compressed", lambda s: b"x", UNTAKEN, RELATED, "Content-Encoding: gzip"),
    raw_stow(
        "larger than is taken",
        lambda s: bytes(9 * 1024 * 1024),
        (409, 413),
        ALONE,
    ),
    raw_stow("nothing", lambda s: b"", UNTAKEN, ALONE),
    raw_stow("DICM alone", lambda s: bytes(128) + b"DICM", UNTAKEN, ALONE),
    *(
        stow_row(
            name,
            lambda scene, make=make: [make(scene)],  # type: ignore[misc]
            (200, 202, 400, 409),
            *SOMETIMES,
            category="payload",
        )
        for name, make in {
            "rows of 65535": huge_rows,
            "two billion frames": many_frames,
            "fragments of nothing": broken_fragments,
        }.items()
    ),
]


@pytest.mark.parametrize("row", PAYLOADS, ids=lambda row: row.name)
async def test_a_body_breaks_nothing(row: Row, scene: Scene) -> None:
    strike(scene, scene.ways["bearer"], row)
    assert scene.full.archive.alive()
    assert scene.full.app.pid is not None
    assert [each for each in scene.full.settings.spool_dir.rglob("*") if each.is_file()] == []


async def test_a_file_cut_at_any_byte(scene: Scene) -> None:
    """Of its first kilobyte; each cut a part of one body."""
    content = own(scene)
    way = scene.way
    cuts = [content[:length] for length in range(128, len(content))]
    headers = (technologist(scene), RELATED)
    for start in range(0, len(cuts), 1000):
        scene.counts["payload"] += len(cuts[start : start + 1000])
        body = parts_of(*cuts[start : start + 1000])
        reply = send(way.port, way.ask(way.root + "/studies", *headers, method="POST", body=body))
        assert reply.status in (202, 400, 409), reply.body[:600]
        assert_nothing_leaks(scene, reply)
    assert scene.full.archive.alive()


SCRIPT = "<script>alert(1)</script>"


async def test_a_name_is_text_and_nothing_else(scene: Scene) -> None:
    """Script, quotes and control characters in a file's texts never stand in a page."""
    study = scene.others
    nasty = f"{SCRIPT}^\"'&\x1b[31m\r\nX-Injected: yes\x00"
    content = own(
        scene,
        PatientName="A" * 60,
        StudyDescription="B" * 60,
        SeriesDescription="C" * 60,
    )
    for letter in (b"A", b"B", b"C"):
        content = content.replace(letter * 60, nasty.encode().ljust(60, b" "), 1)
    answer = await scene.caller.upload(content, role="service", order_id=study.order["id"])
    assert answer.status_code == 200, answer.text
    uid = answer.json()["study_instance_uid"]
    claims = {"sub": scene.mallory, "roles": ["technologist"], "site": scene.site}
    link = await scene.caller.ask(None, "GET", f"/api/v1/dicom/viewer/url/{uid}", claims=claims)
    page = await scene.caller.viewer.client.get(link.json()["url"])
    scene.caller.viewer.client.cookies.clear()
    ctx = page.headers["location"].partition("ctx=")[2].partition("&")[0]
    cookie = "Cookie: " + page.headers["set-cookie"].partition(";")[0]
    port, root = scene.full.edge.viewer_port, f"/s/{ctx}/dicom-web"
    way = Way("cookie", port, root, cookie)
    for path in ("/studies", f"/studies/{uid}/series", f"/studies/{uid}/metadata"):
        scene.counts["payload"] += 1
        (told,) = send(port, way.get(path)).answers
        assert told.status == 200
        assert told.header("content-type") == "application/dicom+json"
        assert told.header("x-content-type-options") == "nosniff"
        assert "default-src 'none'" in told.header("content-security-policy")
        assert not told.header("x-injected")
        assert SCRIPT in json.dumps(json.loads(told.body)), "it is the file's own text"
        assert not re.search(rb"[\x00-\x1f\x7f]", told.body)
    for path in (f"/s/{ctx}/ended", f"/viewer?ctx={ctx}", "/viewer?ctx=%3Cscript%3E", "/", "/x"):
        scene.counts["payload"] += 1
        (told,) = send(port, way.ask(path, cookie)).answers
        assert b"<script" not in told.body.lower()


async def test_how_many(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for category, count in sorted(scene.counts.items()):
            print(f"{category:>14}{count:>6}")
