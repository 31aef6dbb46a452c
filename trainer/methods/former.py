"""Options of older runs by today's names."""

from collections.abc import Mapping
from typing import Any

_RENAMED = {
    "model.ngf": ("method.generator.ngf",),
    "model.blocks": ("method.generator.blocks",),
    "model.checkpointing": ("method.generator.checkpointing",),
    "model.ndf": ("method.discriminator.ndf",),
    "model.layers": ("method.discriminator.layers",),
    "model.antialias": ("method.generator.antialias", "method.discriminator.antialias"),
    "model.head_dim": ("method.head_dim",),
}
_SRUNIT_ALONE = ("method.robust.", "method.constraint.")
_WEIGHTS = (
    "method.robust.beta", "method.constraint.self_distance", "method.constraint.smoothness",
    "method.constraint.consistency", "method.constraint.lipschitz",
)  # fmt: skip


def todays_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A translator's flat configuration, or a layer of one, of any age.

    Networks once had a section of their own, and every method had SRUNIT's options: where they were in use, the method is
    SRUNIT by another preset.
    """
    if config.keys().isdisjoint(_RENAMED):
        return dict(config)
    named = {new: value for name, value in config.items() for new in _RENAMED.get(name, (name,))}
    if named.get("method.name") in ("cut", "fastcut"):
        if any(named.get(weight, 0) > 0 for weight in _WEIGHTS):
            return named | {"method.name": "srunit"}
        return {name: value for name, value in named.items() if not name.startswith(_SRUNIT_ALONE)}
    return named
