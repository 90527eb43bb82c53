"""One error shape, whatever went wrong, and the id of every request."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa

from app import linking
from app.errors import LightboxError
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World
from tests.tables import outcomes, records

FIELDS = {"type", "title", "status", "detail", "request_id"}
PREFIX = "urn:lightbox:problem:"


def assert_problem(answer: httpx.Response, status: int, slug: str, **more: Any) -> dict[str, Any]:
    """The whole shape; `more` are further members."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    body: dict[str, Any] = answer.json()
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["type"] == (f"{PREFIX}{slug}" if slug else "about:blank")
    assert body["status"] == status
    assert body["title"]
    assert body["detail"][-1] in ".)"
    assert set(body) == FIELDS | more.keys()
    assert {name: body[name] for name in more} == more
    return body


def file(content: bytes) -> dict[str, Any]:
    return {"files": {"file": ("a.dcm", content, "application/dicom")}}


API = "/api/v1"


async def test_401(untouched: Shared) -> None:
    answer = await untouched.lightbox.ask(None, "GET", f"{API}/patients")
    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == 'Bearer realm="lightbox"'


async def test_403(untouched: Shared) -> None:
    path = f"{API}/patients/{untouched.world.theirs['id']}"
    answer = await untouched.lightbox.ask("clinician", "GET", path)
    assert_problem(answer, 403, "forbidden", reason="no-relationship")
    answer = await untouched.lightbox.ask("admin", "GET", path)
    assert_problem(answer, 403, "forbidden", reason="role")


async def test_404(untouched: Shared) -> None:
    unknown = UUID(int=7)
    for path in (f"orders/{unknown}", f"patients/{unknown}", "dicom/studies/1.2.3"):
        answer = await untouched.lightbox.ask("service", "GET", f"{API}/{path}")
        assert_problem(answer, 404, "not-found")
    for path in ("/nothing", "/api/v2/patients", f"{API}/patients/{unknown}/x/y/z"):
        answer = await untouched.lightbox.client.get(path)
        assert_problem(answer, 404, "")


async def test_405(untouched: Shared) -> None:
    answer = await untouched.lightbox.ask("service", "DELETE", f"{API}/patients")
    assert_problem(answer, 405, "")
    assert answer.headers["allow"] in ("GET", "POST", "GET, POST")


async def test_409(untouched: Shared) -> None:
    person = {"first_name": "A", "last_name": "B", "mrn": "MRN-MINE", "dob": "1980-01-01"}
    answer = await untouched.lightbox.ask("service", "POST", f"{API}/patients", json=person)
    assert_problem(answer, 409, "conflict")


async def test_409_of_another_patient_shows_both(untouched: Shared) -> None:
    answer = await untouched.lightbox.upload(
        ct_image(patient_id="MRN-WRONG", PatientName="Wrong^Will", PatientSex="M"),
        order_id=untouched.world.my_order["id"],
    )
    differences = {
        "PatientID": {"file": "MRN-WRONG", "expected": "MRN-MINE"},
        "PatientName": {"file": "Wrong^Will", "expected": "Doe^Jane"},
        "PatientSex": {"file": "M", "expected": "F"},
    }
    body = assert_problem(answer, 409, "patient-mismatch", differences=differences)
    assert "MRN-WRONG" in body["detail"]
    assert "MRN-MINE" in body["detail"]


async def test_413(untouched: Shared) -> None:
    limit = untouched.lightbox.settings.max_upload_bytes
    answer = await untouched.lightbox.upload(b"\0" * (limit + 1))
    assert_problem(answer, 413, "too-large")


async def test_415(untouched: Shared) -> None:
    for content in (b"", b"%PDF-1.7", b"\0" * 200, b"<html>"):
        answer = await untouched.lightbox.upload(content)
        assert_problem(answer, 415, "not-dicom")


