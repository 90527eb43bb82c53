"""Is it still what was kept? A stamp on each study that changes whenever its files do.

What came through Lightbox changes the study's `generation` or its instances, and so counts at
once. What was changed in Orthanc itself shows in nothing but the study's statistics (a deletion
inside a study moves neither LastUpdate nor /changes), so those are asked for again after a second;
with them, whether the archive still holds the study under this one patient alone.
"""

import asyncio
import hashlib
import time
from typing import Protocol

from app.models import Instance
from app.orthanc import Orthanc

State = tuple[int, str]
"""Number of a study's files in the archive, and their size."""

FRESH_SECONDS = 1.0
_MOST_REMEMBERED = 10_000


class Known(Protocol):
    """What a stamp is made of: a `StudyAccess`, or a study that is made ready for one."""

    @property
    def study_instance_uid(self) -> str: ...
    @property
    def orthanc_id(self) -> str: ...
    @property
    def dicom_patient_id(self) -> str: ...
    @property
    def generation(self) -> str: ...
    @property
    def instance_count(self) -> int: ...


class Freshness:
    """Stamps of studies. One per app."""

    def __init__(self, orthanc: Orthanc) -> None:
        self._orthanc = orthanc
        self._states: dict[str, tuple[float, State]] = {}
        self._asking: dict[str, asyncio.Task[State]] = {}

    async def stamp(self, access: Known) -> str:
        """16 hexadecimal digits: another file, another stamp.

        Raises NotFound for a study that has gone from the archive, Conflict for one that it holds
        under two patients, OrthancUnavailable.
        """
        count, size = await self._state(access.study_instance_uid, access.orthanc_id)
        # Instances that are linked later count too, though the archive has had them before.
        whole = f"{access.generation} {access.instance_count} {count} {size}"
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    async def held(self, access: Known, instances: list[Instance]) -> list[Instance]:
        """Those of the study's instances that the archive has not lost. Raises as `stamp` does."""
        count, _ = await self._state(access.study_instance_uid, access.orthanc_id)
        if count == access.instance_count:
            return instances
        held = await self._orthanc.study_instances(access.orthanc_id)
        return [each for each in instances if each.orthanc_id in held]

    async def _state(self, study_uid: str, orthanc_id: str) -> State:
        known = self._states.get(orthanc_id)
        if known is not None and time.monotonic() - known[0] < FRESH_SECONDS:
            return known[1]
        asking = self._asking.get(orthanc_id)
        if asking is None:
            # Of many requests at once one asks, and goes on asking if its client goes away.
            asking = asyncio.create_task(self._ask(study_uid, orthanc_id))
            self._asking[orthanc_id] = asking
            asking.add_done_callback(lambda _: self._asking.pop(orthanc_id, None))
        return await asyncio.shield(asking)

    async def _ask(self, study_uid: str, orthanc_id: str) -> State:
        asked_at = time.monotonic()
        state, _ = await asyncio.gather(
            self._orthanc.study_state(orthanc_id),
            self._orthanc.refuse_shared(study_uid, orthanc_id),
        )
        if len(self._states) >= _MOST_REMEMBERED:
            self._states.clear()
        self._states[orthanc_id] = (asked_at, state)
        return state
