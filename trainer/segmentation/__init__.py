"""Semantic segmenters: those trained here, and outside networks."""

from trainer.segmentation.load import load_segmenter
from trainer.segmentation.segmenter import Segmenter, check_label_space

__all__ = ["Segmenter", "check_label_space", "load_segmenter"]
