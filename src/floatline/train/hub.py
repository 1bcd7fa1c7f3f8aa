"""Load a model and its processor from a Hugging Face directory or hub id.

The same two functions load the demo's 1.4 M-parameter model and Qwen/Qwen3-VL-2B-Instruct. Two things differ from a
bare `from_pretrained`:

- torchvision is not needed. Transformers builds a video processor for every Qwen-VL processor, and that part alone
  wants torchvision; without it the processor is loaded without its video side (`image_only`).
- a missing directory or an unknown architecture is one clear error.

Not covered: remote code (`trust_remote_code`), quantised checkpoints, video input.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any


@cache
def image_only(processor_class: type) -> type:
    """Return a subclass of a transformers processor class that has no video side.

    It saves and loads the same files (minus `video_preprocessor_config.json`) under the original class name, so
    that a directory written by it also loads where torchvision is installed.
    """

    class ImageOnly(processor_class):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__
    return ImageOnly


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None
