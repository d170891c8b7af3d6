"""Measuring checkpoints, and reporting what was measured."""

from smpconv_zoo.evaluation.classification import EvaluationResult, evaluate_checkpoint, top1

__all__ = ["EvaluationResult", "evaluate_checkpoint", "top1"]
