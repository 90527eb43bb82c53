"""Traffic of every kind, and then every log: no name, no number, no token of it stands there."""

import http.client
import json
import re
import secrets
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom.uid import generate_uid

from app.db import migrate
from app.demo.stack import LOOPBACK, AppServer, Edge, OrthancServer, free_port
from app.settings import Settings
from tests.images import ct_image
from tests.lightbox import signed
from tests.live.conftest import Edged, edged, environment_of, settings_for

FAMILY, GIVEN, MRN, ACCESSION = "Zebrowski", "Quirina", "MRN-77341-Q", "ACC-90210-Z"
STUDY_WORDS = "Kniegelenk beidseits"
STUDY, SERIES, INSTANCE = (generate_uid(entropy_srcs=[secrets.token_hex(8)]) for _ in range(3))
HOSTILE = f"{FAMILY}\u202e\u2066\x1b[2K\x9b1A\u2028\x85{GIVEN}"

# The app as `serve` runs it, and in it a handler that fails with a patient's name on its lips. With
# LIGHTBOX_TEST_LEAK somebody also logs it, which the check has to find.
SCRIPT = f"""
import logging, os, warnings
from app import linking
from app.cli import main

studies_of = linking.studies_of

async def failing(access):
    if access.origin.request_id.startswith("fail-"):
        warnings.warn(f"value {FAMILY}^{GIVEN} of {STUDY}")
        logging.getLogger("pydicom").warning("Invalid value {FAMILY}^{GIVEN}")
        try:
            raise KeyError("{MRN} of {FAMILY}")
        except KeyError as error:
            raise RuntimeError("study {STUDY} of {FAMILY}") from error
    return await studies_of(access)

linking.studies_of = failing
if os.environ.get("LIGHTBOX_TEST_LEAK"):
    logging.getLogger("app.leak").warning("patient %s", "{FAMILY}")
main()
"""


@dataclass
class Site:
    """Orthanc, app and edge of this test's own, and what must not be in any of their logs."""

    settings: Settings
    orthanc: OrthancServer
    app: AppServer
    edge: Edge
    database: Path
    caller: Edged
    secrets: set[str] = field(default_factory=set)

    def logs(self) -> dict[str, str]:
        paths = {
            "app": self.app.log_path,
            "edge": self.edge.log_path,
            "edge's access log": self.edge.access_log_path,
            "orthanc": self.orthanc.log_path,
        }
        return {name: path.read_text(errors="replace") for name, path in paths.items()}

    def execute(self, *statements: str) -> None:
        connection = sqlite3.connect(self.database, timeout=30)
        try:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
        finally:
            connection.close()


def leaked(text: str, words: set[str]) -> list[str]:
    """Which of the words stand in a log, in whatever case."""
    low = text.lower()
    return sorted(word for word in words if word.lower() in low)


def app_server(state: Path, port: int, settings: Settings, **environment: str) -> AppServer:
    serve = ["serve", "--host", LOOPBACK, "--port", str(port)]
    return AppServer(
        port,
        {**environment_of(settings), **environment},
        [sys.executable, "-c", SCRIPT, *serve],
        state_dir=state,
    )


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    files, spool = tmp_path / "viewer", tmp_path / "spool"
    files.mkdir()
    spool.mkdir()
    (files / "index.html").write_text("<!doctype html><title>the viewer</title>")
    database = tmp_path / "lightbox.sqlite"
    url = f"sqlite+aiosqlite:///{database}"
    migrate(url)
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    orthanc = OrthancServer(
        tmp_path / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    )
    settings = settings_for(
        url,
        orthanc,
        api_base_url=f"http://localhost:{api_port}",
        viewer_base_url=f"http://localhost:{viewer_port}",
        spool_dir=spool,
        log_level="DEBUG",
        failed_sign_ins_per_minute=25,
    )
    app = app_server(tmp_path / "app", app_port, settings)
    edge = Edge(
        tmp_path / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=files,
    )
    with orthanc, app, edge:
        async with edged(settings) as caller:
            yield Site(settings, orthanc, app, edge, database, caller)


