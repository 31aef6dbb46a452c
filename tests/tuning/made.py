"""Records of trials that never ran, and options of trials that take seconds."""

from tuning.results import Record

BETA, T = "method.robust.beta", "method.robust.T"
TINY = {
    "data.crop": 32, "data.decoder": "pillow", "method.generator.ngf": 2, "method.discriminator.ndf": 2,
    "method.generator.blocks": 6, "method.head_dim": 4, "method.taps": (0, 4), "method.patches": 8, "method.buffer": 2,
    "engine.precision": "fp32", "loop.samples": 1, "loop.checkpoint_every": 4, "evaluation.every": 0.5,
    "optim.epochs": 1.0, "optim.decay_epochs": 1.0,
}  # fmt: skip


def records() -> list[Record]:
    def one(number: int, beta: float, t: float, status: str, miou: float | None, cause: str = "") -> Record:
        metrics = {} if miou is None else {"mIoU": miou, "Dist": 60 - 50 * miou}
        return Record(number, {BETA: beta, T: t}, status, cause, 100, metrics, "here/1")  # type: ignore[arg-type]

    return [
        one(0, 1e-5, 0.05, "finished", 0.31),
        one(1, 2e-4, 0.12, "finished", 0.40),
        one(2, 9e-4, 0.02, "stopped", 0.55),
        one(3, 5e-4, 0.19, "failed", None, "G is not a finite number at step 7"),
    ]
