"""Files that come in: what is taken, what is refused and why, and what is linked then."""

import io
import json
import zipfile
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pydicom
import pytest

from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World, make_settings, make_world, running
from tests.tables import contents, outcomes, records, rows

FIELDS = {
    "status",
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "orthanc_study_id",
    "orthanc_instance_id",
    "order_id",
    "patient_id",
    "coerced",
    "warnings",
}


async def refused(
    lightbox: Lightbox, status: int, content: bytes, *words: str, **fields: Any
) -> httpx.Response:
    """Send a file that has to be refused, with nothing kept and nothing asked to be kept."""
    before = contents(lightbox)
    answer = await lightbox.upload(content, **fields)
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.json()["detail"]
    assert contents(lightbox) == before
    return answer


async def linked(lightbox: Lightbox, order: Any) -> list[str]:
    found = await lightbox.must("service", "GET", f"/orders/{order['id']}")
    assert found["study_instance_uid"] == (found["studies"][0] if found["studies"] else None)
    return list(found["studies"])


def stored_image(fake: FakeOrthanc, orthanc_id: str) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(fake.bodies[orthanc_id]))


# ------------------------------------------------------------------------------------- one file


async def test_an_upload_to_an_order_is_stored_and_linked(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    content = ct_image()
    answer = await lightbox.upload(content, order_id=order["id"])
    assert answer.status_code == 200
    said, image = answer.json(), pydicom.dcmread(io.BytesIO(content))
    assert set(said) == FIELDS
    assert said["status"] == "uploaded"
    assert (said["order_id"], said["patient_id"]) == (order["id"], patient["id"])
    assert said["study_instance_uid"] == image.StudyInstanceUID
    assert said["series_instance_uid"] == image.SeriesInstanceUID
    assert said["sop_instance_uid"] == image.SOPInstanceUID
    assert fake_orthanc.bodies == {said["orthanc_instance_id"]: content}, "to the byte"
    assert (said["coerced"], said["warnings"]) == ({}, [])
    assert await linked(lightbox, order) == [image.StudyInstanceUID]


async def test_the_same_file_again_is_a_duplicate_and_linked_all_the_same(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = fake_orthanc.bodies[world.my_image["orthanc_instance_id"]]
    other = await lightbox.order(world.mine)
    again = await lightbox.upload(content, order_id=other["id"])
    assert again.json() == {**world.my_image, "status": "duplicate", "order_id": other["id"]}
    assert await linked(lightbox, other) == await linked(lightbox, world.my_order)
    assert len(rows(lightbox, "SELECT * FROM instance")) == 2
    study = await lightbox.must("clinician", "GET", f"/dicom/studies/{world.my_study}")
    assert study["order_ids"] == [world.my_order["id"], other["id"]]
    assert study["order_id"] == world.my_order["id"], "the first that was linked"


async def test_a_file_to_a_patient_is_linked_to_no_order(lightbox: Lightbox, world: World) -> None:
    said = (
        await lightbox.upload(ct_image(patient_id="MRN-MINE"), patient_id=world.mine["id"])
    ).json()
    assert (said["order_id"], said["patient_id"]) == (None, world.mine["id"])
    study = await lightbox.must("clinician", "GET", f"/dicom/studies/{said['study_instance_uid']}")
    assert (study["order_id"], study["order_ids"]) == (None, [])


async def test_a_file_that_names_nobody_goes_to_the_patient_of_its_id(
    lightbox: Lightbox, world: World
) -> None:
    said = (await lightbox.upload(ct_image(patient_id="MRN-MINE "))).json()
    assert said["patient_id"] == world.mine["id"]
    await refused(lightbox, 404, ct_image(patient_id="MRN-NEW"), "MRN-NEW", "order_id")
    await refused(lightbox, 404, ct_image(patient_id="mrn-mine"), "mrn-mine")
    await refused(lightbox, 404, ct_image(patient_id="MRN-MINE", IssuerOfPatientID="B"), "issuer B")
    await refused(lightbox, 422, ct_image(patient_id=""), "no PatientID")
    await refused(lightbox, 422, ct_image(PatientID=None), "no PatientID")


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"order_id": str(UUID(int=7))}, 404, "No order"),
        ({"patient_id": str(UUID(int=7))}, 404, "No patient"),
        ({"order_id": "7"}, 422, "order_id"),
        ({"patient_id": "MRN-MINE"}, 422, "patient_id"),
        ({"coerce_patient": "perhaps"}, 422, "coerce_patient"),
    ],
)
async def test_a_target_that_is_none_is_refused(
    fields: dict[str, str], status: int, word: str, untouched: Shared
) -> None:
    content = ct_image(patient_id="MRN-MINE")
    await refused(untouched.lightbox, status, content, word, **fields)


