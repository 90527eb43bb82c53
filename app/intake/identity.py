"""Whose is this file? The file's identifiers against the patient's and the order's.

Pure: from a header and an access to differences, to a refusal that shows both sides, or to the
changes that make the file the patient's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_VR

from app.access import PatientAccess
from app.dicom import Header, PatientIdentifier, person_name
from app.errors import Conflict, PatientMismatch

Differences = Mapping[str, Mapping[str, str]]
"""`{keyword: {"file": value in the file, "expected": value of patient or order}}`."""

FORMER_IDENTITY = (
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDs",
    "OtherPatientIDsSequence",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientTelecomInformation",
    "MedicalRecordLocator",
    "ResponsiblePerson",
    "PatientComments",
)
"""What else of the patient module (PS3.3 C.7.1.1, C.2.2) says who somebody is; emptied when the
PatientID is coerced."""


def differences(
    access: PatientAccess,
    header: Header,
    *,
    authority: str,
    ambiguous: bool,
    fill: bool,
    former: Sequence[PatientIdentifier] = (),
) -> dict[str, dict[str, str]]:
    """Where the file's identifiers contradict the patient's and the order's.

    Empty when PatientID, its issuer and the accession number (where the file has one) agree. A
    file without issuer has the site's own `authority`; where there is none it agrees, unless the
    number is `ambiguous`, known under another issuer too. The demographics that go with an
    identifier differ with it; alone they are only warned about. `fill` counts an absent accession
    number as a difference. `former` are the identifiers of those who were merged into the patient:
    a file under one of them is the patient's.
    """
    patient, order, theirs = access.patient, access.order, header.patient
    issuer = (theirs.issuer if theirs else "") or authority

    def agrees(mrn: str, mrn_issuer: str) -> bool:
        # A patient registered without issuer is of the site's own authority, too.
        same = issuer == (mrn_issuer or authority) or (not issuer and not ambiguous)
        return theirs is not None and theirs.value == mrn and same

    known = [(patient.mrn, patient.mrn_issuer), *((each.value, each.issuer) for each in former)]
    pairs: dict[str, tuple[str, str]] = {}
    if not any(agrees(*each) for each in known):
        name = person_name(patient.last_name, patient.first_name)
        pairs = {
            "PatientID": (theirs.value if theirs else "", patient.mrn),
            "IssuerOfPatientID": (theirs.issuer if theirs else "", patient.mrn_issuer),
            "PatientName": (header.patient_name, name),
            "PatientBirthDate": (header.patient_birth_date, patient.dob.strftime("%Y%m%d")),
            "PatientSex": (header.patient_sex, patient.sex),
        }
    if order is not None and (header.accession_number or fill):
        pairs["AccessionNumber"] = (header.accession_number, order.accession_number)
    return {
        keyword: {"file": file, "expected": expected}
        for keyword, (file, expected) in pairs.items()
        if file != expected
    }


def names_another(found: Differences) -> bool:
    """Do the differences say that it is another patient's file?"""
    return bool(found.keys() & {"PatientID", "IssuerOfPatientID"})


def refuse(access: PatientAccess, header: Header, found: Differences) -> None:
    """Raises PatientMismatch or Conflict, showing both sides: the file's and what was expected."""
    mend = (
        "Nothing was stored. Send it to the right order, or, if it really is this patient's, a "
        "technologist or radiologist may send it with `coerce_patient=true`."
    )
    extra = {"differences": found}
    if names_another(found):
        ours = PatientIdentifier(access.patient.mrn, access.patient.mrn_issuer)
        theirs = f"PatientID {header.patient}" if header.patient else "no PatientID"
        raise PatientMismatch(
            f"The file has {theirs}, the patient here {ours}. {mend}", extra=extra
        )
    numbers = found["AccessionNumber"]
    raise Conflict(
        f"The file has AccessionNumber {numbers['file']}, the order {numbers['expected']}. {mend}",
        extra=extra,
    )


def refuse_other_issuer(access: PatientAccess, header: Header) -> None:
    """Raises Conflict where file and order name different issuers of the accession number."""
    ours = access.order.accession_issuer if access.order else ""
    if ours and header.accession_issuer and header.accession_issuer != ours:
        raise Conflict(
            f"The file's accession number was issued by {header.accession_issuer}, the order's "
            f"by {ours}. Nothing was stored; send it to the right order."
        )


def coercion(access: PatientAccess, header: Header, found: Differences) -> tuple[Dataset, Header]:
    """The elements to rewrite, and the header as it will be."""
    changes = Dataset()
    for keyword, each in found.items():
        empty: Any = [] if dictionary_VR(keyword) == "SQ" else ""
        setattr(changes, keyword, each["expected"] or empty)
    fields: dict[str, Any] = {
        name: found[keyword]["expected"]
        for name, keyword in {
            "patient_name": "PatientName",
            "patient_birth_date": "PatientBirthDate",
            "patient_sex": "PatientSex",
            "accession_number": "AccessionNumber",
        }.items()
        if keyword in found
    }
    if names_another(found):
        patient = access.patient
        fields["patient"] = PatientIdentifier(patient.mrn, patient.mrn_issuer)
    return changes, replace(header, **fields)


def warnings(access: PatientAccess, header: Header) -> list[str]:
    """Differences that don't refuse a file whose identifier agrees, but that a human should see."""
    patient = access.patient
    ours = {
        "PatientName": person_name(patient.last_name, patient.first_name).casefold(),
        "PatientBirthDate": patient.dob.strftime("%Y%m%d"),
        "PatientSex": patient.sex,
    }
    theirs = {
        "PatientName": header.patient_name.rstrip("^").casefold(),
        "PatientBirthDate": header.patient_birth_date,
        "PatientSex": header.patient_sex,
    }
    found = [
        f"The file's {keyword} differs from the patient's."
        for keyword, value in theirs.items()
        if value and ours[keyword] and value != ours[keyword]
    ]
    if not header.meta_agrees:
        found.append(
            "The file meta information names another SOP instance or class than the dataset, "
            "which alone was used."
        )
    return found
