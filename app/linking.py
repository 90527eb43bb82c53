"""Orders and patients joined to studies: who owns a study, which orders it answers, what is known.

A study belongs to exactly one patient. Every function takes the access (or the window of a list)
first and never looks beyond it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select

from app.access import PatientAccess, RoleAccess, VisiblePatients
from app.errors import NotFound
from app.models import (
    Arrival,
    ArrivalState,
    Instance,
    Order,
    OrderStudy,
    Patient,
    Series,
    SeriesMetadata,
    Study,
)
from app.orderlife import images_changed


@dataclass(frozen=True)
class SeriesSummary:
    """A series and the number of its instances."""

    series: Series
    instance_count: int


@dataclass(frozen=True)
class StudySummary:
    """A study with its orders (first linked first), series and counts."""

    study: Study
    order_ids: tuple[UUID, ...] = ()
    series: tuple[SeriesSummary, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """ModalitiesInStudy (0008,0061): sorted, each once."""
        return tuple(sorted({each.series.modality for each in self.series if each.series.modality}))

    @property
    def instance_count(self) -> int:
        return sum(each.instance_count for each in self.series)


@dataclass(frozen=True)
class StudyFilter:
    """What a search for studies asks; None and empty mean anything."""

    patient_id: UUID | None = None
    mrn: str = ""
    accession_number: str = ""
    modality: str = ""
    study_date_from: date | None = None
    study_date_to: date | None = None
    description: str = ""
    order_id: UUID | None = None
    after: str = ""  # the last StudyInstanceUID of the page before
    limit: int = 50


async def find_studies(window: VisiblePatients, wanted: StudyFilter) -> list[StudySummary]:
    """The studies of visible patients that fit, in the order of their UIDs."""
    query = select(Study).join(Patient, col(Patient.id) == col(Study.patient_id))
    if wanted.patient_id:
        query = query.where(Study.patient_id == wanted.patient_id)
    if wanted.mrn:
        query = query.where(Patient.mrn == wanted.mrn)
    if wanted.accession_number:
        # The order's number counts too: a study may have been linked without carrying it.
        of_order = (
            select(OrderStudy.study_instance_uid)
            .join(Order, col(Order.id) == col(OrderStudy.order_id))
            .where(Order.accession_number == wanted.accession_number)
        )
        query = query.where(
            sa.or_(
                col(Study.accession_number) == wanted.accession_number,
                col(Study.study_instance_uid).in_(of_order),
            )
        )
    if wanted.modality:
        of_modality = select(Series.study_instance_uid).where(Series.modality == wanted.modality)
        query = query.where(col(Study.study_instance_uid).in_(of_modality))
    if wanted.study_date_from:
        query = query.where(Study.study_date >= wanted.study_date_from.strftime("%Y%m%d"))
    if wanted.study_date_to:
        # An absent StudyDate is "", which must not count as early.
        query = query.where(
            Study.study_date != "", Study.study_date <= wanted.study_date_to.strftime("%Y%m%d")
        )
    if wanted.description:
        query = query.where(
            col(Study.study_description).icontains(wanted.description, autoescape=True)
        )
    if wanted.order_id:
        linked = select(OrderStudy.study_instance_uid).where(OrderStudy.order_id == wanted.order_id)
        query = query.where(col(Study.study_instance_uid).in_(linked))
    query = await window.only(query)
    if wanted.after:
        query = query.where(Study.study_instance_uid > wanted.after)
    query = query.order_by(col(Study.study_instance_uid)).limit(wanted.limit)
    studies = (await window.session.exec(query)).all()
    return await summaries(window, studies)


async def studies_of(access: PatientAccess) -> list[StudySummary]:
    """The studies of the order that the access names, first linked first; else its patient's."""
    if access.order is None:
        return await patient_studies_of(access)
    query = (
        select(Study)
        .join(OrderStudy, col(OrderStudy.study_instance_uid) == col(Study.study_instance_uid))
        .where(OrderStudy.order_id == access.order.id, Study.patient_id == access.patient.id)
        .order_by(col(OrderStudy.linked_at), col(Study.study_instance_uid))
    )
    return await summaries(access, (await access.session.exec(query)).all())


async def patient_studies_of(access: PatientAccess) -> list[StudySummary]:
    """All studies of the access's patient, newest first, whatever else the access names."""
    query = (
        select(Study)
        .where(Study.patient_id == access.patient.id)
        .order_by(col(Study.study_date).desc(), col(Study.study_instance_uid))
    )
    return await summaries(access, (await access.session.exec(query)).all())


async def study_of(access: PatientAccess) -> StudySummary:
    """The study that the access names."""
    assert access.study is not None
    (summary,) = await summaries(access, [access.study])
    return summary


async def order_studies(
    window: PatientAccess | VisiblePatients, orders: Sequence[Order]
) -> dict[UUID, list[str]]:
    """StudyInstanceUIDs of each order, first linked first. Every order has a key."""
    linked: dict[UUID, list[str]] = {order.id: [] for order in orders}
    rows = await window.session.exec(
        select(OrderStudy)
        .where(col(OrderStudy.order_id).in_(linked))
        .order_by(col(OrderStudy.linked_at), col(OrderStudy.study_instance_uid))
    )
    for row in rows:
        linked[row.order_id].append(row.study_instance_uid)
    return linked