def image(**more: Any) -> bytes:
    values = {
        "PatientName": f"{FAMILY}^{GIVEN}",
        "PatientBirthDate": "19810203",
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": SERIES,
        "SOPInstanceUID": INSTANCE,
        "SpecificCharacterSet": "ISO_IR 192",
        "AccessionNumber": ACCESSION,
        "StudyDescription": STUDY_WORDS,
    }
    return ct_image(patient_id=MRN, **{**values, **more})


async def test_no_log_tells_of_a_patient(site: Site) -> None:
    caller = site.caller
    site.secrets |= {FAMILY, GIVEN, MRN, ACCESSION, STUDY_WORDS, STUDY, SERIES, INSTANCE}
    site.secrets |= {"Kniegelenk", site.orthanc.password, "19810203"}
    headers = {
        "User-Agent": f"{FAMILY}/1.0",
        "Referer": f"https://ehr.example/?patient={FAMILY}",
        "X-Forwarded-For": f"{FAMILY}, 203.0.113.9",
        "X-Request-ID": f"{FAMILY} {GIVEN}",
        "Cookie": f"ehr={FAMILY}",
    }
    site.secrets.add("203.0.113.9")

    # Registering, uploading: what fits, and what does not.
    patient = await caller.patient(MRN, first_name=GIVEN, last_name=FAMILY, dob="1981-02-03")
    order = await caller.order(patient, accession_number=ACCESSION, description=STUDY_WORDS)
    other = await caller.patient("MRN-55-OTHER", first_name="Olga", last_name="Xylander")
    theirs = await caller.order(other)
    site.secrets |= {"MRN-55-OTHER", "Xylander"}
    statuses = [
        (await caller.upload(content, order_id=order_id, filename=f"{FAMILY}.dcm")).status_code
        for content, order_id in (
            (image(), order["id"]),
            (image(), order["id"]),
            (image(), theirs["id"]),
            (image()[:700], order["id"]),
            (f"not DICOM, but {FAMILY}".encode(), order["id"]),
            (image(SOPInstanceUID=generate_uid(), PatientName=HOSTILE), order["id"]),
            (image(SOPInstanceUID=generate_uid(), StudyDescription=HOSTILE), order["id"]),
        )
    ]
    assert statuses[:5] == [200, 200, 409, 422, 415], statuses
    form = [("files", (f"{FAMILY}.dcm", image(), "application/dicom")) for _ in range(2)]
    form.append(("files", (f"{HOSTILE}.dcm", b"broken", "application/dicom")))
    many = await caller.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/upload-multiple",
        files=form,
        data={"order_id": order["id"]},
    )
    assert many.status_code < 500
    read = await caller.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/read-tags",
        files={"file": (f"{FAMILY}.dcm", image(), "application/dicom")},
    )
    assert read.status_code == 200

    # Searching, by everything that names a patient; and addresses that do.
    for role, path in (
        ("clinician", f"/api/v1/patients?mrn={MRN}"),
        ("clinician", f"/api/v1/patients?name={FAMILY}"),
        ("clinician", f"/api/v1/patients/{FAMILY}"),
        ("clinician", f"/api/v1/patients/{patient['id']}"),
        ("clinician", f"/dicom-web/studies?PatientName={FAMILY}*"),
        ("clinician", f"/dicom-web/studies?AccessionNumber={ACCESSION}"),
        ("clinician", f"/dicom-web/studies/{STUDY}/metadata"),
        ("clinician", f"/dicom-web/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}/frames/1"),
        ("clinician", f"/dicom-web/studies/{FAMILY}/series/{GIVEN}"),
        ("clinician", f"/dicom-web/{STUDY}"),
        ("clinician", f"/{FAMILY}/{MRN}?{ACCESSION}"),
        ("auditor", f"/api/v1/audit?study_instance_uid={STUDY}"),
        ("auditor", f"/api/v1/audit.csv?study_instance_uid={STUDY}"),
        ("auditor", f"/api/v1/patients/{patient['id']}/access-report"),
        ("auditor", f"/fhir/R4/AuditEvent?entity={STUDY}&agent={FAMILY}"),
    ):
        answer = await caller.ask(role, "GET", path, headers=headers)
        assert answer.status_code < 500, f"{path}: {answer.status_code}"

    reason = {"reason_code": "emergency-treatment", "reason_text": f"{FAMILY} lies here"}
    glass = f"/api/v1/patients/{other['id']}/break-glass"
    broken = await caller.ask("clinician", "POST", glass, sub="another", json=reason)
    assert broken.is_success, broken.text

    # Tokens that are refused, and too many of them.
    forged = caller.token("clinician")[:-6] + "AAAAAA"
    expired = signed(site.settings, exp=1)
    site.secrets |= {forged, forged.split(".")[1], expired, "opaque-token-4711"}
    refused = [
        (await caller.client.get(path, headers={"Authorization": f"Bearer {token}"})).status_code
        for token in [forged, expired, "opaque-token-4711", HOSTILE.encode().hex()] * 8
        for path in [f"/api/v1/patients?mrn={MRN}&access_token={token}"]
    ]
    assert set(refused) == {401, 429}

    # The viewer: opened, looked at, guessed at.
    opened = await caller.open(f"/{STUDY}")
    cookie = opened.cookie.partition("=")[2]
    site.secrets |= {opened.code, cookie, opened.ctx, "guessed-code-1234"}
    frame = f"/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}/frames/1"
    for path in ("/studies", f"/studies/{STUDY}/metadata", frame):
        assert (await opened.get(path)).status_code == 200, path
    await opened.get(f"/studies/{STUDY}", cookie=f"lightbox={FAMILY}")
    for address in ("/viewer?launch=guessed-code-1234", f"/viewer?launch={opened.code}"):
        assert (await caller.viewer.client.get(address)).status_code in (404, 410, 429)
    await caller.viewer.client.get(f"/s/{opened.ctx}/ended")

    # What is no HTTP, at the edge and past it.
    for port in (site.edge.api_port, site.edge.viewer_port, site.app.port):
        for raw in (f"GET /{FAMILY} \x01 HTTP/9\r\n\r\n", f"{FAMILY} {MRN}\r\n\r\n"):
            with socket.create_connection((LOOPBACK, port), timeout=10) as connection:
                connection.sendall(raw.encode("latin-1"))
                connection.settimeout(10)
                connection.recv(4096)

    # An archive that is down.
    site.orthanc.stop()
    try:
        assert (await opened.get(frame + "?")).status_code in (200, 503)
        down = await caller.upload(image(SOPInstanceUID=generate_uid()), order_id=order["id"])
        assert down.status_code == 503
    finally:
        site.orthanc.start()
        site.orthanc.wait_until_ready()

    # A database that fails, in words that quote the row; and one without its table.
    site.execute(
        "CREATE TRIGGER quoting BEFORE INSERT ON imaging_order BEGIN "
        f"SELECT RAISE(ABORT, 'order of {FAMILY} {MRN}'); END"
    )
    failed = await _ask(caller, "service", "POST", "/api/v1/orders", order)
    assert failed.status_code == 409  # taken for an accession number that is there already
    site.execute("DROP TRIGGER quoting", "ALTER TABLE imaging_order RENAME TO moved")
    missing = await _ask(caller, "service", "POST", "/api/v1/orders", order)
    assert missing.status_code == 503
    site.execute("ALTER TABLE moved RENAME TO imaging_order")

    # A handler that nobody foresaw.
    url = f"/api/v1/dicom/viewer/url/order/{order['id']}"
    injected = await caller.ask("clinician", "GET", url, headers={"X-Request-ID": "fail-1"})
    assert injected.status_code == 500
    assert FAMILY not in injected.text

    site.app.stop()  # what is written at the end, too
    logs = site.logs()
    for name, text in logs.items():
        assert leaked(text, site.secrets) == [], name
        # Whoever reads a log in a terminal: nothing in it moves the cursor or turns the text.
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text), name
    _says_enough(logs)


