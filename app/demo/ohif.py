"""The built viewer: fetched once from npm, checked, unpacked into a cache folder.

`ohif/version.json` names the package, its version and its integrity (Subresource Integrity, as
npm writes it). What npm's client delivers is used only if it matches, and nothing of it is run.
"""

import base64
import gzip
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from app.demo.stack import REPOSITORY, SetupError

VERSION_FILE = REPOSITORY / "ohif" / "version.json"

_DIST = PurePosixPath("package/dist")
_NEVER_SERVED = {
    "app-config.js",  # points at a public demo server; ours takes its place
    "init-service-worker.js",
    "sw.js",
    "google.js",
    "oidc-client.min.js",
    "silent-refresh.html",
    "serve.json",
    "_headers",
    "_redirects",
}
# Compressed once, here: the largest file has 17 MB, which the edge would compress at each opening.
_COMPRESSED = {".js", ".css", ".wasm", ".json", ".svg"}
_DOWNLOAD_SECONDS = 600


@dataclass(frozen=True, slots=True)
class ViewerVersion:
    """The one build of OHIF this Lightbox was tried with."""

    package: str
    version: str
    integrity: str
    """`sha512-` and the digest in base64."""

    @property
    def folder_name(self) -> str:
        """Changes with version and content, so that an old cache is never mistaken for ours."""
        digest = base64.b64decode(self.integrity.removeprefix("sha512-")).hex()
        return f"ohif-{self.version}-{digest[:12]}-gz"


def viewer_version() -> ViewerVersion:
    """What `ohif/version.json` pins."""
    pinned = json.loads(VERSION_FILE.read_text(encoding="utf-8"))
    return ViewerVersion(pinned["package"], pinned["version"], pinned["integrity"])


def ensure_ohif(cache_dir: Path, report: Callable[[str], None]) -> Path:
    """Folder with the built viewer, fetched first if `cache_dir` lacks it.

    `report` is told, in a sentence, before something slow happens. Without a network, the
    package's .tgz put into `cache_dir` serves as well. Raises SetupError.
    """
    pinned = viewer_version()
    cache_dir = cache_dir.resolve()
    target = cache_dir / pinned.folder_name
    if (target / "index.html").is_file():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ohif-", dir=cache_dir) as scratch:
        work = Path(scratch)
        given = sorted(cache_dir.glob(f"*-{pinned.version}.tgz"))
        if given:
            report(f"Unpacking the OHIF viewer {pinned.version} from {given[0]}.")
            archive = given[0]
        else:
            report(f"Fetching the OHIF viewer {pinned.version} with npm (50 MB, once).")
            archive = _npm_pack(pinned, work)
        check_integrity(archive, pinned.integrity)
        unpacked = work / "dist"
        unpack_viewer(archive, unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            # Another one that started at the same time was faster; the content is the same.
            if not (target / "index.html").is_file():
                raise SetupError(f"The viewer could not be put into {target}.") from None
    return target


def check_integrity(archive: Path, integrity: str) -> None:
    """Raise SetupError unless the file has this `sha512-<base64>` digest."""
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha512").digest()
    found = "sha512-" + base64.b64encode(digest).decode("ascii")
    if not hmac.compare_digest(found, integrity):
        raise SetupError(
            f"The viewer package {archive.name} is not the one pinned in ohif/version.json "
            "(its checksum differs), so it is not used."
        )


def _served_as(member: tarfile.TarInfo) -> PurePosixPath | None:
    """Where a file of the package is served, below the viewer's folder; None if it is not."""
    name = PurePosixPath(member.name)
    if not member.isfile() or ".." in name.parts or not name.is_relative_to(_DIST):
        return None
    name = name.relative_to(_DIST)
    return None if str(name) in _NEVER_SERVED or name.suffix == ".map" else name


def unpack_viewer(archive: Path, target: Path) -> None:
    """Unpack what is served of the package's `dist/` into `target`, with a `.gz` beside each file
    that shrinks (nginx's gzip_static). Raises SetupError."""
    # npm gives every file of every package the same date. nginx makes ETags of date and size, so
    # that a file of one version would pass for that of the next.
    unpacked_at = int(time.time())

    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = _served_as(member)
                content = tar.extractfile(member) if name is not None else None
                if name is None or content is None:
                    continue
                # Written here, not by tarfile, whose filters Debian 12's Python lacks.
                file = target / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with content, file.open("xb") as out:
                    shutil.copyfileobj(content, out)
                for each in (file, *_compressed(file)):
                    each.chmod(0o644)
                    os.utime(each, (unpacked_at, unpacked_at))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SetupError(f"The viewer package could not be unpacked: {error}.") from error
    if not (target / "index.html").is_file():
        raise SetupError("The viewer package holds no built viewer (dist/index.html).")


def _compressed(file: Path) -> list[Path]:
    """The file's `.gz`, made now; none where it would not shrink."""
    if file.suffix not in _COMPRESSED:
        return []
    packed = file.with_name(f"{file.name}.gz")
    with file.open("rb") as source, gzip.open(packed, "xb", compresslevel=6) as out:
        shutil.copyfileobj(source, out)
    if packed.stat().st_size >= file.stat().st_size:
        packed.unlink()
        return []
    return [packed]


def _npm_pack(pinned: ViewerVersion, work: Path) -> Path:
    """Let npm's client download the package into `work`; the path of the .tgz."""
    npm = shutil.which("npm")
    if npm is None:
        raise SetupError(
            "npm is not installed and is needed once to fetch the viewer; on Debian: apt install "
            f"npm. Or put the package's {pinned.version}.tgz into the cache folder."
        )
    command = [npm, "pack", f"{pinned.package}@{pinned.version}", "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(
            [*command, "--pack-destination", str(work)],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError("npm did not deliver the viewer within ten minutes.") from None
    archives = sorted(work.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        raise SetupError(
            f"npm could not fetch the viewer ({pinned.package}@{pinned.version}): is there a "
            "network, and is npm's registry set? `npm pack` by hand shows why."
        )
    return archives[0]
