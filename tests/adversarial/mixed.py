"""Studies whose values come from two patients or two orders, each value by chance.

Where two can be told apart and both have a say, nobody can know: a human has to decide.
"""

from dataclasses import replace

from app.matching import ArrivedStudy, Identifier, OrderCandidate, Request
from tests.adversarial.case import ABSENT, Case, kind
from tests.adversarial.people import AUTHORITY, ONE_PERSON, TODAY, Maker, da


def mixed(m: Maker, a: OrderCandidate, b: OrderCandidate, share: float) -> Case:
    """Each value is A's, or with this share B's; some are missing, some mistyped."""
    chosen = [b if m.random.random() < share else a for _ in range(7)]
    uid, number, accession, named, born, sexed, asked = chosen
    missing = [m.random.random() < 0.15 for _ in chosen]
    from_study = m.random.random() < 0.6
    issuer = m.random.choice(("", AUTHORITY))
    study = m.study(
        a,
        study_instance_uid=uid.planned_study_instance_uid if from_study else m.uid(),
        patient=ABSENT if missing[1] else Identifier(number.patient.mrn, issuer),
        accession=ABSENT if missing[2] else Identifier(accession.accession_number),
        patient_name="" if missing[3] else named.patient.name,
        birth_date="" if missing[4] else da(born.patient.birth_date),
        sex="" if missing[5] else sexed.patient.sex,
        body_parts=(),
        requests=()
        if missing[6] or m.random.random() < 0.7
        else (Request(Identifier(asked.accession_number), asked.planned_study_instance_uid),),
    )
    if m.random.random() < 0.1:
        study = replace(study, patient=Identifier(m.slip(number.patient.mrn), issuer))
    orders = {a.id, b.id}
    for order, other in ((a, b), (b, a)):
        if _says(study, other, order):
            orders.discard(order.id)
    one = next((each for each in (a, b) if each.id in orders), None)
    return Case(
        study=study,
        orders=(a, b),
        patient=one.patient.id if one else a.patient.id,
        answers=frozenset(orders),
        waits=not orders,
    )


def _says(study: ArrivedStudy, one: OrderCandidate, other: OrderCandidate) -> bool:
    """Does any value of the study speak for one of them, and not for the other?"""
    asked = [each.accession.value for each in study.requests]
    said = [
        *(study.study_instance_uid, study.patient.value, study.patient_name),
        *(study.birth_date, study.sex, study.accession.value, *asked),
    ]
    values = zip(said, _values(one, len(asked)), _values(other, len(asked)), strict=True)
    return any(value and value == mine != theirs for value, mine, theirs in values)


def _values(order: OrderCandidate, asked: int) -> list[str]:
    patient = order.patient
    return [
        *(order.planned_study_instance_uid, patient.mrn, patient.name),
        *(da(patient.birth_date), patient.sex, *[order.accession_number] * (1 + asked)),
    ]


@kind("mixed: values of twins")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.sibling(a.patient))
    return mixed(m, a, b, m.random.choice((0.1, 0.3)))


@kind("mixed: values of two with one name")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(m.patient(a.patient.name, sex=a.patient.sex, mrn=m.slip(a.patient.mrn)))
    return mixed(m, a, b, m.random.choice((0.1, 0.3)))


@kind("mixed: values of two who have nothing in common")
def _(m: Maker) -> Case:
    names = [m.random.choice(("", each[0])) for each in m.random.sample(ONE_PERSON, 2)]
    a, b = (m.order(m.patient(name)) for name in names)
    return mixed(m, a, b, m.random.choice((0.1, 0.3)))


@kind("mixed: values of newborns of one day")
def _(m: Maker) -> Case:
    last = m.random.choice(("Smith", "Garcia"))
    marks = m.random.sample(("Girl", "Boy", "Girl A", "Girl B", "A", "B"), 2)
    a, b = (
        m.order(m.patient(f"{last}^Baby {mark}", birth_date=TODAY, mrn=f"7{m.digits(5)}"))
        for mark in marks
    )
    return mixed(m, a, b, 0.2)


@kind("mixed: values of two orders of one patient")
def _(m: Maker) -> Case:
    a = m.order(m.patient())
    b = m.order(a.patient, accession_number=m.slip(a.accession_number))
    return mixed(m, a, b, 0.3)
