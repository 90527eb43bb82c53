"""Studies that modalities push straight into Orthanc find their orders; what is not sure waits."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian

from tests.lightbox import Lightbox, running
from tests.live.arrivals import (
    STABLE_SECONDS,
    QuickOrthanc,
    count_of,
    following,
    ordered,
    push,
    slices,
    studies_of,
    until,
    until_state,
)
from tests.live.conftest import Archive, DatabaseUrls, unique


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuickOrthanc]:
    with QuickOrthanc(tmp_path_factory.mktemp("arrivals")) as server:
        yield server


@pytest.fixture
async def site(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    """A following app on each database."""
    async with running(following(database.app, orthanc, tmp_path)) as lightbox:
        yield lightbox


async def test_a_study_finds_its_order_once_it_is_stable(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    archive, took = Archive(orthanc), []
    for _ in range(20):
        patient, order = await ordered(site)
        uid = order["planned_study_instance_uid"]
        push(orthanc, tmp_path, *slices(patient, order, 3))
        (study,) = [each["ID"] for each in archive.find(uid) if each["Type"] == "Study"]

        async def stable(study: str = study) -> bool:
            return bool(archive.ask("GET", f"/studies/{study}").json()["IsStable"])

        async def shown(order: Any = order, uid: str = uid) -> bool:
            return await studies_of(site, order) == [uid]

        await until(stable)
        # Told, not judged: three seconds are promised, and this machine may be busy.
        took.append(await until(shown, "linked"))
        assert await count_of(site, uid) == 3
    median, worst = statistics.median(took), max(took)
    print(f"{site.settings.database_url[:6]}: median {median:.2f} s, worst {worst:.2f} s")


async def test_an_order_that_is_placed_later_finds_its_images(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    patient, other = await ordered(site)
    await site.must("service", "PATCH", f"/orders/{other['id']}", json={"status": "cancelled"})
    accession = f"L{unique()[-10:]}"
    files = slices(patient, None, 2, AccessionNumber=accession, PatientName="Else^Body")
    uid = pydicom.dcmread(BytesIO(files[0])).StudyInstanceUID
    push(orthanc, tmp_path, *files)
    await until_state(site, uid, "conflicting")  # that name is nobody's under this number

    stranger = {"mrn": unique(), "last_name": "Late", "first_name": "Lea", "dob": "1971-02-03"}
    late = slices({**stranger, "sex": "F"}, None, 2, AccessionNumber=accession)
    late_uid = pydicom.dcmread(BytesIO(late[0])).StudyInstanceUID
    push(orthanc, tmp_path, *late)
    await until_state(site, late_uid, "unmatched")
    mrn = stranger.pop("mrn")
    person = await site.patient(mrn, **stranger)
    order = await site.order(person, accession_number=accession)

    async def shown() -> bool:
        return await studies_of(site, order) == [late_uid]

    assert await until(shown, "linked") < 5.0
    assert await count_of(site, uid) == 0


async def test_images_that_come_later_are_looked_at_before_they_are_shown(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    patient, order = await ordered(site)
    uid = order["planned_study_instance_uid"]
    push(orthanc, tmp_path, *slices(patient, order, 2))
    await until_state(site, uid, "linked")
    push(orthanc, tmp_path, *slices(patient, order, 3, start=3))
    assert await count_of(site, uid) == 2

    async def five() -> bool:
        return await count_of(site, uid) == 5

    await until(five, "add-on images")
    # One more that says it is somebody else: what is shown stays, the new one is not shown.
    push(orthanc, tmp_path, *slices(patient, order, 1, start=6, PatientName="Victim^Vera"))
    row = await until_state(site, uid, "quarantined")
    assert row["codes"] == ["files-disagree"]
    assert await count_of(site, uid) == 5


async def test_it_is_seen_arriving_at_its_order_and_at_no_other(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    patient, order = await ordered(site)
    files = slices(patient, order, 40)
    seen: list[Any] = []

    async def arriving() -> bool:
        found = await site.must("service", "GET", f"/orders/{order['id']}")
        if found["arriving"]:
            seen.append(found["arriving"])
            assert found["studies"] == []
        return bool(seen)

    sending = asyncio.create_task(asyncio.to_thread(push, orthanc, tmp_path, *files))
    await until(arriving, "arriving")
    await sending
    assert seen[0]["study_instance_uid"] == order["planned_study_instance_uid"]
    assert 0 < seen[0]["instance_count"] <= 40
    await until_state(site, order["planned_study_instance_uid"], "linked")
    found = await site.must("service", "GET", f"/orders/{order['id']}")
    assert (found["arriving"], found["studies"]) == (None, [order["planned_study_instance_uid"]])
    # Somebody else's images under this order's UID are never seen at it.
    _victim, theirs = await ordered(site)
    push(orthanc, tmp_path, *slices(patient, theirs, 2, AccessionNumber=""))
    row = await until_state(site, theirs["planned_study_instance_uid"], "conflicting")
    found = await site.must("service", "GET", f"/orders/{theirs['id']}")
    assert (found["arriving"], found["studies"], row["patient_id"]) == (None, [], None)


async def test_one_uid_under_two_patients_is_shown_to_nobody(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    patient, order = await ordered(site)
    uid = order["planned_study_instance_uid"]
    push(
        orthanc,
        tmp_path,
        *slices(patient, order, 2),
        *slices(patient, order, 1, PatientID="MRN-VICTIM"),
    )
    rows = await until_state(site, uid, "conflicting")
    assert "two-patients" in rows["codes"]
    assert await count_of(site, uid) == 0
    assert await studies_of(site, order) == []


@pytest.mark.parametrize("kind", ["deep", "deep-later", "big-endian"])
async def test_a_file_that_would_do_harm_is_never_linked(
    database: DatabaseUrls, tmp_path: Path, kind: str
) -> None:
    """In an Orthanc of its own: it would take down the shared one."""
    with QuickOrthanc(tmp_path / "orthanc") as orthanc:
        async with running(following(database.app, orthanc, tmp_path)) as site:
            patient, order = await ordered(site)
            uid = order["planned_study_instance_uid"]
            good, bad = slices(patient, order, 2)
            if kind == "deep-later":
                push(orthanc, tmp_path, good)
                await until_state(site, uid, "linked")
            image = pydicom.dcmread(BytesIO(bad))
            if kind == "big-endian":
                image.BitsAllocated = 32
                image.PixelData = bytes(16 * 16 * 4)
                image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            else:
                inner = pydicom.Dataset()
                for _ in range(20):  # beyond our bound, and not yet what kills Orthanc 1.10
                    outer = pydicom.Dataset()
                    outer.ReferencedStudySequence = [inner]
                    inner = outer
                image.ReferencedStudySequence = inner.ReferencedStudySequence
            out = BytesIO()
            pydicom.dcmwrite(
                out,
                image,
                implicit_vr=False,
                little_endian=kind != "big-endian",
                force_encoding=True,
            )
            files = [out.getvalue()] if kind == "deep-later" else [good, out.getvalue()]
            for each in files:
                Archive(orthanc).store(each)
            row = await until_state(site, uid, "quarantined")
            assert row["codes"] == ["did-not-pass"]
            assert await count_of(site, uid) == (1 if kind == "deep-later" else 0)


async def test_deletions_in_orthanc_are_seen_and_recorded(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    archive = Archive(orthanc)
    settings = following(
        database.app, orthanc, tmp_path, sweep_seconds=1, sweep_studies_per_second=100
    )
    async with running(settings) as site:
        patient, order = await ordered(site)
        uid = order["planned_study_instance_uid"]
        push(orthanc, tmp_path, *slices(patient, order, 3))
        await until_state(site, uid, "linked")
        (study,) = [each["ID"] for each in archive.find(uid) if each["Type"] == "Study"]
        (series,) = archive.ask("GET", f"/studies/{study}").json()["Series"]
        instances = archive.ask("GET", f"/series/{series}").json()["Instances"]
        archive.ask("DELETE", f"/instances/{instances[0]}")

        async def two() -> bool:
            return await count_of(site, uid) == 2

        await until(two, "a file less")
        archive.ask("DELETE", f"/studies/{study}")
        await until_state(site, uid, "gone")
        assert await studies_of(site, order) == []
        records = await site.audit(action="archive:change", study_instance_uid=uid)
        assert [each["reason"] for each in records] == ["study-gone", "instances-gone"]
        assert len(records[1]["detail"]["sop_instance_uids"]) == 1
        assert len(records[0]["detail"]["sop_instance_uids"]) == 2
        # What comes back under the same UIDs is looked at like anything else.
        push(orthanc, tmp_path, *slices(patient, order, 2, PatientName="Victim^Vera"))
        await until_state(site, uid, "conflicting")
        assert await count_of(site, uid) == 0


async def test_what_was_stored_anew_under_known_uids_is_looked_at_anew(
    site: Lightbox, orthanc: QuickOrthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted and pushed again between two looks of the sweep: our row would vouch for it."""
    monkeypatch.setattr("app.arrivals.changes._CLOCKS_APART", timedelta(seconds=0))
    archive = Archive(orthanc)
    patient, order = await ordered(site)
    uid = order["planned_study_instance_uid"]
    (first,) = slices(patient, order, 1)
    push(orthanc, tmp_path, first)
    await until_state(site, uid, "linked")

    await asyncio.sleep(2 * STABLE_SECONDS)  # the follower has read all that was said of it
    other = pydicom.dcmread(BytesIO(first))
    other.PatientName = "Victim^Vera"
    out = BytesIO()
    other.save_as(out, enforce_file_format=True)
    (study,) = [each["ID"] for each in archive.find(uid) if each["Type"] == "Study"]
    archive.ask("DELETE", f"/studies/{study}")
    archive.store(out.getvalue())
    await until_state(site, uid, "conflicting")
    assert await count_of(site, uid) == 0
