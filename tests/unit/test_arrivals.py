"""What files say of whose they are, and the log of changes by pages, against a fake archive."""

import asyncio
import re
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from app.arrivals import facts
from app.arrivals.changes import Changes, NotOursError
from app.arrivals.facts import FilesDisagreeError
from app.arrivals.references import renumbered
from app.arrivals.sweep import Sweep
from app.db import Database
from app.dicom import Limits, orthanc_id, read_header, read_tags, scan
from app.matching import ArrivedStudy, Identifier, Request
from app.models import Arrival, FollowerPosition
from app.orthanc import Orthanc
from tests.images import ct_image
from tests.lightbox import make_settings

URL = "http://many-orthanc.test"


def says(content: bytes) -> ArrivedStudy:
    file = BytesIO(content)
    with scan(file, Limits(max_bytes=10_000_000)) as scanned:
        return facts.of_file(read_header(file, scanned), read_tags(file, scanned))


def item(**values: Any) -> Dataset:
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_every_identifier_of_a_file_is_read() -> None:
    issuer = item(LocalNamespaceEntityID="RIS", UniversalEntityID="1.2.9")
    study = says(
        ct_image(
            patient_id="MRN-1",
            IssuerOfPatientID="HOSP",
            IssuerOfPatientIDQualifiersSequence=[item(UniversalEntityID="1.2.3")],
            OtherPatientIDsSequence=[item(PatientID="OLD-1", IssuerOfPatientID="CLINIC")],
            OtherPatientNames="Maiden^Jane",
            AccessionNumber="A-1",
            IssuerOfAccessionNumberSequence=[issuer],
            RequestAttributesSequence=[
                item(AccessionNumber="A-2", StudyInstanceUID="1.2.3.4"),
                item(ReferencedStudySequence=[item(ReferencedSOPInstanceUID="1.2.3.5")]),
            ],
            BodyPartExamined="CHEST",
            StationName="CT-ONE",
            InstitutionName="Main",
        )
    )
    assert study.patient == Identifier("MRN-1", "HOSP", "1.2.3")
    assert study.other_patient_ids == (Identifier("OLD-1", "CLINIC"),)
    assert study.other_patient_names == ("Maiden^Jane",)
    assert study.accession == Identifier("A-1", "RIS", "1.2.9")
    assert study.requests == (
        Request(Identifier("A-2"), "1.2.3.4"),
        Request(Identifier(), "1.2.3.5"),
    )
    assert (study.body_parts, study.stations) == (("CHEST",), ("CT-ONE",))
    assert facts.from_json(facts.as_json(study, from_files=True)) == (study, True)


@pytest.mark.parametrize(
    "other",
    [
        {"PatientName": "Roe^Jane"},
        {"PatientBirthDate": "19800102"},
        {"PatientSex": "M"},
        {"IssuerOfPatientID": "ELSEWHERE"},
        {"patient_id": "MRN-2"},
    ],
)
def test_files_of_one_study_must_name_one_patient(other: dict[str, Any]) -> None:
    mine = says(ct_image(study_uid="1.2.3"))
    with pytest.raises(FilesDisagreeError):
        facts.merged([mine, says(ct_image(study_uid="1.2.3", **other))])


def test_what_one_file_lacks_another_says() -> None:
    poor = ct_image(study_uid="1.2.3", PatientName="", PatientSex="", AccessionNumber="A-1")
    rich = ct_image(study_uid="1.2.3", AccessionNumber="A-2", Modality="SR")
    whole = facts.merged([says(poor), says(rich)])
    assert (whole.patient_name, whole.sex) == ("Doe^Jane", "F")
    assert whole.modalities == ("CT", "SR")
    # A second accession number must not go under.
    assert (whole.accession.value, whole.requests) == ("A-1", (Request(Identifier("A-2")),))


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_copy_always_has_the_same_uids(one: str, other: str) -> None:
    made = renumbered("patient", one)
    assert made == renumbered("patient", one)
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{1,38}", made)
    assert (made == renumbered("patient", other)) is (one == other)
    assert made != renumbered("somebody else", one)


# ------------------------------------------------------------------------------ the log


@dataclass
class ManyStudies:
    """An archive of thousands of studies and a log of changes, and nothing else."""

    uids: list[str] = field(default_factory=list)
    log: list[tuple[int, str, str]] = field(default_factory=list)
    last: int = 0
    requests: int = 0

    def add(self, uid: str) -> None:
        self.uids.append(uid)
        for kind in ("NewInstance", "NewStudy", "StableStudy"):
            self.last += 1
            self.log.append((self.last, kind, orthanc_id("P", uid)))

    def study(self, uid: str) -> dict[str, Any]:
        return {
            "ID": orthanc_id("P", uid),
            "IsStable": True,
            "Series": [],
            "MainDicomTags": {"StudyInstanceUID": uid},
            "PatientMainDicomTags": {"PatientID": "P"},
        }

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        path, query = request.url.path, request.url.params
        since, limit = int(query.get("since", 0)), int(query.get("limit", 0))
        if path == "/changes":
            found = [each for each in self.log if each[0] > since][:limit]
            changes = [
                {"Seq": n, "ChangeType": kind, "ID": key, "Date": "20250101T000000"}
                for n, kind, key in found
            ]
            last = found[-1][0] if found else self.last
            return httpx.Response(200, json={"Changes": changes, "Last": last})
        if path == "/statistics":
            names = ("CountPatients", "CountStudies", "CountSeries", "CountInstances")
            counts = {each: len(self.uids) for each in names}
            return httpx.Response(200, json={**counts, "TotalDiskSize": "0"})
        if path == "/studies" and "expand" in query:
            page = self.uids[since : since + limit]
            return httpx.Response(200, json=[self.study(each) for each in page])
        if path == "/studies":
            return httpx.Response(200, json=[orthanc_id("P", each) for each in self.uids])
        for uid in self.uids:
            if path == f"/studies/{orthanc_id('P', uid)}":
                return httpx.Response(200, json=self.study(uid))
        return httpx.Response(404, json={})


