"""DICOMweb with a bearer token: every resource to who may see the study, and to nobody else."""

import asyncio
import gzip
import json
from datetime import UTC, datetime
from io import BytesIO
from typing import Any
from uuid import uuid4

import httpx
import pydicom
import pytest
from pydicom.uid import RLELossless

from app.dicomweb import freshness
from app.orthanc import Orthanc
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World
from tests.matching import TAGS, WANTED, many_studies, matches
from tests.parts import files_of, parts_of
from tests.tables import REFUSE_RECORDS, change, contents, records, rows

STUDY = "/studies/{study_instance_uid}"
SERIES = STUDY + "/series/{series_instance_uid}"
INSTANCE = SERIES + "/instances/{sop_instance_uid}"
EXPLICIT = "1.2.840.10008.1.2.1"
JSON, OCTETS, DICOM = "application/dicom+json", "application/octet-stream", "application/dicom"

METADATA = [STUDY + "/metadata", SERIES + "/metadata", INSTANCE + "/metadata"]
SEARCHES = [STUDY + "/series", STUDY + "/instances", SERIES + "/instances"]
FILES = [STUDY, SERIES, INSTANCE]
BYTES = [INSTANCE + "/frames/1", INSTANCE + "/frames", INSTANCE + "/frames/1,1"]
BYTES += [INSTANCE + "/bulk/00080018"]
PICTURES = [
    f"{path}/{what}"
    for path in (STUDY, SERIES, INSTANCE, INSTANCE + "/frames/1")
    for what in ("rendered", "thumbnail")
]
RESOURCES = [*METADATA, *SEARCHES, *FILES, *BYTES, *PICTURES]
FROM_ORTHANC = [each for each in RESOURCES if each not in SEARCHES]


def filled(path: str, image: Any) -> str:
    return "/dicom-web" + path.format(**image)


async def ask(
    lightbox: Lightbox,
    path: str,
    image: Any = None,
    *,
    role: str | None = "clinician",
    sub: str | None = None,
    method: str = "GET",
    request_id: str = "",
    params: Any = None,
    **headers: str,
) -> httpx.Response:
    """`headers` by keyword, with underscores."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if request_id:
        sent["X-Request-ID"] = request_id
    target = filled(path, image) if image is not None else f"/dicom-web{path}"
    return await lightbox.ask(role, method, target, sub=sub, headers=sent, params=params)


async def another(lightbox: Lightbox, patient: Any, **values: Any) -> Any:
    """One more slice of a patient; what upload answered."""
    content = ct_image(patient_id=patient["mrn"], **values)
    answer = await lightbox.upload(content, patient_id=patient["id"])
    assert answer.status_code == 200, answer.text
    return answer.json()


def location_of(answer: httpx.Response) -> str:
    return str(answer.headers.get("x-accel-redirect", ""))


@pytest.fixture
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthanc is asked at every request whether the study is still what it was."""
    monkeypatch.setattr(freshness, "FRESH_SECONDS", 0.0)


# ---------------------------------------------------------------------------- to the right person


@pytest.mark.parametrize("path", RESOURCES)
async def test_who_treats_the_patient_gets_it(path: str, shared: Shared) -> None:
    image, name = shared.world.my_image, path.rpartition("/")[2]
    answer = await ask(shared.lightbox, path, image)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    orthanc_id, sop = image["orthanc_instance_id"], image["sop_instance_uid"]
    if path in METADATA or path in SEARCHES:
        assert answer.headers["content-type"] == JSON
        (row,) = answer.json()
        assert row["0020000D"]["Value"] == [shared.world.my_study]
        if name != "series":
            assert row["00080018"]["Value"] == [sop]
    elif path in PICTURES:
        assert answer.headers["content-type"] == "image/jpeg"
        assert f"/instances/{orthanc_id}/frames/0/rendered" in location_of(answer)
    elif location_of(answer):
        assert f"/instances/{orthanc_id}/" in location_of(answer)
    elif path in FILES:
        assert files_of(answer) == [orthanc_id]
    else:
        pixels = pydicom.dcmread(BytesIO(shared.orthanc.bodies[orthanc_id])).PixelData
        assert {part.content for part in parts_of(answer)} == {pixels}
    assert not [word for word in World.SECRET_WORDS if word in answer.text]


@pytest.mark.parametrize("path", RESOURCES)
async def test_head_says_the_same_without_a_body(path: str, shared: Shared) -> None:
    image = shared.world.my_image
    got = await ask(shared.lightbox, path, image, request_id="same")
    head = await ask(shared.lightbox, path, image, method="HEAD", request_id="same")
    assert head.status_code == 200
    changing = {"content-length", "x-accel-redirect", "content-type"}
    assert {k: v for k, v in head.headers.items() if k not in changing} == {
        k: v for k, v in got.headers.items() if k not in changing
    }
    kinds = [each.headers["content-type"].partition(";")[0] for each in (got, head)]
    assert kinds[0] == kinds[1]


