"""Statistics for radiology admins: numbers, and no patient's data."""

from typing import Annotated

from fastapi import Depends, Request
from pydantic import BaseModel

from app import linking
from app.access import Caller, RoleAccess
from app.audit import Action
from app.orthanc import Orthanc
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/dicom", tags=["admin"])

ReadStatistics = Annotated[RoleAccess, Depends(Caller(Action.STATISTICS_READ), scope="function")]


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


@router.get("/stats")
async def read_statistics(access: ReadStatistics, request: Request) -> StatisticsOut:
    """Totals of the archive and of the links."""
    orthanc: Orthanc = request.app.state.orthanc
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
    )
