"""Deletion of a study: from Orthanc, from our tables, with the viewers that show it."""

from typing import Any

import sqlalchemy as sa

from app import journal, linking
from app.access import PatientAccess
from app.audit import AuditTrail
from app.errors import Conflict
from app.linking import Unlinked
from app.orthanc import Orthanc, promptly
from app.viewer import Viewer


async def delete_study(
    access: PatientAccess,
    parts: tuple[AuditTrail, Orthanc, Viewer],
    why: str,
    **said: Any,
) -> tuple[Unlinked, int]:
    """Delete the access's study, and add the record to its transaction: what is gone, and the
    number of viewers that ended. `said` is what else the record says.

    Safe to repeat. Raises Conflict where images arrived meanwhile, OrthancUnavailable.
    """
    trail, orthanc, viewer = parts
    assert access.study is not None
    await access.release()
    await journal.will_delete(trail, access, access.study.orthanc_id, why)
    await orthanc.delete_study(access.study.orthanc_id)
    ended = await viewer.end_study_sessions(access)
    try:
        gone = await linking.forget_study(access)
    except sa.exc.IntegrityError as error:
        raise Conflict("Images arrived at the same moment; delete the study again.") from error
    # What an upload brought in meanwhile; one that comes later finds the study gone, and waits.
    async with promptly():
        await orthanc.delete_study(access.study.orthanc_id)
    await access.done(
        detail={
            "reason": why,
            "series_count": gone.series_count,
            "instance_count": gone.instance_count,
            "order_ids": [str(each) for each in gone.order_ids],
            "sop_instance_uids": gone.sop_instance_uids,
            "viewers_ended": ended,
            **({"order_status": gone.order_status} if gone.order_status else {}),
        },
        **said,
    )
    return gone, ended
