"""Studies: search, one study, of an order, of a patient, and deletion."""

from datetime import date, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import BackgroundTasks, Depends, Path, Query, Request, Response
from pydantic import BaseModel

from app import deletion, linking
from app.access import Gate, Grant, PatientAccess, Subject, Visible, VisiblePatients
from app.audit import Action
from app.errors import Unprocessable
from app.linking import StudyFilter, StudySummary
from app.orthanc import Orthanc
from app.routes.paging import Cursor, Limit, link_next, read_cursor
from app.routing import AccessRouter
from app.viewer import Viewer

router = AccessRouter(prefix="/api/v1/dicom/studies", tags=["studies"])

ListStudies = Annotated[VisiblePatients, Depends(Visible(Action.STUDY_LIST), scope="function")]
ReadStudy = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_READ, of=Subject.STUDY), scope="function")
]
ReadPatientStudies = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_READ, of=Subject.PATIENT), scope="function")
]
ReadOrderStudies = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_READ, of=Subject.ORDER), scope="function")
]
DeleteStudy = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_DELETE, of=Subject.STUDY), scope="function")
]
StudyUid = Annotated[str, Path(alias="study_instance_uid", description="StudyInstanceUID")]


class SeriesOut(BaseModel):
    SeriesInstanceUID: str
    Modality: str
    SeriesNumber: int | None
    SeriesDescription: str
    NumberOfSeriesRelatedInstances: int


class StudyOut(BaseModel):
    """A study by its DICOM keywords; `order_id` is the first order it answers."""

    StudyInstanceUID: str
    PatientID: str
    PatientName: str
    PatientBirthDate: str
    PatientSex: str
    StudyDate: str
    StudyTime: str
    StudyDescription: str
    AccessionNumber: str
    ModalitiesInStudy: list[str]
    NumberOfStudyRelatedSeries: int
    NumberOfStudyRelatedInstances: int
    order_id: UUID | None
    order_ids: list[UUID]
    patient_id: UUID
    created_at: datetime

    @classmethod
    def of(cls, summary: StudySummary, **more: Any) -> "StudyOut":
        study = summary.study
        return cls(
            StudyInstanceUID=study.study_instance_uid,
            PatientID=study.dicom_patient_id,
            PatientName=study.patient_name,
            PatientBirthDate=study.patient_birth_date,
            PatientSex=study.patient_sex,
            StudyDate=study.study_date,
            StudyTime=study.study_time,
            StudyDescription=study.study_description,
            AccessionNumber=study.accession_number,
            ModalitiesInStudy=list(summary.modalities),
            NumberOfStudyRelatedSeries=len(summary.series),
            NumberOfStudyRelatedInstances=summary.instance_count,
            order_id=summary.order_ids[0] if summary.order_ids else None,
            order_ids=list(summary.order_ids),
            patient_id=study.patient_id,
            created_at=study.created_at,
            **more,
        )


class StudyWithSeries(StudyOut):
    series: list[SeriesOut]

    @classmethod
    def with_series(cls, summary: StudySummary) -> "StudyWithSeries":
        series = [
            SeriesOut(
                SeriesInstanceUID=each.series.series_instance_uid,
                Modality=each.series.modality,
                SeriesNumber=each.series.series_number,
                SeriesDescription=each.series.series_description,
                NumberOfSeriesRelatedInstances=each.instance_count,
            )
            for each in summary.series
        ]
        return cls(**StudyOut.of(summary).model_dump(), series=series)


class Deleted(BaseModel):
    status: str
    study_instance_uid: str
    series_deleted: int
    instances_deleted: int
    order_ids: list[UUID]
    viewers_ended: int


@router.get("")
async def list_studies(
    window: ListStudies,
    request: Request,
    response: Response,
    patient_id: UUID | None = None,
    mrn: Annotated[str, Query(max_length=64)] = "",
    accession_number: Annotated[str, Query(max_length=16)] = "",
    modality: Annotated[str, Query(max_length=16)] = "",
    study_date_from: date | None = None,
    study_date_to: date | None = None,
    description: Annotated[str, Query(max_length=64, description="Part of it; case ignored.")] = "",
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[StudyOut]:
    """The studies of patients that the caller may see."""
    wanted = StudyFilter(
        patient_id=patient_id,
        mrn=mrn,
        accession_number=accession_number,
        modality=modality,
        study_date_from=study_date_from,
        study_date_to=study_date_to,
        description=description,
        after=read_cursor(cursor),
        limit=limit + 1,
    )
    found = await linking.find_studies(window, wanted)
    page = found[:limit]
    last = page[-1].study.study_instance_uid if len(found) > limit else None
    link_next(request, response, last)
    await window.disclose(each.study.patient_id for each in page)
    return [StudyOut.of(each) for each in page]


@router.get("/{study_instance_uid}")
async def read_study(access: ReadStudy, study_instance_uid: StudyUid) -> StudyWithSeries:
    """One study with its series."""
    return StudyWithSeries.with_series(await linking.study_of(access))


@router.get("/patient/{patient_id}")
async def read_patient_studies(access: ReadPatientStudies, patient_id: UUID) -> list[StudyOut]:
    """A patient's studies, newest first; empty where there are none yet."""
    return [StudyOut.of(each) for each in await linking.studies_of(access)]


@router.get("/order/{order_id}")
async def read_order_studies(access: ReadOrderStudies, order_id: UUID) -> list[StudyOut]:
    """An order's studies, first linked first; empty where there are none yet."""
    return [StudyOut.of(each) for each in await linking.studies_of(access)]


@router.delete("/{study_instance_uid}")
async def delete_study(
    access: DeleteStudy,
    study_instance_uid: StudyUid,
    request: Request,
    after: BackgroundTasks,
    reason: Annotated[str, Query(min_length=3, max_length=500, description="Why, for the record.")],
) -> Deleted:
    """Delete a study from the archive, with its links, for a reason.

    Safe to repeat: where the archive failed half-way the study is still listed, and deleting it
    again finishes the work; once it is gone, the answer is 404.
    """
    viewer: Viewer = request.app.state.viewer
    orthanc: Orthanc = request.app.state.orthanc
    gate: Gate = request.app.state.gate
    assert access.study is not None
    if len(reason.strip()) < 3:
        raise Unprocessable("`reason` must say why the study is deleted.")
    gone, ended = await deletion.delete_study(access, (gate.trail, orthanc, viewer), reason.strip())
    after.add_task(request.app.state.worklist.wake)
    return Deleted(
        status="deleted",
        study_instance_uid=access.study.study_instance_uid,
        series_deleted=gone.series_count,
        instances_deleted=gone.instance_count,
        order_ids=gone.order_ids,
        viewers_ended=ended,
    )