async def study_instance(
    access: PatientAccess, series_instance_uid: str, sop_instance_uid: str
) -> Instance:
    """One instance of the access's study. Raises NotFound unless all three UIDs belong together."""
    assert access.study is not None
    found = (
        await access.session.exec(
            select(Instance).where(
                Instance.sop_instance_uid == sop_instance_uid,
                Instance.series_instance_uid == series_instance_uid,
                Instance.study_instance_uid == access.study.study_instance_uid,
            )
        )
    ).first()
    if found is None:
        raise NotFound("The study has no such instance.")
    return found


async def series_instances(access: PatientAccess, series_instance_uid: str) -> set[str]:
    """SOPInstanceUIDs of a series of the access's study; empty if it is no series of it."""
    assert access.study is not None
    rows = await access.session.exec(
        select(Instance.sop_instance_uid).where(
            Instance.series_instance_uid == series_instance_uid,
            Instance.study_instance_uid == access.study.study_instance_uid,
        )
    )
    return set(rows)


@dataclass(frozen=True)
class Totals:
    """How much Lightbox knows."""

    patients: int
    orders: int
    orders_with_images: int
    studies: int


async def totals(access: RoleAccess) -> Totals:
    """Counts over all patients: numbers only."""

    async def count(what: sa.ColumnElement[int]) -> int:
        return int(await access.session.scalar(sa.select(what)) or 0)

    return Totals(
        patients=await count(sa.func.count(col(Patient.id))),
        orders=await count(sa.func.count(col(Order.id))),
        orders_with_images=await count(sa.func.count(sa.distinct(col(OrderStudy.order_id)))),
        studies=await count(sa.func.count(col(Study.study_instance_uid))),
    )


@dataclass(frozen=True)
class Unlinked:
    """What a deletion took away; kept in the audit trail."""

    series_count: int
    instance_count: int
    order_ids: list[UUID]
    sop_instance_uids: list[str]
    order_status: dict[str, str] = field(default_factory=dict)  # of orders that it moved
    reopened: list[UUID] = field(default_factory=list)  # orders whose images were complete


async def forget_study(access: PatientAccess) -> Unlinked:
    """Remove the access's study and its links from our tables."""
    assert access.study is not None
    uid = access.study.study_instance_uid
    summary = await study_of(access)
    instances = await access.session.exec(
        select(Instance.sop_instance_uid)
        .where(Instance.study_instance_uid == uid)
        .order_by(Instance.sop_instance_uid)
    )
    sop_instance_uids = list(instances)
    # From here on nobody keeps metadata of its series. (SQLite locks no row, and has one writer.)
    series = select(Series.series_instance_uid).where(Series.study_instance_uid == uid)
    await access.session.exec(series.order_by(Series.series_instance_uid).with_for_update())
    for table in (OrderStudy, SeriesMetadata, Instance, Series, Study):
        await access.session.exec(sa.delete(table).where(col(table.study_instance_uid) == uid))
    moved = await images_changed(access.session, summary.order_ids)
    await access.session.exec(
        sa.update(Arrival)
        .where(col(Arrival.orthanc_id) == access.study.orthanc_id)
        .values(state=ArrivalState.GONE.value, patient_id=None, order_id=None, rule="")
        .execution_options(synchronize_session=False)
    )
    return Unlinked(
        series_count=len(summary.series),
        instance_count=summary.instance_count,
        order_ids=list(summary.order_ids),
        sop_instance_uids=sop_instance_uids,
        order_status={str(each.order_id): each.told for each in moved},
        reopened=[each.order_id for each in moved if each.reopened],
    )


async def summaries(
    window: PatientAccess | VisiblePatients, studies: Sequence[Study]
) -> list[StudySummary]:
    uids = [study.study_instance_uid for study in studies]
    orders: dict[str, list[UUID]] = {uid: [] for uid in uids}
    links = await window.session.exec(
        select(OrderStudy)
        .where(col(OrderStudy.study_instance_uid).in_(uids))
        .order_by(col(OrderStudy.linked_at), col(OrderStudy.order_id))
    )
    for link in links:
        orders[link.study_instance_uid].append(link.order_id)
    series: dict[str, list[SeriesSummary]] = {uid: [] for uid in uids}
    counted = await window.session.exec(
        select(Series, sa.func.count(col(Instance.sop_instance_uid)))
        .join(
            Instance,
            col(Instance.series_instance_uid) == col(Series.series_instance_uid),
            isouter=True,
        )
        .where(col(Series.study_instance_uid).in_(uids))
        .group_by(*Series.__table__.c)  # type: ignore[attr-defined]
    )
    for each, count in counted:
        series[each.study_instance_uid].append(SeriesSummary(each, count))
    return [
        StudySummary(
            study=study,
            order_ids=tuple(orders[study.study_instance_uid]),
            series=tuple(sorted(series[study.study_instance_uid], key=_series_order)),
        )
        for study in studies
    ]


def _series_order(each: SeriesSummary) -> tuple[bool, int, str]:
    """By SeriesNumber (0020,0011); those without one last."""
    number = each.series.series_number
    return (number is None, number or 0, each.series.series_instance_uid)