async def test_metadata_has_addresses_that_work(shared: Shared) -> None:
    lightbox, image = shared.lightbox, shared.world.my_image
    (row,) = (await ask(lightbox, SERIES + "/metadata", image)).json()
    uri = row["7FE00010"]["BulkDataURI"]
    root = f"{lightbox.settings.api_base_url}/dicom-web"
    assert uri == root + (INSTANCE + "/frames").format(**image)
    answer = await ask(lightbox, uri.removeprefix(root))
    assert answer.status_code == 200
    assert "orthanc" not in json.dumps(row)


@pytest.mark.parametrize("path", METADATA)
async def test_metadata_is_packed_where_that_is_taken(path: str, shared: Shared) -> None:
    plain = await ask(shared.lightbox, path, shared.world.my_image, accept_encoding="identity")
    packed = await ask(shared.lightbox, path, shared.world.my_image, accept_encoding="gzip, br")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "Accept-Encoding"  # the edge says so of what it packs
    assert packed.json() == plain.json()


async def test_one_and_the_same_frame_alone_or_as_a_part(shared: Shared) -> None:
    image, path = shared.world.my_image, INSTANCE + "/frames/1"
    for accept in ("", "*/*", OCTETS, f"{OCTETS}; transfer-syntax=*"):
        answer = await ask(shared.lightbox, path, image, accept=accept)
        assert answer.headers["content-type"] == f"{OCTETS}; transfer-syntax={EXPLICIT}", accept
        assert location_of(answer).startswith("/_orthanc-kept/")
    for accept in (f"multipart/related; type={OCTETS}; transfer-syntax=*", "multipart/related"):
        answer = await ask(shared.lightbox, path, image, accept=accept)
        assert answer.headers["content-type"].startswith("multipart/related; "), accept
        assert location_of(answer).startswith("/_orthanc-part/")


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        (INSTANCE + "/frames/1", "image/jpeg"),
        (INSTANCE + "/frames/1", f"{OCTETS}; transfer-syntax=1.2.840.10008.1.2.4.50"),
        (STUDY, DICOM),
        (STUDY, "application/zip"),
        (INSTANCE, f"{DICOM}; transfer-syntax=1.2.840.10008.1.2.4.50"),
        *((path, "application/dicom+xml") for path in (*METADATA, *SEARCHES)),
        (INSTANCE + "/rendered", "image/gif"),
        (STUDY + "/thumbnail", "text/html"),
        (INSTANCE + "/bulk/00080018", "text/html"),
    ],
)
async def test_what_can_not_be_had_as_asked_is_refused(
    path: str, accept: str, shared: Shared
) -> None:
    answer = await ask(shared.lightbox, path, shared.world.my_image, accept=accept)
    assert answer.status_code == 406, answer.text
    assert answer.json()["type"] == "urn:lightbox:problem:not-acceptable"
    assert not location_of(answer)


