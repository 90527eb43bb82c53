"""Statistics for radiology admins: numbers, and no patient's data."""

from dataclasses import asdict
from typing import Annotated

from fastapi import Depends, Request
from pydantic import BaseModel

from app import linking
from app.access import Caller, RoleAccess
from app.arrivals import Follower
from app.audit import Action
from app.orthanc import Orthanc
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/dicom", tags=["admin"])

ReadStatistics = Annotated[RoleAccess, Depends(Caller(Action.STATISTICS_READ), scope="function")]


class FollowerOut(BaseModel):
    """How far Orthanc's changes are followed. `listed` of `to_list` studies that were there at the
    start are noted, `to_look_at` of all still have to be looked at, `waiting` are for people to
    decide; `problem` is a sentence, empty while all is well. `following`: this process does it.
    """

    following: bool
    position: int
    listed: int
    to_list: int
    to_look_at: int
    waiting: int
    problem: str


class StatisticsOut(BaseModel):
    """`total_...` and `disk_size_mb` (MiB) are what Orthanc holds, the others what we know."""

    total_patients: int
    total_studies: int
    total_series: int
    total_instances: int
    disk_size_mb: float
    registered_patients: int
    orders: int
    orders_with_images: int
    linked_studies: int
    follower: FollowerOut


@router.get("/stats")
async def read_statistics(access: ReadStatistics, request: Request) -> StatisticsOut:
    """Totals of the archive and of the links."""
    orthanc: Orthanc = request.app.state.orthanc
    follower: Follower = request.app.state.follower
    archive = await orthanc.statistics()
    ours = await linking.totals(access)
    return StatisticsOut(
        total_patients=archive.patients,
        total_studies=archive.studies,
        total_series=archive.series,
        total_instances=archive.instances,
        disk_size_mb=archive.disk_size_mb,
        registered_patients=ours.patients,
        orders=ours.orders,
        orders_with_images=ours.orders_with_images,
        linked_studies=ours.studies,
        follower=FollowerOut(**asdict(await follower.progress())),
    )
