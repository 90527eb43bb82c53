"""The demo's people and images, brought in through Lightbox's own API as an EHR would.

Safe to repeat: what is there already is found again by its MRN and accession number.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydicom.data import get_testdata_file

from app.demo.stack import SetupError
from app.demo.synthetic import ct_series, to_bytes
from app.dicom import person_name

CLINICIAN, OTHER_CLINICIAN = "dr.lee", "dr.novak"

WHO: Mapping[str, tuple[str, str, str]] = {
    # name in demo.json: (sub, role, what to know)
    "clinician": (CLINICIAN, "clinician", "requested the orders of Bergstrom and Okafor"),
    "other_clinician": (OTHER_CLINICIAN, "clinician", "treats Tanaka and Weber, nobody else"),
    "radiologist": ("dr.sato", "radiologist", "reads every patient with an imaging order"),
    "technologist": ("tech.kim", "technologist", "uploads, and sees what is under way"),
    "admin": ("admin.ruiz", "admin", "statistics; no images, no patients"),
    "auditor": ("auditor.weiss", "auditor", "the audit trail; nothing else"),
    "service": ("ehr", "service", "the EHR's backend"),
}


@dataclass(frozen=True)
class DemoOrder:
    """An order and the images that answer it: pydicom's samples, or the synthetic CT."""

    accession_number: str
    order_category: str
    description: str
    requested_by: str
    samples: tuple[str, ...] = ()
    synthetic_slices: int = 0


@dataclass(frozen=True)
class DemoPatient:
    mrn: str
    first_name: str
    last_name: str
    dob: str
    sex: str
    orders: tuple[DemoOrder, ...]
    care_team: tuple[str, ...] = field(default=())


PATIENTS = (
    DemoPatient(
        "LB-1001",
        "Anna",
        "Bergstrom",
        "1968-04-12",
        "F",
        (
            DemoOrder("DEMO-CT-1", "CT", "CT thorax", CLINICIAN, synthetic_slices=80),
            DemoOrder("DEMO-MR-1", "MR", "MR brain", CLINICIAN, ("MR_small.dcm",)),
            DemoOrder("DEMO-CR-1", "CR", "Chest X-ray, not taken yet", CLINICIAN),
        ),
    ),
    DemoPatient(
        "LB-1002",
        "Daniel",
        "Okafor",
        "1981-09-30",
        "M",
        (
            DemoOrder(
                "DEMO-US-1", "US", "Ultrasound, cine", CLINICIAN, ("examples_ybr_color.dcm",)
            ),
            DemoOrder("DEMO-CT-2", "CT", "CT abdomen", CLINICIAN, ("CT_small.dcm",)),
        ),
    ),
    DemoPatient(
        "LB-1003",
        "Yuki",
        "Tanaka",
        "1959-01-23",
        "F",
        (
            DemoOrder("DEMO-CT-3", "CT", "CT head", OTHER_CLINICIAN, ("693_J2KI.dcm",)),
            DemoOrder("DEMO-NM-1", "NM", "Bone scan", OTHER_CLINICIAN, ("JPEG2000.dcm",)),
        ),
    ),
    DemoPatient(
        "LB-1004",
        "Karl",
        "Weber",
        "1947-11-05",
        "M",
        (DemoOrder("DEMO-ECG-1", "ECG", "12-lead ECG", "dr.sato", ("waveform_ecg.dcm",)),),
        care_team=(OTHER_CLINICIAN,),
    ),
)


class Seeder:
    """Brings the demo's data in. `tokens` by the names of `WHO`."""

    def __init__(self, api: str, tokens: Mapping[str, str]) -> None:
        self._client = httpx.Client(base_url=api, timeout=60.0, trust_env=False)
        self._tokens = tokens

    def seed(self, progress: Callable[[str, int, int], None]) -> tuple[list[Any], list[Any]]:
        """The patients and orders as the API gives them, in the order of `PATIENTS`.

        `progress` hears what is loaded, how many files of it, of how many. Raises SetupError.
        """
        patients, orders = [], []
        for wanted in PATIENTS:
            patient = self._patient(wanted)
            patients.append(patient)
            for sub in wanted.care_team:
                self._ask("PUT", f"/patients/{patient['id']}/care-team/{sub}", json={})
            orders += [self._order(wanted, patient, each, progress) for each in wanted.orders]
        self._client.close()
        return patients, orders

    def _patient(self, wanted: DemoPatient) -> Any:
        found = self._ask("GET", "/patients", params={"mrn": wanted.mrn})
        if found:
            return found[0]
        return self._ask(
            "POST",
            "/patients",
            json={
                "mrn": wanted.mrn,
                "first_name": wanted.first_name,
                "last_name": wanted.last_name,
                "dob": wanted.dob,
                "sex": wanted.sex,
            },
        )

    def _order(
        self,
        person: DemoPatient,
        patient: Any,
        wanted: DemoOrder,
        progress: Callable[[str, int, int], None],
    ) -> Any:
        found = self._ask("GET", "/orders", params={"accession_number": wanted.accession_number})
        order = (
            found[0]
            if found
            else self._ask(
                "POST",
                "/orders",
                json={
                    "patient_id": patient["id"],
                    "order_type": "IMAGING",
                    "order_category": wanted.order_category,
                    "description": wanted.description,
                    "status": "scheduled",
                    "accession_number": wanted.accession_number,
                    "requested_by": wanted.requested_by,
                },
            )
        )
        count = len(wanted.samples) or wanted.synthetic_slices
        stored = 0
        if order["study_instance_uid"]:
            study = self._ask("GET", f"/dicom/studies/{order['study_instance_uid']}")
            stored = study["NumberOfStudyRelatedInstances"]
        if stored < count:  # also where an earlier start was broken off in the middle
            for done, content in enumerate(_files(person, order, wanted), start=1):
                self._ask(
                    "POST",
                    "/dicom/upload",
                    who="technologist",
                    files={"file": ("image.dcm", content, "application/dicom")},
                    data={"order_id": order["id"], "coerce_patient": "true"},
                )
                progress(wanted.description, done, count)
        return self._ask("GET", f"/orders/{order['id']}")

    def _ask(self, method: str, path: str, *, who: str = "service", **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {self._tokens[who]}"}
        try:
            answer = self._client.request(method, f"/api/v1{path}", headers=headers, **more)
        except httpx.HTTPError as error:
            raise SetupError(f"The demo's data could not be loaded: {error}.") from error
        if answer.is_error:
            detail = answer.json().get("detail", "no reason given")
            raise SetupError(f"The demo's data could not be loaded ({path}): {detail}")
        return answer.json()


def _files(person: DemoPatient, order: Any, wanted: DemoOrder) -> Iterator[bytes]:
    """The order's DICOM files."""
    for name in wanted.samples:
        yield Path(str(get_testdata_file(name, download=False))).read_bytes()
    if wanted.synthetic_slices:
        for image in ct_series(
            patient_id=person.mrn,
            patient_name=person_name(person.last_name, person.first_name),
            birth_date=person.dob.replace("-", ""),
            sex=person.sex,
            study_instance_uid=order["planned_study_instance_uid"],
            accession_number=order["accession_number"],
            study_description=wanted.description,
            slices=wanted.synthetic_slices,
        ):
            yield to_bytes(image)
