"""Whatever a caller, a file, Orthanc or the database say: no log line repeats it."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from pydicom.uid import generate_uid

from app import linking
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.loglines import Log, kept_logging
from tests.tables import REFUSE_RECORDS, change

NAME = "Zebrowski"
UID = "1.2.840.99999.4711.1"
HOSTILE = f"{NAME}\u202e\u2066\x1b\x9b\u2028\x85\u200b"  # 16 characters: SH holds it


@pytest.fixture
def log(lightbox: Lightbox, world: World) -> Iterator[Log]:
    with kept_logging():
        yield Log("DEBUG")


def assert_silent(log: Log, *words: str) -> None:
    """Nothing of it stands in the log, and every line is one."""
    assert [word for word in (NAME, UID, *words) if word.lower() in log.text.lower()] == []
    for line in log.text.split("\n")[:-1]:
        assert line.isascii()
        assert line.isprintable()
        json.loads(line)


def requests(log: Log) -> list[Any]:
    return [line for line in log.lines if line["logger"] == "app.requests"]


async def test_the_check_finds_what_is_logged(log: Log) -> None:
    logging.getLogger("app.leak").info("patient %s", NAME)
    with pytest.raises(AssertionError):
        assert_silent(log)


@pytest.mark.parametrize(
    "name",
    [
        *("Accept", "Accept-Language", "Authorization", "Content-Type", "Cookie", "Forwarded"),
        *("Host", "If-None-Match", "Origin", "Range", "Referer", "User-Agent"),
        *("X-Forwarded-For", "X-Forwarded-Host", "X-Request-ID", "X-HTTP-Method-Override"),
    ],
)
async def test_no_header_reaches_a_log(
    lightbox: Lightbox, world: World, log: Log, name: str
) -> None:
    value = (f"Bearer {HOSTILE}" if name == "Authorization" else HOSTILE).encode()
    for path in ("/api/v1/patients", f"/dicom-web/studies/{world.my_study}", "/nothing"):
        headers = [(name.encode(), value)]
        if name != "Authorization":
            token = lightbox.token("clinician")
            headers.append((b"Authorization", f"Bearer {token}".encode()))
        answer = await lightbox.client.get(path, headers=headers)
        assert answer.status_code < 500
    assert len(requests(log)) == 3
    assert_silent(log, world.my_study)


@pytest.mark.parametrize(
    "path",
    [
        f"/api/v1/patients?name={NAME}",
        f"/api/v1/patients?{NAME}=1",
        f"/api/v1/patients/{NAME}",
        f"/{NAME}",
        f"/dicom-web/studies?PatientName={NAME}&StudyInstanceUID={UID}",
        f"/dicom-web/studies/{UID}/series/{UID}/metadata",
        f"/s/{NAME}/dicom-web/studies/{UID}",
        f"/viewer?launch={NAME}",
        "/api/v1/patients?name=%E2%80%AE%0A%1B%5B2K" + NAME,
        f"/docs/static/{NAME}",
    ],
)
async def test_no_address_reaches_a_log(lightbox: Lightbox, log: Log, path: str) -> None:
    answer = await lightbox.ask("clinician", "GET", path)
    assert answer.status_code < 500
    (line,) = requests(log)
    assert line["status"] == answer.status_code
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["route"] == "-" or "{" in line["route"] or line["route"] in path
    assert_silent(log)


async def test_a_method_of_ones_own_is_not_repeated(lightbox: Lightbox, log: Log) -> None:
    await lightbox.client.request(NAME.upper(), "/api/v1/patients")
    (line,) = requests(log)
    assert line["method"] == "OTHER"
    assert_silent(log)


TEXT_KEYWORDS = [
    *("PatientName", "PatientID", "PatientComments", "AccessionNumber", "StudyDescription"),
    *("SeriesDescription", "InstitutionName", "ReferringPhysicianName", "IssuerOfPatientID"),
    *("ProtocolName", "StationName", "StudyID", "OperatorsName", "ImageComments"),
]


@pytest.mark.parametrize("keyword", TEXT_KEYWORDS)
async def test_no_value_of_a_file_reaches_a_log(
    lightbox: Lightbox, world: World, log: Log, keyword: str
) -> None:
    study = generate_uid()
    values = {"SpecificCharacterSet": "ISO_IR 192", "StudyInstanceUID": study, keyword: HOSTILE}
    content = ct_image(**{"patient_id": "MRN-MINE", **values})
    for role, path, data in (
        ("technologist", "/api/v1/dicom/upload", {"order_id": world.my_order["id"]}),
        ("technologist", "/api/v1/dicom/read-tags", {}),
    ):
        answer = await lightbox.ask(
            role,
            "POST",
            path,
            files={"file": (f"{HOSTILE}.dcm", content, "application/dicom")},
            data=data,
        )
        assert answer.status_code < 500, answer.text
    assert len(requests(log)) == 2
    assert_silent(log, study, "MRN-MINE")


ORTHANC_SAYS: list[httpx.Response | Exception] = [
    httpx.ConnectError(f"{NAME} at http://orthanc/studies/{UID}"),
    httpx.ReadTimeout(f"GET http://orthanc/instances/{UID}"),
    httpx.RemoteProtocolError(NAME),
    httpx.Response(500, json={"Message": f"{NAME} {UID}", "OrthancStatus": 1}),
    httpx.Response(200, html=f"<html>{NAME}</html>"),
    httpx.Response(200, content=b'{"' + NAME.encode()),
]


@pytest.mark.parametrize("fault", ORTHANC_SAYS, ids=lambda fault: type(fault).__name__)
async def test_no_word_of_orthanc_reaches_a_log(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    log: Log,
    fault: httpx.Response | Exception,
) -> None:
    fake_orthanc.faults_at[""] = fault
    answer = await lightbox.upload(ct_image(patient_id="MRN-MINE"), order_id=world.my_order["id"])
    assert answer.status_code == 503
    link = f"/api/v1/dicom/viewer/url/{world.my_study}"
    assert (await lightbox.ask("clinician", "GET", link)).status_code == 503
    assert [line["status"] for line in requests(log)] == [503, 503]
    assert {line["level"] for line in requests(log)} == {"WARNING"}
    assert_silent(log, world.my_study)


async def test_a_trail_that_refuses_is_told_without_its_row(
    lightbox: Lightbox, world: World, log: Log
) -> None:
    change(lightbox, REFUSE_RECORDS.replace("the disk is full", f"{NAME} {UID}"))
    answer = await lightbox.ask("clinician", "GET", f"/api/v1/patients?name={NAME}")
    assert answer.status_code == 503
    told = [each for line in log.lines for each in line.get("error", [])]
    assert told
    assert {each["type"].rpartition(".")[2] for each in told} == {"IntegrityError"}
    assert_silent(log)


@pytest.mark.parametrize(
    "error",
    [
        sa.exc.OperationalError(f"SELECT '{NAME}'", {"uid": UID}, Exception(NAME)),
        sa.exc.TimeoutError(f"pool of {NAME}"),
        RuntimeError(f"{NAME} {UID}"),
        ExceptionGroup(NAME, [ValueError(UID)]),
        UnicodeDecodeError("utf-8", NAME.encode(), 0, 1, NAME),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_is_told_without_its_words(
    lightbox: Lightbox,
    world: World,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    async def fails(*_: object) -> None:
        try:
            raise KeyError(NAME)
        except KeyError as cause:
            raise error from cause

    monkeypatch.setattr(linking, "studies_of", fails)
    link = f"/api/v1/dicom/viewer/url/{world.my_study}"
    transport = httpx.ASGITransport(lightbox.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://lightbox.test") as client:
        token = lightbox.token("clinician")
        answer = await client.get(link, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code in (500, 503)
    (line,) = requests(log)
    assert (line["status"], line["level"]) == (answer.status_code, "WARNING")
    # What the server, which is not here, logs of what comes through to it.
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)
    told = [each["type"] for line in log.lines for each in line.get("error", [])]
    assert f"{type(error).__module__}.{type(error).__qualname__}" in told
    assert "builtins.KeyError" in told
    assert_silent(log, world.my_study)
