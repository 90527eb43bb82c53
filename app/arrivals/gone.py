"""What was deleted in Orthanc itself: it is no longer listed, and that is on record.

A row that stays would vouch for a file that nobody looked at, if one came back under its UIDs.
"""

from collections.abc import Collection

import sqlalchemy as sa
from sqlmodel import col, select

from app import linking
from app.access import Gate, Subject
from app.arrivals import index
from app.arrivals.changes import ORIGIN
from app.arrivals.linker import follower
from app.audit import Action, AuditTrail, Entry, Outcome
from app.models import Arrival, ArrivalState, Instance, Series, SeriesMetadata, Study


class Gone:
    """Takes away what has gone from the archive."""

    def __init__(self, gate: Gate, site: str) -> None:
        self._gate = gate
        self._principal = follower(site)

    async def study(self, row: Arrival) -> None:
        """The archive holds the study no more. Raises as the gate does."""
        uid = row.study_instance_uid
        columns = {
            "state": ArrivalState.GONE.value,
            "due_at": None,
            "patient_id": None,
            "order_id": None,
            "rule": "",
        }
        async with self._gate.transaction([]) as session:
            study = await session.get(Study, uid) if uid else None
            if study is None or study.orthanc_id != row.orthanc_id:
                await session.commit()
                async with self._gate.database.writing():
                    if await index.change(session, row, **columns):
                        await AuditTrail.add(session, _record(row))
                    await session.commit()
                return
            access = await self._gate.patient_access(
                session, self._principal, Action.STUDY_LINK, ORIGIN, Subject.STUDY, uid
            )
            await access.release()
            async with self._gate.database.writing():
                gone = await linking.forget_study(access)
                await index.change(session, row, **columns)
                await access.done(
                    action=Action.ARCHIVE_CHANGE,
                    reason="study-gone",
                    detail={
                        "order_ids": [str(each) for each in gone.order_ids],
                        "sop_instance_uids": gone.sop_instance_uids,
                    },
                )
                await session.commit()

    async def instances(self, row: Arrival, orthanc_ids: Collection[str]) -> None:
        """Files of a study have gone, and the study has not."""
        uid = row.study_instance_uid
        async with self._gate.transaction([]) as session:
            access = await self._gate.patient_access(
                session, self._principal, Action.STUDY_LINK, ORIGIN, Subject.STUDY, uid
            )
            await access.release()
            these = sa.and_(
                col(Instance.study_instance_uid) == uid,
                col(Instance.orthanc_id).in_(sorted(orthanc_ids)),
            )
            async with self._gate.database.writing():
                sops = (await session.exec(select(Instance.sop_instance_uid).where(these))).all()
                await session.exec(sa.delete(Instance).where(these))
                empty = (
                    col(Series.study_instance_uid) == uid,
                    col(Series.series_instance_uid).not_in(
                        select(Instance.series_instance_uid).where(
                            Instance.study_instance_uid == uid
                        )
                    ),
                )
                going = select(Series.series_instance_uid).where(*empty)
                # Held, so that nobody keeps metadata of them meanwhile.
                series = (await session.exec(going.with_for_update())).all()
                for table in (SeriesMetadata, Series):
                    await session.exec(
                        sa.delete(table).where(col(table.series_instance_uid).in_(series))
                    )
                await access.done(
                    action=Action.ARCHIVE_CHANGE,
                    reason="instances-gone",
                    detail={"sop_instance_uids": sorted(sops)},
                )
                await session.commit()


def _record(row: Arrival) -> Entry:
    return Entry(
        action=Action.ARCHIVE_CHANGE,
        outcome=Outcome.DONE,
        origin=ORIGIN,
        actor="lightbox",
        reason="study-gone",
        study_instance_uid=row.study_instance_uid,
        detail={"orthanc_id": row.orthanc_id, "state": row.state},
    )
