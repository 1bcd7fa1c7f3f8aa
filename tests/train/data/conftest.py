"""A tiny Qwen3-VL processor with a Qwen-shaped chat template, and ways to write a messages JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from floatline.train.hub import image_only

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [*SPECIAL, "<|video_pad|>"]
    texts = ["Which digit is at the top left?", "How many digits are there?", "user\nassistant\nsystem\n 0 1 2 3"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts * 10, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def processor(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saved and loaded again, as a run gets it: 32 x 32 pixels become one token."""
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from floatline.train.hub import load_processor

    images = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    )
    made = image_only(Qwen3VLProcessor)(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)
    folder = tmp_path_factory.mktemp("processor")
    made.save_pretrained(folder)
    return load_processor(str(folder))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write lines (objects, or text as it is) to data.jsonl."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "data.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., str]:
    """Save an image of random pixels beside data.jsonl and return its name."""

    def picture(name: str = "a.png", size: tuple[int, int] = (64, 32), mode: str = "RGB") -> str:
        from PIL import Image

        Image.effect_noise(size, 50).convert(mode).save(tmp_path / name)
        return name

    return picture


@pytest.fixture(scope="session")
def talk() -> Callable[..., dict[str, Any]]:
    """A line: turns alternate between user and assistant; images are shown before the first question."""

    def talk(*turns: str, images: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)
        ]
        parts = [{"type": "image", "image": name} for name in images]
        messages[0]["content"] = [*parts, {"type": "text", "text": turns[0]}]
        return {"messages": messages, **keys}

    return talk
