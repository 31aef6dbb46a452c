"""Translation methods by name: the class of their options, and the presets that their papers give."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.methods.ablations import ABLATIONS
from trainer.methods.base import Method
from trainer.methods.config import MethodConfig
from trainer.methods.cut import FASTCUT, Cut, CutConfig
from trainer.methods.cyclegan import CYCLEGAN, CycleGanConfig
from trainer.methods.distancegan import DISTANCEGAN, DistanceGanConfig
from trainer.methods.drit import DRIT, DritConfig
from trainer.methods.gcgan import GCGAN, GCGAN_ON_TASKS, GcGanConfig
from trainer.methods.munit import MUNIT, MUNIT_ON_TASKS, MunitConfig
from trainer.methods.semst import SemstConfig
from trainer.methods.sincut import SINCUT, SINCUT_ON_TASKS, SincutConfig
from trainer.methods.src import CITYSCAPES, SrcConfig
from trainer.methods.srunit import RELEASED, Srunit, SrunitConfig
from trainer.tasks import TASKS

__all__ = ["ABLATIONS", "METHODS", "Cut", "CutConfig", "Family", "Method", "MethodConfig", "Srunit", "SrunitConfig"]


@dataclass(frozen=True)
class Family:
    """options: of the whole tree, under those of the task. on_tasks: over those of a task, by its name."""

    config: type[MethodConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    on_tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


METHODS = {
    "cut": Family(CutConfig),
    "fastcut": Family(CutConfig, FASTCUT),
    "srunit": Family(SrunitConfig),
    "srunit-released": Family(SrunitConfig, RELEASED),
    "cyclegan": Family(CycleGanConfig, CYCLEGAN),
    "distancegan": Family(DistanceGanConfig, DISTANCEGAN),
    "gcgan": Family(GcGanConfig, GCGAN, GCGAN_ON_TASKS),
    "munit": Family(MunitConfig, MUNIT, MUNIT_ON_TASKS),
    "semst": Family(SemstConfig),
    "src": Family(SrcConfig, on_tasks={"label2city": CITYSCAPES}),
    "sincut": Family(SincutConfig, SINCUT, dict.fromkeys(TASKS, SINCUT_ON_TASKS)),
    "drit": Family(DritConfig, DRIT),
}
