"""The modality worklist without a modality: entries byte by byte, the folder, and one's turn.

tests/live/test_worklist_live.py asks the real Orthanc.
"""

import asyncio
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import httpx
import pydicom
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlmodel import col

from app.audit import AuditTrail
from app.errors import AuditUnavailable
from app.models import Order, OrderStatus, Patient, Restriction
from app.worklist import order_fulfilled
from app.worklist.entry import Listed, Site, Withheld, make_entry
from app.worklist.folder import Busy, Folder, Unfit
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, make_settings, running

SOON_SECONDS = 60.0
ORDER_ID = UUID("0f8b1c6e-6f3a-4c7d-9a51-2f1f5c9d7e10")


def listed(**more: Any) -> Listed:
    """An order with all that a worklist can say; `more` replaces fields of order and patient."""
    patient = Patient(
        id=uuid4(),
        mrn="MRN-1",
        mrn_issuer="Hospital&1.2.3.4&ISO",
        first_name="Jane",
        last_name="Doe",
        dob=date(1980, 2, 1),
        sex="F",
    )
    order = Order(
        id=ORDER_ID,
        patient_id=patient.id,
        order_type="IMAGING",
        order_category="CT",
        description="CT abdomen",
        accession_number="26-0123456789ABC",
        accession_issuer="1.2.3.4.5",
        planned_study_instance_uid="2.25.117597055778299430787770094930605779743",
        scheduled_at=datetime(2026, 1, 1, 23, 30, tzinfo=UTC),
        station_ae_title="CT1",
        site="main",
        procedure_code="CTABD",
        procedure_code_system="99LOCAL",
        procedure_code_meaning="CT of the abdomen",
        protocol_code="P1",
        protocol_code_system="99LOCAL",
        protocol_code_meaning="Portal venous",
        performing_physician="Novak^Jana",
        referring_physician="Lee^Kim",
        requesting_physician="Sato^Ren",
        procedure_location="Room 2",
        patient_location="Ward 4",
        patient_state="stable",
        medical_alerts="pacemaker",
        allergies="iodine",
        special_needs="wheelchair",
        patient_weight_kg=71.25,
        pregnancy_status=4,
    )
    for name, value in more.items():
        setattr(order if name in Order.model_fields else patient, name, value)
    return Listed(order, patient)


def read(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(content))


def entry_of(site: Site | None = None, **more: Any) -> pydicom.Dataset:
    return read(make_entry(listed(**more), site or Site()).content)


# ------------------------------------------------------------------------------- the entry


def test_an_entry_is_table_k_6_1() -> None:
    entry = entry_of()
    said = {element.keyword: element.value for element in entry if element.VR != "SQ"}
    assert {name: str(value or "") for name, value in said.items()} == {
        "TimezoneOffsetFromUTC": "+0000",
        "AccessionNumber": "26-0123456789ABC",
        "ReferringPhysicianName": "Lee^Kim",
        "PatientName": "Doe^Jane",
        "PatientID": "MRN-1",
        "IssuerOfPatientID": "Hospital&1.2.3.4&ISO",
        "PatientBirthDate": "19800201",
        "PatientSex": "F",
        "PatientWeight": "71.25",
        "MedicalAlerts": "pacemaker",
        "Allergies": "iodine",
        "PregnancyStatus": "4",
        "StudyInstanceUID": "2.25.117597055778299430787770094930605779743",
        "RequestingPhysician": "Sato^Ren",
        "RequestedProcedureDescription": "CT abdomen",
        "AdmissionID": "",
        "SpecialNeeds": "wheelchair",
        "CurrentPatientLocation": "Ward 4",
        "PatientState": "stable",
        "RequestedProcedureID": "26-0123456789ABC",
        "RequestedProcedurePriority": "",
        "PatientTransportArrangements": "",
        "ConfidentialityConstraintOnPatientDataDescription": "",
    }
    (step,) = entry.ScheduledProcedureStepSequence
    plain = {element.keyword: str(element.value or "") for element in step if element.VR != "SQ"}
    assert plain == {
        "Modality": "CT",
        "RequestedContrastAgent": "",
        "ScheduledStationAETitle": "CT1",
        "ScheduledProcedureStepStartDate": "20260101",
        "ScheduledProcedureStepStartTime": "233000",
        "ScheduledPerformingPhysicianName": "Novak^Jana",
        "ScheduledProcedureStepDescription": "CT abdomen",
        "ScheduledProcedureStepID": "26-0123456789ABC",
        "ScheduledStationName": "",
        "ScheduledProcedureStepLocation": "Room 2",
        "PreMedication": "",
    }
    for (code,), value, meaning in (
        (entry.RequestedProcedureCodeSequence, "CTABD", "CT of the abdomen"),
        (step.ScheduledProtocolCodeSequence, "P1", "Portal venous"),
    ):
        assert (code.CodeValue, code.CodingSchemeDesignator) == (value, "99LOCAL")
        assert code.CodeMeaning == meaning
    assert list(entry.ReferencedStudySequence) == list(entry.ReferencedPatientSequence) == []


