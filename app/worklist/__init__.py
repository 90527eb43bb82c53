"""The modality worklist: the scheduled orders, as files that Orthanc's worklist plugin serves.

The folder is a view of the database and nothing else: what should stand there is asked by SQL,
and the difference is applied. Here no caller decides: what a site gives to its modalities is a
disclosure that it configured, and each order's is on record (`worklist:publish`).
"""

from .follow import Report, Worklist
from .orders import order_fulfilled

__all__ = ["Report", "Worklist", "order_fulfilled"]
