"""The trail as DICOM audit messages (PS3.15 A.5), sent to an audit repository over syslog.

`events` says which event of the standard each action is, `messages` writes the XML of a record,
`syslog` frames it and brings it to the receiver, `feed` sends the trail: in order, each at least
once, from where the receiver got to.
"""

from app.atna.feed import Feed
from app.atna.messages import Reporter, audit_message

__all__ = ["Feed", "Reporter", "audit_message"]