def test_issuers_are_qualified_where_they_say_how() -> None:
    entry = entry_of()
    (patient,) = entry.IssuerOfPatientIDQualifiersSequence
    assert patient.LocalNamespaceEntityID == "Hospital"
    assert (patient.UniversalEntityID, patient.UniversalEntityIDType) == ("1.2.3.4", "ISO")
    (accession,) = entry.IssuerOfAccessionNumberSequence
    assert (accession.UniversalEntityID, accession.UniversalEntityIDType) == ("1.2.3.4.5", "ISO")
    assert "LocalNamespaceEntityID" not in accession
    local = entry_of(mrn_issuer="Hospital", accession_issuer="RIS")
    assert local.IssuerOfPatientID == "Hospital"
    assert "IssuerOfPatientIDQualifiersSequence" not in local
    assert local.IssuerOfAccessionNumberSequence[0].LocalNamespaceEntityID == "RIS"
    none = entry_of(mrn_issuer="", accession_issuer="")
    assert "IssuerOfPatientID" not in none
    assert "IssuerOfAccessionNumberSequence" not in none


def test_what_is_not_known_is_there_and_empty() -> None:
    """Type 2: a modality must see that nothing is known, not that nothing was asked."""
    texts = "performing_physician referring_physician requesting_physician procedure_location"
    texts += " patient_location patient_state medical_alerts allergies special_needs"
    codes = [
        f"{c}{p}" for c in ("procedure_code", "protocol_code") for p in ("", "_system", "_meaning")
    ]
    unknown: dict[str, Any] = dict.fromkeys([*texts.split(), *codes, "sex", "description"], "")
    unknown |= {"patient_weight_kg": None, "pregnancy_status": None}
    entry = entry_of(**unknown)
    for keyword in (
        *("PatientSex", "PatientWeight", "PatientState", "PregnancyStatus", "MedicalAlerts"),
        *("Allergies", "SpecialNeeds", "CurrentPatientLocation", "ReferringPhysicianName"),
        *("RequestingPhysician", "AdmissionID"),
    ):
        assert keyword in entry, keyword
        assert entry[keyword].is_empty, keyword
    (step,) = entry.ScheduledProcedureStepSequence
    assert step["ScheduledPerformingPhysicianName"].is_empty
    # Type 1C: a value or nothing.
    assert "RequestedProcedureCodeSequence" not in entry
    assert "ScheduledProtocolCodeSequence" not in step
    assert entry.RequestedProcedureDescription == step.ScheduledProcedureStepDescription == "CT"


def test_times_are_the_modalitys() -> None:
    site = Site(time_zone=ZoneInfo("Europe/Vienna"))
    entry = entry_of(site)
    (step,) = entry.ScheduledProcedureStepSequence
    starts = (step.ScheduledProcedureStepStartDate, step.ScheduledProcedureStepStartTime)
    assert starts == ("20260102", "003000")
    assert entry.TimezoneOffsetFromUTC == "+0100"


def test_an_order_for_no_time_and_no_station_has_both() -> None:
    placed = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    entry = entry_of(
        Site(station_ae_title="ANYCT"), scheduled_at=None, created_at=placed, station_ae_title=""
    )
    (step,) = entry.ScheduledProcedureStepSequence
    assert step.ScheduledProcedureStepStartDate == "20260304"
    assert step.ScheduledProcedureStepStartTime == "050607"
    assert step.ScheduledStationAETitle == "ANYCT"


@pytest.mark.parametrize(
    ("level", "said"), [("", ""), ("vip", "R"), ("sealed", "V")], ids=["none", "vip", "sealed"]
)
def test_the_console_is_told_of_a_restriction(level: str, said: str) -> None:
    entry = read(make_entry(replace(listed(), restriction=level), Site()).content)
    assert (entry.ConfidentialityConstraintOnPatientDataDescription or "") == said


