"""The seed scenario on real parts: from an order to the pixels, and what everyone else gets."""

import json
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import pydicom
import pytest

from tests.images import ct_image
from tests.live.conftest import Edged, Full, audit_of, make_person, sample, stored_frame, unique
from tests.parts import Part, parts_of

ALONE = "application/octet-stream; transfer-syntax=*"
IN_PARTS = "multipart/related; type=application/octet-stream; transfer-syntax=*"
"""As OHIF asks for frames, and as it did by default."""


def path_of(uploaded: Any) -> str:
    """The DICOMweb path of an instance."""
    study, series = uploaded["study_instance_uid"], uploaded["series_instance_uid"]
    return f"/studies/{study}/series/{series}/instances/{uploaded['sop_instance_uid']}"


async def test_from_order_to_pixels_and_away_again(through_edge: Edged, full: Full) -> None:
    """Each step as the contract describes it, with the answers a stranger gets beside it."""
    api = through_edge
    person = await make_person(api)
    patient, order = person.patient, person.order
    assert order["study_instance_uid"] is None
    assert order["accession_number"]
    content = sample("CT_small.dcm")

    refused = await api.upload(content, order_id=order["id"])
    assert refused.status_code == 409
    assert "1CT1" in refused.json()["detail"]
    assert person.mrn in refused.json()["detail"]
    answer = await api.upload(content, order_id=order["id"], coerce_patient="true")
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    uid = uploaded["study_instance_uid"]
    assert uploaded["status"] == "uploaded"
    assert (uploaded["order_id"], uploaded["patient_id"]) == (order["id"], patient["id"])
    again = await api.upload(content, order_id=order["id"], coerce_patient="true")
    assert again.json()["status"] == "duplicate"

    linked = await api.must("clinician", "GET", f"/orders/{order['id']}")
    assert linked["study_instance_uid"] == uid
    assert linked["studies"] == [uid]
    for search in (
        f"/dicom/studies?patient_id={patient['id']}",
        f"/dicom/studies?mrn={person.mrn}",
        f"/dicom/studies?accession_number={order['accession_number']}",
        f"/dicom/studies/order/{order['id']}",
        f"/dicom/studies/patient/{patient['id']}",
    ):
        (found,) = await api.must("clinician", "GET", search)
        assert found["StudyInstanceUID"] == uid
        assert found["PatientID"] == person.mrn
        assert found["order_id"] == order["id"]
        assert found["ModalitiesInStudy"] == ["CT"]

    steps = [
        f"/patients/{patient['id']}",
        f"/orders/{order['id']}",
        f"/dicom/studies/{uid}",
        f"/dicom/studies/order/{order['id']}",
        f"/dicom/studies/patient/{patient['id']}",
        f"/dicom/viewer/url/{uid}",
        f"/dicom/viewer/url/order/{order['id']}",
        f"/dicom/viewer/url/patient/{patient['id']}",
    ]
    for step in steps:
        stranger = await api.ask("clinician", "GET", f"/api/v1{step}", sub="stranger")
        assert stranger.status_code == 403, step
        assert person.mrn not in stranger.text
        assert (await api.ask(None, "GET", f"/api/v1{step}")).status_code == 401, step
    for search in ("/patients", "/orders", "/dicom/studies"):
        assert await api.must("clinician", "GET", search, sub="stranger") == []

    for subject in (uid, f"order/{order['id']}", f"patient/{patient['id']}"):
        link = await api.must("clinician", "GET", f"/dicom/viewer/url/{subject}")
        assert link["url"].startswith(
            f"{api.settings.viewer_base_url}/viewer?StudyInstanceUIDs={uid}&"
        )
        assert (link["study_count"], link["study_instance_uids"]) == (1, [uid])
        assert person.mrn not in link["url"]
        assert patient["id"] not in link["url"]

    opened = await api.open(f"/order/{order['id']}")
    frame = await opened.get(f"{path_of(uploaded)}/frames/1")
    assert frame.status_code == 200
    assert frame.content == stored_frame(content, 1)[0]

    deletion = f"/api/v1/dicom/studies/{uid}"
    assert (await api.ask("clinician", "DELETE", f"{deletion}?reason=wrong")).status_code == 403
    assert (await api.ask("service", "DELETE", deletion)).status_code == 422
    gone = await api.ask("service", "DELETE", f"{deletion}?reason=wrong+patient")
    assert gone.status_code == 200, gone.text
    assert (gone.json()["series_deleted"], gone.json()["instances_deleted"]) == (1, 1)
    assert full.archive.find(uid) == []
    for who, path in (
        ("clinician", f"/dicom/studies/{uid}"),
        ("clinician", f"/dicom/viewer/url/{uid}"),
        ("clinician", f"/dicom/viewer/url/order/{order['id']}"),
        ("service", f"/dicom/studies/{uid}"),
    ):
        assert (await api.ask(who, "GET", f"/api/v1{path}")).status_code == 404, path
    assert (await api.ask("service", "DELETE", f"{deletion}?reason=again")).status_code == 404
    assert (await opened.get(f"{path_of(uploaded)}/frames/1")).status_code == 403
    order_now = await api.must("clinician", "GET", f"/orders/{order['id']}")
    assert (order_now["study_instance_uid"], order_now["studies"]) == (None, [])
    assert await api.must("clinician", "GET", f"/dicom/studies/order/{order['id']}") == []

    records = await api.audit(patient_id=patient["id"])
    (deleted,) = audit_of(records, "study:delete", "done")
    assert deleted["detail"]["reason"] == "wrong patient"
    assert deleted["detail"]["sop_instance_uids"] == [uploaded["sop_instance_uid"]]
    assert len([each for each in records if each["actor"] == "stranger"]) == len(steps)
    assert all(each["outcome"] == "denied" for each in records if each["actor"] == "stranger")


