"""What a clinician is told, of each check: what is so, and what to do next."""

from collections.abc import Mapping

from app.access import Reason, Subject
from app.models import OrderStatus

# What to do next
ASK_ADMINISTRATOR = "Ask your administrator to give you a role that opens images."
ASK_FOR_A_TIE = (
    "Check that you have the right patient. If you treat them, ask whoever is responsible for the "
    "patient to put you on the care team, or the EHR's support if you think you are on it."
)
ASK_PRIVACY_OFFICE = (
    "Ask one of the people who treat the patient, or the privacy office, to have you named."
)
ASK_PACS = "Call the radiology (PACS) administrator and give them the reference of this answer."
ASK_RADIOLOGY = (
    "Come back when the examination is done. If it should be there by now, call radiology."
)
ASK_TO_MATCH = "Ask radiology to match the images to the order; they know how, and who may."
CHECK_THE_ID = "Check the identifier, and that this is the system it came from."
EMERGENCY = "In an emergency, break the glass: say why, and you see the patient for a while."
NEW_LINK = (
    "Close this tab, go back to the EHR and open the images from there: each link opens once, and "
    "soon after it was made."
)
NOTHING_IN_THE_WAY = "Nothing stands in the way."
OPEN_FROM_EHR = "Open the images from the EHR."
OPEN_AGAIN = "Close this tab, go back to the EHR and open the images from there."
OPEN_BY_PATIENT = "Open the images by patient or by study instead, if you may see them still."
STILL_OPEN = "The viewer did not get an answer, but this viewing session is open."
TRY_AGAIN_ANY = "Try again in a minute. If it stays so, call the EHR's support."
TRY_AGAIN = "Try again in a minute. If it stays so, call whoever runs the image archive."

# Role
NO_ROLE = "Your role, or the way you signed in, does not open images."
ROLE = "Your role may open images."

# Relationship
UNKNOWN: Mapping[Subject, str] = {
    Subject.ORDER: "No order has this id.",
    Subject.PATIENT: "No patient has this id.",
    Subject.STUDY: "No study here has this StudyInstanceUID.",
}
UNRELATED: Mapping[Subject, str] = {
    subject: f"There is no such {name} among those you may see: either it doesn't exist, or "
    "nothing ties you to the patient (an order, the care team, your site)."
    for subject, name in (
        (Subject.ORDER, "order"),
        (Subject.PATIENT, "patient"),
        (Subject.STUDY, "study"),
    )
}
NO_TIE = "Nothing ties you to this patient now (an order, the care team, your site)."
OF_THE_EHR: Mapping[Reason | None, tuple[str, str]] = {
    Reason.EHR: ("The EHR does not let you see this patient.", ASK_FOR_A_TIE),
    Reason.EHR_UNAVAILABLE: (
        "The EHR, which has a say in who may see this patient, does not answer right now.",
        "Try again in a minute. If it stays so, call the EHR's support.",
    ),
}
BROKE = "You broke the glass for this patient; that holds for a while, and is reviewed."
RELATED = "You are tied to this patient."
SEES_ALL = "Your role may see every patient."

# Restriction
NOT_RESTRICTED = "The patient's record is open to you."
RESTRICTED = "The patient's record is restricted to named people, and you are not among them."

# Order
CANCELLED = "The order is cancelled."
NOT_CANCELLED = "The order is not cancelled."

# Images
IMAGES = "There are images."
NONE_OF_PATIENT = "There are no images of this patient yet."
NONE_OF_ORDER = "There are no images of this order yet."
NOT_ACQUIRED: Mapping[OrderStatus, str] = {
    OrderStatus.SCHEDULED: "The examination is scheduled; no images have been acquired yet.",
    OrderStatus.IN_PROGRESS: "The examination is under way; no images have arrived yet.",
    OrderStatus.COMPLETED: "The EHR says that the examination is done, but no images of it have "
    "arrived.",
}
UNMATCHED = (
    "There are images that may be these, but nobody has matched them to the order and the patient "
    "yet. Until then they are not shown."
)

# The archive
ARCHIVE = "The image archive answers, and holds them."
ARCHIVE_SILENT = "The image archive (PACS) does not answer right now."
NOT_IN_ARCHIVE = "The image archive does not hold these images any more."
ONE_PATIENT = "They are filed under one patient."
TWO_PATIENTS = (
    "The image archive holds these images under more than one patient, or under another one. "
    "Nobody is shown them until that is settled."
)

# Sessions
LINK_WAITS = "A link to them was made and waits to be opened."
NO_VIEWER = "You have had no viewer open; nothing stands in the way."
VIEWER_OPEN = "A viewer of yours is open."
