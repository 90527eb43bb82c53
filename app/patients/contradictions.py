"""Does what a study's files say of their patient contradict who the patient is?

An empty value says nothing. A name that differs by a slip of the pen is no contradiction: people
write names in many ways; another family or given name is.
"""

from app.dicom import person_name
from app.matching.names import Names, compare, read
from app.models import Patient, Study

_OTHERS = {Names.OTHER, Names.OTHER_FAMILY, Names.OTHER_GIVEN}


def contradictions(patient: Patient, study: Study) -> dict[str, dict[str, str]]:
    """`{keyword: {"study": ..., "patient": ...}}`; empty where they agree."""
    found: dict[str, tuple[str, str]] = {}
    name = person_name(patient.last_name, patient.first_name)
    if compare(read(study.patient_name), read(name)) in _OTHERS:
        found["PatientName"] = (study.patient_name, name)
    born = patient.dob.strftime("%Y%m%d")
    if study.patient_birth_date not in ("", born):
        found["PatientBirthDate"] = (study.patient_birth_date, born)
    sexes = {study.patient_sex, patient.sex}
    if sexes == {"M", "F"}:
        found["PatientSex"] = (study.patient_sex, patient.sex)
    return {
        keyword: {"study": theirs, "patient": ours} for keyword, (theirs, ours) in found.items()
    }
