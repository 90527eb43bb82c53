"""Opening the viewer: launch sessions, the guards of its requests, the pages that say why not."""

from app.viewer.endings import SessionOver
from app.viewer.guard import SessionCookie, SignOfLife, ViewerGrant, ViewerNothing, ViewerSearch
from app.viewer.links import Launch, Redeemed
from app.viewer.pages import EHR_PAGE, page
from app.viewer.sessions import COMPARE_LAYOUT, Viewer

__all__ = [
    "COMPARE_LAYOUT",
    "EHR_PAGE",
    "Launch",
    "Redeemed",
    "SessionCookie",
    "SessionOver",
    "SignOfLife",
    "Viewer",
    "ViewerGrant",
    "ViewerNothing",
    "ViewerSearch",
    "page",
]
