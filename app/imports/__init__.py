"""Imports that take long: many files, big archives, bad lines.

`tus` is how files are sent, `spool` where their bytes wait, `rows` what the database knows, `take`
what becomes of one file, `work` who does it and when, `events` how it is watched. See imports.md.
"""

from app.imports.events import watch
from app.imports.rows import Key, Rows, counts, principal_json
from app.imports.spool import Spool
from app.imports.work import Imports

__all__ = ["Imports", "Key", "Rows", "Spool", "counts", "principal_json", "watch"]