async def test_422_of_a_file_names_what_is_wrong(untouched: Shared) -> None:
    answer = await untouched.lightbox.upload(ct_image(SeriesInstanceUID=None, StudyInstanceUID=""))
    errors = answer.json()["errors"]
    assert_problem(answer, 422, "malformed-dicom", errors=errors)
    assert [each["keyword"] for each in errors] == ["SeriesInstanceUID", "StudyInstanceUID"]


async def test_422_of_a_body_names_the_fields_and_repeats_nothing(untouched: Shared) -> None:
    order = {"patient_id": "Secret^Name", "status": "Secret^Name", "order_category": "secret-name"}
    answer = await untouched.lightbox.ask("service", "POST", f"{API}/orders", json=order)
    errors = answer.json()["errors"]
    assert_problem(answer, 422, "invalid-request", errors=errors)
    assert [each["field"] for each in errors] == [
        "body.patient_id",
        "body.order_category",
        "body.status",
    ]
    assert all(each["problem"] for each in errors)
    assert "ecret" not in answer.text


async def test_422_of_a_path_or_a_query(untouched: Shared) -> None:
    ask = untouched.lightbox.ask
    for path in ("orders/7", "patients/x", "dicom/studies/1.2.x", "dicom/studies/..."):
        answer = await ask("service", "GET", f"{API}/{path}")
        assert_problem(answer, 422, "invalid-request", **extra_of(answer))
    for query in ("limit=0", "limit=201", "limit=x", "cursor=!", "unknown=1", "mrn="):
        answer = await ask("service", "GET", f"{API}/patients?{query}")
        assert_problem(answer, 422, "invalid-request", **extra_of(answer))


def extra_of(answer: httpx.Response) -> dict[str, Any]:
    """Field errors, where FastAPI found them."""
    return {name: value for name, value in answer.json().items() if name == "errors"}


