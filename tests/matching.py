"""Attribute matching of PS3.4 C.2.2.2, written from the standard and not from `app.dicomweb`.

What a search in SQL finds on either database is held against this; with studies to search for.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

from pydicom.datadict import dictionary_VR

from tests.images import ct_image
from tests.lightbox import Lightbox

FOLDED = ("PatientName", "ReferringPhysicianName", "StudyDescription")
"""Compared without case (C.2.2.2.1), and whatever way accents are written."""


def matches(keyword: str, wanted: str, values: Iterable[str]) -> bool:
    """Does any of an attribute's values match? One that is absent is the empty value."""
    held = list(values) or [""]
    vr = dictionary_VR(keyword)
    if not wanted:
        return True
    if vr == "UI":
        return any(each in wanted.replace("\\", ",").split(",") for each in held)
    if vr in ("DA", "TM"):
        return any(_within(wanted, each) for each in held if each)
    if keyword in FOLDED:
        return any(_like(_folded(wanted), _folded(each)) for each in held)
    return any(_like(wanted, each) for each in held)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().rstrip("^ ")


def _within(wanted: str, value: str) -> bool:
    """Range matching (C.2.2.2.5). Less precision stands for the whole time in it."""
    first, dash, last = wanted.partition("-")
    last = last if dash else first
    first, last, value = (each.replace(".", "") for each in (first, last, value))
    return first.ljust(12, "0") <= value.ljust(12, "0") <= (last or "9").ljust(12, "9")


def _like(pattern: str, text: str) -> bool:
    """Wildcards (C.2.2.2.4): by the lengths of the text that the pattern so far can have eaten."""
    eaten = {0}
    for each in pattern:
        if each == "*":
            eaten = set(range(min(eaten), len(text) + 1))
        else:
            eaten = {n + 1 for n in eaten if n < len(text) and each in ("?", text[n])}
        if not eaten:
            return False
    return len(text) in eaten


PEOPLE = ["Doe^Jane", "doe^john", "Dörfler^Zoë", "O'Neil^A[1]", "Roe^R_1%"]


async def many_studies(lightbox: Lightbox) -> list[dict[str, Any]]:
    """Ten studies of two patients of `clinician`; as sent, and one of somebody else."""
    sent: list[dict[str, Any]] = []
    for n in range(10):
        mrn = f"MRN-{n % 2}"
        if n < 2:
            await lightbox.order(await lightbox.patient(mrn))
        values = {
            "PatientName": PEOPLE[n % 5],
            "StudyDate": f"202501{n + 1:02}",
            "StudyTime": f"{n + 8:02}1500",
            "StudyDescription": ("CT thorax", "MR [brain]", "")[n % 3],
            "StudyID": f"S-{n}",
            "ReferringPhysicianName": ("Smith^Ann", "Jones^Bo")[n % 2],
            "Modality": ("CT", "MR", "US")[n % 3],
        }
        answer = await lightbox.upload(
            ct_image(patient_id=mrn, **values), role="service", sub="ehr"
        )
        assert answer.status_code == 200, answer.text
        uid = answer.json()["study_instance_uid"]
        found = {**values, "StudyInstanceUID": uid, "PatientID": mrn}
        found["ModalitiesInStudy"] = found.pop("Modality")
        sent.append(found)
    other = await lightbox.patient("MRN-VICTIM", first_name="Vera", last_name="Victim")
    await lightbox.order(other, requested_by="other")
    content = ct_image(
        patient_id="MRN-VICTIM",
        PatientName="Victim^Vera",
        StudyDate="20250103",
        StudyID="S-3",
        StudyDescription="secret study",
        Modality="NM",
    )
    assert (await lightbox.upload(content, role="service", sub="ehr")).status_code == 200
    return sent


TAGS = {
    "AccessionNumber": "00080050",
    "ModalitiesInStudy": "00080061",
    "PatientID": "00100020",
    "PatientName": "00100010",
    "ReferringPhysicianName": "00080090",
    "StudyDate": "00080020",
    "StudyDescription": "00081030",
    "StudyID": "00200010",
    "StudyInstanceUID": "0020000D",
    "StudyTime": "00080030",
}
WANTED = [
    *(("PatientID", each) for each in ("MRN-0", "MRN-?", "MRN-*", "mrn-0", "*", "", "9")),
    *(("PatientName", each) for each in ("doe*", "DOE^JANE", "d?rfler^*", "*[1]", "*_1%", "_*")),
    *(("PatientName", each) for each in ("Doe^Jane^^", "*^*", "*%*", "Do\u0308rfler*")),
    *(("StudyDate", each) for each in ("20250103", "20250103-", "-20250103", "20250102-20250104")),
    *(("StudyTime", each) for each in ("10", "1015", "09-11", "-0915", "1215-", "101500-121500")),
    *(("StudyDescription", each) for each in ("ct*", "*[BRAIN]", "", "CT THORAX", "thorax")),
    *(("StudyID", each) for each in ("S-3", "S-?", "s-3", "S*")),
    *(("ReferringPhysicianName", each) for each in ("smith*", "JONES^BO", "x")),
    *(("ModalitiesInStudy", each) for each in ("CT", "?R", "NM", "ct")),
    *(("AccessionNumber", each) for each in ("X", "*")),
    *(("StudyInstanceUID", each) for each in ("9.9.9", "*")),
]
