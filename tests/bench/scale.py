"""Row 11: the same searches where few studies are known, and where many are."""

from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url
from sqlmodel import SQLModel

from app.models import Instance, Order, OrderStudy, Patient, Series, Study
from tests.bench import data
from tests.bench.client import BenchError, fetch, wrk
from tests.bench.measure import Better, Row
from tests.bench.queries import JSON, Searches
from tests.bench.site import STUDIES_A_PATIENT, LightboxServers, Session, Site

MANY = 20_000
NOT_COPIED = "audit"


def rows(site: Site) -> Iterator[Row]:
    scale = _Scale(site)
    for name, title, path in (
        ("study", "a study by its StudyInstanceUID", scale.searches.study),
        ("series", "the series of a study", scale.searches.series),
        ("priors", "the studies of a patient", scale.searches.priors),
    ):
        yield Row(
            name=f"scale-{name}",
            title=f"search for {title}: Lightbox with {site.small_studies} studies (left) and "
            f"with {MANY:,} (right)",
            unit="ms",
            target=1.2,
            better=Better.LOWER,
            prepare=partial(scale.prepare, path),
            direct=partial(scale.few, path),
            ours=partial(scale.many, path),
        )


class _Scale:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._large: LightboxServers | None = None
        self.searches = Searches(site)

    @property
    def large(self) -> LightboxServers:
        """A copy of Lightbox's database, open viewers included, with many studies more."""
        if self._large is None:
            assert self.searches.sessions
            owner_url, app_url = self._site.new_database("large")
            source = _engine(self._site.lightbox.owner_url)
            target = _engine(owner_url)
            try:
                with source.connect() as old, target.begin() as new:
                    _copy(old, new)
                    _add_studies(new, MANY - self._site.small_studies)
                for each in (source, target):
                    if each.dialect.name == "postgresql":  # as autovacuum does in its time
                        with each.begin() as connection:
                            connection.execute(sa.text("ANALYZE"))
            finally:
                source.dispose()
                target.dispose()
            self._large = self._site.another_lightbox("large", owner_url, app_url)
        return self._large

    def prepare(self, path: Callable[[int], str]) -> None:
        for origin in (self._site.lightbox.edge.viewer_url, self.large.edge.viewer_url):
            session = self.searches.sessions[0]
            source = session.at(origin).with_headers(Accept=JSON)
            answer = fetch(source, session.root + path(0))
            if answer.status != 200 or b'"0020000D"' not in answer.body:
                raise BenchError(f"a search: {answer.status}")

    def few(self, path: Callable[[int], str]) -> float:
        return self._milliseconds(self._site.lightbox.edge.viewer_url, path)

    def many(self, path: Callable[[int], str]) -> float:
        return self._milliseconds(self.large.edge.viewer_url, path)

    def _milliseconds(self, origin: str, path: Callable[[int], str]) -> float:
        sessions: list[Session] = self.searches.sessions
        sources = [each.at(origin).with_headers(Accept=JSON) for each in sessions]
        requests = [
            source.request(each.root + path(STUDIES_A_PATIENT * index))
            for index, (source, each) in enumerate(zip(sources, sessions, strict=True))
        ]
        load = wrk(
            sources[0].address,
            requests,
            connections=1,
            seconds=2 if self._site.quick else 4,
            folder=self._site.folder,
        )
        return 1000 / load.rate


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(make_url(url.replace("sqlite+aiosqlite", "sqlite")))


def _copy(old: Connection, new: Connection) -> None:
    """All tables but the trail, which nothing here reads."""
    for table in SQLModel.metadata.sorted_tables:
        if not table.name.startswith(NOT_COPIED):
            rows = [dict(each) for each in old.execute(sa.select(table)).mappings()]
            if rows:
                new.execute(sa.insert(table), rows)


def _add_studies(connection: Connection, number: int) -> None:
    """Patients with five studies each, every one with an order, a series and an instance. Orthanc
    has none of them."""
    batches: dict[type[SQLModel], list[SQLModel]] = {
        each: [] for each in (Patient, Order, Study, Series, Instance, OrderStudy)
    }
    patient_id = UUID(int=0)
    for index in range(number):
        nth = index % STUDIES_A_PATIENT
        mrn = f"SCALE-{index // STUDIES_A_PATIENT:06}"
        if nth == 0:
            patient_id = uuid4()
            batches[Patient].append(
                Patient(
                    id=patient_id,
                    mrn=mrn,
                    first_name="Scale",
                    last_name=f"Person{index}",
                    dob=date(1950 + index % 60, 1, 1),
                    sex="M",
                )
            )
        study, series = data.uid("scale", index), data.uid("scale", index, "series")
        order = Order(
            patient_id=patient_id,
            order_type="IMAGING",
            order_category="CT",
            accession_number=f"SCALE{index:08}",
            planned_study_instance_uid=data.uid("scale", index, "planned"),
            requested_by=f"clinician-{index % 50}",
            site="main",
        )
        batches[Order].append(order)
        batches[Study].append(
            Study(
                study_instance_uid=study,
                patient_id=patient_id,
                orthanc_id=str(uuid4()),
                dicom_patient_id=mrn,
                patient_name=f"Person{index}^Scale",
                study_date=f"20{10 + nth:02}0115",
                study_description="CT for measuring",
                accession_number=order.accession_number,
            )
        )
        batches[Series].append(
            Series(
                series_instance_uid=series,
                study_instance_uid=study,
                modality="CT",
                series_number=1,
            )
        )
        batches[Instance].append(
            Instance(
                sop_instance_uid=data.uid(series, 1),
                series_instance_uid=series,
                study_instance_uid=study,
                orthanc_id=str(uuid4()),
                sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                received_sha256="0" * 64,
                received_by="technologist",
            )
        )
        batches[OrderStudy].append(
            OrderStudy(order_id=order.id, study_instance_uid=study, linked_by="technologist")
        )
    for model, batch in batches.items():
        table = SQLModel.metadata.tables[str(model.__tablename__)]
        connection.execute(sa.insert(table), [each.model_dump() for each in batch])
