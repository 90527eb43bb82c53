"""Whole studies through WADO-RS: every file as it is stored, or an answer that shows its break."""

import http.client
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import httpx
import pydicom
import pytest
from pydicom.uid import generate_uid

from tests.images import ct_image
from tests.live.conftest import Edged, Full, Person, make_person

DICOM = 'multipart/related; type="application/dicom"; transfer-syntax=*'


async def send(
    through_edge: Edged, person: Person, count: int = 5, **values: Any
) -> tuple[list[bytes], Any]:
    """A study of that many files, as they were sent, and what the last upload answered."""
    study, series = generate_uid(None), generate_uid(None)
    files = [
        ct_image(
            patient_id=person.mrn,
            study_uid=study,
            series_uid=series,
            InstanceNumber=number,
            **values,
        )
        for number in range(1, count + 1)
    ]
    for content in files:
        answer = await through_edge.upload(content, order_id=person.order["id"])
        assert answer.status_code == 200, answer.text
    return files, answer.json()


def parts(answer: httpx.Response) -> Iterator[bytes]:
    boundary = answer.headers["content-type"].partition("boundary=")[2].encode()
    before, *found, end = answer.content.split(b"--" + boundary)
    assert before.strip() == b""
    assert end == b"--\r\n"
    for each in found:
        head, _, body = each.partition(b"\r\n\r\n")
        assert b"content-type: application/dicom; transfer-syntax=" in head.lower()
        yield body.removesuffix(b"\r\n")


@pytest.mark.parametrize("level", ["study", "series"])
async def test_every_file_comes_as_it_was_sent(through_edge: Edged, full: Full, level: str) -> None:
    person = await make_person(through_edge)
    files, image = await send(through_edge, person, count=9)
    path = f"/studies/{image['study_instance_uid']}"
    if level == "series":
        path += f"/series/{image['series_instance_uid']}"
    opened = await through_edge.open(f"/order/{person.order['id']}")
    for answer in (
        await through_edge.ask("clinician", "GET", f"/dicom-web{path}", headers={"Accept": DICOM}),
        await opened.get(path, headers={"Accept": DICOM}),
    ):
        assert answer.status_code == 200, answer.text
        assert list(parts(answer)) == files
        assert answer.headers["etag"].startswith('W/"')


async def is_cut(through_edge: Edged, full: Full, path: str) -> bool:
    """Does an answer of 200 break off before its end?"""
    connection = http.client.HTTPConnection("localhost", full.edge.api_port, timeout=30)
    token = through_edge.token("clinician")
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    told = connection.getresponse()
    assert told.status == 200
    try:
        told.read()
    except http.client.IncompleteRead:
        return True
    finally:
        connection.close()
    return False


async def test_a_file_that_has_gone_cuts_the_answer(through_edge: Edged, full: Full) -> None:
    """What was deleted in Orthanc a moment ago can't be noticed before: then the answer ends
    without its last boundary, and no client takes it for a whole study."""
    for _ in range(5):  # a slow machine may let the second pass for which a study is unchanged
        person = await make_person(through_edge)
        files, image = await send(through_edge, person)
        path = f"/dicom-web/studies/{image['study_instance_uid']}"
        assert (await through_edge.ask("clinician", "GET", path)).status_code == 200
        full.archive.ask("DELETE", f"/instances/{image['orthanc_instance_id']}")
        if await is_cut(through_edge, full, path):
            break
    else:
        pytest.fail("an answer that lacks a file was never cut")

    # As soon as the change shows, what is left is sent, and whole.
    deadline = time.monotonic() + 60
    while True:
        with suppress(httpx.RemoteProtocolError):
            answer = await through_edge.ask("clinician", "GET", path)
            assert list(parts(answer)) == files[:-1]
            assert "lost 1 of the 5 files" in answer.headers["warning"]
            return
        assert time.monotonic() < deadline, "the study counts as unchanged for too long"


@pytest.mark.parametrize("quote", ["'", '"'])
async def test_no_directive_of_a_file_is_carried_out(
    through_edge: Edged, full: Full, quote: str
) -> None:
    """The envelope has places that the edge fills in; what a file says is never read for them.

    Short directives, too, which fit where the value of an attribute is cut or checked, and one
    that is put together of two attributes.
    """
    victim = await make_person(through_edge, requested_by="other")
    _, theirs = await send(through_edge, victim, count=1, PatientName="Victim^Vera")
    place = f"/_orthanc-whole/instances/{theirs['orthanc_instance_id']}/file"
    planted = f"<!--# include virtual={quote}{place}{quote} -->"
    echo = f"<!--# echo var={quote}request_method{quote} -->"
    person = await make_person(through_edge)
    pixels = ((planted + echo) * 20).encode().ljust(16 * 16 * 2, b" ")[: 16 * 16 * 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom: longer than LO may be
        files, mine = await send(
            through_edge,
            person,
            count=2,
            PixelData=pixels,
            StudyDescription=f"a{planted}b",
            InstitutionName=f"<!--# set var={quote}a{quote} value={quote}{place}{quote} -->",
            SeriesDescription=f"<!--# include virtual={quote}$a{quote} -->",
            StudyID=echo[:64],
            ProtocolName=f"c{echo}d",
        )
    uid = mine["study_instance_uid"]
    study = f"/dicom-web/studies/{uid}"
    instance = f"{study}/series/{mine['series_instance_uid']}/instances/{mine['sop_instance_uid']}"
    opened = await through_edge.open(f"/order/{person.order['id']}")
    asked = [
        "/dicom-web/studies",
        f"/dicom-web/studies?StudyInstanceUID={uid}",
        "/dicom-web/studies/",
        study,
        f"{study}?{planted}",
        f"{study}/series/{mine['series_instance_uid']}",
        f"{study}/series",
        f"{study}/instances",
        f"{study}/metadata",
        instance,
        f"{instance}/metadata",
        f"{instance}/frames/1",
        f"{instance}/frames/1,1",
        f"/api/v1/dicom/studies/{uid}",
    ]
    for path in asked:
        answers = [await through_edge.ask("clinician", "GET", path)]
        if path.startswith("/dicom-web"):
            answers.append(await opened.get(path.removeprefix("/dicom-web")))
        for answer in answers:
            assert b"Victim" not in answer.content, path
            assert b"aGET" not in answer.content, path
            assert b"cGETd" not in answer.content, path
            assert b"an error occurred" not in answer.content, path  # of a directive
    answer = await through_edge.ask("clinician", "GET", study)
    assert list(parts(answer)) == files
    (row,) = (await through_edge.ask("clinician", "GET", f"{study}/series")).json()
    assert row["00181030"]["Value"] == [f"c{echo}d"]
    # An answer of STOW-RS tells the sender what stood in the file, at the same address.
    for address in (study, "/dicom-web/studies"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = ct_image(patient_id=planted[:64], StudyDescription=planted, PatientSex=echo)
        stored = await through_edge.ask(
            "technologist",
            "POST",
            address,
            content=other,
            headers={"Content-Type": "application/dicom"},
        )
        assert stored.status_code >= 400
        assert b"Victim" not in stored.content


async def test_a_study_of_many_files(through_edge: Edged, full: Full) -> None:
    """Beyond 256 files, each gets a smaller share of the edge's memory."""
    person = await make_person(through_edge)
    files, image = await send(through_edge, person, count=258)
    answer = await through_edge.ask(
        "clinician", "GET", f"/dicom-web/studies/{image['study_instance_uid']}"
    )
    assert list(parts(answer)) == files
    assert pydicom.dcmread(BytesIO(files[-1])).InstanceNumber == 258
