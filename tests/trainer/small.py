"""Methods of a size for tests."""

from typing import Any

from infra.config import build
from trainer.methods import METHODS, MethodConfig

SIZES = {"generator.ngf": 4, "generator.blocks": 6, "discriminator.ndf": 4, "head_dim": 8}


def method_config(name: str = "srunit", **options: Any) -> MethodConfig:
    """The options of a method by its preset, with small networks; options: "__" for a dot."""
    family = METHODS[name]
    preset = {key.removeprefix("method."): value for key, value in family.options.items() if key.startswith("method.")}
    given = {key.replace("__", "."): value for key, value in options.items()}
    return build(family.config, SIZES, preset, given)


def small_method(name: str = "srunit", *, seed: int = 0, global_batch: int = 1, **options: Any) -> Any:
    return method_config(name, **options).build(seed=seed, global_batch=global_batch)