async def test_compressed_frames_as_they_are_or_decompressed(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    image = pydicom.dcmread(BytesIO(ct_image(patient_id="MRN-MINE")))
    plain = image.PixelData
    image.compress(RLELossless, generate_instance_uid=False)
    out = BytesIO()
    image.save_as(out)
    answer = await lightbox.upload(out.getvalue(), patient_id=world.mine["id"])
    sent, path = answer.json(), INSTANCE + "/frames/1"
    alone = await ask(lightbox, path, sent, accept=f"{OCTETS}; transfer-syntax=*")
    assert alone.headers["content-type"] == f"{OCTETS}; transfer-syntax={RLELossless}"
    assert location_of(alone).endswith("/frames/0/raw")
    decompressed = await ask(lightbox, path, sent, accept=OCTETS)
    assert decompressed.headers["content-type"] == f"{OCTETS}; transfer-syntax={EXPLICIT}"
    assert decompressed.content == plain
    in_parts = await ask(lightbox, path, sent, accept=f"multipart/related; type={OCTETS}")
    (part,) = parts_of(in_parts)
    assert (part.media_type, part.content) == (f"{OCTETS}; transfer-syntax={EXPLICIT}", plain)
    drawn = await ask(lightbox, INSTANCE + "/rendered", sent)
    assert (drawn.status_code, drawn.headers["content-type"]) == (200, "image/jpeg")
    fake_orthanc.faults_at["/frames/1"] = httpx.Response(400, text="no decoder at 10.0.0.1")
    fake_orthanc.faults_at["/rendered"] = httpx.Response(415, text="no decoder at 10.0.0.1")
    for each, accept in (
        (path, OCTETS),
        (path, f"multipart/related; type={OCTETS}"),
        (INSTANCE + "/rendered", "image/jpeg"),
    ):
        refused = await ask(lightbox, each, sent, accept=accept)
        assert refused.status_code == 406, refused.text
        assert "10.0.0.1" not in refused.text
    icon = await ask(lightbox, INSTANCE + "/thumbnail", sent)
    assert (icon.status_code, icon.headers["content-type"]) == (200, "image/png")


async def test_what_has_no_pixels_is_shown_as_an_icon(lightbox: Lightbox, world: World) -> None:
    bare = dict.fromkeys(("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored"))
    bare |= dict.fromkeys(("HighBit", "PixelRepresentation", "SamplesPerPixel"))
    bare["PhotometricInterpretation"] = None
    sent = await another(
        lightbox, world.mine, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR", **bare
    )
    for path in (STUDY, SERIES, INSTANCE):
        icon = await ask(lightbox, path + "/thumbnail", sent)
        assert (icon.status_code, icon.headers["content-type"]) == (200, "image/png")
        assert icon.content.startswith(b"\x89PNG")
        assert (await ask(lightbox, path + "/rendered", sent)).status_code == 404


async def test_a_series_is_pictured_by_the_one_in_its_middle(
    lightbox: Lightbox, world: World
) -> None:
    uids = {"study_uid": world.my_study, "series_uid": world.my_image["series_instance_uid"]}
    slices = [await another(lightbox, world.mine, InstanceNumber=n, **uids) for n in (2, 3, 4, 5)]
    for path in (STUDY, SERIES):
        for what in ("thumbnail", "rendered"):
            answer = await ask(lightbox, f"{path}/{what}", world.my_image)
            assert f"/instances/{slices[1]['orthanc_instance_id']}/" in location_of(answer)


# ------------------------------------------------------------------------------- to nobody else


@pytest.mark.parametrize("path", RESOURCES)
async def test_a_study_of_others_is_as_one_that_is_not_there(path: str, untouched: Shared) -> None:
    lightbox, world = untouched.lightbox, untouched.world
    nowhere = {**world.their_image, "study_instance_uid": "2.25.404"}
    theirs = await ask(lightbox, path, world.their_image, request_id="same")
    unknown = await ask(lightbox, path, nowhere, request_id="same")
    assert theirs.status_code == 404
    assert theirs.json()["request_id"] == "same"
    assert (theirs.content, theirs.headers) == (unknown.content, unknown.headers)
    refused, missing = records(lightbox, "same")[-2:]
    assert {refused["outcome"], missing["outcome"]} == {"denied"}
    assert refused["action"] == ("study:retrieve" if path in FILES else "study:view")
    assert (refused["reason"], missing["reason"]) == ("no-relationship", "unknown")
    assert missing["detail"] == {"requested": "2.25.404"}


@pytest.mark.parametrize("path", RESOURCES)
async def test_a_role_that_sees_no_images_is_told_so(path: str, untouched: Shared) -> None:
    for role in ("admin", "auditor"):
        request_id = uuid4().hex
        for image in (untouched.world.my_image, untouched.world.their_image):
            answer = await ask(untouched.lightbox, path, image, role=role, request_id=request_id)
            assert (answer.status_code, answer.json()["reason"]) == (403, "role")
        assert {each["reason"] for each in records(untouched.lightbox, request_id)} == {"role"}
    assert (
        await ask(untouched.lightbox, path, untouched.world.my_image, role=None)
    ).status_code == (401)


@pytest.mark.parametrize("path", [each for each in RESOURCES if "{series" in each])
async def test_what_is_of_another_study_is_not_found_under_mine(path: str, shared: Shared) -> None:
    world = shared.world
    before = len(shared.orthanc.requests)
    for mixed in (
        {**world.their_image, "study_instance_uid": world.my_study},
        {**world.my_image, "series_instance_uid": world.their_image["series_instance_uid"]},
        {**world.my_image, "sop_instance_uid": world.their_image["sop_instance_uid"]},
    ):
        if filled(path, mixed) == filled(path, world.my_image):
            continue  # the path names no instance
        answer = await ask(shared.lightbox, path, mixed)
        empty = path == SERIES + "/instances"
        assert answer.status_code == (200 if empty else 404), answer.text
        assert not empty or answer.json() == []
        assert not [word for word in World.SECRET_WORDS if word in answer.text]
    asked = {path for _, path in shared.orthanc.requests[before:]}
    own = f"/studies/{world.my_image['orthanc_study_id']}/statistics"
    assert asked <= {own, "/tools/lookup"}


@pytest.mark.parametrize("path", ["/", "/series", "/instances", "/patients", "/studies/", "/x/y"])
async def test_what_is_not_enumerated_is_not_there(path: str, untouched: Shared) -> None:
    for role, status in (("clinician", 404), ("service", 404), ("admin", 404), (None, 401)):
        request_id = uuid4().hex
        for query in ("", "?PatientID=MRN-VICTIM", "?limit=1"):
            answer = await ask(untouched.lightbox, path + query, role=role, request_id=request_id)
            assert answer.status_code == status, answer.text
        if role is not None:
            found = {
                (each["outcome"], each["reason"], each["actor"])
                for each in records(untouched.lightbox, request_id)
            }
            assert found == {("denied", "not-enumerated", role)}


@pytest.mark.parametrize("path", ["/studies", *RESOURCES, "/series"])
async def test_nothing_is_changed_by_this_way(path: str, untouched: Shared) -> None:
    for method in ("DELETE", "PUT", "PATCH"):
        answer = await ask(
            untouched.lightbox, path, untouched.world.my_image, role="service", method=method
        )
        assert answer.status_code == 405, f"{method} {answer.text}"
        anonymous = await ask(
            untouched.lightbox, path, untouched.world.my_image, role=None, method=method
        )
        assert anonymous.status_code == 401


@pytest.mark.parametrize("path", RESOURCES)
async def test_what_a_resource_does_not_know_is_refused(path: str, untouched: Shared) -> None:
    for query in ("x=1", "_method=DELETE", "StudyInstanceUID=1.2.3", "accept=*/*", "viewport=x"):
        answer = await ask(untouched.lightbox, f"{path}?{query}", untouched.world.my_image)
        assert answer.status_code == 422, query
        assert answer.json()["type"] == "urn:lightbox:problem:invalid-request"


@pytest.mark.parametrize(
    "spelling",
    [
        "/studies/{mine}/%2e%2e/{theirs}/series",
        "/studies/{mine}%2f..%2f{theirs}/series",
        "/studies/{mine}%5C{theirs}/series",
        "/%73tudies/{theirs}/series",
        "/studies//{theirs}/series",
        "/studies/{mine}/series%3Fx",
        "/studies/%31.2.3",
    ],
)
async def test_a_path_that_can_be_read_in_two_ways_is_refused(
    spelling: str, untouched: Shared
) -> None:
    world, request_id = untouched.world, uuid4().hex
    path = spelling.format(mine=world.my_study, theirs=world.their_study)
    url = httpx.URL("http://lightbox.test").copy_with(raw_path=f"/dicom-web{path}".encode())
    answer = await untouched.lightbox.client.get(
        url,
        headers={
            "Authorization": f"Bearer {untouched.lightbox.token('clinician')}",
            "X-Request-ID": request_id,
        },
    )
    assert answer.status_code == 404, answer.text
    (record,) = records(untouched.lightbox, request_id)
    assert record["outcome"] == "denied"
    assert record["reason"] in ("not-plain", "not-enumerated")


async def test_no_record_no_image(lightbox: Lightbox, world: World) -> None:
    change(lightbox, REFUSE_RECORDS)
    for path in RESOURCES:
        for image in (world.my_image, world.their_image):
            answer = await ask(lightbox, path, image)
            assert answer.status_code == 503, path
            assert answer.json()["type"] == "urn:lightbox:problem:audit-unavailable"
            assert not location_of(answer)


# ------------------------------------------------------------------------------------ the record


async def test_a_view_is_recorded_once_and_each_transfer_of_files(
    lightbox: Lightbox, world: World
) -> None:
    async def recorded(path: str, image: Any = world.my_image, **caller: Any) -> list[Any]:
        request_id = uuid4().hex
        await ask(lightbox, path, image, request_id=request_id, **caller)
        found = records(lightbox, request_id)
        return [(each["action"], each["outcome"], each["reason"]) for each in found]

    viewed, fetched = ("study:view", "granted", ""), ("study:retrieve", "granted", "")
    assert await recorded(INSTANCE + "/frames/1") == [viewed]
    for path in (INSTANCE + "/frames/1", SERIES + "/metadata", STUDY + "/thumbnail"):
        assert await recorded(path) == []
    assert await recorded(SERIES + "/metadata", role="service") == [viewed], "somebody else"
    for path in (*FILES, *FILES):
        assert await recorded(path) == [fetched]
    refused = ("study:view", "denied", "no-relationship")
    for _ in range(2):
        assert await recorded(INSTANCE + "/frames/1", world.their_image) == [refused]
    second = await another(lightbox, world.mine)
    assert await recorded(SERIES + "/metadata", second) == [viewed], "another study"
    assert await recorded(SERIES + "/metadata", second) == []


async def test_of_many_first_views_at_once_one_is_recorded(
    lightbox: Lightbox, world: World
) -> None:
    answers = await asyncio.gather(
        *(ask(lightbox, INSTANCE + "/frames/1", world.my_image) for _ in range(20))
    )
    assert {each.status_code for each in answers} == {200}
    found = await lightbox.audit(action="study:view", outcome="granted")
    assert len([each for each in found if each["study_instance_uid"] == world.my_study]) == 1


async def test_a_view_is_recorded_again_after_a_while(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.access.glance.RECORD_SECONDS", 0.0)
    for n in range(3):
        await ask(lightbox, INSTANCE + "/frames/1", world.my_image, request_id=f"view-{n}")
        assert len(records(lightbox, f"view-{n}")) == 1


# --------------------------------------------------------------------------- what is had already


@pytest.mark.parametrize("path", FROM_ORTHANC)
async def test_not_modified_is_for_who_has_the_right(
    path: str, lightbox: Lightbox, world: World
) -> None:
    first = await ask(lightbox, path, world.my_image)
    tag = first.headers["etag"]
    for known in (tag, f'"x", {tag}', f"W/{tag.removeprefix('W/')}", "*"):
        again = await ask(lightbox, path, world.my_image, if_none_match=known)
        assert (again.status_code, again.content) == (304, b""), known
        assert not location_of(again)
    assert (await ask(lightbox, path, world.my_image, if_none_match='"x"')).status_code == 200
    change(lightbox, "UPDATE imaging_order SET requested_by = 'somebody'")
    for known in (tag, "*"):
        lost = await ask(lightbox, path, world.my_image, if_none_match=known)
        assert lost.status_code == 404
        assert "etag" not in lost.headers
    assert (
        await ask(lightbox, path, world.my_image, role=None, if_none_match=tag)
    ).status_code == (401)


async def test_a_right_that_ends_ends_at_the_next_request(lightbox: Lightbox, world: World) -> None:
    member = f"/patients/{world.theirs['id']}/care-team/clinician"
    frame = INSTANCE + "/frames/1"
    assert (await ask(lightbox, frame, world.their_image)).status_code == 404
    await lightbox.must("service", "PUT", member, json={})
    assert (await ask(lightbox, frame, world.their_image)).status_code == 200
    await lightbox.must("service", "DELETE", member)
    assert (await ask(lightbox, frame, world.their_image)).status_code == 404
    until = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    await lightbox.must("service", "PUT", member, json={"expires_at": until})
    assert (await ask(lightbox, frame, world.their_image)).status_code == 404


async def test_a_new_instance_shows_at_once(lightbox: Lightbox, world: World) -> None:
    """Also to who asks whether what they have is still good."""
    uids = {"study_uid": world.my_study, "series_uid": world.my_image["series_instance_uid"]}
    watched = [STUDY + "/metadata", SERIES + "/metadata", STUDY, SERIES]
    tags = {path: (await ask(lightbox, path, world.my_image)).headers["etag"] for path in watched}
    added = await another(lightbox, world.mine, **uids)
    for path in watched:
        answer = await ask(lightbox, path, world.my_image, if_none_match=tags[path])
        assert answer.status_code == 200, path
        if path in METADATA:
            sops = {row["00080018"]["Value"][0] for row in answer.json()}
            assert added["sop_instance_uid"] in sops
        else:
            assert added["orthanc_instance_id"] in files_of(answer)


@pytest.mark.usefixtures("always_fresh")
async def test_what_is_deleted_in_orthanc_itself_is_gone(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Orthanc tells nobody: neither LastUpdate nor /changes move."""
    uids = {"study_uid": world.my_study, "series_uid": world.my_image["series_instance_uid"]}
    added = await another(lightbox, world.mine, **uids)
    paths = [STUDY + "/metadata", INSTANCE + "/frames/1"]
    before = {path: await ask(lightbox, path, world.my_image) for path in paths}
    assert len(before[paths[0]].json()) == 2
    for kept in (fake_orthanc.instances, fake_orthanc.bodies):
        del kept[added["orthanc_instance_id"]]
    for path in paths:
        tag = before[path].headers["etag"]
        after = await ask(lightbox, path, world.my_image, if_none_match=tag)
        assert after.status_code == 200, path
        assert location_of(after) != location_of(before[path]) or path in METADATA
    (row,) = (await ask(lightbox, paths[0], world.my_image)).json()
    assert row["00080018"]["Value"] == [world.my_image["sop_instance_uid"]]
    assert (await ask(lightbox, INSTANCE + "/metadata", added)).status_code == 404
    for path in (STUDY, SERIES):
        sent = files_of(await ask(lightbox, path, world.my_image))
        assert sent == [world.my_image["orthanc_instance_id"]]


async def test_nothing_of_a_study_outlives_its_deletion(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted while Orthanc makes its metadata: that is neither shown nor kept."""
    asked = Orthanc.series_metadata

    async def meanwhile_deleted(orthanc: Orthanc, study_uid: str, series_uid: str) -> bytes:
        answer = await asked(orthanc, study_uid, series_uid)
        path = f"/dicom/studies/{study_uid}"
        await lightbox.must("radiologist", "DELETE", path, params={"reason": "a wrong patient"})
        return answer

    monkeypatch.setattr(Orthanc, "series_metadata", meanwhile_deleted)
    answer = await ask(lightbox, SERIES + "/metadata", world.my_image)
    assert answer.status_code == 404
    assert rows(lightbox, "SELECT * FROM series_metadata") == []


async def test_who_refuses_gzip_gets_none(shared: Shared) -> None:
    for header in ("gzip;q=0", "gzip; q=0.0, br", "br", ""):
        path = SERIES + "/metadata"
        answer = await ask(shared.lightbox, path, shared.world.my_image, accept_encoding=header)
        assert "content-encoding" not in answer.headers, header
        assert answer.json()


async def test_a_study_that_came_again_is_another_one(lightbox: Lightbox, world: World) -> None:
    """Deleted, and stored anew under its UIDs: nothing that was kept of the first counts."""
    before = await ask(lightbox, SERIES + "/metadata", world.my_image)
    frame = await ask(lightbox, INSTANCE + "/frames/1", world.my_image)
    await lightbox.must("service", "DELETE", f"/dicom/studies/{world.my_study}?reason=wrong")
    assert (await ask(lightbox, SERIES + "/metadata", world.my_image)).status_code == 404
    uids = {
        "study_uid": world.my_study,
        "series_uid": world.my_image["series_instance_uid"],
        "sop_uid": world.my_image["sop_instance_uid"],
    }
    again = await another(lightbox, world.mine, StudyDescription="CT corr", **uids)
    tag = before.headers["etag"]
    after = await ask(lightbox, SERIES + "/metadata", again, if_none_match=tag)
    assert after.status_code == 200
    assert after.json()[0]["00081030"]["Value"] == ["CT corr"]
    moved = await ask(lightbox, INSTANCE + "/frames/1", again)
    assert location_of(moved) != location_of(frame)


# ------------------------------------------------------------------------- when Orthanc is broken


@pytest.mark.usefixtures("always_fresh")
@pytest.mark.parametrize("path", FROM_ORTHANC)
async def test_nothing_is_shown_while_orthanc_is_away(
    path: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Not even what is kept: nobody can say whether it is still what is there."""
    assert (await ask(lightbox, path, world.my_image)).status_code == 200
    faults: list[httpx.Response | Exception] = [
        httpx.ConnectError("refused at 10.0.0.1"),
        httpx.Response(500, text="10.0.0.1"),
        httpx.Response(200, json={"DiskSize": 7}),
        httpx.Response(200, content=b"{"),
    ]
    for fault in faults:
        for at in ("/statistics", "/tools/lookup"):
            fake_orthanc.faults_at = {at: fault}
            answer = await ask(lightbox, path, world.my_image)
            assert answer.status_code == 503, answer.text
            assert answer.json()["type"] == "urn:lightbox:problem:orthanc-unavailable"
            assert answer.headers["retry-after"] == "5"
            assert "10.0.0.1" not in answer.text
            assert not location_of(answer)


@pytest.mark.usefixtures("always_fresh")
@pytest.mark.parametrize("path", FROM_ORTHANC)
async def test_a_study_that_orthanc_lost_is_not_there(
    path: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Also where its metadata was kept."""
    tag = (await ask(lightbox, path, world.my_image)).headers["etag"]
    for key in list(fake_orthanc.instances):
        if fake_orthanc.instances[key].StudyInstanceUID == world.my_study:
            del fake_orthanc.instances[key], fake_orthanc.bodies[key]
    for known in ("", tag):
        answer = await ask(lightbox, path, world.my_image, if_none_match=known)
        assert answer.status_code in (404, 409), answer.text
        assert not location_of(answer)


@pytest.mark.usefixtures("always_fresh")
@pytest.mark.parametrize("path", FROM_ORTHANC)
async def test_a_study_of_two_patients_is_shown_to_nobody(
    path: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Somebody stored another patient's slice under my study's UID in Orthanc itself."""
    assert (await ask(lightbox, path, world.my_image)).status_code == 200
    series = world.my_image["series_instance_uid"]
    fake_orthanc._store(
        ct_image(patient_id="MRN-VICTIM", study_uid=world.my_study, series_uid=series)
    )
    for _ in range(2):
        answer = await ask(lightbox, path, world.my_image)
        assert answer.status_code == 409
        assert "VICTIM" not in answer.text
        assert not location_of(answer)


@pytest.mark.parametrize(
    "said",
    [
        b"<html>",
        b"{}",
        b"null",
        b'"x"',
        b"[",
        gzip.compress(b"[]"),
    ],
)
@pytest.mark.parametrize("path", METADATA)
async def test_metadata_that_is_none_is_not_passed_on(
    path: str, said: bytes, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults_at["/metadata"] = httpx.Response(200, content=said)
    answer = await ask(lightbox, path, world.my_image)
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:lightbox:problem:orthanc-unavailable"
    assert rows(lightbox, "SELECT * FROM series_metadata") == []
    fake_orthanc.faults_at.clear()
    assert (await ask(lightbox, path, world.my_image)).status_code == 200


@pytest.mark.parametrize(("status", "said"), [(404, 404), (500, 503), (401, 503)])
async def test_parts_that_can_not_be_had_are_refused_with_a_status(
    status: int, said: int, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults_at["/raw"] = httpx.Response(status, text="10.0.0.1")
    answer = await ask(lightbox, INSTANCE + "/frames/1,1", world.my_image)
    assert answer.status_code == said, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "10.0.0.1" not in answer.text


# ----------------------------------------------------------------------------------- searches


async def search(lightbox: Lightbox, params: Any = None, **caller: Any) -> httpx.Response:
    return await ask(lightbox, "/studies", params=params, **caller)


def uids_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [row["0020000D"]["Value"][0] for row in answer.json()]


async def test_every_filter_finds_what_the_standard_says(lightbox: Lightbox) -> None:
    sent = await many_studies(lightbox)
    mine = [each["StudyInstanceUID"] for each in sent]
    several = ",".join([mine[1], "9.9.9", mine[4]])
    for keyword, wanted in [*WANTED, ("StudyInstanceUID", several), ("StudyInstanceUID", mine[0])]:
        expected = {
            each["StudyInstanceUID"]
            for each in sent
            if matches(keyword, wanted, [str(each.get(keyword, ""))])
        }
        for name in (keyword, TAGS[keyword], TAGS[keyword].lower()):
            answer = await search(lightbox, {name: wanted})
            assert set(uids_of(answer)) == expected, (name, wanted)
            assert answer.headers["x-total-count"] == str(len(expected))
    both = await search(lightbox, {"PatientID": "MRN-0", "ModalitiesInStudy": "CT"})
    assert set(uids_of(both)) == {mine[0], mine[6]}


async def test_pages_come_newest_first_and_count_what_is_visible(lightbox: Lightbox) -> None:
    sent = await many_studies(lightbox)
    newest = [each["StudyInstanceUID"] for each in reversed(sent)]
    found: list[str] = []
    for offset in range(0, 12, 3):
        answer = await search(lightbox, {"limit": 3, "offset": offset})
        found += uids_of(answer)
        assert answer.headers["x-total-count"] == "10"
        left = max(0, 10 - offset - 3)
        warning = f'299 lightbox "There are {left} additional results."'
        assert answer.headers.get("warning") == (warning if left else None)
    assert found == newest
    none = await search(lightbox, {"limit": 0})
    assert (none.json(), none.headers["x-total-count"]) == ([], "10")
    everything = await search(lightbox, role="service")
    assert everything.headers["x-total-count"] == "11"
    fuzzy = await search(lightbox, {"fuzzymatching": "true", "PatientName": "jane"})
    assert uids_of(fuzzy) == []
    assert "fuzzymatching" in fuzzy.headers["warning"]


@pytest.mark.parametrize(
    "params",
    [
        {"PatientID": "MRN-VICTIM"},
        {"00100020": "MRN-VICTIM"},
        {"PatientID": "*VICTIM"},
        {"PatientName": "Victim^Vera"},
        {"PatientName": "vic*"},
        {"StudyDate": "20240404"},
        {"StudyDate": "20240401-20240430"},
        {"StudyDescription": "secret*"},
        {"StudyInstanceUID": "{theirs}"},
        {"StudyInstanceUID": "{theirs},9.9.9"},
        {"PatientID": "MRN-VICTIM", "limit": "0"},
        {"PatientID": "MRN-VICTIM", "offset": "1"},
    ],
    ids=str,
)
async def test_no_search_tells_whether_others_are_there(
    params: dict[str, str], untouched: Shared
) -> None:
    """A hit on somebody else's data and nonsense: the same answer, byte for byte."""
    theirs = untouched.world.their_study
    asked = {name: value.format(theirs=theirs) for name, value in params.items()}
    nonsense = {
        name: value if name in ("limit", "offset") else NONSENSE.get(name, "9.9.9")
        for name, value in params.items()
    }
    hit = await search(untouched.lightbox, asked, request_id="same")
    miss = await search(untouched.lightbox, nonsense, request_id="same")
    assert hit.status_code == miss.status_code == 200
    assert (hit.content, hit.headers) == (miss.content, miss.headers)
    assert (hit.json(), hit.headers["x-total-count"]) == ([], "0")
    service = await search(untouched.lightbox, asked, role="service")
    assert service.headers["x-total-count"] == "1", "it is there"


NONSENSE = {"PatientName": "Nobody", "StudyDate": "19000101", "StudyDescription": "none"}


@pytest.mark.parametrize(
    "query",
    [
        "patientid=MRN-VICTIM",
        "PatientID=MRN-MINE&00100020=MRN-VICTIM",
        "PatientID=MRN-MINE&PatientID=MRN-VICTIM",
        "PatientBirthDate=19800101",
        "StudyDate=2025",
        "StudyTime=x",
        "limit=-1",
        "limit=1&limit=100",
        "offset=x",
        "_method=DELETE",
        "nonsense=",
    ],
)
async def test_a_search_that_would_show_more_is_refused(query: str, untouched: Shared) -> None:
    request_id = uuid4().hex
    answer = await ask(untouched.lightbox, f"/studies?{query}", request_id=request_id)
    assert answer.status_code == 422, answer.text
    assert "MRN" not in answer.text
    found = [each["outcome"] for each in records(untouched.lightbox, request_id)]
    assert found == ["granted", "failed"]


async def test_a_search_is_recorded_with_whom_it_showed(lightbox: Lightbox) -> None:
    await many_studies(lightbox)
    await search(lightbox, {"PatientID": "MRN-0"}, request_id="asks")
    granted, *done = records(lightbox, "asks")
    assert (granted["action"], granted["outcome"]) == ("study:list", "granted")
    assert granted["detail"]["query"] == {"PatientID": "MRN-0"}
    assert [each["outcome"] for each in done] == ["done"]
    (patient,) = await lightbox.must("clinician", "GET", "/patients?mrn=MRN-0")
    assert done[0]["patient_id"] == patient["id"].replace("-", "")
    for role, status in (("admin", 403), ("auditor", 403), (None, 401)):
        assert (await search(lightbox, role=role)).status_code == status


async def test_series_and_instances_are_searched_in_one_study(
    lightbox: Lightbox, world: World
) -> None:
    image, uids = world.my_image, {"study_uid": world.my_study}
    second = await another(
        lightbox, world.mine, Modality="SR", SeriesNumber=0, BodyPartExamined="CHEST", **uids
    )
    third = await another(
        lightbox,
        world.mine,
        InstanceNumber=7,
        series_uid=image["series_instance_uid"],
        **uids,
    )
    series = {
        "Modality=SR": [second],
        "00080060=C?": [image],
        "SeriesNumber=0": [second],
        "SeriesNumber=1": [image],
        f"SeriesInstanceUID={image['series_instance_uid']}": [image],
        "BodyPartExamined=CHEST": [second],
        "": [second, image],
        "limit=1": [second],
        "limit=1&offset=1": [image],
        "Modality=NM": [],
    }
    for query, expected in series.items():
        answer = await ask(lightbox, f"{STUDY}/series?{query}", image)
        found = [row["0020000E"]["Value"][0] for row in answer.json()]
        assert found == [each["series_instance_uid"] for each in expected], query
        total = 2 if "limit" in query else len(expected)
        assert answer.headers["x-total-count"] == str(total)
    counts = {
        row["0020000E"]["Value"][0]: row["00201209"]["Value"][0]
        for row in (await ask(lightbox, STUDY + "/series", image)).json()
    }
    assert counts == {image["series_instance_uid"]: 2, second["series_instance_uid"]: 1}
    instances = {
        "InstanceNumber=7": {third["sop_instance_uid"]},
        f"SOPInstanceUID={image['sop_instance_uid']}": {image["sop_instance_uid"]},
        "SOPClassUID=1.2.840.10008.5.1.4.1.1.2": {
            each["sop_instance_uid"] for each in (image, second, third)
        },
        "SOPClassUID=1.2.3": set(),
    }
    for query, sops in instances.items():
        answer = await ask(lightbox, f"{STUDY}/instances?{query}", image)
        assert {row["00080018"]["Value"][0] for row in answer.json()} == sops, query
    answer = await ask(lightbox, SERIES + "/instances", image)
    assert [row["00200013"]["Value"] for row in answer.json()] == [[1], [7]]
    for path in SEARCHES:
        for query in ("PatientID=MRN-MINE", "StudyInstanceUID=1.2.3", "modality=CT"):
            assert (await ask(lightbox, f"{path}?{query}", image)).status_code == 422


async def test_searches_ask_orthanc_nothing(untouched: Shared) -> None:
    before = contents(untouched.lightbox)
    for path in ("/studies", *SEARCHES):
        assert (await ask(untouched.lightbox, path, untouched.world.my_image)).status_code == 200
    assert contents(untouched.lightbox) == before
