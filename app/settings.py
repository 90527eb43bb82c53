"""What an operator can set, by environment (`LIGHTBOX_...`) or by secret files.

Every field is documented in docs/configuration.md; a test compares the two. Nothing secret has
a default. Frozen: made once by the command line or a test, and handed to `create_app`.
"""

from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1024 * 1024


class _Environment(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="LIGHTBOX_",
        frozen=True,
        extra="ignore",
        secrets_dir="/run/secrets" if Path("/run/secrets").is_dir() else None,
    )


class DatabaseSettings(_Environment):
    """Where the database is: all that migrating needs."""

    database_url: str = Field(
        description="SQLAlchemy URL of the database, as the application's own role: "
        "`sqlite+aiosqlite:///path` or `postgresql+psycopg://user:password@host/name`."
    )
    migration_database_url: str | None = Field(
        default=None,
        description="The same database as the role that owns the tables; only `python -m app "
        "migrate` uses it. Empty: `database_url`. On PostgreSQL the two must be different "
        "roles, or the application could change its own audit trail, and it refuses to start.",
    )


class IdentitySettings(_Environment):
    """Who is calling: all that a token needs."""

    jwt_secret: SecretStr | None = Field(
        default=None,
        description="Shared secret (at least 32 characters) for HS256 tokens: development only. "
        "Exactly one of this and `oidc_issuer` is set.",
    )
    oidc_issuer: str | None = Field(
        default=None,
        description="The hospital's OpenID Connect issuer; its keys are read from the JWKS that "
        "its discovery document names.",
    )
    jwt_issuer: str = Field(
        default="lightbox-development",
        description="The `iss` of shared-secret tokens. With `oidc_issuer`, that is the `iss`.",
    )
    jwt_audience: str = Field(default="lightbox", description="The `aud` a token must name.")
    jwt_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("RS256", "ES256"),
        description="Comma-separated signature algorithms accepted from the OIDC issuer. A "
        "shared secret always means HS256 and nothing else.",
    )
    jwt_leeway_seconds: int = Field(
        default=30, ge=0, le=300, description="Clock difference forgiven in `exp` and `nbf`."
    )
    roles_claim: str = Field(
        default="roles",
        description="The claim that lists the roles; dots go down: `realm_access.roles`.",
    )
    site_claim: str = Field(
        default="site", description="The claim that names the caller's site; absent: `site`."
    )
    site: str = Field(default="main", description="The site of orders and callers that name none.")
    assigning_authority: str = Field(
        default="",
        description="Issuer of PatientID (HL7 CX.4) for patients made without `mrn_issuer` and "
        "files without IssuerOfPatientID. Empty: such patients have no issuer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _split_algorithms(cls, data: dict[str, object]) -> dict[str, object]:
        value = data.get("jwt_algorithms")
        if isinstance(value, str):
            data = {**data, "jwt_algorithms": tuple(a.strip() for a in value.split(",") if a)}
        return data

    @model_validator(mode="after")
    def _one_way_to_sign_in(self) -> Self:
        if (self.jwt_secret is None) == (self.oidc_issuer is None):
            raise ValueError(
                "set exactly one of LIGHTBOX_JWT_SECRET (development) and LIGHTBOX_OIDC_ISSUER"
            )
        if self.jwt_secret is not None and len(self.jwt_secret.get_secret_value()) < 32:
            raise ValueError("LIGHTBOX_JWT_SECRET must have at least 32 characters")
        symmetric = [a for a in self.jwt_algorithms if not a.startswith(("RS", "ES", "PS", "Ed"))]
        if symmetric or not self.jwt_algorithms:
            raise ValueError("LIGHTBOX_JWT_ALGORITHMS takes asymmetric algorithms only (RS256...)")
        return self


class Settings(IdentitySettings, DatabaseSettings):
    """The whole configuration of one app process."""

    # Where things are
    api_base_url: str = Field(
        default="http://localhost:8000",
        description="The API origin as clients see it, without a trailing slash.",
    )
    viewer_base_url: str = Field(
        default="http://localhost:3001",
        description="The viewer origin as browsers see it, without a trailing slash. Must be "
        "another origin than the API's. With https the session cookie is marked Secure.",
    )
    orthanc_url: str = Field(description="Orthanc's REST address, private to app and edge.")
    orthanc_username: str = Field(description="The user registered in Orthanc for Lightbox.")
    orthanc_password: SecretStr = Field(description="That user's password.")
    orthanc_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long Orthanc may stay silent before a request is given up with 503.",
    )

    # What may come in
    max_upload_bytes: int = Field(
        default=2048 * MEBIBYTE, gt=0, description="Largest DICOM file, and largest request."
    )
    max_zip_files: int = Field(default=10_000, gt=0, description="Most files in one ZIP.")
    max_zip_ratio: int = Field(
        default=200, gt=1, description="Largest ratio of unpacked to packed size in a ZIP."
    )
    max_sequence_depth: int = Field(
        default=16, ge=1, le=32, description="Deepest nesting of sequences in a DICOM file."
    )
    max_elements: int = Field(
        default=500_000, gt=0, description="Most data elements in one DICOM file."
    )
    spool_dir: Path = Field(
        default=Path(gettempdir()),
        description="Folder for uploads on their way to Orthanc; emptied as they go.",
    )

    # Viewer launches
    launch_code_seconds: int = Field(
        default=60, gt=0, description="How long a viewer link can be opened, once."
    )
    session_idle_minutes: int = Field(
        default=60, gt=0, description="An open viewer ends after this long without a request."
    )
    session_max_hours: int = Field(
        default=12, gt=0, description="An open viewer ends this long after its launch, used or not."
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log line that is written."
    )

    @model_validator(mode="after")
    def _origins_apart(self) -> Self:
        if self.viewer_base_url == self.api_base_url:
            raise ValueError("the viewer origin and the API origin must be different")
        for name in ("api_base_url", "viewer_base_url", "orthanc_url"):
            if getattr(self, name).endswith("/"):
                raise ValueError(f"LIGHTBOX_{name.upper()} must not end with a slash")
        return self
