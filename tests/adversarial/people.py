"""People, orders and studies to be matched, made from a seed; what is true of them is known."""

import random
import unicodedata
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from app.matching import ArrivedStudy, Identifier, OrderCandidate, PatientCandidate

AUTHORITY = "HOSP"
TODAY = date(2026, 3, 2)
FAMILIES = (
    "Smith Miller Johnson Brown Garcia Lopez Nguyen Rossi Dubois Meier Schmidt Weber Kowalski "
    "Novak Jensen Silva Costa Haddad Cohen Singh Patel Yilmaz Murphy OBrien Fischer Bauer Wagner "
    "Hoffmann Keller Lang Vogel Peters Clark Lewis Young Walker Hall Wright Scott Green Baker"
).split()
GIRLS = (
    "Anna Maria Emma Julia Sophie Laura Clara Helen Grace Nora Ruth Eva Lena Ida Paula Alice "
    "Martha Irene Olivia Judith Diana Fiona Carmen Lucia"
).split()
BOYS = (
    "John Peter Paul Thomas Oscar David Simon Felix Hugo Martin Victor Eric Albert Bruno Carl "
    "Dominik Frank George Henry Ivan Jacob Kevin Louis Oliver"
).split()
# As the EHR has it, as a modality may send it. One person each.
ONE_PERSON = (
    ("Müller^Jörg", "MUELLER^JOERG"),
    ("Müller^Jörg", "Muller^Jorg^^^"),
    ("Groß^Käthe", "GROSS^KAETHE"),
    ("Strauß^Änne", "Strauss^Anne"),
    ("Nguyễn^Thị Lan", "NGUYEN^THI LAN"),
    ("Łukasiewicz^Michał", "Lukasiewicz^Michal"),
    ("Sørensen^Bjørn", "SOERENSEN^BJOERN"),
    ("O'Brien^Seán", "OBRIEN^SEAN"),
    ("Dvořák^Jiří", unicodedata.normalize("NFD", "Dvořák^Jiří")),
    ("García López^José", "GARCIA-LOPEZ^JOSE"),
    ("von der Leyen^Eva", "LEYEN^EVA"),
    ("Smith^Mary", "Smith^Mary^^Mrs^"),
    ("Weber^Karl-Heinz", "WEBER^KARL HEINZ"),
    ("Meier^Anna", "  meier^anna^^^"),
    ("山田^太郎", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    ("Yamada^Tarou", "YAMADA^TAROU=山田^太郎=やまだ^たろう"),
    ("ヤマダ^タロウ", "=山田^太郎=やまだ^たろう"),
    ("ヤマダ^タロウ", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    ("Hong^Gildong", "Hong^Gildong=洪^吉洞=홍^길동"),
    ("홍^길동", "Hong^Gildong=洪^吉洞=홍^길동"),
    ("Wang^XiaoDong", "Wang^XiaoDong=王^小东"),
    ("Иванов^Пётр", "ИВАНОВ^ПЕТР"),
    ("محمد^أحمد", "محمد^احمد"),
)
# In two scripts: nothing is to be read from it, but hints.
TWO_SCRIPTS = (
    ("Иванов^Пётр", "Ivanov^Petr"),
    ("山田^太郎", "Yamada^Taro"),
    ("やまだ^たろう", "山田^太郎"),
    ("홍^길동", "Hong^Gildong"),
    ("王^小东", "Wang^Xiaodong"),
    ("محمد^أحمد", "Mohammed^Ahmad"),
    ("Παπαδόπουλος^Γιώργος", "Papadopoulos^Giorgos"),
    ("כהן^דוד", "Cohen^David"),
    ("ヤマダ^タロウ", "YAMADA^TARO"),
)
BABIES = ("Baby Girl", "BABY BOY", "Babygirl", "BG", "Newborn", "Baby")
NOBODY = (
    "Unknown^Unknown",
    "NOTFALL",
    "TRAUMA^1",
    "Anonymous",
    "^^^^",
    "X",
    "?????",
    "UNBEKANNT^M",
)
NOT_BORN = ("19000101", "18000101", "00000000", "", "        ", "19000230")
PARTS = (("CT head", "HEAD"), ("CT chest", "CHEST"), ("CT knee", "KNEE"), ("CT pelvis", "PELVIS"))


def da(day: date | None) -> str:
    return day.strftime("%Y%m%d") if day else ""


def born(patient: PatientCandidate) -> date:
    assert patient.birth_date is not None
    return patient.birth_date


def family(name: str) -> str:
    return name.split("=", maxsplit=1)[0].split("^", maxsplit=1)[0]


@dataclass
class Maker:
    """Makes up values; the same for the same seed."""

    random: random.Random

    def uuid(self) -> UUID:
        return UUID(int=self.random.getrandbits(128))

    def uid(self) -> str:
        return f"2.25.{self.random.getrandbits(100)}"

    def digits(self, n: int) -> str:
        return str(self.random.randint(10 ** (n - 1), 10**n - 1))

    def day(self, first: int = 1930, last: int = 2020) -> date:
        start = date(first, 1, 1)
        return start + timedelta(days=self.random.randrange((date(last, 12, 31) - start).days))

    def patient(self, name: str = "", **values: object) -> PatientCandidate:
        sex = self.random.choice("MF")
        given = self.random.choice(GIRLS if sex == "F" else BOYS)
        made = PatientCandidate(
            id=self.uuid(),
            mrn=self.digits(7),
            mrn_issuer=AUTHORITY,
            name=name or f"{self.random.choice(FAMILIES)}^{given}",
            birth_date=self.day(),
            sex=sex,
        )
        return replace(made, **values)  # type: ignore[arg-type]

    def sibling(self, of: PatientCandidate, **values: object) -> PatientCandidate:
        """Of the same sex and family name, born on the same day."""
        first = of.name.split("^")[1]
        names = [each for each in (GIRLS if of.sex == "F" else BOYS) if each[0] != first[:1]]
        name = f"{family(of.name)}^{self.random.choice(names)}"
        return replace(
            self.patient(name, birth_date=of.birth_date, sex=of.sex),
            **values,  # type: ignore[arg-type]
        )

    def order(self, patient: PatientCandidate, /, **values: object) -> OrderCandidate:
        day = TODAY - timedelta(days=self.random.randrange(60))
        at = datetime(day.year, day.month, day.day, self.random.randrange(7, 18), tzinfo=UTC)
        description, _ = self.random.choice(PARTS)
        made = OrderCandidate(
            id=self.uuid(),
            patient=patient,
            accession_number=f"A{self.digits(8)}",
            planned_study_instance_uid=self.uid(),
            modality="CT",
            description=description,
            scheduled_at=at,
            ordered_at=at - timedelta(days=self.random.randrange(1, 20)),
            station_ae_title="CT_1",
            site="main",
        )
        return replace(made, **values)  # type: ignore[arg-type]

    def study(self, order: OrderCandidate, /, **values: object) -> ArrivedStudy:
        """What a modality makes that took all values from the worklist."""
        body_part = dict(PARTS).get(order.description, "")
        made = replace(
            self.of_patient(order.patient),
            study_instance_uid=order.planned_study_instance_uid,
            accession=Identifier(order.accession_number, order.accession_issuer),
            modalities=(order.modality,),
            study_date=da(order.scheduled_at.date() if order.scheduled_at else None),
            body_parts=(body_part,) if body_part else (),
            stations=(order.station_ae_title,),
        )
        return replace(made, **values)  # type: ignore[arg-type]

    def own_uid(self, order: OrderCandidate, /, **values: object) -> ArrivedStudy:
        """The same by a modality that makes StudyInstanceUIDs of its own."""
        return self.study(order, **{"study_instance_uid": self.uid(), **values})

    def of_patient(self, whose: PatientCandidate, /, **values: object) -> ArrivedStudy:
        """A study of a patient that no order was placed for."""
        made = ArrivedStudy(
            study_instance_uid=self.uid(),
            patient=Identifier(whose.mrn, whose.mrn_issuer),
            patient_name=whose.name,
            birth_date=da(whose.birth_date),
            sex=whose.sex,
            modalities=("CT",),
            study_date=da(TODAY - timedelta(days=self.random.randrange(60))),
            stations=("CT_1",),
            institution="Main Hospital",
        )
        return replace(made, **values)  # type: ignore[arg-type]

    def slip(self, number: str) -> str:
        """A number as somebody mistypes it; never the same."""
        while True:
            n = self.random.randrange(1, len(number) - 1)
            other = self.random.choice(
                (
                    number[:n] + self.random.choice("0123456789") + number[n + 1 :],
                    number[:n] + number[n + 1] + number[n] + number[n + 2 :],
                    number[:n] + number[n + 1 :],
                )
            )
            if other != number:
                return other