def test_the_same_order_is_the_same_bytes() -> None:
    """Several processes write; whoever is late must find it done."""
    assert make_entry(listed(id=ORDER_ID), Site()).content == (
        make_entry(listed(id=ORDER_ID), Site()).content
    )


@pytest.mark.parametrize(
    ("last", "first", "term"),
    [
        ("Doe", "Jane", None),
        ("Müller", "Jürgen", "ISO_IR 100"),
        ("Mu\u0308ller", "Jane", "ISO_IR 100"),  # decomposed, as some systems send it
        ("Dvořák", "Šárka", "ISO_IR 101"),
        ("Yılmaz", "Ayşe", "ISO_IR 148"),
        ("Иванов", "Иван", "ISO_IR 144"),
        ("Παπαδόπουλος", "Νίκος", "ISO_IR 126"),
        ("山田", "太郎", "ISO_IR 192"),
        ("Müller", "Иван", "ISO_IR 192"),
    ],
)
def test_the_smallest_character_set_that_fits(last: str, first: str, term: str | None) -> None:
    entry = entry_of(last_name=last, first_name=first)
    assert entry.get("SpecificCharacterSet") == term
    assert str(entry.PatientName) == f"{last}^{first}".replace("u\u0308", "ü")


def test_an_identifier_is_never_recomposed() -> None:
    """NFC and NFD of an identifier are two identifiers."""
    entry = entry_of(mrn="u\u0308-1")
    assert entry.SpecificCharacterSet == "ISO_IR 192"
    assert entry.PatientID == "u\u0308-1"


def test_a_forced_character_set() -> None:
    forced = Site(character_set="ISO_IR 192")
    assert entry_of(forced).SpecificCharacterSet == "ISO_IR 192"
    with pytest.raises(Withheld, match="ISO_IR 100"):
        make_entry(listed(last_name="Иванов"), Site(character_set="ISO_IR 100"))
    with pytest.raises(Withheld, match="SpecificCharacterSet"):
        make_entry(listed(allergies="Ибупрофен"), Site(character_set="ISO_IR 6"))


@pytest.mark.parametrize(
    ("field", "value", "keyword"),
    [
        ("mrn", "M" * 65, "PatientID"),
        ("mrn", "A\\B", "PatientID"),
        ("mrn", "", "PatientID"),
        ("mrn_issuer", "I" * 65, "PatientID"),
        ("last_name", "N" * 60, "PatientName"),  # and ^Jane: 65
        ("last_name", "Doe=Roe", "PatientName"),
        ("accession_number", "A" * 17, "AccessionNumber"),
        ("accession_number", "", "AccessionNumber"),
        ("accession_issuer", "I" * 65, "IssuerOfAccessionNumberSequence"),
        ("planned_study_instance_uid", "1." * 40, "StudyInstanceUID"),
        ("order_category", "", "Modality"),
        ("order_category", "ct", "Modality"),
        ("station_ae_title", "A" * 17, "ScheduledStationAETitle"),
        ("description", "D" * 65, "RequestedProcedureDescription"),
        ("procedure_code", "C" * 17, "RequestedProcedureCodeSequence"),
        ("procedure_code_meaning", "", "RequestedProcedureCodeSequence"),
        ("protocol_code_system", "", "ScheduledProtocolCodeSequence"),
        ("procedure_location", "L" * 17, "ScheduledProcedureStepLocation"),
        ("referring_physician", "A=B", "ReferringPhysicianName"),
        ("allergies", "A" * 65, "Allergies"),
        ("allergies", "A\\B", "Allergies"),
        ("medical_alerts", "A\nB", "MedicalAlerts"),
        ("patient_weight_kg", float("inf"), "PatientWeight"),
        ("patient_weight_kg", 0.0, "PatientWeight"),
        ("pregnancy_status", 5, "PregnancyStatus"),
    ],
)
def test_what_does_not_fit_is_refused_and_never_cut(field: str, value: Any, keyword: str) -> None:
    with pytest.raises(Withheld) as raised:
        make_entry(listed(**{field: value}), Site())
    assert raised.value.keyword == keyword


@given(
    st.text(min_size=1, max_size=70),
    st.text(max_size=70),
)
def test_an_identifier_comes_out_as_it_went_in_or_not_at_all(mrn: str, name: str) -> None:
    given_ = listed(mrn=mrn, last_name=name, description=name)
    try:
        entry = read(make_entry(given_, Site()).content)
    except Withheld:
        return
    assert entry.PatientID == mrn.strip(" ")
    assert entry.AccessionNumber == given_.order.accession_number


