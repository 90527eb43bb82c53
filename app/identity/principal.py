"""Who is calling, and what their token limits them to."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class Role(StrEnum):
    ADMIN = "admin"
    AUDITOR = "auditor"
    CLINICIAN = "clinician"
    RADIOLOGIST = "radiologist"
    SERVICE = "service"
    TECHNOLOGIST = "technologist"


@dataclass(frozen=True, slots=True)
class PatientContext:
    """The one patient that a token is limited to: by our id, or by `mrn` and its issuer. With
    neither it names nobody, and nobody is shown."""

    patient_id: UUID | None = None
    mrn: str = ""
    mrn_issuer: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """A SMART resource scope: of `level` (patient, user, system), `letters` among `cruds` for a
    FHIR resource, or for all of them: `*`."""

    level: str
    resource: str
    letters: frozenset[str]


@dataclass(frozen=True)
class Principal:
    """Who is calling: `sub` of the token, display name, known roles, site.

    `sid` is the sign-in at the identity provider; empty: the token names none. `patient` and
    `scopes` limit what the token is good for; None: they don't. `issued_at` is the token's `iat`;
    None: it has none.
    """

    sub: str
    name: str
    roles: frozenset[Role]
    site: str
    sid: str = ""
    patient: PatientContext | None = None
    scopes: frozenset[Scope] | None = None
    issued_at: datetime | None = field(default=None, compare=False)

    @property
    def roles_text(self) -> str:
        return ",".join(sorted(self.roles))


@dataclass(frozen=True)
class LogoutToken:
    """What a checked logout token says: whose sign-ins end. Of `sub` and `sid` one may be empty,
    never both: without `sid` all sign-ins of `sub` end. `jti` is good for one use."""

    sub: str
    sid: str
    jti: str
