"""Text batches: full-length sequences without padding.

A planned batch is packed: every token counts and no `attention_mask` is passed, so that attention may take the
fused kernel it takes in a packed run. A batch with padding holds a mask beside it and computes on its padding:
it is never smaller than this one of the same width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from floatline.plan.inputs.layout import Layout, class_ids, masked_labels, real, special_ids, token_ids
from floatline.plan.positions import position_limit, text_config
from floatline.plan.shape import Filling

USUAL = {"causal-lm": 2048, "seq2seq": 512, "encoder": 512}
NO_MASK = "sequences are full-length without padding, so no attention_mask is passed"


def lay_out_text(filling: Filling, config: Any, task: str, kind: str) -> Layout:
    """Lay out a batch for a model that reads text: causal, masked, classifying, encoder-decoder."""
    filling.refuse("image", "images", "seconds")
    if task == "seq2seq-lm":
        return _encoder_decoder(filling, config)
    filling.refuse("target")
    text = text_config(config)
    limit, key = position_limit(text)
    batch = filling.batch()
    seq = filling.length("seq", USUAL[kind], "a usual length for this kind of model", limit, key)
    special = special_ids(config)

    def make() -> dict[str, torch.Tensor]:
        ids = token_ids(batch, seq, text.vocab_size, special)
        with real():
            return {"input_ids": ids, **_LABELS[task](ids, config)}

    return Layout(
        shape=filling.shape,
        batch=make,
        limits={} if limit is None else {"seq": limit},
        choices=tuple(filling.choices),
        notes=(NO_MASK,),
        facts={"tokens": seq},
    )


def _classes(ids: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        ids[:, -1] = end  # encoder-decoders classify at the end token and refuse a row without one
    return {"labels": class_ids(len(ids), config.num_labels)}


def _spans(ids: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    starts = class_ids(ids.shape[0], ids.shape[1])
    return {"start_positions": starts, "end_positions": starts.clone()}


_LABELS: dict[str, Callable[[torch.Tensor, Any], dict[str, torch.Tensor]]] = {
    "causal-lm": lambda ids, config: {"labels": ids.clone()},
    "masked-lm": lambda ids, config: {"labels": masked_labels(ids)},
    "sequence-classification": _classes,
    "token-classification": lambda ids, config: {"labels": ids % config.num_labels},
    "question-answering": _spans,
}


def _encoder_decoder(filling: Filling, config: Any) -> Layout:
    limit, key = position_limit(config)
    batch = filling.batch()
    seq = filling.length("seq", USUAL["seq2seq"], "a usual length for this kind of model", limit, key)
    target = filling.length("target", min(seq, limit or seq), "as long as the encoder's side", limit, key)
    special, vocabulary = special_ids(config), text_config(config).vocab_size

    def make() -> dict[str, torch.Tensor]:
        ids = token_ids(batch, seq, vocabulary, special)
        return {"input_ids": ids, "labels": token_ids(batch, target, vocabulary, special)}

    return Layout(
        shape=filling.shape,
        batch=make,
        limits={} if limit is None else {"seq": limit, "target": limit},
        choices=tuple(filling.choices),
        notes=(NO_MASK,),
        facts={"tokens": seq + target},
    )
