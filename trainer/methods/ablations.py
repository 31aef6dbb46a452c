"""The rows of the papers' ablation tables, as options on top of a task's preset."""

from typing import Any

# The rows differ in what G and D are held to, and in nothing else: all have SRUNIT's other options.
_BACKBONE: dict[str, Any] = {"method.name": "srunit", "method.robust.beta": 0.0}
_SRUNIT: dict[str, Any] = {"method.name": "srunit"}
_CUT: dict[str, Any] = {"method.name": "cut"}
_BANK: dict[str, Any] = {"method.bank.size": 16384}

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    # SRUNIT, Table 2 and Appendix G. No weights are given there: E1 has that of DistanceGAN's published code, E6 that of
    # WGAN-GP's paper, E2 and E5 have 1; E3 and E4 have SRUNIT's beta.
    "srunit": {
        "CUT": _BACKBONE,
        "E1": _BACKBONE | {"method.constraint.self_distance": 1.0},
        "E2": _BACKBONE | {"method.constraint.smoothness": 1.0},
        "E3": _SRUNIT | {"method.robust.semantics": "features"},
        "E4": _SRUNIT | {"method.robust.reference": "translation"},
        "E5": _BACKBONE | {"method.constraint.consistency": 1.0},
        "E6": _BACKBONE | {"method.constraint.lipschitz": 10.0},
        "SRUNIT": _SRUNIT,
    },
    # CUT, the ablation study and Appendix C.5. int: negatives from the image itself, ext: from the memory bank.
    "cut": {
        "CUT": _CUT,
        "no id": _CUT | {"method.identity": False},
        "no id, 15 neg": _CUT | {"method.identity": False, "method.patches": 16},
        "last": _CUT | {"method.taps": (16,)},
        "int and ext": _CUT | _BANK,
        "ext only": _CUT | _BANK | {"method.bank.internal": False},
        "ext only, last": _CUT | _BANK | {"method.bank.internal": False, "method.taps": (16,)},
        "separate encoder": _CUT | {"method.separate_encoder": True},
        "no NCE to decoder": _CUT | {"method.decoder_nce": False},
    },
}
