"""Studies with which nothing is wrong, or nothing that says whose they are."""

from dataclasses import replace

from app.matching import Identifier
from tests.adversarial.case import ABSENT, Case, kind, of, true
from tests.adversarial.people import (
    AUTHORITY,
    BABIES,
    NOBODY,
    NOT_BORN,
    ONE_PERSON,
    TODAY,
    TWO_SCRIPTS,
    Maker,
    family,
)


@kind("all from the worklist")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(order, m.study(order))


@kind("from the worklist, no issuers said")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(order, m.study(order, patient=Identifier(order.patient.mrn)))


@kind("from the worklist, twin scheduled beside")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(order, m.study(order), m.order(m.sibling(order.patient)))


@kind("from the worklist, namesake of the same birth date beside")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(
        order, m.study(order), m.order(replace(order.patient, id=m.uuid(), mrn=m.digits(7)))
    )


@kind("StudyInstanceUID of its own, accession and PatientID")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(order, m.own_uid(order))


@kind("the same, other order of the patient beside")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    return true(order, m.own_uid(order), m.order(order.patient))


@kind("name written in another way")
def _(m: Maker) -> Case:
    ours, theirs = m.random.choice(ONE_PERSON)
    order = m.order(m.patient(ours))
    make = m.random.choice((m.study, m.own_uid))
    return true(order, make(order, patient_name=theirs))


@kind("name in another script")
def _(m: Maker) -> Case:
    ours, theirs = m.random.choice(TWO_SCRIPTS)
    order = m.order(m.patient(ours))
    make = m.random.choice((m.study, m.own_uid))
    return true(order, make(order, patient_name=theirs))


@kind("family and given name exchanged")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    last, first = order.patient.name.split("^")
    name = m.random.choice(
        (f"{first}^{last}", f"{last} {first}", f"{first} {last}", f"{last}, {first}")
    )
    return true(order, m.own_uid(order, patient_name=name))


@kind("middle name, initial or second family name left out")
def _(m: Maker) -> Case:
    names = (
        "Smith^Anna^Maria",
        "Smith^Anna Maria",
        "Smith-Jones^Anna",
        "Smith^A",
        "Dr. Smith^Anna",
    )
    order = m.order(m.patient(m.random.choice(names)))
    return true(order, m.own_uid(order, patient_name="Smith^Anna"))


@kind("no name, or nobody's")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    make = m.random.choice((m.study, m.own_uid))
    return true(order, make(order, patient_name=m.random.choice(("", *NOBODY))))


@kind("no birth date, or nobody's")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    make = m.random.choice((m.study, m.own_uid))
    return true(order, make(order, birth_date=m.random.choice(NOT_BORN)))


@kind("sex unknown or other on one side")
def _(m: Maker) -> Case:
    order = m.order(m.patient(sex=m.random.choice(("", "M", "O"))))
    return true(order, m.study(order, sex=m.random.choice(("O", "", "U", "x"))))


@kind("TRAUMA 1, born 1900, from the worklist")
def _(m: Maker) -> Case:
    first = m.patient("TRAUMA^1", birth_date=None, sex="")
    other = m.patient("TRAUMA^2", birth_date=None, sex="")
    order = m.order(first)
    return true(order, m.study(order, birth_date="19000101", sex="O"), m.order(other))


@kind("newborn, named in the EHR meanwhile")
def _(m: Maker) -> Case:
    order = m.order(m.patient(birth_date=TODAY))
    name = f"{family(order.patient.name)}^{m.random.choice(BABIES)}"
    make = m.random.choice((m.study, m.own_uid))
    return true(order, make(order, patient_name=name))


@kind("newborn twins from the worklist")
def _(m: Maker) -> Case:
    a = m.order(m.patient("Smith^Baby Girl A", birth_date=TODAY, sex="F"))
    b = m.order(m.patient("Smith^Baby Girl B", birth_date=TODAY, sex="F"))
    return true(a, m.random.choice((m.study, m.own_uid))(a), b)


