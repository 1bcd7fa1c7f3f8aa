"""Make a tiny Qwen3-VL once and save it as an ordinary Hugging Face checkpoint directory.

The class is the real one, `Qwen3VLForConditionalGeneration`, and so are the parts: vision tower with 2x2 merger and
deepstack, text model with interleaved multimodal rotary positions, byte-level tokenizer with Qwen's special tokens,
chat template, image processor. Only the sizes are small (1.4 M parameters) and the weights random, so it trains on a
CPU in minutes and loads through the same `from_pretrained` as Qwen/Qwen3-VL-2B-Instruct.

What differs from Qwen's own settings, chosen together and not separated by experiment:

- `image_mean` is the colour of the paper and `image_std` is 0.25, so that empty paper is 0 and ink stands out.
- `initializer_range` is 0.06 for vision and 0.04 for text, not 0.02: a fan-in of 64 to 384 wants larger weights than
  one of thousands. With 0.02 the model had not begun to read after 450 updates.
- `rope_theta` is 100: neighbouring places differ by one position, which at 5 000 000 hardly turns the width channels.

Not covered: video (the processor has no video side, so torchvision is not needed), thinking templates, tools.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scenes import PAPER, PLACE, read_texts

from floatline.train.hub import image_only, require_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
PATCH = 16

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build(directory: str | Path, texts: Iterable[str], *, seed: int = 0) -> Path:
    """Save a randomly initialised tiny Qwen3-VL with its processor.

    Args:
        directory: Where to write; made if missing.
        texts: What the tokenizer is trained on: questions and answers.
        seed: Decides the weights.

    Returns:
        The directory: config.json, model.safetensors (fp32), generation_config.json and the processor's files.
    """
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    directory = Path(directory)
    require_transformers()  # without its progress bars
    tokenizer = train_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(tokenizer))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    processor = image_only(Qwen3VLProcessor)(image_processor(), tokenizer, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(directory)
    return directory


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts, with Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[*SPECIAL, *PADS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be encoded
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    bpe.train_from_iterator([*texts, *roles * 10], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in (*SPECIAL, *PADS) if token != "<|endoftext|>"],
        model_max_length=4096,
    )


def image_processor() -> Any:
    """Qwen's image processor on PIL, centred on the colour of the paper."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[round(value / 255, 4) for value in PAPER],
        image_std=[0.25, 0.25, 0.25],
        size={"shortest_edge": PLACE * PLACE, "longest_edge": 256 * 256},  # pixels of area, not of an edge
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The sizes: a text model of 4 layers of width 128, a vision tower of 4 layers of width 64."""
    from transformers import Qwen3VLConfig

    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "initializer_range": 0.04,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.06,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a tiny Qwen3-VL with its processor as a checkpoint directory.")
    parser.add_argument("--data", required=True, help="directory with train.jsonl, for the tokenizer")
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (%(default)s)")
    args = parser.parse_args()
    build(args.out, read_texts(Path(args.data) / "train.jsonl"), seed=args.seed)
    print(args.out)


if __name__ == "__main__":
    main()
