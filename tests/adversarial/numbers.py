"""Numbers used again, mistyped, of another issuer, or missing."""

from dataclasses import replace
from datetime import timedelta

from app.matching import ArrivedStudy, Identifier
from tests.adversarial.case import ABSENT, Case, identifiers_of, kind, of, true
from tests.adversarial.people import (
    AUTHORITY,
    NOBODY,
    TODAY,
    Maker,
    da,
)


@kind("accession used again: the former patient is not known")
def _(m: Maker) -> Case:
    order, former = m.order(m.patient()), m.patient()
    study = m.own_uid(order)
    old = m.of_patient(former, accession=study.accession)
    return of(None, replace(old, patient=m.random.choice((old.patient, ABSENT))), order)


@kind("accession used again: both patients are known")
def _(m: Maker) -> Case:
    order, former = m.order(m.patient()), m.patient()
    study = m.of_patient(former, accession=Identifier(order.accession_number))
    return of(former, study, order)


@kind("accession used again for the same patient, years apart")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    day = TODAY - timedelta(days=m.random.randrange(400, 3000))
    return of(order.patient, m.own_uid(order, study_date=da(day)), order)


@kind("accession of another site, its issuer said")
def _(m: Maker) -> Case:
    order = m.order(m.patient(), accession_issuer=m.random.choice(("RIS1", "")))
    study = m.own_uid(order, accession=Identifier(order.accession_number, "ELSEWHERE"))
    return of(order.patient, study, order)


@kind("accession and PatientID of another site, a stranger")
def _(m: Maker) -> Case:
    order, stranger = m.order(m.patient()), m.patient()
    study = m.own_uid(order, patient_name=stranger.name, birth_date=da(stranger.birth_date))
    issuer = m.random.choice(("", "ELSEWHERE"))
    return of(None, replace(study, patient=Identifier(order.patient.mrn, issuer)), order)


@kind("PatientID of another issuer, said, patient known there")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.patient(mrn=a.patient.mrn, mrn_issuer="ELSEWHERE")
    return of(b, m.of_patient(b), a)


@kind("PatientID of two issuers, not said, no authority set")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = replace(a.patient, id=m.uuid(), mrn_issuer="ELSEWHERE")
    study = identifiers_of(m, a, patient=Identifier(b.mrn))
    return of(b, study, a, authority="", waits=True)


@kind("PatientID of another issuer, not said, a stranger")
def _(m: Maker) -> Case:
    order, stranger = m.order(m.patient()), m.patient()
    study = m.of_patient(stranger, patient=Identifier(order.patient.mrn))
    return of(None, replace(study, sex=m.random.choice((study.sex, ""))), order)


@kind("PatientID of another issuer by its qualifiers")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    number = Identifier(a.patient.mrn, m.random.choice(("", "ELSE")), "1.2.3.4")
    return of(None, m.of_patient(a.patient, patient=number), a)


@kind("PatientID in other case, another patient's")
def _(m: Maker) -> Case:
    number = m.digits(6)
    a = m.order(m.patient(mrn=f"ab{number}"))
    b = m.patient(a.patient.name, mrn=f"AB{number}", birth_date=a.patient.birth_date)
    return of(b, identifiers_of(m, a, patient=Identifier(b.mrn, AUTHORITY)), a, waits=True)


@kind("PatientID used again after a merger")
def _(m: Maker) -> Case:
    number = m.digits(7)
    a = m.order(m.patient(former=(Identifier(number, AUTHORITY),)))
    b = m.patient(mrn=number)
    return of(b, m.of_patient(b, accession=Identifier(a.accession_number)), a, waits=True)


@kind("merged, but the EHR has not said so")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = replace(a.patient, id=m.uuid(), mrn=m.digits(7))
    return true(a, m.study(a, patient=Identifier(b.mrn, AUTHORITY)), b, waits=True)


@kind("PatientID mistyped, hits another patient")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.patient(mrn=m.slip(a.patient.mrn)))
    return true(a, identifiers_of(m, a, patient=Identifier(b.patient.mrn)), b)


@kind("PatientID mistyped, hits another patient, nothing else said")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.patient(mrn=m.slip(a.patient.mrn)))
    study = m.own_uid(a, patient=Identifier(b.patient.mrn), patient_name="", birth_date="", sex="")
    return true(a, replace(study, accession=m.random.choice((ABSENT, study.accession))), b)


@kind("PatientID mistyped, hits nobody")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    return true(a, identifiers_of(m, a, patient=Identifier(m.slip(a.patient.mrn))))


@kind("accession mistyped, hits another patient's order")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.patient(), accession_number=m.slip(a.accession_number))
    return true(a, m.own_uid(a, accession=Identifier(b.accession_number)), b)


@kind("accession mistyped, hits nobody")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    study = identifiers_of(m, a, accession=Identifier(m.slip(a.accession_number)))
    return true(a, study, m.order(a.patient, modality="US"))


@kind("no PatientID, accession of the order")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    return true(a, m.own_uid(a, patient=ABSENT))


@kind("name and birth date alone")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    return true(a, m.own_uid(a, patient=ABSENT, accession=ABSENT))


@kind("nothing at all")
def _(m: Maker) -> Case:
    order = m.order(m.patient(), planned_study_instance_uid="", accession_number="")
    study = ArrivedStudy(m.random.choice(("", m.uid())), patient_name=m.random.choice(NOBODY))
    return of(None, study, order, m.patient(mrn="", mrn_issuer=""))
