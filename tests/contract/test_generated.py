"""Thousands of generated requests to every operation of OpenAPI: nothing fails, nothing leaks.

The callers may see one patient, or none; the requests are full of the other's names. The app is
called as a server calls it, so that nothing tidies up a path or a header.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from app.dicomweb.search import INSTANCE_MATCHING, SERIES_MATCHING, STUDY_MATCHING
from app.main import create_app
from tests.fake_orthanc import URL
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World, make_settings
from tests.tables import contents

EXAMPLES = 3000
MINE, THEIRS = "{mine}", "{theirs}"
"""What stands for an identifier in a generated request until the world is there."""


@dataclass(frozen=True)
class Operation:
    """An operation as OpenAPI describes it."""

    method: str
    path: str
    in_path: tuple[str, ...]
    in_query: tuple[str, ...]
    bodies: tuple[str, ...]


def operations() -> list[Operation]:
    described = create_app(make_settings("sqlite+aiosqlite://", URL)).openapi()
    found = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parameters = operation.get("parameters", [])
            named = {
                where: tuple(each["name"] for each in parameters if each["in"] == where)
                for where in ("path", "query")
            }
            bodies = tuple(operation.get("requestBody", {}).get("content", {}))
            found.append(Operation(method.upper(), path, named["path"], named["query"], bodies))
    return found


OPERATIONS = operations()


# --------------------------------------------------------------------------------- the strategies

# Without surrogates, which no address can hold; NUL and control characters are welcome.
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ODD = st.sampled_from(
    [
        *("", "*", "?", "%", "_", "\\", "'", '"', "' OR 1=1 --", "0", "-1", "1", "2", "9" * 30),
        *("1,1", "1,2,3", "1,", "00100010", "7fe00010", "00081110/1/00100010", "5400/0", "../x"),
        *(
            "null",
            "true",
            "NaN",
            "1e999",
            "\x00",
            "\n",
            "\u0661",
            "\uff11",
            "\U0001f4a3",
            "a" * 300,
        ),
        *("20240404", "20240404-", "-", "2024-04-04", "101500", "CT", "XA", "all", "Victim*"),
        *("Vera", "MRN-VICTIM", "MRN-MINE", "secret study", "scheduled", "clinician", "granted"),
        *("<script>", "\r\nX-Y: z", ";x=1", "128,128", "4096,4096", "1,1,linear", "50", "{}", "[]"),
    ]
)
IDENTIFIERS = st.sampled_from(
    [MINE, MINE, THEIRS, THEIRS, THEIRS, THEIRS + "0", "0" + THEIRS, THEIRS + ".", THEIRS + ","]
)
VALUES = st.one_of(IDENTIFIERS, IDENTIFIERS, ODD, TEXT)
TAGS = ("0020000D", "0020000E", "00080018", "00100020", "00100010", "00080020", "00080060")
NAMES = st.sampled_from(
    [
        *STUDY_MATCHING,
        *SERIES_MATCHING,
        *INSTANCE_MATCHING,
        *TAGS,
        *("limit", "offset", "fuzzymatching", "includefield", "viewport", "window", "quality"),
        *("_method", "cursor", "patient_id", "mrn", "00100020.00100010", "accept", "ctx", "launch"),
    ]
)
HEADERS: Mapping[str, Sequence[str]] = {
    "Accept": (
        *(
            "*/*",
            "",
            "application/json",
            "application/dicom+json",
            "application/dicom",
            "text/html",
        ),
        *("image/png", "image/jpeg, */*;q=0", "video/mp4", "application/octet-stream", ";;", ","),
        *("multipart/related", 'multipart/related; type="application/dicom"; transfer-syntax=*'),
        'multipart/related; type="application/octet-stream"; transfer-syntax=1.2.840.10008.1.2.1',
        *("application/octet-stream; transfer-syntax=1.2.840.10008.1.2.4.50", "a/b; a*=x; a*0=y"),
    ),
    "Accept-Encoding": ("gzip", "identity", "gzip;q=0", "br"),
    "Range": ("bytes=0-0", "bytes=-1", "bytes=9-1", "bytes=0-0,1-1", "items=1"),
    "If-None-Match": ("*", 'W/"x"', '"', "*, *", ",", "é"),
    "X-HTTP-Method-Override": ("DELETE", "PUT"),
    "X-Request-ID": ("x" * 65, "..", "a\tb"),
    "Content-Encoding": ("gzip",),
    "Content-Length": ("-1", "x", "99999999999999999999"),
    "Host": ("evil.example", ""),
    "X-Forwarded-Host": ("evil.example",),
    "X-Lightbox-Origin": ("viewer", "x"),
}
HEADER = st.sampled_from([(name, value) for name, values in HEADERS.items() for value in values])
CALLERS = st.sampled_from(
    [*["clinician"] * 5, "cookie", "admin", "auditor", "nobody", "bad token", "basic"]
)
VIEWERS = st.sampled_from([*["cookie"] * 4, "other cookie", "clinician", "nobody"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), VALUES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(VALUES, inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = (
    *("mrn", "mrn_issuer", "first_name", "last_name", "dob", "sex", "role", "expires_at"),
    *("patient_id", "order_type", "order_category", "description", "status", "requested_by"),
)
FILES = st.sampled_from(
    [
        *(
            b"",
            b"x",
            b"PK\x05\x06" + bytes(18),
            bytes(128) + b"DICM",
            ct_image(patient_id="MRN-MINE"),
        ),
        *(ct_image(patient_id="MRN-VICTIM"), ct_image(patient_id="MRN-MINE")[:-7]),
    ]
)
KINDS = st.sampled_from(
    [
        *("application/json", "application/json; charset=utf-16", "multipart/form-data", "", "x/y"),
        *("multipart/form-data; boundary=b", "application/dicom", "text/xml; boundary=b"),
        *('multipart/related; type="application/dicom"; boundary=b', "multipart/related"),
    ]
)


@dataclass(frozen=True)
class Asked:
    """A generated request; identifiers are not filled in yet."""

    caller: str
    operation: Operation
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, str]:
    """A body and its Content-Type."""
    kind = draw(KINDS)
    if "boundary" not in kind:
        value = draw(st.one_of(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), JSON))
        return json.dumps(value).encode("utf-8", "surrogatepass"), kind
    file = draw(FILES)
    if draw(st.booleans()):
        head = b"Content-Type: application/dicom"
    else:
        head = b'Content-Disposition: form-data; name="file"; filename="a"'
    field = draw(VALUES).encode()
    extra = b'--b\r\nContent-Disposition: form-data; name="order_id"\r\n\r\n' + field + b"\r\n"
    body = b"--b\r\n" + head + b"\r\n\r\n" + file + b"\r\n"
    return (extra if draw(st.booleans()) else b"") + body + b"--b--\r\n", kind


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    operation = draw(st.sampled_from(OPERATIONS))
    path = operation.path
    aim = draw(st.sampled_from(["mine", "mine", "theirs", "anything"]))
    for name in operation.in_path:
        value = draw(VALUES) if aim == "anything" else "{" + aim + "}"
        if name == "ctx":
            value = draw(st.sampled_from([MINE, MINE, MINE, THEIRS, value]))
        elif name in ("frame", "frames"):
            value = draw(st.sampled_from(["1", "1", "2", "1,1", draw(ODD)]))
        elif name == "path":
            value = draw(st.sampled_from(["00100010", "00104000", "7fe00010", draw(ODD)]))
        slashes = "/" if name == "path" or draw(st.integers(0, 9)) == 0 else ""
        path = path.replace("{" + name + "}", quote(value, safe=slashes + "{},;*'"), 1)
        path = path.replace(MINE, f"<mine {name}>").replace(THEIRS, f"<theirs {name}>")
    if draw(st.integers(0, 19)) == 0:
        path += draw(st.sampled_from(["/", "//", "%2f", "/..", "%00", ";", "%0a", "/x", "%ff"]))
    named = st.one_of(NAMES, NAMES, st.sampled_from(operation.in_query or ("x",)), TEXT)
    pairs = draw(st.one_of(st.just([]), st.lists(st.tuples(named, VALUES), max_size=3)))
    query = "&".join(f"{quote(key, safe='')}={quote(value, safe='{},*')}" for key, value in pairs)
    method = operation.method
    if draw(st.integers(0, 19)) == 0:
        method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"]))
    several = st.lists(HEADER, max_size=3, unique_by=lambda each: each[0])
    headers = list(draw(st.one_of(st.just([]), several)))
    body, kind = draw(bodies()) if operation.bodies else (b"", "")
    if kind:
        headers.append(("Content-Type", kind))
    caller = draw(VIEWERS if operation.path.startswith("/s/") else CALLERS)
    return Asked(caller, operation, method, path, query, tuple(headers), body)


# ------------------------------------------------------------------------------------- the asking


@dataclass
class Told:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def call(lightbox: Lightbox, asked: Asked, path: str, query: str, body: bytes) -> Told:
    """One request, as a server hands it over. What the app raises is raised."""
    told = Told(0, [], b"")
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            told.status, told.headers = message["status"], list(message["headers"])
        else:
            told.body += message.get("body", b"")

    headers = [
        (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in asked.headers
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 50000),
        "server": ("lightbox.test", 80),
    }
    await lightbox.app(scope, receive, send)
    return told


def credential(shared: Shared, caller: str) -> tuple[tuple[str, str], ...]:
    if caller in ("clinician", "admin", "auditor"):
        return (("Authorization", f"Bearer {shared.lightbox.token(caller)}"),)
    return {
        "cookie": (("Cookie", shared.mine.cookie),),
        "other cookie": (("Cookie", "lightbox=" + "x" * 43),),
        "bad token": (("Authorization", "Bearer a.b.c"),),
        "basic": (("Authorization", "Basic bGlnaHRib3g6bGlnaHRib3g="),),
        "nobody": (),
    }[caller]


def identifiers(shared: Shared, whose: str) -> dict[str, str]:
    """The value of each path parameter, for one of the two patients."""
    world, is_mine = shared.world, whose == "mine"
    image = world.my_image if is_mine else world.their_image
    return {
        "ctx": (shared.mine if is_mine else shared.theirs).ctx,
        "patient_id": (world.mine if is_mine else world.theirs)["id"],
        "order_id": (world.my_order if is_mine else world.their_order)["id"],
        **{name: image[name] for name in ("study_instance_uid", "series_instance_uid")},
        "sop_instance_uid": image["sop_instance_uid"],
    }


def filled(text: str, shared: Shared) -> str:
    for whose in ("mine", "theirs"):
        known = identifiers(shared, whose)
        for name in ("frame", "frames", "path", "sub", *known):
            text = text.replace(f"<{whose} {name}>", known.get(name, known["study_instance_uid"]))
        text = text.replace("{" + whose + "}", known["study_instance_uid"])
    return text


def marks(world: World) -> list[bytes]:
    """What is the victim's alone."""
    image = world.their_image
    found = [
        *World.SECRET_WORDS,
        *(world.theirs["id"], world.their_order["id"]),
        *(image[name] for name in image if name.endswith(("_uid", "_id")) and image[name]),
    ]
    return [str(each).encode() for each in found]


