"""From recipe to report: recipe, data, loop, checkpoints and exact resume, run directory."""

from floatline.train.merge import merge_checkpoint
from floatline.train.recipe import Recipe, load_recipe
from floatline.train.run import RunResult, train

__all__ = ["Recipe", "RunResult", "load_recipe", "merge_checkpoint", "train"]
