"""Twins, namesakes, newborns, fathers and sons."""

from dataclasses import replace
from datetime import timedelta

from app.matching import Identifier
from tests.adversarial.case import ABSENT, Case, identifiers_of, kind, of, true
from tests.adversarial.people import (
    AUTHORITY,
    GIRLS,
    TODAY,
    Maker,
    born,
    da,
    family,
)

GIRLS_ALIKE = ("Anna", "Anne", "Hanna", "Anja", "Ann", "Johanna", "Anna-Lena", "Anna Luisa")
BOYS_ALIKE = ("Jan", "Jon", "Jann", "Ian", "John", "Jean", "Jan Paul", "Jan Peter", "Jan-P.")


@kind("twins: one's identifiers, the other's name")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.sibling(a.patient))
    return true(b, identifiers_of(m, a, patient_name=b.patient.name), a)


@kind("triplets with names alike: one's identifiers, another's name")
def _(m: Maker) -> Case:
    names = m.random.choice((GIRLS_ALIKE, BOYS_ALIKE))
    first, second, third = m.random.sample(names, 3)
    last, day = family(m.patient().name), m.day()
    a, b, c = (
        m.order(m.patient(f"{last}^{x}", birth_date=day, sex="F")) for x in (first, second, third)
    )
    return true(b, identifiers_of(m, a, patient_name=b.patient.name), a, c)


@kind("twins: one's number and name, the other's accession")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.sibling(a.patient))
    return true(a, m.own_uid(a, accession=Identifier(b.accession_number)), b, waits=True)


@kind("twins: family name and birth date alone")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.sibling(a.patient))
    name = m.random.choice((a.patient.name, family(a.patient.name)))
    study = m.own_uid(a, patient=ABSENT, accession=ABSENT, patient_name=name)
    return true(a, study, b, waits=True)


@kind("newborn twins: A's identifiers, B's name")
def _(m: Maker) -> Case:
    marks = m.random.choice((("A", "B"), ("1", "2"), ("I", "II"), ("GIRL", "BOY")))
    a, b = (m.order(m.patient(f"Smith^Baby {x}", birth_date=TODAY, sex="")) for x in marks)
    return true(b, identifiers_of(m, a, patient_name=b.patient.name), a)


@kind("two Baby Girls Smith: mistyped number of the other")
def _(m: Maker) -> Case:
    a, b = (m.patient("Smith^Baby Girl", birth_date=TODAY, sex="F") for _ in "ab")
    study = m.of_patient(a, patient=Identifier(b.mrn, AUTHORITY))
    return of(a, study, m.order(b), b)


@kind("baby under the mother's entry")
def _(m: Maker) -> Case:
    mother = m.order(
        m.patient(f"Smith^{m.random.choice(GIRLS)}", sex="F", birth_date=m.day(1980, 2005))
    )
    first = mother.patient.name.split("^")[1]
    name = m.random.choice(
        (f"Smith^Baby Girl of {first}", "Smith^Baby", "Smith^BB", "Smith^NEWBORN")
    )
    baby = m.patient("Smith^Baby", birth_date=TODAY)
    study = identifiers_of(
        m, mother, patient_name=name, birth_date=m.random.choice((da(TODAY), "")), sex=""
    )
    return of(baby, study, mother)


@kind("father and son of one name: his identifiers, the son's birth date")
def _(m: Maker) -> Case:
    father = m.order(m.patient(sex="M", birth_date=m.day(1930, 1970)))
    son = m.patient(father.patient.name, sex="M", birth_date=m.day(1971, 2010))
    study = identifiers_of(m, father, birth_date=da(son.birth_date))
    return of(son, study, father, m.order(son))


@kind("father and son: his identifiers, Jr., no birth date")
def _(m: Maker) -> Case:
    father = m.order(m.patient(sex="M", birth_date=m.day(1930, 1970)))
    son = m.patient(f"{father.patient.name}^^^Jr", sex="M", birth_date=m.day(1971, 2010))
    name = m.random.choice(
        (son.name, f"{family(son.name)} JR.^{father.patient.name.split('^')[1]}")
    )
    return of(son, identifiers_of(m, father, patient_name=name, birth_date=""), father)


@kind("brother's identifiers, initial, sister's sex")
def _(m: Maker) -> Case:
    brother = m.order(m.patient("Lang^Chris", sex="M"))
    sister = m.patient("Lang^Carmen", sex="F", birth_date=brother.patient.birth_date)
    return of(sister, identifiers_of(m, brother, patient_name="Lang^C", sex="F"), brother)


@kind("namesake of the same birth date: mistyped number of the other")
def _(m: Maker) -> Case:
    a = m.patient()
    b = replace(a, id=m.uuid(), mrn=m.slip(a.mrn))
    return of(a, m.of_patient(a, patient=Identifier(b.mrn, AUTHORITY)), b, m.order(b))


@kind("namesakes of the same birth date, no PatientID")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(replace(a.patient, id=m.uuid(), mrn=m.digits(7)))
    return true(a, m.own_uid(a, patient=ABSENT, accession=ABSENT), b, waits=True)


@kind("namesake, birth date one slip away, no PatientID")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    day = born(a.patient) + timedelta(days=1)
    b = m.order(replace(a.patient, id=m.uuid(), mrn=m.digits(7), birth_date=day))
    return true(a, m.own_uid(a, patient=ABSENT, birth_date=da(day)), b)