SEEN: Counter[tuple[str, int]] = Counter()


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(asked=requests())
async def test_whatever_is_asked(asked: Asked, shared: Shared) -> None:
    path, query = filled(asked.path, shared), filled(asked.query, shared)
    body = filled(asked.body.decode("latin-1"), shared).encode("latin-1")
    sent = Asked(**{**vars(asked), "headers": (*asked.headers, *credential(shared, asked.caller))})
    told = await call(shared.lightbox, sent, path, query, body)
    SEEN[asked.caller, told.status // 100] += 1
    assert 200 <= told.status < 500, told
    if asked.caller == "auditor" and path.startswith("/api/v1/audit"):
        return  # the trail names who was asked for, and what was asked
    text = told.body + b"".join(name + b": " + value for name, value in told.headers)
    said = unquote(f"{path}?{query}").encode() + body
    leaked = [mark for mark in marks(shared.world) if mark in text and mark not in said]
    assert leaked == [], (told, asked)


async def test_and_nothing_has_changed(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """After all that: the tables but for sessions, their counts and what is kept of metadata."""
    lightbox, world = shared.lightbox, shared.world
    kept = ("patient", "imaging_order", "study", "series", "instance", "order_study")
    lines = [
        line
        for line in contents(lightbox)
        if line.startswith(tuple(f'INSERT INTO "{table}"' for table in kept))
    ]
    assert len(lines) == 12
    assert sum(world.their_study in line for line in lines) == 4
    assert len(shared.orthanc.instances) == 2
    assert not shared.orthanc.asked("DELETE")
    assert not shared.orthanc.asked("PUT")
    with capsys.disabled():
        print()
        for caller in sorted({caller for caller, _ in SEEN}):
            counts = "".join(f"{SEEN[caller, kind]:>7}" for kind in (2, 3, 4))
            print(f"{caller:>14}{counts}")
