"""Modalities that answer for each other, and body parts by region."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

from app.matching.folding import words

NO_IMAGES = frozenset(
    "SR PR KO OT SC DOC SEG RTSTRUCT RTDOSE RTPLAN RTRECORD RTIMAGE REG RWV FID PLAN AU HC M3D "
    "SMR TEXTUREMAP ANN ASMT".split()
)
"""Modalities (PS3.3 C.7.3.1.1.1) that come along with images of any other."""

_EQUIVALENT = (
    *({"CR", "DX", "DR", "RG", "RF"}, {"RF", "XA"}, {"MG", "BMD"}, {"PT", "CT"}, {"PT", "MR"}),
    *({"NM", "CT"}, {"NM", "PT"}, {"US", "IVUS"}, {"ES", "XC", "GM"}, {"OP", "OPT", "OAM"}),
    *({"IO", "PX", "DX", "CR"}, {"ECG", "EPS", "HD"}, {"SM", "GM"}, {"MG", "DX", "CR"}),
)
_REGIONS = {
    "head": "head brain skull cranium schadel schaedel kopf hirn sinus sinuses orbit orbits face "
    "facial pituitary neuro jaw mandible gehirn",
    "neck": "neck hals thyroid carotid carotids larynx headneck cspine",
    "chest": "chest thorax lung lungs rib ribs heart cardiac coronary mediastinum sternum herz "
    "lunge chestabdomen chestabdpelvis",
    "breast": "breast breasts mamma mammography mammogram",
    "abdomen": "abdomen abdominal liver kidney kidneys renal pancreas spleen bowel colon stomach "
    "gallbladder leber niere chestabdomen chestabdpelvis abdomenpelvis",
    "pelvis": "pelvis pelvic bladder prostate uterus becken abdomenpelvis chestabdpelvis",
    "spine": "spine spinal cspine tspine lspine sspine lumbar cervical sacrum vertebra hws bws lws",
    "arm": "shoulder arm elbow forearm wrist hand finger thumb clavicle humerus radius ulna "
    "schulter ellenbogen handgelenk",
    "leg": "hip hips thigh knee leg ankle foot toe femur tibia fibula calcaneus heel knie fuss "
    "sprunggelenk hufte huefte",
}
_BY_WORD = {
    word: {region for region, these in _REGIONS.items() if word in these.split()}
    for these in _REGIONS.values()
    for word in these.split()
}
_NEIGHBOURS = {
    frozenset(pair)
    for pair in (
        *(("head", "neck"), ("neck", "chest"), ("neck", "spine"), ("head", "spine")),
        *(("chest", "spine"), ("chest", "abdomen"), ("chest", "breast"), ("chest", "arm")),
        *(("abdomen", "pelvis"), ("abdomen", "spine"), ("pelvis", "spine"), ("pelvis", "leg")),
        *(("breast", "arm"), ("chest", "pelvis")),
    )
}


def of_images(modalities: Iterable[str]) -> frozenset[str]:
    """The modalities that say what was done."""
    return frozenset(each.strip("\0 ").upper() for each in modalities) - NO_IMAGES - {""}


def equivalent(a: str, b: str) -> bool:
    return a == b or any(a in these and b in these for these in _EQUIVALENT)


def known(modality: str) -> bool:
    return any(modality in these for these in _EQUIVALENT)


def regions(texts: Iterable[str]) -> frozenset[str]:
    """Regions of the body that a text names; empty where it names none that is known."""
    return frozenset(chain.from_iterable(_regions(text[:256]) for text in texts))


@lru_cache(maxsize=1024)
def _regions(text: str) -> frozenset[str]:
    return frozenset(chain.from_iterable(_BY_WORD.get(word, ()) for word in words(text)))


def apart(a: frozenset[str], b: frozenset[str]) -> bool:
    """Are these regions of the body neither the same nor next to each other?"""
    if not a or not b or a & b:
        return False
    return not any(frozenset({x, y}) in _NEIGHBOURS for x in a for y in b)