def _says_enough(logs: Mapping[str, str]) -> None:
    """Silence would pass the check above: the lines are there, and can be used."""
    lines = [json.loads(line) for line in logs["app"].splitlines()]
    requests = [line for line in lines if line["logger"] == "app.requests"]
    assert len(requests) > 60
    assert all(line["request_id"] and line["duration_ms"] >= 0 for line in requests)
    routes = {(line["method"], line["route"], line["status"]) for line in requests}
    assert ("GET", "/api/v1/patients/{patient_id}", 200) in routes
    assert ("POST", "/api/v1/dicom/upload", 409) in routes
    # Of DICOMweb the app tells what it answered itself; what the edge sends is in the edge's log.
    told = {route for _, route, status in routes if status == 200}
    assert any(route.startswith("/dicom-web/studies") for route in told)
    assert any(route.startswith("/s/{ctx}/dicom-web/studies") for route in told)
    assert not any(route.endswith("/frames/{frames}") for route in told)
    errors = [line for line in lines if "error" in line]
    kinds = {each["type"] for line in errors for each in line["error"]}
    assert {"builtins.RuntimeError", "builtins.KeyError"} <= kinds
    assert any(kind.startswith("sqlalchemy.exc.") for kind in kinds)
    assert "fail-1" in {line.get("request_id") for line in errors}
    assert "pydicom" in {line["logger"] for line in lines}
    assert any(line["message"].startswith("UserWarning at ") for line in lines)
    edge = [json.loads(line) for line in logs["edge's access log"].splitlines()]
    paths = {line["path"] for line in edge}
    assert {"/api/v1/patients", "/dicom-web/.../frames", "/s/.../dicom-web", "/viewer"} <= paths
    shared = {line["request_id"] for line in edge} & {line["request_id"] for line in requests}
    assert len(shared) > 50