@dataclass
class Parts:
    archive: ManyStudies
    database: Database
    orthanc: Orthanc

    async def arrivals(self, *where: Any) -> int:
        async with self.database.session() as session:
            query = sa.select(sa.func.count()).select_from(Arrival).where(*where)
            return int(await session.scalar(query) or 0)

    async def position(self) -> FollowerPosition:
        async with self.database.session() as session:
            found = await session.get(FollowerPosition, "orthanc")
        assert found is not None
        return found

    async def follow(self) -> int:
        """To the end, each step by a follower that has just started; how many steps."""
        steps = 1
        while await Changes(self.database, self.orthanc).follow():
            steps += 1
        return steps


@pytest.fixture
async def parts(sqlite_url: str, tmp_path: Path) -> Any:
    archive = ManyStudies()
    database = Database(sqlite_url)
    orthanc = Orthanc.from_settings(make_settings(sqlite_url, URL))
    with respx.mock(assert_all_called=False) as router:
        router.route(url__startswith=URL).mock(side_effect=archive.answer)
        yield Parts(archive, database, orthanc)
    await orthanc.close()
    await database.close()


async def test_thousands_at_the_first_start_by_pages_whoever_dies(parts: Parts) -> None:
    for number in range(3000):
        parts.archive.add(f"1.2.{number}")
    steps = await parts.follow()
    assert await parts.arrivals() == 3000
    assert parts.archive.requests < 80  # not one for each
    position = await parts.position()
    assert (position.listing, position.listed, position.to_list) == (False, 3000, 3000)
    assert position.position == 9000
    assert steps >= 15
    for number in range(5):
        parts.archive.add(f"1.3.{number}")
    await parts.follow()
    assert await parts.arrivals() == 3005
    assert (await parts.position()).position == 9015


async def test_a_second_follower_can_not_move_the_position(parts: Parts) -> None:
    await parts.follow()
    parts.archive.add("1.2.3")
    one, two = (Changes(parts.database, parts.orthanc) for _ in range(2))
    await one.follow()
    before = await parts.position()
    parts.archive.add("1.2.4")
    both = await asyncio.gather(one.follow(), two.follow(), return_exceptions=True)
    assert sorted(type(each).__name__ for each in both) in (
        ["NotOursError", "bool"],
        ["bool", "bool"],  # one after the other
    )
    assert await parts.arrivals() == 2
    async with parts.database.session() as session:
        before.position -= 1
        with pytest.raises(NotOursError):
            await one._move(session, before, position=1)


async def test_a_sequence_that_counts_anew_is_noticed(parts: Parts) -> None:
    for number in range(10):
        parts.archive.add(f"1.2.{number}")
    follower = Changes(parts.database, parts.orthanc)
    while await follower.follow():
        pass
    parts.archive.log, parts.archive.last = [], 0
    parts.archive.add("1.9.1")
    while await follower.follow():
        pass
    assert await parts.arrivals(Arrival.study_instance_uid == "1.9.1") == 1
    assert (await parts.position()).position == 3
    # Another log that is longer than ours: known by the change at our position.
    parts.archive.log, parts.archive.last = [], 0
    for number in range(20):
        parts.archive.add(f"1.8.{number}")
    await parts.follow()
    assert await parts.arrivals(sa.text("study_instance_uid LIKE '1.8.%'")) == 20


async def test_what_is_missing_in_bulk_is_no_deletion(parts: Parts) -> None:
    for number in range(100):
        parts.archive.add(f"1.2.{number}")
    await parts.follow()
    async with parts.database.session() as session:
        await session.exec(sa.update(Arrival).values(due_at=None))
        await session.commit()
    sweep = Sweep(parts.database, parts.orthanc, seconds=1)
    due = sa.text("due_at IS NOT NULL")
    kept = parts.archive.uids
    parts.archive.uids = kept[:10]
    await sweep.whole()
    assert "90 of 100" in sweep.problem
    assert await parts.arrivals(due) == 0
    parts.archive.uids = kept[:95]
    await sweep.whole()
    assert sweep.problem == ""
    assert await parts.arrivals(due) == 5
    # And one that no change told of.
    parts.archive.uids = [*kept, "1.7.7"]
    await sweep.whole()
    assert await parts.arrivals(Arrival.study_instance_uid == "1.7.7") == 1