async def test_503(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    fake_orthanc.faults.append(httpx.ConnectError("refused at 10.0.0.1"))
    answer = await lightbox.ask("admin", "GET", f"{API}/dicom/stats")
    assert_problem(answer, 503, "orthanc-unavailable")
    assert answer.headers["retry-after"] == "5"
    assert "10.0.0.1" not in answer.text


@pytest.mark.parametrize(
    "error",
    [
        sa.exc.OperationalError("SELECT secret", {}, Exception("disk I/O at /srv/db")),
        sa.exc.InterfaceError("SELECT secret", {}, Exception("gone")),
        sa.exc.TimeoutError("QueuePool limit"),
    ],
    ids=lambda each: type(each).__name__,
)
async def test_503_of_the_database(
    error: Exception, lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(linking, "study_of", fail)
    answer = await lightbox.ask("clinician", "GET", f"{API}/dicom/studies/{world.my_study}")
    assert_problem(answer, 503, "database-unavailable")
    assert answer.headers["retry-after"] == "5"
    assert "secret" not in answer.text


async def test_422_of_what_the_database_cannot_keep(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL says it of U+0000 in a text; SQLite would take it."""

    async def fail(*_: object) -> None:
        raise sa.exc.DataError("SELECT secret", {}, Exception("cannot contain NUL (0x00) bytes"))

    monkeypatch.setattr(linking, "find_studies", fail)
    answer = await lightbox.ask("clinician", "GET", f"{API}/dicom/studies?mrn=x")
    assert_problem(answer, 422, "invalid-request")
    assert "secret" not in answer.text


@pytest.mark.parametrize("address", ["/%00", f"{API}/patients/%00", f"{API}/patients?mrn=a%00"])
async def test_422_of_nul_in_an_address(address: str, untouched: Shared) -> None:
    for role in (None, "service"):
        answer = await untouched.lightbox.ask(role, "GET", address)
        assert_problem(answer, 422, "invalid-request")


async def test_500_says_nothing_of_what_is_inside(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("Victim^Vera at /srv/secret.py")

    monkeypatch.setattr(linking, "study_of", fail)
    transport = httpx.ASGITransport(lightbox.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://lightbox.test") as client:
        answer = await client.get(
            f"{API}/dicom/studies/{world.my_study}",
            headers={
                "Authorization": f"Bearer {lightbox.token('clinician')}",
                "X-Request-ID": "five-hundred",
            },
        )
    body = assert_problem(answer, 500, "internal-error")
    assert body["request_id"] == "five-hundred"
    for word in ("Victim", "secret", "RuntimeError", "Traceback", "study_of"):
        assert word not in answer.text
    assert outcomes(lightbox, "five-hundred") == [
        ("study:read", "granted"),
        ("study:read", "failed"),
    ]
    assert records(lightbox, "five-hundred")[1]["reason"] == "RuntimeError"


# --------------------------------------------------------------------------------- request ids


@pytest.mark.parametrize("sane", ["a", "A-b_c.d:e+f=g@h", "0" * 64, "5e3b5f0e-7d6b-4a53-8a35"])
async def test_a_sane_request_id_is_kept(sane: str, untouched: Shared) -> None:
    for path in ("/viewer", f"{API}/patients", "/nothing"):
        answer = await untouched.lightbox.client.get(path, headers={"X-Request-ID": sane})
        assert answer.headers["x-request-id"] == sane


@pytest.mark.parametrize(
    "insane",
    ["", " ", "a b", "0" * 65, "<script>", "a\tb", "é", "a;b", "a/b", '"', "{}", "a,b", "%0a"],
)
async def test_an_insane_request_id_is_replaced(insane: str, untouched: Shared) -> None:
    answer = await untouched.lightbox.client.get(
        f"{API}/patients", headers=[(b"X-Request-ID", insane.encode())]
    )
    given = answer.headers["x-request-id"]
    assert len(UUID(given).hex) == 32
    assert answer.json()["request_id"] == given
    assert len(records(untouched.lightbox, given)) == 1


async def test_every_request_has_an_id_of_its_own(untouched: Shared) -> None:
    ids = {
        (await untouched.lightbox.client.get("/viewer")).headers["x-request-id"] for _ in range(5)
    }
    assert len(ids) == 5


# ---------------------------------------------------------------------- nothing before the guard


TOO_LARGE = b" " * (1024 * 1024) + b"{}"


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 5000, b"\xff", b"null", b'"x"', TOO_LARGE])
@pytest.mark.parametrize("path", ["patients", "orders"])
async def test_a_body_is_not_read_before_the_caller_is_known(
    path: str, body: bytes, untouched: Shared
) -> None:
    headers = {"Content-Type": "application/json"}
    refusal = 413 if body is TOO_LARGE else 422
    for role, status in ((None, 401), ("clinician", 403), ("service", refusal)):
        answer = await untouched.lightbox.ask(
            role, "POST", f"{API}/{path}", content=body, headers=headers
        )
        assert answer.status_code == status, f"{role}: {answer.text}"
        assert answer.headers["content-type"] == "application/problem+json"
        recorded = outcomes(untouched.lightbox, answer.headers["x-request-id"])
        if role != "service":
            assert [outcome for _, outcome in recorded] == ["denied"]


async def test_a_body_is_read_no_further_than_its_limit(untouched: Shared) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * 1024 * 1024:
            sent += 256 * 1024
            yield b" " * (256 * 1024)

    headers = {"Content-Type": "application/json"}
    answer = await untouched.lightbox.ask(
        None, "POST", f"{API}/patients", content=endless(), headers=headers
    )
    assert_problem(answer, 401, "unauthenticated")
    assert sent <= 2 * 1024 * 1024


def test_every_error_of_the_tree_has_words_of_its_own() -> None:
    def leaves(kind: type[LightboxError]) -> list[type[LightboxError]]:
        return [kind, *(leaf for each in kind.__subclasses__() for leaf in leaves(each))]

    slugs: dict[str, set[int]] = {}
    for kind in leaves(LightboxError):
        slugs.setdefault(kind.slug, set()).add(kind.status)
        assert kind.title
        assert 400 <= kind.status < 600
    assert all(len(statuses) == 1 for statuses in slugs.values()), slugs
