"""Methods of a size for tests: every one that is registered has a row, and whoever adds one adds its row."""

from typing import Any

from infra.config import build
from trainer.methods import METHODS, MethodConfig

CUT = {"generator.ngf": 4, "generator.blocks": 6, "discriminator.ndf": 4, "head_dim": 8}
MUNIT = {"generator.ngf": 4, "generator.blocks": 1, "generator.hidden": 8, "discriminator.ndf": 4}
STRIDED = {"generator.ngf": 4, "generator.blocks": 6, "discriminator.ndf": 4}
SMALL: dict[str, dict[str, Any]] = {
    "cut": CUT,
    "fastcut": CUT,
    "srunit": CUT,
    "srunit-released": CUT,
    "cyclegan": STRIDED,
    "distancegan": STRIDED,
    "gcgan": STRIDED,
    "munit": MUNIT,
    "drit": {"generator.ngf": 4, "discriminator.ndf": 4, "content_layers": 1},
    "src": CUT,
    "semst": CUT | {"local": 24},
    "sincut": {"generator.ngf": 1, "discriminator.ndf": 1, "discriminator.size": 16, "head_dim": 8},
}
"""Options of the method that make its networks small."""

IN_USE: dict[str, dict[str, Any]] = {
    "cut": {"patches": 16},
    "fastcut": {"patches": 16},
    "srunit": {"patches": 16, "buffer": 4, "robust.start": 0.0},
    "srunit-released": {"patches": 16, "robust.start": 0.6},  # of five steps: awake after the third
    "cyclegan": {"buffer": 4, "identity": 0.5},
    "distancegan": {"buffer": 4, "both": True, "lambda_a": 10.0, "measured": 8},
    "gcgan": {"buffer": 4, "generators": "cross"},
    "munit": {},
    "semst": {"patches": 16, "lambda_src": 0.05},
    "src": {"patches": 16, "flip_equivariance": True, "buffer": 4},
    "sincut": {"buffer": 4, "epoch": 6},
    "drit": {"every": 2, "mode_seeking": 1.0},
}
"""More of them, which put everything to use that has a state or draws, from the first step on."""

CROPS: dict[str, int] = {"munit": 64, "semst": 56, "drit": 64}
"""The sides of images for those that do not take 32 pixels."""

BATCHES: dict[str, int] = {"drit": 4}
"""The global batches, over two ranks, of those that do not take one pair each."""

ONE_PASS: tuple[str, ...] = ("distancegan", "sincut")
"""Those whose losses need the whole global batch at once, so that two micro-batches are not what two ranks are."""


def crop_of(name: str) -> int:
    return CROPS.get(name, 32)


def method_config(name: str = "srunit", **options: Any) -> MethodConfig:
    """The options of a method by its preset, with small networks; options: "__" for a dot."""
    family = METHODS[name]
    preset = {key.removeprefix("method."): value for key, value in family.options.items() if key.startswith("method.")}
    given = {key.replace("__", "."): value for key, value in options.items()}
    return build(family.config, SMALL[name], preset, given)


def small_method(name: str = "srunit", *, seed: int = 0, global_batch: int = 1, **options: Any) -> Any:
    return method_config(name, **options).build(seed=seed, global_batch=global_batch)