async def test_order_and_patient_must_belong_together(untouched: Shared) -> None:
    world = untouched.world
    fields = {"order_id": world.my_order["id"], "patient_id": world.theirs["id"]}
    for mrn in ("MRN-MINE", "MRN-VICTIM"):
        await refused(
            untouched.lightbox, 409, ct_image(patient_id=mrn), "belong together", **fields
        )


async def test_a_cancelled_order_takes_no_images(lightbox: Lightbox, world: World) -> None:
    path = f"/orders/{world.my_order['id']}"
    await lightbox.order(world.mine)  # the technologist still works on the patient
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    content = ct_image(patient_id="MRN-MINE")
    await refused(lightbox, 409, content, "cancelled", order_id=world.my_order["id"])


GOOD = ct_image(patient_id="MRN-MINE")


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 415, ["not a DICOM file"]),
        (b"plain text", 415, ["not a DICOM file"]),
        (GOOD[128:], 415, ["not a DICOM file"]),
        (b"PK\x03\x04" + GOOD, 415, ["not a DICOM file"]),
        (GOOD[:-1], 422, ["truncated"]),
        (GOOD[:200], 422, []),
        (GOOD + b"<script>", 422, []),
        (ct_image(SOPInstanceUID=None), 422, ["SOPInstanceUID"]),
        (ct_image(SeriesInstanceUID=None), 422, ["SeriesInstanceUID"]),
        (ct_image(StudyInstanceUID=None), 422, ["StudyInstanceUID"]),
        (ct_image(StudyInstanceUID=""), 422, ["StudyInstanceUID"]),
        (ct_image(NumberOfFrames="0"), 422, ["NumberOfFrames"]),
    ],
)
async def test_a_file_that_is_not_sound_is_refused(
    content: bytes, status: int, words: list[str], untouched: Shared
) -> None:
    order = untouched.world.my_order["id"]
    await refused(untouched.lightbox, status, content, *words, order_id=order)


# -------------------------------------------------------------------------------- whose file it is


async def test_another_patients_file_is_refused_and_shows_both(untouched: Shared) -> None:
    answer = await refused(
        untouched.lightbox,
        409,
        ct_image(patient_id="MRN-OTHER", IssuerOfPatientID="B"),
        "MRN-OTHER (issuer B)",
        "MRN-MINE",
        "coerce_patient",
        order_id=untouched.world.my_order["id"],
    )
    differences = answer.json()["differences"]
    assert differences["PatientID"] == {"file": "MRN-OTHER", "expected": "MRN-MINE"}
    assert differences["IssuerOfPatientID"] == {"file": "B", "expected": ""}
    assert "PatientBirthDate" not in differences, "that agrees"


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        ("", None, True),
        ("", "", True),
        ("", "HOSP", False),
        ("HOSP", None, True),
        ("HOSP", "", True),
        ("HOSP", " HOSP ", True),
        ("HOSP", "hosp", False),
        ("HOSP", "OTHER", False),
    ],
)
async def test_the_issuer_must_agree_where_the_file_has_one(
    ours: str, theirs: str | None, agree: bool, lightbox: Lightbox
) -> None:
    """Two hospitals' MRN-1 are two people."""
    order = await lightbox.order(await lightbox.patient(mrn_issuer=ours))
    more = {} if theirs is None else {"IssuerOfPatientID": theirs}
    answer = await lightbox.upload(ct_image(**more), order_id=order["id"])
    assert answer.status_code == (200 if agree else 409), answer.text


