"""Train an adapter on episodes, with the base model frozen.

Start with `run.train`, which runs a recipe, and `loss.EpisodeModel`, which is one training step.
"""

from deltamem_tool.training.dry_run import DryRun, PeakMemory, dry_run
from deltamem_tool.training.loss import EpisodeModel
from deltamem_tool.training.run import TrainingResult, train
from deltamem_tool.training.sharding import BaseShare

__all__ = ["BaseShare", "DryRun", "EpisodeModel", "PeakMemory", "TrainingResult", "dry_run", "train"]
