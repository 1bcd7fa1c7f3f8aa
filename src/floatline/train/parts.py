"""What a run and its plan are both made of, so that the plan is of this run: encoder, collator, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from floatline.train.data import Collator, SampleEncoder
from floatline.train.hub import load_processor
from floatline.train.recipe import Recipe, TrainSection


def encoder_of(recipe: Recipe) -> SampleEncoder:
    """Return the encoder of a recipe's samples.

    Raises:
        ModelError: The model's directory has no processor that can be used.
    """
    return SampleEncoder(
        load_processor(recipe.model.path),
        max_length=recipe.data.max_length,
        max_answer_tokens=recipe.data.max_answer_tokens,
    )


def collator_of(encoder: SampleEncoder) -> Collator:
    """Return what makes batches for training."""
    return Collator(pad_token_id(encoder.tokenizer))


def pad_token_id(tokenizer: Any) -> int:
    """Return the padding token, or the end token where there is none (padding is masked anyway)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def optimizer_of(train: TrainSection) -> Callable[[Any], torch.optim.Optimizer]:
    """Return a factory of the optimizer: AdamW, fused, so that its step has no temporaries of the weights' size."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    return make