async def test_the_configured_authority_is_the_issuer_of_those_who_name_none(
    sqlite_url: str, fake_orthanc: FakeOrthanc
) -> None:
    async with running(make_settings(sqlite_url, URL, assigning_authority="HOSP")) as lightbox:
        ours = await lightbox.patient()
        other = await lightbox.patient(mrn_issuer="OTHER")
        assert ours["mrn_issuer"] == "HOSP"
        for patient in (ours, other):
            await lightbox.order(patient)
        for issuer, owner in ((None, ours), ("HOSP", ours), ("OTHER", other)):
            more = {"IssuerOfPatientID": issuer} if issuer else {}
            said = (await lightbox.upload(ct_image(**more))).json()
            assert said["patient_id"] == owner["id"]


async def test_other_demographics_are_only_warned_about(lightbox: Lightbox, world: World) -> None:
    content = ct_image(
        patient_id="MRN-MINE",
        PatientName="Doe-Smith^Jane",
        PatientBirthDate="19800102",
        PatientSex="O",
    )
    said = (await lightbox.upload(content, order_id=world.my_order["id"])).json()
    assert [each.split()[2] for each in said["warnings"]] == [
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
    ]
    absent = ct_image(
        patient_id="MRN-MINE", PatientName="DOE^JANE^^", PatientBirthDate="", PatientSex=""
    )
    said = (await lightbox.upload(absent, order_id=world.my_order["id"])).json()
    assert said["warnings"] == []


