"""From recipe to report: recipe, data, loop, checkpoints and exact resume, run directory."""

from floatline.train.loop import RunResult, train
from floatline.train.merge import merge_checkpoint
from floatline.train.recipe import Recipe, load_recipe

__all__ = ["Recipe", "RunResult", "load_recipe", "merge_checkpoint", "train"]