async def _ask(caller: Edged, role: str, method: str, path: str, order: Any) -> httpx.Response:
    body = {name: order[name] for name in ("patient_id", "order_type", "order_category")}
    body |= {"description": STUDY_WORDS, "status": "scheduled", "accession_number": ACCESSION + "2"}
    return await caller.ask(role, method, path, json=body)


async def test_the_check_finds_a_name_that_is_logged(site: Site) -> None:
    assert leaked(site.logs()["app"], {FAMILY}) == []
    site.app.stop()
    site.app.environment["LIGHTBOX_TEST_LEAK"] = "yes"
    site.app.start()
    site.app.wait_until_ready()
    assert leaked(site.logs()["app"], {FAMILY, MRN}) == [FAMILY]


# ------------------------------------------------------------------------------- whose address


async def test_a_client_can_not_choose_its_address(site: Site) -> None:
    """Neither before the edge nor past it: limits and trail go by where a request comes from."""
    claims = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Real-IP": "203.0.113.9",
        "Forwarded": "for=203.0.113.9",
        "X-Request-ID": "by-the-edge",
    }
    assert (await site.caller.client.get("/api/v1/patients", headers=claims)).status_code == 401
    # Somebody on the machine's network who found the app itself; only the edge is believed.
    past = http.client.HTTPConnection(
        LOOPBACK, site.app.port, timeout=10, source_address=("127.0.0.2", 0)
    )
    try:
        past.request("GET", "/api/v1/patients", headers={**claims, "X-Request-ID": "past-it"})
        assert past.getresponse().status == 401
    finally:
        past.close()
    tries = await site.caller.audit(action="sign-in")
    found = {each["request_id"]: each["client_address"] for each in tries}
    assert found == {"by-the-edge": "127.0.0.1", "past-it": "127.0.0.2"}