@pytest.mark.parametrize("role", ["technologist", "radiologist"])
async def test_coercing_rewrites_the_identity_and_keeps_it_on_record(
    role: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = ct_image(
        patient_id="MRN-OTHER", PatientName="Wrong^Will", PatientSex="M", AccessionNumber="OLD"
    )
    answer = await lightbox.ask(
        role,
        "POST",
        "/api/v1/dicom/upload",
        files={"file": ("a.dcm", content)},
        data={"order_id": world.my_order["id"], "coerce_patient": "true"},
        headers={"X-Request-ID": "coerces"},
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    expected = {
        "PatientID": {"file": "MRN-OTHER", "expected": "MRN-MINE"},
        "PatientName": {"file": "Wrong^Will", "expected": "Doe^Jane"},
        "PatientSex": {"file": "M", "expected": "F"},
        "AccessionNumber": {"file": "OLD", "expected": world.my_order["accession_number"]},
    }
    assert said["coerced"] == expected
    image = stored_image(fake_orthanc, said["orthanc_instance_id"])
    assert {keyword: str(image[keyword].value) for keyword in expected} == {
        keyword: each["expected"] for keyword, each in expected.items()
    }
    before = pydicom.dcmread(io.BytesIO(content))
    assert image.PixelData == before.PixelData
    assert image.SOPInstanceUID == before.SOPInstanceUID
    study = await lightbox.must("clinician", "GET", f"/dicom/studies/{image.StudyInstanceUID}")
    assert (study["PatientID"], study["PatientName"]) == ("MRN-MINE", "Doe^Jane")
    assert study["AccessionNumber"] == world.my_order["accession_number"]
    assert outcomes(lightbox, "coerces") == [
        ("study:upload", "granted"),
        ("study:coerce", "granted"),
        ("study:coerce", "done"),
    ]
    assert records(lightbox, "coerces")[2]["detail"]["coerced"] == expected
    again = await lightbox.upload(content, order_id=world.my_order["id"], coerce_patient="true")
    assert (again.json()["status"], again.json()["coerced"]) == ("duplicate", {})


async def test_who_may_upload_may_not_therefore_coerce(untouched: Shared) -> None:
    lightbox, world = untouched.lightbox, untouched.world
    before = contents(lightbox)
    answer = await lightbox.ask(
        "service",
        "POST",
        "/api/v1/dicom/upload",
        files={"file": ("a.dcm", ct_image(patient_id="MRN-OTHER"))},
        data={"order_id": world.my_order["id"], "coerce_patient": "true"},
        headers={"X-Request-ID": (request_id := uuid4().hex)},
    )
    assert answer.status_code == 403
    assert outcomes(lightbox, request_id) == [
        ("study:upload", "granted"),
        ("study:coerce", "denied"),
        ("study:upload", "failed"),
    ]
    assert contents(lightbox) == before


async def test_coercing_never_takes_a_study_from_its_patient(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    theirs = fake_orthanc.bodies[world.their_image["orthanc_instance_id"]]
    fields = {"order_id": world.my_order["id"], "coerce_patient": "true"}
    answer = await refused(lightbox, 409, theirs, "already belongs to another", **fields)
    assert not [word for word in ("Vera", "Victim", "MRN-VICTIM") if word in answer.text]
    assert (await lightbox.upload(theirs, order_id=world.their_order["id"])).is_success


# -------------------------------------------------------------------------------- accession numbers


@pytest.mark.parametrize(
    ("in_file", "coerce", "status", "kept"),
    [
        ("", "false", 200, ""),
        ("", "true", 200, "ORDER-1"),
        ("ORDER-1", "false", 200, "ORDER-1"),
        ("ORDER-1 ", "false", 200, "ORDER-1"),
        ("ORDER-1", "true", 200, "ORDER-1"),
        ("OTHER", "false", 409, ""),
        ("order-1", "false", 409, ""),
        ("OTHER", "true", 200, "ORDER-1"),
    ],
)
async def test_the_accession_number_of_the_order_is_checked_or_put_in(
    in_file: str,
    coerce: str,
    status: int,
    kept: str,
    lightbox: Lightbox,
    fake_orthanc: FakeOrthanc,
) -> None:
    order = await lightbox.order(await lightbox.patient(), accession_number="ORDER-1")
    content = ct_image(AccessionNumber=in_file)
    answer = await lightbox.upload(content, order_id=order["id"], coerce_patient=coerce)
    assert answer.status_code == status, answer.text
    if status == 409:
        assert answer.json()["differences"] == {
            "AccessionNumber": {"file": in_file, "expected": "ORDER-1"}
        }
        assert (answer.json()["type"], fake_orthanc.bodies) == (
            "urn:lightbox:problem:conflict",
            {},
        )
        return
    image = stored_image(fake_orthanc, answer.json()["orthanc_instance_id"])
    assert image.AccessionNumber == kept
    found = await lightbox.must(
        "clinician", "GET", "/dicom/studies", params={"accession_number": "ORDER-1"}
    )
    assert len(found) == 1, "found by the order's number either way"


# ------------------------------------------------------------------------------- one owner a UID


async def test_a_planned_uid_belongs_to_its_orders_patient(
    lightbox: Lightbox, world: World
) -> None:
    planned = world.their_order["planned_study_instance_uid"]
    stolen = ct_image(patient_id="MRN-MINE", study_uid=planned)
    await refused(lightbox, 409, stolen, "already belongs", order_id=world.my_order["id"])
    mine = ct_image(patient_id="MRN-MINE", study_uid=world.my_order["planned_study_instance_uid"])
    assert (await lightbox.upload(mine, order_id=world.my_order["id"])).is_success


async def test_uids_of_a_study_a_series_or_an_image_are_not_used_twice(
    untouched: Shared,
) -> None:
    world = untouched.world
    mine, theirs = world.my_image, world.their_image
    used = {
        "their study": {"study_uid": theirs["study_instance_uid"]},
        "their series": {"series_uid": theirs["series_instance_uid"]},
        "their image": {"sop_uid": theirs["sop_instance_uid"]},
        "my series in another study": {"series_uid": mine["series_instance_uid"]},
        "my image in another series": {
            "study_uid": mine["study_instance_uid"],
            "sop_uid": mine["sop_instance_uid"],
        },
        "my image with other content": {
            "study_uid": mine["study_instance_uid"],
            "series_uid": mine["series_instance_uid"],
            "sop_uid": mine["sop_instance_uid"],
            "PixelData": b"\1" * 512,
        },
    }
    stored = len(untouched.orthanc.bodies)
    requests = list(untouched.orthanc.requests)
    for how, uids in used.items():
        answer = await refused(
            untouched.lightbox,
            409,
            ct_image(patient_id="MRN-MINE", **uids),
            "already",
            order_id=world.my_order["id"],
        )
        assert not [word for word in World.SECRET_WORDS if word in answer.text], how
    assert len(untouched.orthanc.bodies) == stored
    untouched.orthanc.requests[:] = requests


async def test_a_uid_that_orthanc_holds_under_another_id_is_refused(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    stray = ct_image(patient_id="MRN-STRAY")
    fake_orthanc._store(stray)
    uid = str(pydicom.dcmread(io.BytesIO(stray)).StudyInstanceUID)
    content = ct_image(patient_id="MRN-MINE", study_uid=uid)
    answer = await refused(
        lightbox, 409, content, "another PatientID", order_id=world.my_order["id"]
    )
    assert "STRAY" not in answer.text


# --------------------------------------------------------------------------------------- the form


async def post(lightbox: Lightbox, path: str, **more: Any) -> httpx.Response:
    return await lightbox.ask("technologist", "POST", f"/api/v1/dicom/{path}", **more)


@pytest.mark.parametrize("path", ["upload", "upload-multiple", "read-tags", "modify-tags"])
async def test_a_body_that_is_no_form_with_a_file_is_refused(path: str, untouched: Shared) -> None:
    form = "multipart/form-data"
    field = "files" if path == "upload-multiple" else "file"
    boundary = {"Content-Type": f"{form}; boundary=x"}
    named = f'--x\r\nContent-Disposition: form-data; name="{field}"'
    for more in (
        {},
        {"json": {field: "x"}},
        {"data": {field: "x"}},
        {"content": GOOD, "headers": {"Content-Type": "application/dicom"}},
        {"content": b"", "headers": {"Content-Type": form}},
        {"content": b"garbage", "headers": boundary},
        {"content": b"--y\r\n\r\n--y--", "headers": boundary},
        {"content": f"{named}\r\n\r\ntext\r\n--x--\r\n".encode(), "headers": boundary},
        {"files": {"other": ("a.dcm", GOOD)}},
        {"files": {field: (None, GOOD)}},
    ):
        answer = await post(untouched.lightbox, path, **more)
        assert answer.status_code == 422, f"{more}: {answer.text}"
        assert answer.json()["detail"]


async def test_one_file_means_one(untouched: Shared) -> None:
    two = [("file", ("a.dcm", GOOD)), ("file", ("b.dcm", GOOD))]
    for path in ("upload", "read-tags"):
        assert (await post(untouched.lightbox, path, files=two)).status_code == 422
    for name in ("order_id", "patient_id", "coerce_patient"):
        more = {"files": {"file": ("a.dcm", GOOD)}, "data": {name: ["true", "true"]}}
        assert (await post(untouched.lightbox, "upload", **more)).status_code == 422


@pytest.fixture
async def small(sqlite_url: str, fake_orthanc: FakeOrthanc) -> AsyncIterator[Lightbox]:
    """A Lightbox that takes a megabyte, and a megabyte around it."""
    async with running(make_settings(sqlite_url, URL, max_upload_bytes=1024 * 1024)) as lightbox:
        await lightbox.order(await lightbox.patient())
        yield lightbox


@pytest.mark.parametrize("path", ["upload", "upload-multiple", "read-tags", "modify-tags"])
async def test_a_body_beyond_the_limit_is_given_up(path: str, small: Lightbox) -> None:
    sent = 0
    field = "files" if path == "upload-multiple" else "file"

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a"\r\n\r\n'
        yield head.encode()
        while sent < 64 * 1024 * 1024:
            sent += 256 * 1024
            yield bytes(256 * 1024)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = await post(small, path, content=endless(), headers=headers)
    assert answer.status_code == 413
    assert "1048576 bytes" in answer.json()["detail"]
    assert sent <= 3 * 1024 * 1024, "without a Content-Length: no more was read than the limit"
    sent = 0
    answer = await post(
        small, path, content=endless(), headers={**headers, "Content-Length": "99999999"}
    )
    assert answer.status_code == 413
    assert sent <= 256 * 1024, "with one: nothing was read"


async def test_a_file_beyond_the_limit_is_too_large(
    small: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    big = ct_image(PixelData=bytes(1024 * 1024))
    assert (await small.upload(big)).status_code == 413
    files = [("files", ("big", big)), ("files", ("good", ct_image()))]
    answer = await post(small, "upload-multiple", files=files)
    assert [each["error_status"] for each in answer.json()["results"]] == [413, None]
    assert len(fake_orthanc.bodies) == 1


async def test_a_client_that_breaks_off_leaves_nothing(untouched: Shared) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield GOOD[:300]

    answer = await post(
        untouched.lightbox,
        "upload",
        content=broken(),
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 422


# ------------------------------------------------------------------------------------ many files


def zipped(*files: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.filename = name
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


async def test_one_bad_file_stops_no_other(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    duplicate = fake_orthanc.bodies[world.my_image["orthanc_instance_id"]]
    slices = [ct_image(patient_id="MRN-MINE") for _ in range(5)]
    bomb = zipped(("bomb", bytes(4 * 1024 * 1024)))
    encrypted = bytearray(zipped(("secret.dcm", slices[4])))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(magic) + offset] |= 1
    sent = [
        ("one.dcm", slices[0]),
        ("notes.txt", b"not DICOM"),
        ("cut.dcm", slices[1][:-7]),
        ("other.dcm", ct_image(patient_id="MRN-OTHER")),
        ("../again.dcm", duplicate),
        ("disc.zip", zipped(("a/1.dcm", slices[1]), ("../2.dcm", slices[2]), ("DICOMDIR", b"x"))),
        ("nested.zip", zipped(("in.zip", zipped(("3.dcm", slices[3]))), ("4.dcm", slices[3]))),
        ("bomb.zip", bomb),
        ("encrypted.zip", bytes(encrypted)),
        ("broken.zip", bomb[:100]),
        ("last.dcm", slices[4]),
    ]
    answer = await post(
        lightbox,
        "upload-multiple",
        files=[("files", (name, content, "application/octet-stream")) for name, content in sent],
        data={"order_id": world.my_order["id"]},
        headers={"X-Request-ID": "many"},
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert [
        (each["filename"], each["status"], each["error_status"]) for each in said["results"]
    ] == [
        ("one.dcm", "uploaded", None),
        ("notes.txt", "failed", 415),
        ("cut.dcm", "failed", 422),
        ("other.dcm", "failed", 409),
        ("../again.dcm", "duplicate", None),
        ("disc.zip/a/1.dcm", "uploaded", None),
        ("disc.zip/../2.dcm", "failed", 422),
        ("disc.zip/DICOMDIR", "failed", 415),
        ("nested.zip/in.zip", "failed", 422),
        ("nested.zip/4.dcm", "uploaded", None),
        ("bomb.zip", "failed", 413),
        ("encrypted.zip/secret.dcm", "failed", 422),
        ("broken.zip", "failed", 422),
        ("last.dcm", "uploaded", None),
    ]
    assert (said["total_files"], said["successful"], said["failed"]) == (14, 5, 9)
    for each in said["results"]:
        assert bool(each["error"]) is (each["status"] == "failed")
        assert (each["order_id"] == world.my_order["id"]) is (each["status"] != "failed")
    uploaded = [each for each in said["results"] if each["status"] == "uploaded"]
    assert set(await linked(lightbox, world.my_order)) == {
        world.my_study,
        *(each["study_instance_uid"] for each in uploaded),
    }
    assert len(fake_orthanc.bodies) == 2 + len(uploaded)
    done = [each for each in records(lightbox, "many") if each["outcome"] == "done"]
    assert len(done) == 5


async def test_an_empty_zip_has_no_results(untouched: Shared) -> None:
    answer = await post(
        untouched.lightbox, "upload-multiple", files={"files": ("empty.zip", zipped())}
    )
    assert answer.json() == {"total_files": 0, "successful": 0, "failed": 0, "results": []}


async def test_a_zip_is_no_dicom_file(untouched: Shared) -> None:
    await refused(untouched.lightbox, 415, zipped(("a.dcm", GOOD)))


# -------------------------------------------------------------------------------------------- tags


async def test_reading_tags_stores_nothing(untouched: Shared) -> None:
    answer = await post(untouched.lightbox, "read-tags", files={"file": ("a.dcm", GOOD)})
    tags = answer.json()["tags"]
    assert set(answer.json()) == {"tags"}
    assert (tags["PatientID"], tags["Modality"], tags["Rows"]) == ("MRN-MINE", "CT", 16)
    for content, status in ((b"x", 415), (GOOD[:-1], 422)):
        answer = await post(untouched.lightbox, "read-tags", files={"file": ("a", content)})
        assert answer.status_code == status


async def test_modifying_tags_answers_the_changed_file(untouched: Shared) -> None:
    wanted = {"StudyDescription": "Changed", "SeriesNumber": 7, "StudyDate": None}
    answer = await post(
        untouched.lightbox,
        "modify-tags",
        files={"file": ("a.dcm", GOOD)},
        data={"tags": json.dumps(wanted)},
        headers={"X-Request-ID": (request_id := uuid4().hex)},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/dicom"
    image, before = (pydicom.dcmread(io.BytesIO(each)) for each in (answer.content, GOOD))
    assert (image.StudyDescription, image.SeriesNumber, image.StudyDate) == ("Changed", 7, "")
    assert (image.PatientID, image.PixelData) == (before.PatientID, before.PixelData)
    recorded = records(untouched.lightbox, request_id)
    assert [each["outcome"] for each in recorded] == ["granted", "done"]
    assert recorded[1]["detail"] == {"keywords": sorted(wanted)}


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ('{"Nonsense": "x"}', "Nonsense"),
        ('{"StudyDate": "20251399"}', "StudyDate"),
        ('{"StudyInstanceUID": "not a UID"}', "StudyInstanceUID"),
        ('{"PixelData": "x"}', "PixelData"),
        ('{"Rows": 1}', "Rows"),
        ('{"SeriesNumber": {"a": 1}}', "SeriesNumber"),
        ("{}", "tags"),
        ("[]", "tags"),
        ("x", "tags"),
        ('"x"', "tags"),
        ("[" * 5000, "tags"),
    ],
)
async def test_a_tag_that_cannot_be_set_is_named(tags: str, word: str, untouched: Shared) -> None:
    answer = await post(
        untouched.lightbox,
        "modify-tags",
        files={"file": ("a.dcm", GOOD)},
        data={"tags": tags},
    )
    assert answer.status_code == 422
    assert word in answer.json()["detail"]


async def test_nothing_is_left_in_the_spool_folder(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spool = tmp_path_factory.mktemp("spool")
    async with running(make_settings(sqlite_url, URL, spool_dir=spool)) as lightbox:
        world = await make_world(lightbox)
        big = ct_image(patient_id="MRN-MINE", PixelData=bytes(2 * 1024 * 1024))
        order = world.my_order["id"]
        await lightbox.upload(big, order_id=order, coerce_patient="true")
        await lightbox.upload(big[:-1], order_id=order)
        archive = zipped(("a.dcm", big), ("b.dcm", b"x"))
        await post(lightbox, "upload-multiple", files={"files": ("a.zip", archive)})
        data = {"tags": '{"StudyDescription": "x"}'}
        await post(lightbox, "modify-tags", files={"file": ("a", big)}, data=data)
    assert [each for each in spool.rglob("*") if each.is_file()] == []