@kind("accession: zeros lost, prefix or cut at 16, StudyInstanceUID planned")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    number = f"000{m.digits(7)}"
    ours, theirs = m.random.choice(
        ((number, number[3:]), (m.digits(8), "x"), (f"A-{m.digits(14)}7", "cut"))
    )
    theirs = {"x": f"LB{ours}", "cut": ours[:16]}.get(theirs, theirs)
    order = replace(order, accession_number=ours)
    return true(order, m.study(order, accession=Identifier(theirs)))


@kind("accession: zeros lost or prefix, StudyInstanceUID of its own")
def _(m: Maker) -> Case:
    number = m.digits(7)
    order = m.order(m.patient(), accession_number=f"000{number}")
    theirs = m.random.choice((number, f"LB000{number}"))
    return true(order, m.own_uid(order, accession=Identifier(theirs)))


@kind("PatientID without its leading zeros")
def _(m: Maker) -> Case:
    number = m.digits(6)
    order = m.order(m.patient(mrn=f"00{number}"))
    return true(order, m.study(order, patient=Identifier(number)))


@kind("accession of two sites, issuer said")
def _(m: Maker) -> Case:
    order = m.order(m.patient(), accession_issuer="RIS1")
    other = m.order(m.patient(), accession_number=order.accession_number, accession_issuer="RIS2")
    return true(order, m.own_uid(order), other)


@kind("accession of two sites, issuer not said")
def _(m: Maker) -> Case:
    order = m.order(m.patient(), accession_issuer="RIS1")
    other = m.order(m.patient(), accession_number=order.accession_number, accession_issuer="RIS2")
    return true(order, m.own_uid(order, accession=Identifier(order.accession_number)), other)


@kind("more images of a fulfilled order's study")
def _(m: Maker) -> Case:
    order = m.order(m.patient(), status=m.random.choice(("completed", "in-progress")))
    uid = m.random.choice((order.planned_study_instance_uid, m.uid()))
    order = replace(order, linked=frozenset({uid, m.uid()}))
    return true(order, m.study(order, study_instance_uid=uid, owner=order.patient.id))


@kind("more images of a study that answers two orders")
def _(m: Maker) -> Case:
    uid, patient = m.uid(), m.patient()
    a, b = (m.order(patient, linked=frozenset({uid}), status="completed") for _ in "ab")
    study = m.study(a, study_instance_uid=uid, accession=ABSENT, owner=patient.id, body_parts=())
    return replace(true(a, study, b), answers=frozenset({a.id, b.id}))


@kind("other modality that can answer the order")
def _(m: Maker) -> Case:
    pairs = (
        ("CR", ("DX",)),
        ("CT", ("PT", "CT")),
        ("PT", ("PT", "CT", "SR")),
        ("DX", ("CR", "PR")),
    )
    modality, done = m.random.choice(pairs)
    order = m.order(m.patient(), modality=modality, description="")
    return true(order, m.study(order, modalities=done))


@kind("no order, number, name and birth date agree")
def _(m: Maker) -> Case:
    patient = m.patient()
    return of(patient, m.of_patient(patient))


@kind("the same, accession known to nobody, orders of the patient beside")
def _(m: Maker) -> Case:
    patient = m.patient()
    study = m.of_patient(patient, accession=Identifier(m.digits(9), m.random.choice(("", "ELSE"))))
    return of(patient, study, m.order(patient, modality="US"), m.order(m.sibling(patient)))


@kind("merged into the patient")
def _(m: Maker) -> Case:
    former = Identifier(m.digits(7), AUTHORITY)
    order = m.order(m.patient(former=(former,)))
    return true(order, m.random.choice((m.study, m.own_uid))(order, patient=former))


@kind("family name changed by marriage, both known")
def _(m: Maker) -> Case:
    order = m.order(m.patient("Keller^Anna", sex="F", other_names=("Vogel^Anna",)))
    return true(order, m.own_uid(order, patient_name="VOGEL^ANNA"))


@kind("garbage around the values")
def _(m: Maker) -> Case:
    order = m.order(m.patient())
    name = "".join(c + m.random.choice(("", "\0", "\u200b")) for c in order.patient.name)
    number = Identifier(f" {order.patient.mrn} \0", AUTHORITY + " ")
    return true(order, m.study(order, patient_name=name + "^^ ", patient=number))