FRAMES = [
    # file, frame, the same image in little endian where the file is in big endian
    pytest.param("MR_small.dcm", 1, "", id="explicit"),
    pytest.param("MR_small_implicit.dcm", 1, "", id="implicit"),
    pytest.param("MR_small_bigendian.dcm", 1, "MR_small.dcm", id="big-endian"),
    pytest.param(
        "SC_rgb_small_odd_big_endian.dcm", 1, "SC_rgb_small_odd.dcm", id="big-endian-OW-8"
    ),
    pytest.param("liver_expb_1frame.dcm", 1, "liver_1frame.dcm", id="big-endian-1-bit"),
    pytest.param("image_dfl.dcm", 1, "", id="deflated"),
    pytest.param("MR_small_jp2klossless.dcm", 1, "", id="jpeg-2000"),
    pytest.param("MR_small_jpeg_ls_lossless.dcm", 1, "", id="jpeg-ls"),
    pytest.param("MR_small_RLE.dcm", 1, "", id="rle"),
    pytest.param("SC_rgb_rle_16bit_2frame.dcm", 2, "", id="rle-second-frame"),
    pytest.param("examples_ybr_color.dcm", 30, "", id="jpeg-30th-frame"),
    pytest.param("rtdose.dcm", 15, "", id="32-bit-15th-frame"),
    pytest.param("SC_rgb_small_odd.dcm", 1, "", id="odd-length"),
]


