"""What goes wrong at the modality, with the order, and on the way from elsewhere."""

from dataclasses import replace
from datetime import timedelta

from app.matching import Identifier, Request
from tests.adversarial.case import ABSENT, INVISIBLE, Case, identifiers_of, kind, of, true
from tests.adversarial.people import (
    AUTHORITY,
    NOT_BORN,
    Maker,
    born,
    da,
)


@kind("A's entry taken, name put right by hand")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    return true(b, identifiers_of(m, a, patient_name=b.patient.name), a)


@kind("A's entry taken, name, birth date and sex put right")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    study = identifiers_of(m, a, patient_name=b.patient.name)
    return true(b, replace(study, birth_date=da(b.patient.birth_date), sex=b.patient.sex), a)


@kind("A's entry taken, all put right but the StudyInstanceUID")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    return true(b, m.study(b, study_instance_uid=a.planned_study_instance_uid), a)


@kind("A's entry taken, all put right but UID and accession")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.patient()
    uid = a.planned_study_instance_uid
    number = Identifier(a.accession_number)
    return of(b, m.of_patient(b, study_instance_uid=uid, accession=number), a)


@kind("A's entry taken for somebody not known, put right")
def _(m: Maker) -> Case:
    a, stranger = m.order(m.patient()), m.patient()
    uid = m.random.choice((a.planned_study_instance_uid, m.uid()))
    number = Identifier(a.accession_number)
    return of(None, m.of_patient(stranger, study_instance_uid=uid, accession=number), a)


@kind("the last patient's study continued for the next")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    uid = m.uid()
    a = replace(a, linked=frozenset({uid}), status="completed")
    study = m.study(b, study_instance_uid=uid)
    return true(b, replace(study, owner=m.random.choice((None, a.patient.id))), a)


@kind("A's and B's accession exchanged")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    study = identifiers_of(m, a, accession=Identifier(b.accession_number))
    return true(a, study, b, waits=True)


@kind("two patients under one StudyInstanceUID")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    return true(a, m.study(a, under_two_patients=True), m.order(m.patient()), waits=True)


@kind("linked to another patient already")
def _(m: Maker) -> Case:
    a, other = m.order(m.patient()), m.patient()
    return true(a, identifiers_of(m, a, owner=other.id), other, waits=True)


@kind("order cancelled")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), status="cancelled")
    linked = m.random.choice((frozenset(), frozenset({a.planned_study_instance_uid})))
    a = replace(a, linked=linked)
    return true(a, identifiers_of(m, a), waits=True)


@kind("order fulfilled by another study")
def _(m: Maker) -> Case:
    status = m.random.choice(("scheduled", "in-progress", "completed"))
    a = m.order(m.patient(), status=status, linked=frozenset({m.uid()}))
    return true(a, identifiers_of(m, a), waits=True)


@kind("order completed without images here")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), status=m.random.choice(("completed", "of a later release")))
    return true(a, identifiers_of(m, a), waits=True)


@kind("images of two orders in one study")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), description="")
    b = m.order(a.patient, description="")
    requests = tuple(Request(Identifier(each.accession_number)) for each in (a, b))
    number = m.random.choice((ABSENT, Identifier(a.accession_number)))
    case = true(a, m.own_uid(a, requests=requests, accession=number), b, waits=True)
    return replace(case, answers=frozenset({a.id, b.id}))


@kind("order said only in the request attributes")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    said = Request(Identifier(a.accession_number), a.planned_study_instance_uid)
    return true(a, m.own_uid(a, requests=(said,), accession=ABSENT), m.order(a.patient))


@kind("planned for A's order, requests name another of A's")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(a.patient, description=a.description)
    said = Request(study_instance_uid=b.planned_study_instance_uid)
    return true(b, m.study(a, requests=(said,)), a)


@kind("wrong entry of the same patient, other modality")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), modality="MR", description="MR head")
    b = m.order(a.patient)
    return true(b, identifiers_of(m, a, modalities=("CT",)), a)


@kind("wrong entry of the same patient, other body part")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), description="CT head")
    b = m.order(a.patient, description="CT knee")
    return true(b, identifiers_of(m, a, body_parts=("KNEE",)), a)


@kind("A's entry taken for B, other body part, nothing put right")
def _(m: Maker) -> Case:
    a, b = (m.order(m.patient(), description=x) for x in ("CT head", "CT knee"))
    return true(b, identifiers_of(m, a, body_parts=("KNEE",)), a)


@kind("UID of one order, accession of another of the patient")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(a.patient, description=a.description)
    study = m.study(a, accession=Identifier(b.accession_number))
    return true(m.random.choice((a, b)), study, a, b, waits=True)


@kind("birth date one slip away")
def _(m: Maker) -> Case:
    a = m.order(m.patient(birth_date=m.day().replace(month=3, day=7)))
    day = born(a.patient)
    wrong = m.random.choice((day.replace(month=7, day=3), day + timedelta(1), day - timedelta(1)))
    return true(a, identifiers_of(m, a, birth_date=da(wrong)))


@kind("name misspelled")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    last, first = a.patient.name.split("^")
    name = m.random.choice(
        (f"{m.slip(last + '  ').strip()}^{first}", f"{last}^{m.slip(first + '  ').strip()}")
    )
    return true(a, identifiers_of(m, a, patient_name=name))


@kind("family name changed, the EHR does not know")
def _(m: Maker) -> Case:
    a = m.order(m.patient("Keller^Anna", sex="F"))
    return true(a, identifiers_of(m, a, patient_name="Haddad^Anna"))


# --------------------------------------------------------------------- from elsewhere


@kind("brought from elsewhere: another issuer's number, our patient's name")
def _(m: Maker) -> Case:
    patient = m.patient()
    study = m.of_patient(patient, patient=Identifier(m.digits(8), "ELSEWHERE"))
    return of(patient, study, m.order(m.sibling(patient)))


@kind("the same, our number among the other PatientIDs")
def _(m: Maker) -> Case:
    patient = m.patient()
    study = m.of_patient(patient, patient=Identifier(m.digits(8), "ELSEWHERE"))
    return of(patient, replace(study, other_patient_ids=(Identifier(patient.mrn, AUTHORITY),)))


@kind("the other PatientIDs name another patient")
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.patient()
    other = (Identifier(b.mrn, AUTHORITY),)
    return true(a, identifiers_of(m, a, other_patient_ids=other), b, waits=True)


@kind("de-identified copy that kept its StudyInstanceUID")
def _(m: Maker) -> Case:
    a = m.order(m.patient(), status="in-progress")
    number = m.random.choice((ABSENT, Identifier(f"SUBJ-{m.digits(3)}")))
    study = m.study(a, patient=number, patient_name=m.random.choice(("Anonymous", "SUBJ^1", "")))
    study = replace(study, birth_date=m.random.choice(NOT_BORN), accession=ABSENT)
    return true(a, study, waits=True)


# ------------------------------------------------------- what no header shows: apart


@kind("A's entry taken for B, nothing put right", INVISIBLE)
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    return true(b, identifiers_of(m, a), a)


@kind("the same, and the images say their body part", INVISIBLE)
def _(m: Maker) -> Case:
    a, b = m.order(m.patient()), m.order(m.patient())
    return true(b, identifiers_of(m, a, body_parts=m.study(b).body_parts), a)


@kind("wrong entry of the same patient, same modality, no body part", INVISIBLE)
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(a.patient)
    return true(b, identifiers_of(m, a, body_parts=()), a)


@kind("twin on the table, no given name checked", INVISIBLE)
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.sibling(a.patient))
    return true(b, identifiers_of(m, a), a)
