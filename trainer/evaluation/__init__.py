"""Metrics of translations. docs/evaluation.md defines them.

Everything counted is mergeable, so the images may be spread over any number of ranks and the metrics stay the same to the
last bit.
"""

from trainer.evaluation.base import Example, Metric
from trainer.evaluation.collection import MetricCollection, compute_metrics
from trainer.evaluation.paired import deltas_of

__all__ = ["Example", "Metric", "MetricCollection", "compute_metrics", "deltas_of"]
