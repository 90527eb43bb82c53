"""What an operator can set, by environment (`LIGHTBOX_...`) or by secret files.

Every field is documented in docs/configuration.md; a test compares the two. Nothing secret has
a default. Frozen: made once by the command line or a test, and handed to `create_app`.
"""

import base64
import binascii
from pathlib import Path
from shutil import which
from tempfile import gettempdir
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1024 * 1024


def webhook_key(secret: str) -> bytes:
    """The key in a secret as Standard Webhooks writes it: `whsec_` and 24 to 64 bytes in base64.
    Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("it must be `whsec_` and 24 to 64 random bytes in base64")
    return key


# Smallest first: single-byte sets without code extensions (PS3.3 table C.12-2), then UTF-8.
WORKLIST_CHARACTER_SETS = (
    "ISO_IR 6",
    "ISO_IR 100",
    "ISO_IR 101",
    "ISO_IR 148",
    "ISO_IR 109",
    "ISO_IR 110",
    "ISO_IR 144",
    "ISO_IR 126",
    "ISO_IR 127",
    "ISO_IR 138",
    "ISO_IR 166",
    "ISO_IR 192",
)


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


class TrailSettings(DatabaseSettings):
    """Where the audit trail is, and who vouches for it."""

    audit_key_file: Path | None = Field(
        default=None,
        description="The Ed25519 private key (PEM) that signs checkpoints and purges of the audit "
        "trail; `python -m app audit key` makes one.",
    )
    audit_checkpoint_file: Path | None = Field(
        default=None,
        description="File that checkpoints are added to, one JSON object a line; best on another "
        "host's disk. Empty, and no `audit_checkpoint_url`: there are none, and the log says so.",
    )
    audit_checkpoint_url: str | None = Field(
        default=None,
        description="Where checkpoints are sent instead: each the body of a POST, again until "
        "the answer is 2xx.",
    )
    audit_checkpoint_records: int = Field(
        default=1000, gt=0, description="A checkpoint is written after so many records,"
    )
    audit_checkpoint_seconds: float = Field(
        default=60.0, gt=0, description="or after so many seconds, if there is a new record."
    )

    @field_validator(
        "audit_key_file", "audit_checkpoint_file", "audit_checkpoint_url", mode="before"
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _checkpoints_are_signed(self) -> Self:
        sinks = [self.audit_checkpoint_file, self.audit_checkpoint_url]
        if all(sink is not None for sink in sinks):
            raise ValueError(
                "set LIGHTBOX_AUDIT_CHECKPOINT_FILE or LIGHTBOX_AUDIT_CHECKPOINT_URL, not both"
            )
        if any(sink is not None for sink in sinks) and self.audit_key_file is None:
            raise ValueError("checkpoints are signed: set LIGHTBOX_AUDIT_KEY_FILE too")
        url = self.audit_checkpoint_url
        if url is not None and not url.startswith(("https://", "http://")):
            raise ValueError("LIGHTBOX_AUDIT_CHECKPOINT_URL must start with https:// (or http://)")
        return self


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
    patient_claim: str = Field(
        default="patient",
        description="The claim that limits a token to one patient (SMART App Launch): our id, "
        "`issuer|mrn`, or an MRN of `assigning_authority`; see policy.md.",
    )
    service_accounts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Comma-separated `sub`s of service accounts (client credentials): their tokens "
        "have the role `service` without naming it; see security.md.",
    )
    site: str = Field(default="main", description="The site of orders and callers that name none.")
    assigning_authority: str = Field(
        default="",
        description="Issuer of PatientID (HL7 CX.4) for patients made without `mrn_issuer` and "
        "files without IssuerOfPatientID. Empty: such patients have no issuer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, data: dict[str, object]) -> dict[str, object]:
        for name in ("jwt_algorithms", "service_accounts"):
            value = data.get(name)
            if isinstance(value, str):
                words = tuple(word.strip() for word in value.split(","))
                data = {**data, name: tuple(word for word in words if word)}
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


class Settings(IdentitySettings, TrailSettings):
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
    iod_validation: Literal["off", "warn", "refuse"] = Field(
        default="off",
        description="Whether dciodvfy (Debian package dicom3tools) is asked if a file has what its "
        "IOD requires, and what becomes of one that hasn't: a warning, or a refusal; see "
        "imports.md.",
    )
    dciodvfy: str = Field(default="", description="The path of dciodvfy. Empty: found by `PATH`.")
    spool_dir: Path = Field(
        default=Path(gettempdir()),
        description="Folder for uploads on their way to Orthanc; emptied as they go.",
    )
    import_parallel: int = Field(
        default=3, ge=1, le=32, description="Files of imports that a process takes in at once."
    )
    import_spool_bytes: int = Field(
        default=20_480 * MEBIBYTE,
        gt=0,
        description="Most bytes of imports, of all together, that wait below `spool_dir`. What "
        "does not fit is sent again later.",
    )
    import_idle_hours: float = Field(
        default=24.0,
        gt=0,
        description="An import that nothing is sent to for so long is cancelled.",
    )

    # Studies that arrive in Orthanc past Lightbox
    follow_orthanc: bool = Field(
        default=True,
        description="Whether this process may follow Orthanc's changes and link what is certain; "
        "of all that may, one does. See reconciliation.md.",
    )
    sweep_seconds: float = Field(
        default=300.0,
        gt=0,
        description="How often the list of all studies in Orthanc is compared with what is known.",
    )
    sweep_studies_per_second: float = Field(
        default=5.0,
        gt=0,
        le=100,
        description="How many studies are asked about each second whether files of them have gone.",
    )
    reconciliation_original: Literal["keep", "remove"] = Field(
        default="keep",
        description="What becomes of the images whose tags are coerced when a study is confirmed "
        "for another PatientID: kept in Orthanc under the former one, shown to nobody, or removed.",
    )

    # The modality worklist
    worklist_dir: Path | None = Field(
        default=None,
        description="Folder that Orthanc's worklist plugin serves, closed to others (0750 or "
        "narrower), see worklist.md. Empty: no worklist is made.",
    )
    worklist_station_ae_title: str = Field(
        default="ANY",
        pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$",
        description="ScheduledStationAETitle of orders that name no `station_ae_title`.",
    )
    worklist_time_zone: str = Field(
        default="UTC",
        description="The modalities' time zone, `Europe/Vienna`: a worklist says local time.",
    )
    worklist_character_set: str = Field(
        default="",
        description="SpecificCharacterSet of every entry, `ISO_IR 192`. Empty: the smallest "
        "single-byte set that holds the entry, else ISO_IR 192.",
    )
    worklist_days: int = Field(
        default=7,
        gt=0,
        description="An order leaves the worklist this many days after it was scheduled for (or "
        "placed, if for no time).",
    )

    # The EHR's say in who may see whom
    policy_url: str | None = Field(
        default=None,
        description="Where the EHR decides along (OpenID AuthZEN Authorization API 1.0), without "
        "a trailing slash: `/access/v1/evaluation` is asked below it; see policy.md. Empty: the "
        "EHR has no say.",
    )
    policy_secret: SecretStr | None = Field(
        default=None,
        description="The bearer token that Lightbox shows there. Set with `policy_url`.",
    )
    policy_timeout_seconds: float = Field(
        default=1.0,
        gt=0,
        le=30,
        description="How long the EHR may take to decide; after that nothing is shown (503).",
    )
    policy_cache_seconds: float = Field(
        default=10.0,
        ge=0,
        le=300,
        description="How long its decision is kept. 0: it is asked at every request.",
    )

    # Requests that are sent again
    idempotency_hours: float = Field(
        default=24.0,
        gt=0,
        le=24 * 31,
        description="How long an `Idempotency-Key` is known, and its answer kept.",
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
    break_glass_minutes: int = Field(
        default=60,
        gt=0,
        le=1440,
        description="How long somebody who broke the glass may see a patient; viewers opened "
        "under it end with it.",
    )
    break_glass_sealed: bool = Field(
        default=False,
        description="Whether the glass can be broken for patients who are sealed, too.",
    )

    # How often
    failed_sign_ins_per_minute: int = Field(
        default=60,
        gt=0,
        description="After so many bad tokens, cookies and launch codes of one address, more get "
        "429 and are summed up in the trail. Valid ones always pass. Per app process.",
    )
    launches_per_minute: int = Field(
        default=60, gt=0, description="Most viewer links of one person. Per app process."
    )

    # Where the trail is copied to
    syslog_host: str | None = Field(
        default=None,
        description="Where DICOM audit messages (PS3.15 A.5) go, a syslog receiver; see "
        "operating.md. With TLS it must be the name in its certificate. Empty: nowhere.",
    )
    syslog_port: int = Field(default=6514, ge=1, le=65535, description="Its port.")
    syslog_transport: Literal["tls", "tcp-to-local-relay"] = Field(
        default="tls",
        description="`tls`, or `tcp-to-local-relay`: unprotected, and only to this machine.",
    )
    syslog_ca_file: Path | None = Field(
        default=None,
        description="PEM file of the authorities that may vouch for the receiver. Empty: those "
        "that the system trusts.",
    )
    syslog_cert_file: Path | None = Field(
        default=None, description="PEM file of our own certificate, where the receiver wants one."
    )
    syslog_key_file: Path | None = Field(
        default=None, description="PEM file of its private key, if it is not in the same file."
    )

    # Who is told
    webhook_url: str | None = Field(
        default=None,
        description="Where events (broken glass, ...) are sent as signed webhooks; see "
        "operating.md. Empty: nobody is told, and the log says so.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="The key that signs them, as Standard Webhooks writes it: `whsec_` and 24 to "
        "64 random bytes in base64. Set with `webhook_url`.",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log line that is written."
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="Log lines as JSON objects, or as text for people."
    )

    @model_validator(mode="after")
    def _webhook_is_signed(self) -> Self:
        if (self.webhook_url is None) != (self.webhook_secret is None):
            raise ValueError(
                "set both of LIGHTBOX_WEBHOOK_URL and LIGHTBOX_WEBHOOK_SECRET, or none"
            )
        if self.webhook_url is not None and not self.webhook_url.startswith(
            ("https://", "http://")
        ):
            raise ValueError("LIGHTBOX_WEBHOOK_URL must start with https:// (or http://)")
        if self.webhook_secret is not None:
            try:
                webhook_key(self.webhook_secret.get_secret_value())
            except ValueError as error:
                raise ValueError(f"LIGHTBOX_WEBHOOK_SECRET: {error}") from None
        return self

    @model_validator(mode="after")
    def _validator_is_there(self) -> Self:
        if self.iod_validation != "off":
            program = self.dciodvfy or "dciodvfy"
            for name, package in ((program, "dicom3tools"), ("prlimit", "util-linux")):
                if which(name) is None:
                    raise ValueError(
                        f"LIGHTBOX_IOD_VALIDATION={self.iod_validation} needs {name}, which is not "
                        f"here: install the Debian package {package} (apt-get install "
                        f"--no-install-recommends {package})"
                        + (", or set LIGHTBOX_DCIODVFY to its path" if name == program else "")
                    )
        return self

    @field_validator("worklist_dir", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("worklist_time_zone")
    @classmethod
    def _known_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError):
            raise ValueError("this machine knows no such time zone") from None
        return value

    @field_validator("worklist_character_set")
    @classmethod
    def _known_character_set(cls, value: str) -> str:
        if value and value not in WORKLIST_CHARACTER_SETS:
            raise ValueError(f"must be one of {', '.join(WORKLIST_CHARACTER_SETS)}")
        return value

    @model_validator(mode="after")
    def _policy_is_proven(self) -> Self:
        if (self.policy_url is None) != (self.policy_secret is None):
            raise ValueError("set both of LIGHTBOX_POLICY_URL and LIGHTBOX_POLICY_SECRET, or none")
        if self.policy_url is not None and (
            not self.policy_url.startswith(("https://", "http://")) or self.policy_url.endswith("/")
        ):
            raise ValueError("LIGHTBOX_POLICY_URL must start with https:// and end with no slash")
        return self

    @model_validator(mode="after")
    def _syslog_is_protected(self) -> Self:
        if self.syslog_transport != "tls" and self.syslog_host not in (
            *(None, "localhost", "127.0.0.1", "::1"),
        ):
            raise ValueError(
                "LIGHTBOX_SYSLOG_TRANSPORT=tcp-to-local-relay needs LIGHTBOX_SYSLOG_HOST to be "
                "localhost, 127.0.0.1 or ::1: the messages name patients"
            )
        if self.syslog_key_file is not None and self.syslog_cert_file is None:
            raise ValueError("LIGHTBOX_SYSLOG_KEY_FILE needs LIGHTBOX_SYSLOG_CERT_FILE")
        return self

    @model_validator(mode="after")
    def _origins_apart(self) -> Self:
        if self.viewer_base_url == self.api_base_url:
            raise ValueError("the viewer origin and the API origin must be different")
        for name in ("api_base_url", "viewer_base_url", "orthanc_url"):
            if getattr(self, name).endswith("/"):
                raise ValueError(f"LIGHTBOX_{name.upper()} must not end with a slash")
        return self
