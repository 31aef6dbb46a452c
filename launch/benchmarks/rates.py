"""What the device can do at best, whatever the job: a large matrix product in its precision, and a large copy.

Measurements, by their keys in the JSON:

matmul    10^12 FLOPs a second of a large matrix product
copy      10^9 bytes read and written a second by a large copy
"""

from launch.benchmarks.measuring import Measurement, interleaved
from launch.benchmarks.ops import machine_rates
from launch.runs.config import JobConfig
from trainer.engines import make_engine

HELP = "the device's matrix rate in a job's precision, and its bandwidth"


def run(config: JobConfig, repetitions: int, steps: int | None) -> list[Measurement]:
    engine = make_engine(config.engine)
    found = interleaved([lambda: machine_rates(engine)], repetitions)
    return [Measurement("matmul", "TFLOP/s", found["matmul"]), Measurement("copy", "GB/s", found["copy"])]
