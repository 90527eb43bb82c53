"""Many at once at the first start: only what nobody comes near is settled without a look, and as a
look at it would settle it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from app.arrivals import index
from app.arrivals.backlog import Backlog
from app.db import utcnow
from app.models import Arrival
from app.orthanc import Orthanc
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, make_settings, running

SEEN = ("state", "reasons", "candidates", "instance_count", "disk_size", "patient_id", "facts")


@pytest.fixture
async def lightbox(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    async with running(make_settings(sqlite_url, URL, spool_dir=tmp_path)) as each:
        yield each


async def stored(lightbox: Lightbox, fake: FakeOrthanc, *files: bytes) -> list[str]:
    """Orthanc's ids of studies that were there before, and are listed now."""
    ids = list(dict.fromkeys(fake._store(each).json()["ParentStudy"] for each in files))
    orthanc: Orthanc = lightbox.app.state.orthanc
    held = [each for one in ids if (each := await orthanc.held(one)) is not None]
    async with lightbox.app.state.database.writing_session() as session:
        await index.note_all(session, held)
        await session.commit()
    return ids


async def step(lightbox: Lightbox) -> tuple[int, list[str]]:
    state = lightbox.app.state
    return await Backlog(state.database, state.orthanc, "").step()


async def rows(lightbox: Lightbox) -> dict[str, Arrival]:
    async with lightbox.app.state.database.session() as session:
        return {each.orthanc_id: each for each in await session.exec(select(Arrival))}


async def change(lightbox: Lightbox, orthanc_id: str, **values: Any) -> None:
    async with lightbox.app.state.database.writing_session() as session:
        where = col(Arrival.orthanc_id) == orthanc_id
        await session.exec(sa.update(Arrival).where(where).values(**values))
        await session.commit()


def nobodys(number: int, **values: Any) -> bytes:
    person = {"PatientName": f"Old{number}^Ann", "PatientBirthDate": f"19{number + 10}0101"}
    return ct_image(patient_id=f"OLD-{number}", AccessionNumber=f"X{number}", **person | values)


async def test_what_nobody_comes_near_is_settled_as_a_look_would(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    await lightbox.order(await lightbox.patient())
    ids = await stored(lightbox, fake_orthanc, *(nobodys(each) for each in range(5)))
    assert await step(lightbox) == (5, [])
    settled = await rows(lightbox)
    assert {each.state for each in settled.values()} == {"unmatched"}
    assert {each.due_at for each in settled.values()} == {None}
    for each in ids:
        await change(lightbox, each, state="arriving", reasons="[]", due_at=utcnow())
        await lightbox.app.state.follower.look(each)
    looked = await rows(lightbox)
    for each in ids:
        for name in SEEN:
            assert getattr(settled[each], name) == getattr(looked[each], name), name
    assert await step(lightbox) == (0, [])


@pytest.mark.parametrize(
    "near",
    [
        "the planned study",
        "the accession number",
        "the accession number with zeros",
        "the PatientID",
        "the family name and the birth date",
        "the family name, a day off",
    ],
)
async def test_what_somebody_comes_near_is_looked_at(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, near: str
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient, accession_number="4711")
    said = {
        "the planned study": {"study_uid": order["planned_study_instance_uid"]},
        "the accession number": {"AccessionNumber": "4711"},
        "the accession number with zeros": {"AccessionNumber": "0004711"},
        "the PatientID": {"patient_id": "MRN-1"},
        "the family name and the birth date": {
            "PatientName": "DOE^X",
            "PatientBirthDate": "19800101",
        },
        "the family name, a day off": {"PatientName": "Doe^X", "PatientBirthDate": "19800102"},
    }[near]
    file = ct_image(
        **{
            "patient_id": "OLD",
            "PatientName": "Old^Ann",
            "PatientBirthDate": "19110101",
            "AccessionNumber": "X",
            **said,
        }
    )
    (one,) = await stored(lightbox, fake_orthanc, file)
    (other,) = await stored(lightbox, fake_orthanc, nobodys(1))
    assert await step(lightbox) == (1, [one])
    found = await rows(lightbox)
    assert (found[one].state, found[other].state) == ("arriving", "unmatched")


async def test_what_is_linked_decided_doubled_or_gone_is_looked_at(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    doubled = [nobodys(1, study_uid="1.2.3"), nobodys(2, study_uid="1.2.3")]
    twins = await stored(lightbox, fake_orthanc, *doubled)
    (held,) = await stored(lightbox, fake_orthanc, nobodys(3))
    (gone,) = await stored(lightbox, fake_orthanc, nobodys(4))
    (growing,) = await stored(lightbox, fake_orthanc, nobodys(5))
    (plain,) = await stored(lightbox, fake_orthanc, nobodys(6))
    await change(lightbox, held, held=True, state="rejected")
    await change(lightbox, growing, stable=False)
    for key in [k for k, x in fake_orthanc.instances.items() if x.PatientID == "OLD-4"]:
        del fake_orthanc.instances[key]
    count, left = await step(lightbox)
    assert (count, set(left)) == (1, {*twins, held, gone, growing})
    assert (await rows(lightbox))[plain].state == "unmatched"


async def test_what_changes_meanwhile_is_not_written_over(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order that is placed while many are settled has the study looked at again."""
    (one,) = await stored(lightbox, fake_orthanc, nobodys(1))
    write = Backlog._write

    async def writing(self: Backlog, *args: Any) -> None:
        await change(lightbox, one, due_at=utcnow(), backlog=False)
        await write(self, *args)

    monkeypatch.setattr(Backlog, "_write", writing)
    await step(lightbox)
    assert (await rows(lightbox))[one].state == "arriving"
