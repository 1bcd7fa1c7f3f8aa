"""How many positions a model has, and which key of its config says so.

Learned positions cannot be exceeded at all. Rotary ones can be computed for any length, but a model past the length
it was made for is a different model (its rope scaling would be another), so that is refused as well: put the scaling
and `max_position_embeddings` in the config if it is meant.
"""

from __future__ import annotations

from typing import Any

KEYS = ("n_positions", "max_position_embeddings", "max_target_positions", "max_seq_len", "n_ctx", "seq_length")
UNLIMITED = frozenset(
    {"t5", "mt5", "umt5", "longt5", "switch_transformers", "bloom", "mamba", "mamba2", "rwkv", "xlnet"}
)
"""Types whose positions are relative or absent: a length key in their config is advice."""

AFTER_PADDING = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "longformer",
     "esm", "ibert", "lilt", "luke", "mpnet", "xmod", "markuplm", "layoutlmv3"}
)  # fmt: skip
"""Types that count positions from `pad_token_id + 1`, so that the table's first rows are no positions."""


def text_config(config: Any) -> Any:
    """Return the part of a config that describes its text model; of two, the decoder's."""
    try:
        return config.get_text_config()
    except ValueError:  # a text encoder and a text decoder
        return config.get_text_config(decoder=True)


def position_limit(config: Any) -> tuple[int | None, str]:
    """Return the most tokens a text config takes and the key that says so; None where there is no limit.

    >>> from types import SimpleNamespace
    >>> position_limit(SimpleNamespace(model_type="gpt2", n_positions=1024))
    (1024, 'n_positions')
    """
    if config.model_type in UNLIMITED:
        return None, ""
    for key in KEYS:
        limit = getattr(config, key, None)
        if isinstance(limit, int) and limit > 0:
            if config.model_type in AFTER_PADDING:
                first = (config.pad_token_id or 0) + 1
                return limit - first, f"{key} less {first}"
            return limit, key
    return None, ""
