"""The 19 Cityscapes classes and the ways from published label files to them.

Inside the project a label map is uint8 (H, W) of trainIds: 0..18 name a class of CLASSES, IGNORE (255) names none.
Ids, names and colours are those of the Cityscapes benchmark (Cordts et al., CVPR 2016; cityscapesScripts, labels.py);
the public GTA5 release (Richter et al., ECCV 2016) uses the same ids and colours.
"""

import numpy as np

from infra.errors import UserError

IGNORE = 255

# (name, Cityscapes labelId, RGB), in the order of the trainIds.
_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)

CLASSES: tuple[str, ...] = tuple(name for name, _, _ in _CITYSCAPES)
PALETTE: np.ndarray = np.array([colour for _, _, colour in _CITYSCAPES], np.uint8)  # (19, 3), RGB


def _lookup(trainid_of: dict[int, int]) -> np.ndarray:
    """uint8 (256,): trainid_of as an array, IGNORE everywhere else."""
    table = np.full(256, IGNORE, np.uint8)
    table[list(trainid_of)] = list(trainid_of.values())
    table.setflags(write=False)
    return table


LABELID_TO_TRAINID: np.ndarray = _lookup({labelid: trainid for trainid, (_, labelid, _) in enumerate(_CITYSCAPES)})

# The 11 classes of CamVid as SegNet groups them (Badrinarayanan et al., 2017); 11 is void, a cyclist is a rider.
_CAMVID = (
    "sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car", "person", "rider",
)  # fmt: skip
CAMVID_TO_TRAINID: np.ndarray = _lookup({camvid: CLASSES.index(name) for camvid, name in enumerate(_CAMVID)})

_COLOUR_ORDER = np.argsort(PALETTE.astype(np.int32) @ (1 << 16, 1 << 8, 1))
_COLOUR_CODES = (PALETTE.astype(np.int32) @ (1 << 16, 1 << 8, 1))[_COLOUR_ORDER]


def from_labelids(labelids: np.ndarray) -> np.ndarray:
    """Cityscapes labelIds, any integer type and shape, to uint8 trainIds of the same shape; void and unknown ids
    (also -1, the licence plate) become IGNORE."""
    if labelids.dtype == np.uint8:
        return LABELID_TO_TRAINID[labelids]
    known = (labelids >= 0) & (labelids < 256)
    return np.where(known, LABELID_TO_TRAINID[np.where(known, labelids, 0)], np.uint8(IGNORE))


def from_colours(rgb: np.ndarray) -> np.ndarray:
    """A label map drawn in the Cityscapes colours, uint8 (..., 3), to uint8 trainIds (...); a colour that is not
    exactly one of PALETTE becomes IGNORE."""
    code = rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]
    place = np.searchsorted(_COLOUR_CODES, code).clip(max=len(CLASSES) - 1)
    return np.where(_COLOUR_CODES[place] == code, _COLOUR_ORDER[place].astype(np.uint8), np.uint8(IGNORE))


def to_trainids(label: np.ndarray) -> np.ndarray:
    """Whatever a Cityscapes or GTA5 label file decodes to, as uint8 (H, W) trainIds: (H, W) is read as labelIds,
    (H, W, 3) and (H, W, 4) as colours (alpha is dropped). UserError for any other shape."""
    if label.ndim == 2:
        return from_labelids(label)
    if label.ndim == 3 and label.shape[2] in (3, 4):
        return from_colours(label[..., :3])
    raise UserError(f"a label map of shape {label.shape} is neither ids (H, W) nor colours (H, W, 3): convert it first")


def colourise(label: np.ndarray) -> np.ndarray:
    """trainIds uint8 (...) to the standard colours, uint8 RGB (..., 3); IGNORE is black."""
    return _COLOUR_OF_TRAINID[label]


_COLOUR_OF_TRAINID = np.zeros((256, 3), np.uint8)
_COLOUR_OF_TRAINID[: len(CLASSES)] = PALETTE


def class_histogram(label: np.ndarray) -> np.ndarray:
    """Pixels per trainId, int64 (19,); without ignored pixels."""
    return np.bincount(label.ravel(), minlength=256)[: len(CLASSES)].astype(np.int64)
