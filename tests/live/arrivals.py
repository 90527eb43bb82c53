"""What live tests of arrivals share: an Orthanc that modalities push to, an app that follows."""

import asyncio
import json
import re
import secrets
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom.uid import generate_uid

from app.demo.stack import LOOPBACK, OrthancServer, find_program
from app.settings import Settings
from tests.images import ct_image
from tests.lightbox import Lightbox
from tests.live.conftest import settings_for, unique

STABLE_SECONDS = 1
DEADLINE_SECONDS = 120.0


class QuickOrthanc(OrthancServer):
    """One that calls a study stable after `STABLE_SECONDS`, and takes what CT1 sends."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(
            state_dir,
            username="lightbox",
            password=secrets.token_hex(16),
            modalities={"CT1": LOOPBACK},
        )

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        (program, configuration), environment = super()._prepare()
        text = Path(configuration).read_text(encoding="utf-8")
        changed, count = re.subn(r'"StableAge" : \d+', f'"StableAge" : {STABLE_SECONDS}', text)
        assert count == 1
        own = self.state_dir / "orthanc.json"
        own.write_text(changed, encoding="utf-8")
        return [program, own], environment


def push(orthanc: OrthancServer, folder: Path, *files: bytes) -> None:
    """Send files as a modality does: by C-STORE, straight into Orthanc."""
    own = folder / secrets.token_hex(4)
    own.mkdir()
    for number, content in enumerate(files):
        (own / f"{number:05}.dcm").write_bytes(content)
    # Not by PATH: pynetdicom installs programs of the same names.
    program = str(find_program("storescu", ("/usr/bin/storescu",), "dcmtk"))
    sent = subprocess.run(
        [
            *(program, "-aet", "CT1", "-aec", "LIGHTBOX", "+sd", "+r"),
            *(LOOPBACK, str(orthanc.dicom_port), str(own)),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert sent.returncode == 0, sent.stderr


def following(url: str, orthanc: OrthancServer, spool: Path, **more: Any) -> Settings:
    return settings_for(url, orthanc, **{"spool_dir": spool, "follow_orthanc": True, **more})


async def until(
    what: Callable[[], Awaitable[Any]], why: str = "", seconds: float = DEADLINE_SECONDS
) -> float:
    """Seconds until something is so."""
    started = time.monotonic()
    while not await what():
        assert time.monotonic() - started < seconds, f"never came: {why}"
        await asyncio.sleep(0.05)
    return time.monotonic() - started


def slices(person: Any, order: Any | None, count: int, **values: Any) -> list[bytes]:
    """A study of a patient, as the modality makes it from its worklist entry."""
    study = values.pop("study_uid", None) or (
        order["planned_study_instance_uid"] if order else generate_uid(None)
    )
    series = values.pop("series_uid", None) or generate_uid(None)
    start = values.pop("start", 1)
    tags = {
        "AccessionNumber": order["accession_number"] if order else "",
        "PatientName": f"{person['last_name']}^{person['first_name']}",
        "PatientBirthDate": person["dob"].replace("-", ""),
        "PatientSex": person["sex"],
        "StudyDate": time.strftime("%Y%m%d"),
        **values,
    }
    mrn = tags.pop("PatientID", person["mrn"])
    return [
        ct_image(patient_id=mrn, study_uid=study, series_uid=series, InstanceNumber=number, **tags)
        for number in range(start, start + count)
    ]


async def ordered(lightbox: Lightbox, **person: Any) -> tuple[Any, Any]:
    """A patient of this test's own, and an order of theirs."""
    name = "".join(secrets.choice("bcdfghklmnprstvw") + secrets.choice("aeiou") for _ in range(5))
    born = f"19{secrets.randbelow(90) + 10}-0{secrets.randbelow(9) + 1}-1{secrets.randbelow(10)}"
    values = {"last_name": name.title(), "dob": born, **person}
    patient = await lightbox.patient(unique(), **values)
    return patient, await lightbox.order(patient)


async def studies_of(lightbox: Lightbox, order: Any) -> list[str]:
    found: list[str] = (await lightbox.must("service", "GET", f"/orders/{order['id']}"))["studies"]
    return found


async def count_of(lightbox: Lightbox, uid: str) -> int:
    """How many instances of a study are shown; 0: it is not there."""
    answer = await lightbox.ask("service", "GET", f"/api/v1/dicom/studies/{uid}")
    if answer.status_code == 404:
        return 0
    return int(answer.json()["NumberOfStudyRelatedInstances"])


async def state_of(lightbox: Lightbox, uid: str) -> list[Any]:
    """State, reasons and so on of the rows of a StudyInstanceUID."""
    import sqlalchemy as sa
    from sqlmodel import select

    from app.models import Arrival

    async with lightbox.app.state.database.session() as session:
        rows = await session.exec(
            select(Arrival).where(Arrival.study_instance_uid == uid).order_by(sa.text("orthanc_id"))
        )
        return [
            {**row.model_dump(), "codes": [x["code"] for x in json.loads(row.reasons)]}
            for row in rows
        ]


async def until_state(lightbox: Lightbox, uid: str, state: str) -> Any:
    async def so() -> bool:
        rows = await state_of(lightbox, uid)
        return bool(rows) and all(each["state"] == state for each in rows)

    try:
        await until(so, f"{uid} {state}")
    except AssertionError:
        found = [
            {name: each[name] for name in ("state", "codes", "reasons", "stable", "due_at", "held")}
            for each in await state_of(lightbox, uid)
        ]
        raise AssertionError(f"not {state}: {found}") from None
    return (await state_of(lightbox, uid))[0]
