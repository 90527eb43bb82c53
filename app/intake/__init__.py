"""Files on their way in: bounded, read, held against the order's patient, stored, linked.

`identity` compares and coerces (pure), `records` writes what is known of a stored file, `links`
does so for many at once, `take` is the order of things.
"""

from app.intake.identity import Differences
from app.intake.take import Intake, Receipt, Target

__all__ = ["Differences", "Intake", "Receipt", "Target"]
