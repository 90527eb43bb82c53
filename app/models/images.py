"""Studies, series and instances in Orthanc that came in through our checks."""

from datetime import datetime
from uuid import UUID

from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import ATTRIBUTES, EMPTY, UtcDateTime, new_generation


class Study(SQLModel, table=True):
    """A study in Orthanc that belongs to one patient of ours, and to no other."""

    study_instance_uid: str = Field(primary_key=True, max_length=64)
    patient_id: UUID = Field(foreign_key="patient.id", index=True)
    orthanc_id: str = Field(max_length=44)
    dicom_patient_id: str = Field(max_length=64)  # PatientID (0010,0020) as stored
    patient_name: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    study_date: str = Field(default="", index=True)
    study_time: str = ""
    study_description: str = ""
    accession_number: str = Field(default="", index=True)
    # Names and StudyDescription as searches compare them: case folded (PS3.4 C.2.2.2.1).
    folded_name: str = Field(default="", index=True, sa_column_kwargs=EMPTY)
    folded_description: str = Field(default="", sa_column_kwargs=EMPTY)
    folded_referring_physician: str = Field(default="", sa_column_kwargs=EMPTY)
    study_id: str = Field(default="", sa_column_kwargs=EMPTY)
    attributes: str = ATTRIBUTES
    # Another study under the same UID, after a deletion say, has another.
    generation: str = Field(default_factory=new_generation, max_length=32, sa_column_kwargs=EMPTY)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class Series(SQLModel, table=True):
    """A series of a study of ours."""

    series_instance_uid: str = Field(primary_key=True, max_length=64)
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    modality: str = ""
    series_number: int | None = None
    series_description: str = ""
    attributes: str = ATTRIBUTES


class SeriesMetadata(SQLModel, table=True):
    """The DICOM JSON of a series as Orthanc made it, checked, and good while `stamp` holds."""

    __tablename__ = "series_metadata"

    series_instance_uid: str = Field(
        primary_key=True, foreign_key="series.series_instance_uid", max_length=64
    )
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    stamp: str = Field(max_length=64)
    body: bytes  # gzip


class Instance(SQLModel, table=True):
    """An instance that came in through our checks; nothing else of a study is ever served."""

    sop_instance_uid: str = Field(primary_key=True, max_length=64)
    series_instance_uid: str = Field(
        foreign_key="series.series_instance_uid", index=True, max_length=64
    )
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    orthanc_id: str = Field(max_length=44)
    sop_class_uid: str = Field(max_length=64)
    transfer_syntax_uid: str = Field(max_length=64)
    number_of_frames: int = 1
    instance_number: int | None = None
    rows: int | None = None  # 0: no pixels; None: taken in before this was kept
    columns: int | None = None
    attributes: str = ATTRIBUTES
    received_sha256: str = Field(max_length=64)  # of the file as the sender sent it
    received_by: str
    received_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
