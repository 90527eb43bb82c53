"""What is done with a study that is in the archive: look, ask the matcher, link or let it wait."""

import logging
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Denial
from app.arrivals import candidates, facts, index
from app.arrivals.changes import ORIGIN
from app.arrivals.facts import FilesDisagreeError
from app.arrivals.files import DidNotPassError, Examined, Examiner
from app.arrivals.gone import Gone
from app.arrivals.linker import Also, Linker
from app.audit import Action, AuditTrail, Entry, Outcome
from app.db import Database
from app.errors import Conflict, LightboxError, NotFound, Unavailable
from app.matching import ArrivedStudy, Match, Verdict
from app.models import WAITING, Arrival, ArrivalState, Instance, Study
from app.notifications import Event, Notifications
from app.orthanc import Held, Orthanc

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0  # a study that still grows


@dataclass(frozen=True)
class _There:
    """What the archive has of a study now, and what of it is linked."""

    held: Held
    count: int
    size: str
    instances: frozenset[str]  # Orthanc ids; empty while the study grows
    linked: frozenset[str]
    owners: int
    owned: bool  # linked to a patient already

    @property
    def new(self) -> frozenset[str]:
        return self.instances - self.linked


class Work:
    """Looks at one study at a time; several may be looked at side by side."""

    def __init__(
        self,
        database: Database,
        orthanc: Orthanc,
        examiner: Examiner,
        linker: Linker,
        gone: Gone,
        authority: str,
    ) -> None:
        self._database = database
        self._orthanc = orthanc
        self._examiner = examiner
        self._linker = linker
        self._gone = gone
        self._authority = authority

    async def look(self, orthanc_id: str) -> None:
        """Look at one study. What goes wrong puts it off; nothing is raised but
        OrthancUnavailable and what the database raises."""
        async with self._database.session() as session:
            row = await session.get(Arrival, orthanc_id)
        if row is None:
            return
        try:
            await self._look(row)
        except Unavailable:
            await self._put_off(row)
            raise
        except NotFound:
            await self._put_off(row)  # a file of it was deleted while we looked
        except Conflict as error:
            await self._wait(row, ArrivalState.CONFLICTING, index.reason("conflict", error.detail))
        except Denial as error:
            await self._wait(row, ArrivalState.PROPOSED, index.reason("denied", error.detail))
        except (LightboxError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            # Nobody foresaw it. The others go on, and this one is seen.
            logger.error("study %s can't be looked at", orthanc_id, exc_info=error)
            await self._put_off(row)

    async def _look(self, row: Arrival) -> None:
        held = await self._orthanc.held(row.orthanc_id)
        if held is None:
            await self._gone.study(row)
            return
        if row.study_instance_uid == "":
            words = "The study has no valid StudyInstanceUID."
            await self._wait(row, ArrivalState.QUARANTINED, index.reason("no-uid", words))
            return
        there = await self._there(row, held)
        row.stable = held.stable  # after a restart Orthanc no longer says so in its changes
        if held.stable and (lost := there.linked - there.instances):
            await self._gone.instances(row, lost)
        counts: dict[str, Any] = {
            "instance_count": there.count,
            "disk_size": there.size,
            "series_count": len(held.series),
            "stable": held.stable,
            "attempts": 0,
        }
        if there.owned and there.owners == 1 and held.stable and not there.new:
            await self._settle(row, counts)
        elif row.held or row.state == ArrivalState.REJECTED:
            await self._keep(row, **counts, due_at=None)  # a human has said so
        else:
            await self._decide(row, there, counts)

    async def _there(self, row: Arrival, held: Held) -> _There:
        count, size = await self._orthanc.study_state(row.orthanc_id)
        owners = await self._orthanc.owners(row.study_instance_uid)
        instances = (
            await self._orthanc.study_instances(row.orthanc_id) if held.stable else set[str]()
        )
        async with self._database.session() as session:
            study = await session.get(Study, row.study_instance_uid)
            linked = await session.exec(
                select(Instance.orthanc_id).where(
                    Instance.study_instance_uid == row.study_instance_uid
                )
            )
            ours = study is not None and study.orthanc_id == row.orthanc_id
            known = frozenset(linked) if ours else frozenset()
        return _There(held, count, size, frozenset(instances), known, len(owners), ours)

    async def _settle(self, row: Arrival, counts: dict[str, Any]) -> None:
        """All of it is linked: it came through us, or was linked before."""
        async with self._database.session() as session:
            study = await session.get(Study, row.study_instance_uid)
        if study is None:
            await self._put_off(row)
            return
        series = [await self._orthanc.series_modality(x) for x in await self._series(row)]
        await self._linker.unchanged(
            row,
            **counts,
            state=ArrivalState.LINKED.value,
            patient_id=study.patient_id,
            modalities="\\".join(sorted(set(series) - {""}))[:256],
            due_at=None,
            reasons="[]",
            candidates="[]",
        )

    async def _series(self, row: Arrival) -> tuple[str, ...]:
        held = await self._orthanc.held(row.orthanc_id)
        return held.series if held else ()

    async def _decide(self, row: Arrival, there: _There, counts: dict[str, Any]) -> None:
        try:
            said, files, study = await self._judged(row, there)
        except DidNotPassError as error:
            words = f"A file did not pass the checks: {error.why}"
            await self._wait(
                row, ArrivalState.QUARANTINED, index.reason("did-not-pass", words), **counts
            )
            return
        except FilesDisagreeError as error:
            await self._wait(
                row, ArrivalState.QUARANTINED, index.reason("files-disagree", str(error)), **counts
            )
            return
        columns = {
            **counts,
            **index.shown_of(study, study.modalities),
            **index.said_of(said),
            "facts": facts.as_json(study, from_files=bool(files) or _from_files(row)),
            "rule": said.rule.value if said.rule else "",
            "patient_id": said.patient_id,
            "order_id": said.order_id,
        }
        columns["study_instance_uid"] = row.study_instance_uid
        if not there.held.stable:
            await self._keep(row, said, **columns, due_at=index.soon(AGAIN_SECONDS))
        elif said.verdict is Verdict.CERTAIN:
            await self._linker.link_certain(row, files, columns, self._still(study, said))
        else:
            await self._queue(row, said, columns)

    async def _judged(
        self, row: Arrival, there: _There
    ) -> tuple[Match, list[Examined], ArrivedStudy]:
        """What the matcher says; files are read when it is worth it, and all before it counts."""
        kept, from_files = facts.from_json(row.facts)
        if not from_files and not (row.backlog and not await self._has_candidates(kept)):
            first = min(there.new or there.instances, default="") or await self._any(row)
            files = [await self._examiner.one(row.orthanc_id, first)] if first else []
            kept = facts.merged([each.says for each in files]) if files else kept
        said = await self._match(kept, there)
        if said.verdict is not Verdict.CERTAIN or not there.held.stable:
            return said, [], kept
        files = await self._examiner.all(row.orthanc_id, there.new)
        if not files:
            return said, [], kept
        says = [each.says for each in files]
        study = facts.merged([*says, kept] if from_files else says)
        again = await self._match(study, there)
        return again, files, study

    def _still(self, study: ArrivedStudy, said: Match) -> Also:
        """Verdict and link belong in one transaction: the patient may have been taken apart from
        another in between, the order cancelled."""

        async def still(session: AsyncSession) -> None:
            now = await candidates.judge_within(session, study, self._authority)
            if (now.verdict, now.patient_id) != (Verdict.CERTAIN, said.patient_id):
                raise Conflict("The patient, or the order, was changed at the same moment.")

        return still

    async def _match(self, study: ArrivedStudy, there: _There) -> Match:
        async with self._database.session() as session:
            return await candidates.judge(session, study, self._authority, shared=there.owners != 1)

    async def _has_candidates(self, study: ArrivedStudy) -> bool:
        async with self._database.session() as session:
            found = await candidates.find(session, study)
        return bool(found.orders or found.patients)

    async def _any(self, row: Arrival) -> str:
        """Any instance of a study that still grows."""
        return min(await self._orthanc.study_instances(row.orthanc_id), default="")

    async def _queue(self, row: Arrival, said: Match, columns: dict[str, Any]) -> None:
        """Let it wait for a human."""
        state = ArrivalState(said.verdict.value)
        columns |= {"patient_id": None, "order_id": None, "state": state.value, "due_at": None}
        async with self._database.writing_session() as session:
            await index.propose(session, row, said)
            told = await self._tell(session, row, state)
            if await index.change(session, row, **columns, told=told):
                await session.commit()

    async def _wait(self, row: Arrival, state: ArrivalState, reasons: str, **more: Any) -> None:
        """Let it wait for a human, whatever the matcher would say: it is asked whose the study may
        be, which decides who is shown that it waits."""
        kept, _ = facts.from_json(row.facts)
        async with self._database.session() as session:
            said = await candidates.judge(session, kept, self._authority, shared=False)
        columns = {**more, "state": state.value, "reasons": reasons, "due_at": None}
        columns["candidates"] = index.said_of(said)["candidates"]
        async with self._database.writing_session() as session:
            await index.propose(session, row, said)
            told = await self._tell(session, row, state)
            changed = await index.change(
                session, row, **columns, patient_id=None, order_id=None, rule="", told=told
            )
            if not changed:
                return
            if (row.state, row.reasons) != (state.value, reasons):
                entry = Entry(
                    action=Action.STUDY_LINK,
                    outcome=Outcome.FAILED,
                    origin=ORIGIN,
                    actor="lightbox",
                    reason=state.value,
                    study_instance_uid=row.study_instance_uid,
                    detail={"orthanc_id": row.orthanc_id, "reasons": reasons},
                )
                await AuditTrail.add(session, entry)
            await session.commit()

    async def _tell(self, session: Any, row: Arrival, state: ArrivalState) -> bool:
        """Say once that somebody has to look at it."""
        if row.told or state not in WAITING or row.backlog:
            return row.told
        body = {
            "study_instance_uid": row.study_instance_uid,
            "state": state.value,
            "arrived_at": row.arrived_at,
        }
        await Notifications.add(session, Event.STUDY_UNMATCHED, body)
        return True

    async def _keep(self, row: Arrival, said: Match | None = None, **columns: Any) -> None:
        async with self._database.writing_session() as session:
            if said is not None:
                await index.propose(session, row, said)
            await index.change(session, row, **columns)
            await session.commit()

    async def _put_off(self, row: Arrival) -> None:
        async with self._database.writing_session() as session:
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.orthanc_id) == row.orthanc_id)
                .values(attempts=row.attempts + 1, due_at=index.later(row.attempts))
                .execution_options(synchronize_session=False)
            )
            await session.commit()


def _from_files(row: Arrival) -> bool:
    return facts.from_json(row.facts)[1]