# ------------------------------------------------------------------------------ the folder


def folder_in(path: Path) -> Folder:
    made = Folder(path / "worklist")
    made.prepare()
    return made


def names(folder: Folder) -> set[str]:
    return {each.name for each in folder.path.iterdir()}


def file_of(folder: Folder, order_id: UUID = ORDER_ID) -> Path:
    return folder.path / f"lightbox-{order_id}.wl"


def test_the_folder_is_made_what_is_wanted(tmp_path: Path) -> None:
    folder, other = folder_in(tmp_path), uuid4()
    assert set(folder.apply({ORDER_ID: b"one", other: b"two"}).written) == {ORDER_ID, other}
    assert names(folder) == {file_of(folder).name, file_of(folder, other).name}
    done = folder.apply({ORDER_ID: b"changed"})
    assert (done.written, done.removed) == ((ORDER_ID,), (other,))
    assert file_of(folder).read_bytes() == b"changed"
    assert names(folder) == {file_of(folder).name}
    assert folder.apply({ORDER_ID: b"changed"}).written == ()


def test_what_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    """Another system may share the folder; a near miss of our names is not ours."""
    folder = folder_in(tmp_path)
    foreign = (
        *("other.wl", f"{uuid4()}.wl", f"lightbox-{uuid4()}.wl.bak", "lightbox-.wl"),
        *(f"LIGHTBOX-{uuid4()}.wl", f".{uuid4()}.tmp", f"lightbox-{uuid4()}\n.wl"),
    )
    for name in foreign:
        (folder.path / name).write_bytes(b"theirs")
    folder.apply({ORDER_ID: b"ours"})
    folder.apply({})
    assert names(folder) == set(foreign)
    assert {(folder.path / name).read_bytes() for name in foreign} == {b"theirs"}


def test_whatever_happened_to_a_file_it_is_right_again(tmp_path: Path) -> None:
    folder, elsewhere = folder_in(tmp_path), tmp_path / "elsewhere"
    elsewhere.write_bytes(b"right")
    path, wanted = file_of(folder), {ORDER_ID: b"right"}

    def link() -> None:
        path.unlink()
        path.symlink_to(elsewhere)

    def same_length() -> None:
        path.write_bytes(b"wrong")

    for harm in (
        path.unlink,
        same_length,
        link,
        lambda: path.chmod(0o666),
        lambda: os.truncate(path, 2),
    ):
        folder.apply(wanted)
        harm()
        assert folder.apply(wanted).written == (ORDER_ID,)
        assert path.read_bytes() == b"right"
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert elsewhere.read_bytes() == b"right"