@pytest.mark.parametrize(("name", "number", "twin"), FRAMES)
async def test_a_frame_is_the_pixels_that_were_sent(
    through_edge: Edged, name: str, number: int, twin: str
) -> None:
    """Byte for byte, named with the transfer syntax that those bytes are in."""
    person = await make_person(through_edge)
    content = sample(name)
    answer = await through_edge.upload(content, order_id=person.order["id"], coerce_patient="true")
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    opened = await through_edge.open(f"/order/{person.order['id']}")
    pixels, syntax = stored_frame(sample(twin) if twin else content, number)
    named = f"application/octet-stream; transfer-syntax={syntax}"
    frames = f"{path_of(uploaded)}/frames"
    frame = await opened.get(f"{frames}/{number}", headers={"Accept": ALONE})
    assert frame.status_code == 200, frame.text
    assert frame.headers["content-type"] == named
    assert frame.content == pixels
    assert "content-encoding" not in frame.headers
    for each, expected in ((f"/{number}", 1), (f"/{number},{number}", 2)):
        answer = await opened.get(f"{frames}{each}", headers={"Accept": IN_PARTS})
        assert parts_of(answer) == [Part(named, pixels)] * expected
        assert "content-encoding" not in answer.headers
    beyond = await opened.get(f"{path_of(uploaded)}/frames/{number + 30}")
    assert beyond.status_code == 404
    # Samples share their UIDs: make room for the next one.
    uid = uploaded["study_instance_uid"]
    await through_edge.must("service", "DELETE", f"/dicom/studies/{uid}?reason=test+is+over")


async def test_pixels_that_the_archive_would_swap_wrongly_are_refused(
    through_edge: Edged, full: Full
) -> None:
    """Orthanc swaps 32-bit big endian samples as if they had 16: a plausible, wrong dose."""
    person = await make_person(through_edge)
    answer = await through_edge.upload(
        sample("rtdose_expb.dcm"), order_id=person.order["id"], coerce_patient="true"
    )
    assert answer.status_code == 422, answer.text
    assert "little endian" in answer.json()["detail"]
    image = pydicom.dcmread(BytesIO(sample("rtdose_expb.dcm")))
    assert full.archive.find(image.StudyInstanceUID) == []


