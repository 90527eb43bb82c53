"""Studies that arrive in Orthanc past Lightbox: found, matched, linked or put before a human.

`changes` and `sweep` find them, `files` looks at them as at an upload, `candidates` asks the
matcher, `linker` writes what is certain; `reconciliation` is what people decide about the rest.
`follower` runs it all, in one process at a time.
"""

from app.arrivals.follower import Follower, Progress

__all__ = ["Follower", "Progress"]
