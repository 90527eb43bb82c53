"""DICOMweb (PS3.18 10), cut to what the caller may see.

media      what a client accepts, and what it therefore gets
search     QIDO-RS, from our own tables
metadata   WADO-RS metadata: Orthanc's, checked, kept
files      WADO-RS bytes: files, frames, renderings, bulk data
freshness  whether what was kept is still what the archive has
"""

from app.dicomweb.freshness import Freshness
from app.dicomweb.metadata import Metadata

__all__ = ["Freshness", "Metadata"]