async def test_what_the_viewer_asks_for(through_edge: Edged, full: Full) -> None:
    """Search, series, metadata, thumbnail and status, as OHIF asks for them."""
    person = await make_person(through_edge)
    uploaded = (
        await through_edge.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    opened = await through_edge.open(f"/order/{person.order['id']}")
    study, series = uploaded["study_instance_uid"], uploaded["series_instance_uid"]
    paging = "limit=101&offset=0&fuzzymatching=false&includefield=00081030%2C00080060"
    for query in (f"{paging}&StudyInstanceUID={study}", f"{paging}&00100020={person.mrn}"):
        answer = await opened.get(f"/studies?{query}")
        assert answer.headers["content-type"] == "application/dicom+json"
        (row,) = answer.json()
        assert row["0020000D"]["Value"] == [study]
        assert row["00080061"]["Value"] == ["CT"]
    (row,) = (await opened.get(f"/studies/{study}/series?includefield=all")).json()
    assert row["0020000E"]["Value"] == [series]
    answer = await opened.get(f"/studies/{study}/series/{series}/metadata")
    assert answer.headers["content-type"] == "application/dicom+json"
    (row,) = answer.json()
    assert row["00080018"]["Value"] == [uploaded["sop_instance_uid"]]
    assert row["00280010"]["Value"] == [16]
    assert row["00100020"]["Value"] == [person.mrn]
    assert "http://" not in answer.text
    pixel_uri = row["7FE00010"]["BulkDataURI"]
    assert pixel_uri == f"/s/{opened.ctx}/dicom-web{path_of(uploaded)}/frames"
    for viewport in ("", "?viewport=256%2C256"):
        picture = await opened.get(f"{path_of(uploaded)}/rendered{viewport}")
        assert picture.headers["content-type"] == "image/jpeg"
        assert picture.content.startswith(b"\xff\xd8\xff")
    assert full.get("viewer", f"/s/{opened.ctx}/status", Cookie=opened.cookie)[0] == 204
    clean = f"/viewer?StudyInstanceUIDs={study}&ctx={opened.ctx}"
    assert full.get("viewer", clean) == (200, b"<!doctype html><title>the viewer</title>")


async def test_the_waveform_of_an_ecg(through_edge: Edged) -> None:
    """Metadata leads to the bulk data by a URL of our own, and that to the samples' bytes."""
    person = await make_person(through_edge, order_category="ECG")
    content = sample("waveform_ecg.dcm")
    uploaded = (
        await through_edge.upload(content, order_id=person.order["id"], coerce_patient="true")
    ).json()
    opened = await through_edge.open(f"/order/{person.order['id']}")
    series = path_of(uploaded).partition("/instances/")[0]
    (row,) = (await opened.get(f"{series}/metadata")).json()
    groups = pydicom.dcmread(BytesIO(content)).WaveformSequence
    root = f"/s/{opened.ctx}/dicom-web"
    for group, item in zip(groups, row["54000100"]["Value"], strict=True):
        uri = urlsplit(item["54001010"]["BulkDataURI"])
        assert uri.netloc == ""
        assert uri.path.startswith(f"{root}{path_of(uploaded)}/bulk/54000100/")
        answer = await opened.get(
            uri.path.removeprefix(root), headers={"Accept": "application/octet-stream"}
        )
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.content == group.WaveformData
    uid = uploaded["study_instance_uid"]
    await through_edge.must("service", "DELETE", f"/dicom/studies/{uid}?reason=test+is+over")


async def test_each_credential_opens_its_own_origin_only(through_edge: Edged, full: Full) -> None:
    """A stolen viewer cookie can't call the API, a bearer token opens no session of a viewer."""
    person = await make_person(through_edge)
    uploaded = (
        await through_edge.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    opened = await through_edge.open(f"/order/{person.order['id']}")
    bearer = f"Bearer {through_edge.token('clinician')}"
    inside = f"/dicom-web{path_of(uploaded)}/frames/1"
    frame = f"/s/{opened.ctx}{inside}"
    order = f"/api/v1/orders/{person.order['id']}"
    assert full.get("viewer", frame, Cookie=opened.cookie)[0] == 200
    assert full.get("api", order, Authorization=bearer)[0] == 200
    assert full.get("api", inside, Authorization=bearer)[0] == 200
    for origin, path, header, status in (
        ("api", order, {"Cookie": opened.cookie}, 401),
        ("api", inside, {"Cookie": opened.cookie}, 401),
        ("viewer", inside, {"Cookie": opened.cookie}, 404),
        ("viewer", inside, {"Authorization": bearer}, 404),
        ("viewer", "/dicom-web/studies", {"Authorization": bearer}, 404),
        ("api", frame, {"Cookie": opened.cookie}, 404),
        ("api", frame, {"Authorization": bearer}, 404),
        ("viewer", frame, {"Authorization": bearer}, 401),
        ("viewer", frame, {}, 401),
        ("viewer", order, {"Authorization": bearer}, 404),
        ("viewer", order, {"Cookie": opened.cookie}, 404),
    ):
        assert full.get(origin, path, **header)[0] == status, (origin, path, header)


async def test_nothing_behind_the_edge_is_reachable(through_edge: Edged, full: Full) -> None:
    """Internal locations are internal, and Orthanc itself wants the credential."""
    person = await make_person(through_edge)
    uploaded = (
        await through_edge.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    opened = await through_edge.open(f"/order/{person.order['id']}")
    instance = f"/instances/{uploaded['orthanc_instance_id']}"
    for path in (
        f"/_orthanc{instance}/file",
        f"/_orthanc{instance}/frames/0/raw",
        f"/_orthanc-image{instance}/frames/0/rendered",
        f"/_orthanc{instance}",
        "/_orthanc/system",
        "/_ohif/index.html",
        "/_problem",
        "/_page",
        f"{instance}/file",
        "/system",
        "/dicom-web/instances",
        "/dicom-web/series",
        f"/dicom-web{instance}/file",
        "/wado?requestType=WADO",
        f"/s/{opened.ctx}/dicom-web/series",
        f"/s/{opened.ctx}/dicom-web/instances",
        f"/s/{opened.ctx}/dicom-web/../../../_orthanc/system",
    ):
        for origin in ("api", "viewer"):
            status, body = full.get(
                origin,
                path,
                Cookie=opened.cookie,
                Authorization=f"Bearer {through_edge.token('service')}",
                X_Accel_Redirect=f"/_orthanc{instance}/file",
            )
            assert status == 404, (origin, path)
            assert person.mrn.encode() not in body
    for path in ("/system", f"{instance}/file", "/dicom-web/studies"):
        assert full.archive.without_credential(path) == 401


PATHS = [
    "/studies/{mine}/../{theirs}/series",
    "/studies/{mine}/%2e%2e/{theirs}/series",
    "/studies/{mine}/..%2f{theirs}/series",
    "/studies/{mine}/..\\{theirs}/series",
    "/studies/{mine}//../{theirs}/series",
    "/studies/{theirs}/series",
    "/studies/{theirs}/series/{their_series}/metadata",
    "/studies/{mine}/series/{their_series}/metadata",
    "/studies/{mine}/series/{their_series}/instances/{their_sop}/frames/1",
    "/studies/{mine}/series/{my_series}/instances/{their_sop}/frames/1",
    "/studies/{mine}/series/{their_series}/instances/{their_sop}/rendered",
    "/studies/{mine}/series/{my_series}/instances/{their_sop}/bulk/00420011",
    "/studies/{mine},{theirs}/series",
    "/studies/{mine}%5C{theirs}/series",
    "/studies/{mine}%0a/series",
    "/studies/{mine}/series?StudyInstanceUID={theirs}",
    "/studies?StudyInstanceUID={theirs}",
    "/studies?StudyInstanceUID={mine},{theirs}",
    "/studies?PatientID={their_mrn}",
    "/studies?patientid={their_mrn}",
    "/studies?PATIENTID={their_mrn}",
    "/studies?%50atientID={their_mrn}",
    "/studies?PatientID=&00100020={their_mrn}",
    "/studies?PatientID={my_mrn}&00100020={their_mrn}",
    "/studies?PatientID={my_mrn}&PatientID={their_mrn}",
    "/studies?PatientID=*",
    "/studies?PatientName=*",
    "/studies?limit=-1",
    "/studies/{mine}/series/{my_series}/instances/{my_sop}/bulk/../../../../../../../system",
    "/studies/{mine}/series/{my_series}/instances/{my_sop}/frames/1?_method=DELETE",
]


async def test_no_spelling_of_a_path_reaches_another_patient(
    through_edge: Edged, full: Full
) -> None:
    """Every trick that was seen to work on some gateway, in one open viewer."""
    mine, theirs = await make_person(through_edge), await make_person(through_edge)
    words: dict[str, str] = {"my_mrn": mine.mrn, "their_mrn": theirs.mrn}
    for person, prefix, study_key in ((mine, "my", "mine"), (theirs, "their", "theirs")):
        answer = await through_edge.upload(
            ct_image(patient_id=person.mrn, StudyDescription=unique(prefix)),
            order_id=person.order["id"],
        )
        uploaded = answer.json()
        words[study_key] = uploaded["study_instance_uid"]
        words[f"{prefix}_series"] = uploaded["series_instance_uid"]
        words[f"{prefix}_sop"] = uploaded["sop_instance_uid"]
    opened = await through_edge.open(f"/order/{mine.order['id']}")
    for template in PATHS:
        path = f"/s/{opened.ctx}/dicom-web{template.format(**words)}"
        status, body = full.get(
            "viewer", path, Cookie=opened.cookie, X_HTTP_Method_Override="DELETE"
        )
        assert status in (200, 400, 404, 422), (status, template)
        for secret in ("theirs", "their_mrn", "their_series", "their_sop"):
            assert words[secret].encode() not in body, template
        if status == 200 and body.startswith(b"["):
            rows = json.loads(body)
            assert all(row["0020000D"]["Value"] == [words["mine"]] for row in rows), template
    assert full.archive.owners(words["mine"]) == [mine.mrn]
    assert full.archive.owners(words["theirs"]) == [theirs.mrn]
