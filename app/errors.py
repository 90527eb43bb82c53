"""Every error Lightbox answers with, as one tree.

LightboxError                     status  said to the caller as RFC 9457 problem+json
├── Unauthenticated                  401  no token, or one that doesn't hold
├── Forbidden                        403  a valid caller without the right
├── NotFound                         404  nothing of that name for this caller
├── NotAcceptable                    406  none of the media types that are accepted
├── Gone                             410  a link that was used, is late, or was revoked
├── Conflict                         409  contradicts what is stored
│   └── PatientMismatch              409  the file belongs to another patient
├── TooLarge                         413  larger than the configured limit
├── UnsupportedMediaType             415  a body of a type that is not taken here
├── NotDicom                         415  not a DICOM file
├── TooManyRequests                  429  more than the limit; with Retry-After
├── Unprocessable                    422  the request's own form
│   └── MalformedDicom               422  DICOM, but truncated, too deep, or with bad values
├── Nonconforming                    422  a file that lacks what its IOD requires, by setting
├── NotValidated                     422  a file of which that could not be found out, by setting
└── Unavailable                      503  with Retry-After
    ├── OrthancUnavailable           503  the PACS doesn't answer, or answers nonsense
    ├── DatabaseUnavailable          503  the database doesn't answer
    ├── EhrUnavailable               503  the EHR, which has a say, doesn't: nothing is shown
    └── AuditUnavailable             503  the record could not be written, so nothing is shown

`detail` is a sentence for the caller: what was wrong and what to do. It never holds another
patient's data, an internal host, or a stack trace. `extra` holds further problem members.
"""

from collections.abc import Mapping
from typing import Any

PROBLEM_TYPE = "urn:lightbox:problem:"


class LightboxError(Exception):
    """The root. Raise one of the leaves."""

    status = 500
    title = "Internal error"
    slug = "internal-error"

    def __init__(self, detail: str, *, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra: dict[str, Any] = dict(extra or {})

    @property
    def type(self) -> str:
        """The `type` member of RFC 9457."""
        return f"{PROBLEM_TYPE}{self.slug}"


class Unauthenticated(LightboxError):
    status = 401
    title = "Not signed in"
    slug = "unauthenticated"


class Forbidden(LightboxError):
    status = 403
    title = "Not allowed"
    slug = "forbidden"


class NotFound(LightboxError):
    status = 404
    title = "Not found"
    slug = "not-found"


class NotAcceptable(LightboxError):
    status = 406
    title = "Not acceptable"
    slug = "not-acceptable"


class Gone(LightboxError):
    status = 410
    title = "No longer valid"
    slug = "gone"


class Conflict(LightboxError):
    status = 409
    title = "Conflict"
    slug = "conflict"


class PatientMismatch(Conflict):
    title = "Another patient's file"
    slug = "patient-mismatch"


class TooLarge(LightboxError):
    status = 413
    title = "Too large"
    slug = "too-large"


class UnsupportedMediaType(LightboxError):
    status = 415
    title = "Unsupported media type"
    slug = "unsupported-media-type"


class NotDicom(LightboxError):
    status = 415
    title = "Not DICOM"
    slug = "not-dicom"


class Unprocessable(LightboxError):
    status = 422
    title = "Invalid request"
    slug = "invalid-request"


class MalformedDicom(Unprocessable):
    title = "Malformed DICOM"
    slug = "malformed-dicom"


class Nonconforming(LightboxError):
    status = 422
    title = "Required attributes missing"
    slug = "nonconforming"


class NotValidated(LightboxError):
    status = 422
    title = "Not validated"
    slug = "not-validated"


class TooManyRequests(LightboxError):
    """`retry_after_seconds`: when the next try has a chance."""

    status = 429
    title = "Too many requests"
    slug = "too-many-requests"

    def __init__(self, detail: str, retry_after_seconds: int) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(LightboxError):
    status = 503
    title = "Temporarily unavailable"
    slug = "unavailable"
    retry_after_seconds = 5


class OrthancUnavailable(Unavailable):
    title = "Image archive unavailable"
    slug = "orthanc-unavailable"


class DatabaseUnavailable(Unavailable):
    title = "Database unavailable"
    slug = "database-unavailable"


class EhrUnavailable(Unavailable):
    title = "EHR's decision unavailable"
    slug = "ehr-unavailable"


class AuditUnavailable(Unavailable):
    title = "Audit trail unavailable"
    slug = "audit-unavailable"