def test_a_change_that_leaves_size_and_time_is_found_by_reading_all(tmp_path: Path) -> None:
    folder, wanted = folder_in(tmp_path), {ORDER_ID: b"right"}
    folder.apply(wanted)
    before = file_of(folder).stat()
    with file_of(folder).open("r+b") as file:
        file.write(b"WRONG")
    os.utime(file_of(folder), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folder.apply(wanted).written == ()
    assert folder.apply(wanted, read_all=True).written == (ORDER_ID,)


def test_what_was_half_written_is_cleaned(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    (folder.path / f".lightbox-{ORDER_ID}.0a1b2c3d.tmp").write_bytes(b"half")
    folder.apply({})
    assert names(folder) == set()


def test_a_disk_that_refuses_leaves_the_old_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in(tmp_path)
    folder.apply({ORDER_ID: b"old"})

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        folder.apply({ORDER_ID: b"new"})
    assert names(folder) == {file_of(folder).name}
    assert file_of(folder).read_bytes() == b"old"


def test_nobody_else_may_look(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = folder_in(tmp_path)
        folder.apply({ORDER_ID: b"content"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o750
    assert stat.S_IMODE(file_of(folder).stat().st_mode) == 0o640
    for mode in (0o755, 0o751, 0o770):
        folder.path.chmod(mode)
        with pytest.raises(Unfit, match="0750"):
            folder.prepare()
    folder.path.chmod(0o700)
    folder.prepare()


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = folder_in(tmp_path), folder_in(tmp_path)
    with first.turn(), pytest.raises(Busy), second.turn():
        pytest.fail("two had the turn")
    with second.turn():
        pass


# ------------------------------------------------------------------------------- the whole


@pytest.fixture
def worklist_dir(tmp_path: Path) -> Path:
    return tmp_path / "worklist"


def listing_settings(sqlite_url: str, worklist_dir: Path, **more: Any) -> Any:
    return make_settings(
        sqlite_url, URL, spool_dir=worklist_dir.parent, worklist_dir=worklist_dir, **more
    )


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at by itself: what happens, happens because of a hook."""
    monkeypatch.setattr("app.worklist.follow.EVERY_SECONDS", 3600.0)


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> float:
    """Seconds until it holds; fails where it never does."""
    started = time.monotonic()
    while True:
        found = holds()
        if found if isinstance(found, bool) else await found:
            return time.monotonic() - started
        assert time.monotonic() - started < SOON_SECONDS, "it never came to hold"
        await asyncio.sleep(0.01)


def entry_at(worklist_dir: Path, order: Any) -> Path:
    return worklist_dir / f"lightbox-{order['id']}.wl"


def inodes(worklist_dir: Path) -> dict[str, int]:
    """The entries by name; one that was written anew is another inode."""
    return {each.name: each.stat().st_ino for each in worklist_dir.glob("*.wl")}


def open_to(worklist_dir: Path, mode: int) -> None:
    worklist_dir.mkdir(exist_ok=True)
    worklist_dir.chmod(mode)


async def sql(lightbox: Lightbox, statement: Any) -> None:
    """A change past the application, as another process makes it."""
    async with lightbox.app.state.database.session() as session:
        await session.exec(statement)
        await session.commit()


@pytest.mark.usefixtures("fake_orthanc", "slow")
async def test_an_order_is_listed_at_once_and_off_at_once(
    sqlite_url: str, worklist_dir: Path
) -> None:
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        order = await lightbox.order(await lightbox.patient(), station_ae_title="CT1")
        path = entry_at(worklist_dir, order)
        await until(path.exists)
        entry = pydicom.dcmread(path)
        assert entry.StudyInstanceUID == order["planned_study_instance_uid"]
        assert entry.AccessionNumber == order["accession_number"]
        changed = {"description": "CT thorax", "referring_physician": "Lee^Kim"}
        await lightbox.must("service", "PATCH", f"/orders/{order['id']}", json=changed)
        await until(lambda: pydicom.dcmread(path).RequestedProcedureDescription == "CT thorax")
        assert pydicom.dcmread(path).ReferringPhysicianName == "Lee^Kim"
        cancel = {"status": "cancelled"}
        await lightbox.must("service", "PATCH", f"/orders/{order['id']}", json=cancel)
        await until(lambda: not path.exists())


@pytest.mark.usefixtures("fake_orthanc")
async def test_what_nobody_told_is_seen(
    sqlite_url: str, worklist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change by another process, and somebody in the folder: no hook is called."""
    monkeypatch.setattr("app.worklist.follow.EVERY_SECONDS", 0.05)
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        patient = await lightbox.patient()
        order = await lightbox.order(patient)
        path = entry_at(worklist_dir, order)
        await until(path.exists)
        path.unlink()
        await until(path.exists)
        stray = worklist_dir / f"lightbox-{uuid4()}.wl"
        stray.write_bytes(path.read_bytes())
        await until(lambda: not stray.exists())
        this = col(Patient.id) == UUID(patient["id"])
        renamed = sa.update(Patient).where(this).values(last_name="Roe", dob=date(1981, 2, 3))
        await sql(lightbox, renamed)
        await until(lambda: str(pydicom.dcmread(path).PatientName) == "Roe^Jane")
        assert pydicom.dcmread(path).PatientBirthDate == "19810203"
        restricted = Restriction(patient_id=UUID(patient["id"]), level="vip", set_by="x")
        await sql(lightbox, sa.insert(Restriction).values(**restricted.model_dump()))
        await until(
            lambda: pydicom.dcmread(path).ConfidentialityConstraintOnPatientDataDescription == "R"
        )
        off = sa.update(Order).where(col(Order.id) == UUID(order["id"]))
        await sql(lightbox, off.values(status=OrderStatus.COMPLETED))
        await until(lambda: not path.exists())


@pytest.mark.usefixtures("fake_orthanc")
async def test_what_stands_and_what_does_not(sqlite_url: str, worklist_dir: Path) -> None:
    now = datetime.now(UTC)
    settings = listing_settings(sqlite_url, worklist_dir, worklist_days=7)
    async with running(settings) as lightbox:
        patient = await lightbox.patient()

        async def placed(**more: Any) -> Any:
            return await lightbox.order(patient, **more)

        days = timedelta(days=1)
        stand = [
            await placed(),
            await placed(status="in-progress"),
            await placed(scheduled_at=(now - 6.9 * days).isoformat()),
            await placed(scheduled_at=(now + 300 * days).isoformat()),
        ]
        old = await placed()
        await sql(
            lightbox,
            sa.update(Order)
            .where(col(Order.id) == UUID(old["id"]))
            .values(created_at=now - 8 * days),
        )
        later = await placed(scheduled_at=(now + days).isoformat())
        await sql(
            lightbox,
            sa.update(Order)
            .where(col(Order.id) == UUID(later["id"]))
            .values(created_at=now - 80 * days),
        )
        stand.append(later)
        await placed(status="completed")
        await placed(status="cancelled")
        await placed(scheduled_at=(now - 7.1 * days).isoformat())
        report = await lightbox.app.state.worklist.reconcile()
        assert report.listed == len(stand)
        assert inodes(worklist_dir).keys() == {entry_at(worklist_dir, each).name for each in stand}


@pytest.mark.usefixtures("fake_orthanc", "slow")
async def test_fulfilled_orders_leave_and_the_ehr_may_put_them_back(
    sqlite_url: str, worklist_dir: Path
) -> None:
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        state = lightbox.app.state
        order = await lightbox.order(await lightbox.patient())
        path, order_id = entry_at(worklist_dir, order), UUID(order["id"])
        await until(path.exists)

        async def fulfil() -> bool:
            async with state.database.session() as session:
                changed = await order_fulfilled(session, order_id)
                await session.commit()
            await state.worklist.wake()
            return changed

        assert not await fulfil()  # no study is linked: nothing answers it yet
        await state.worklist.reconcile()
        assert path.exists()
        uploaded = await lightbox.upload(ct_image(), order_id=order["id"])
        assert uploaded.status_code == 200, uploaded.text
        await state.worklist.reconcile()
        assert path.exists()  # images are coming, and more may
        assert await fulfil()
        await until(lambda: not path.exists())
        assert not await fulfil()
        read_again = await lightbox.must("service", "GET", f"/orders/{order['id']}")
        assert read_again["fulfilled_at"] is not None
        # No study of it is left, and the EHR wants another.
        deleted = await lightbox.ask(
            "service",
            "DELETE",
            f"/api/v1/dicom/studies/{uploaded.json()['study_instance_uid']}?reason=wrong",
        )
        assert deleted.status_code == 200, deleted.text
        back = {"status": "scheduled"}
        await lightbox.must("service", "PATCH", f"/orders/{order['id']}", json=back)
        await until(path.exists)


@pytest.mark.usefixtures("fake_orthanc", "slow")
async def test_each_order_is_on_record_once_and_before_its_entry(
    sqlite_url: str, worklist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = listing_settings(sqlite_url, worklist_dir)
    real, paths = AuditTrail.record_if_first, list[Path]()

    async def broken(self: AuditTrail, claim: sa.Update, entry: Any) -> None:
        raise AuditUnavailable("not now")

    async def watched(self: AuditTrail, claim: sa.Update, entry: Any) -> None:
        assert not any(path.exists() for path in paths)
        await real(self, claim, entry)

    async with running(settings) as lightbox:
        worklist = lightbox.app.state.worklist
        monkeypatch.setattr(AuditTrail, "record_if_first", broken)
        order = await lightbox.order(await lightbox.patient())
        paths.append(entry_at(worklist_dir, order))
        with pytest.raises(AuditUnavailable):
            await worklist.reconcile()
        assert not paths[0].exists()
        monkeypatch.setattr(AuditTrail, "record_if_first", watched)
        await worklist.reconcile()
        assert paths[0].exists()
    async with running(settings) as lightbox:
        await until(lambda: lightbox.app.state.worklist._made != {})
        await lightbox.app.state.worklist.reconcile(read_all=True)
        (record,) = await lightbox.audit(action="worklist:publish")
        assert (record["outcome"], record["order_id"]) == ("done", order["id"])
        assert record["patient_id"] == order["patient_id"]
        assert record["study_instance_uid"] == order["planned_study_instance_uid"]


@pytest.mark.usefixtures("slow")
async def test_orthanc_never_gets_what_it_would_lose(
    sqlite_url: str,
    worklist_dir: Path,
    fake_orthanc: FakeOrthanc,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Orthanc drops what its DefaultEncoding lacks: better no entry than one without a name."""
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        worklist = lightbox.app.state.worklist
        await worklist.ask_orthanc()
        ivan = await lightbox.order(
            await lightbox.patient("MRN-I", last_name="Иванов", first_name="Иван")
        )
        umlaut = await lightbox.order(await lightbox.patient("MRN-U", last_name="Müller"))
        report = await worklist.reconcile()
        assert not entry_at(worklist_dir, ivan).exists()
        assert entry_at(worklist_dir, umlaut).exists()
        assert "DefaultEncoding" in report.withheld[UUID(ivan["id"])]
        said = await lightbox.must("service", "GET", f"/orders/{ivan['id']}")
        assert "ISO_IR 100" in said["worklist_problem"]
        assert ivan["id"] in caplog.text
        assert "Иван" not in caplog.text
        assert "MRN-I" not in caplog.text

        fake_orthanc.faults_at["/default-encoding"] = httpx.Response(200, text="Utf8")
        await worklist.ask_orthanc()
        await worklist.reconcile()
        assert str(pydicom.dcmread(entry_at(worklist_dir, ivan)).PatientName) == "Иванов^Иван"
        said = await lightbox.must("service", "GET", f"/orders/{ivan['id']}")
        assert said["worklist_problem"] == ""

        fake_orthanc.faults_at["/default-encoding"] = httpx.Response(200, text="Windows1251")
        await worklist.ask_orthanc()  # one that we know nothing of
        await worklist.reconcile()
        assert not entry_at(worklist_dir, umlaut).exists()


@pytest.mark.usefixtures("slow")
async def test_until_orthanc_has_told_only_ascii_stands(
    sqlite_url: str, worklist_dir: Path, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults_at["/default-encoding"] = httpx.ConnectError("not there")
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        plain = await lightbox.order(await lightbox.patient())
        umlaut = await lightbox.order(await lightbox.patient("MRN-U", last_name="Müller"))
        report = await lightbox.app.state.worklist.reconcile()
        assert entry_at(worklist_dir, plain).exists()
        assert not entry_at(worklist_dir, umlaut).exists()
        assert report.withheld == {}  # nobody has to do anything


@pytest.mark.usefixtures("fake_orthanc", "slow")
async def test_an_order_that_does_not_fit_holds_up_no_other(
    sqlite_url: str, worklist_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        patient = await lightbox.patient()
        odd = await lightbox.order(patient, order_category="")
        good = await lightbox.order(patient)
        await until(entry_at(worklist_dir, good).exists)
        await lightbox.app.state.worklist.reconcile()
        said = await lightbox.must("service", "GET", f"/orders/{odd['id']}")
        assert said["worklist_problem"].startswith("Modality: ")
        assert caplog.text.count(odd["id"]) == 1  # said once, not each second
        now_it_fits = {"order_category": "MR"}
        await lightbox.must("service", "PATCH", f"/orders/{odd['id']}", json=now_it_fits)
        await until(entry_at(worklist_dir, odd).exists)


@pytest.mark.usefixtures("fake_orthanc")
async def test_two_apps_on_one_folder(
    sqlite_url: str, worklist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write, neither undoes the other, and there is one record an order."""
    monkeypatch.setattr("app.worklist.follow.EVERY_SECONDS", 0.05)
    settings = listing_settings(sqlite_url, worklist_dir)
    async with running(settings) as one, running(settings) as two:
        patient = await one.patient()
        orders = [await (one, two)[i % 2].order(patient) for i in range(10)]
        for order in orders:
            await until(entry_at(worklist_dir, order).exists)
        before = inodes(worklist_dir)
        assert len(before) == len(orders)
        for each in (one, two, one, two):
            report = await each.app.state.worklist.reconcile(read_all=True)
            assert (report.changes.written, report.changes.removed) == ((), ())
        assert inodes(worklist_dir) == before
        records = await one.audit(action="worklist:publish")
        assert sorted(r["order_id"] for r in records) == sorted(o["id"] for o in orders)


@pytest.mark.usefixtures("fake_orthanc", "slow")
async def test_who_waited_for_the_turn_writes_what_is_true_then(
    sqlite_url: str, worklist_dir: Path
) -> None:
    """Not what it knew when it began to wait: the order was cancelled meanwhile."""
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        worklist = lightbox.app.state.worklist
        patient = await lightbox.patient()
        await worklist.reconcile()
        with Folder(worklist_dir).turn():
            order = await lightbox.order(patient)
            waiting = asyncio.create_task(worklist.reconcile())
            await asyncio.sleep(0)
            this = col(Order.id) == UUID(order["id"])
            await sql(lightbox, sa.update(Order).where(this).values(status=OrderStatus.CANCELLED))
        await waiting
        assert not entry_at(worklist_dir, order).exists()
        assert await lightbox.audit(action="worklist:publish") == []


@pytest.mark.usefixtures("fake_orthanc")
async def test_a_folder_that_can_not_be_used_stops_nothing_else(
    sqlite_url: str, worklist_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("app.worklist.follow.EVERY_SECONDS", 0.05)
    open_to(worklist_dir, 0o755)
    async with running(listing_settings(sqlite_url, worklist_dir)) as lightbox:
        order = await lightbox.order(await lightbox.patient())
        await until(lambda: "open to others" in caplog.text)
        assert inodes(worklist_dir) == {}
        open_to(worklist_dir, 0o750)
        await until(entry_at(worklist_dir, order).exists)


@pytest.mark.usefixtures("fake_orthanc")
async def test_without_a_folder_nothing_is_published(lightbox: Lightbox) -> None:
    order = await lightbox.order(await lightbox.patient())
    report = await lightbox.app.state.worklist.reconcile()
    assert report.listed == 0
    assert await lightbox.audit(action="worklist:publish") == []
    said = await lightbox.must("service", "GET", f"/orders/{order['id']}")
    assert said["worklist_problem"] == ""


# --------------------------------------------------------------------- orders, and settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("procedure_code", "CTABD"),  # without system and meaning
        ("procedure_code_meaning", "alone"),
        ("protocol_code", "C" * 17),
        ("referring_physician", "A^B^C^D^E^F"),
        ("referring_physician", "A=B"),
        ("allergies", "A" * 65),
        ("allergies", "A\\B"),
        ("medical_alerts", "A\nB"),
        ("patient_weight_kg", 0),
        ("patient_weight_kg", 1000),
        ("pregnancy_status", 0),
        ("pregnancy_status", 5),
    ],
)
async def test_what_a_modality_could_not_be_told_is_refused(
    lightbox: Lightbox, field: str, value: Any
) -> None:
    patient = await lightbox.patient()
    base = {"patient_id": patient["id"], "order_category": "CT", field: value}
    answer = await lightbox.ask("service", "POST", "/api/v1/orders", json=base)
    assert answer.status_code == 422, answer.text
    order = await lightbox.order(patient)
    path = f"/api/v1/orders/{order['id']}"
    answer = await lightbox.ask("service", "PATCH", path, json={field: value})
    assert answer.status_code == 422, answer.text
    assert await lightbox.must("service", "GET", f"/orders/{order['id']}") == order


async def test_what_a_modality_is_told_comes_back(lightbox: Lightbox) -> None:
    told = {
        "procedure_code": "CTABD",
        "procedure_code_system": "99LOCAL",
        "procedure_code_meaning": "CT of the abdomen",
        "performing_physician": "Novák^Jana",
        "allergies": "iodine",
        "patient_weight_kg": 71.25,
        "pregnancy_status": 4,
    }
    order = await lightbox.order(await lightbox.patient(), **told, protocol_code=None)
    assert {name: order[name] for name in told} == told
    cleared = {"patient_weight_kg": None, "pregnancy_status": None, "allergies": ""}
    path = f"/orders/{order['id']}"
    changed = await lightbox.must("service", "PATCH", path, json=cleared)
    assert {name: changed[name] for name in cleared} == cleared
    (record,) = [r for r in await lightbox.audit(action="order:write") if r["outcome"] == "done"]
    assert record["detail"]["clinical"] == sorted(cleared)
    assert "iodine" not in str(await lightbox.audit())
    no_null = await lightbox.ask("service", "PATCH", f"/api/v1{path}", json={"allergies": None})
    assert no_null.status_code == 422


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("worklist_time_zone", "Mars/Olympus"),
        ("worklist_time_zone", "../../etc/passwd"),
        ("worklist_character_set", "ISO_IR 9"),
        ("worklist_station_ae_title", ""),
        ("worklist_station_ae_title", "A" * 17),
        ("worklist_station_ae_title", "A\\B"),
        ("worklist_days", 0),
    ],
)
def test_settings_that_make_no_worklist(name: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        make_settings("sqlite+aiosqlite://", URL, **{name: value})
