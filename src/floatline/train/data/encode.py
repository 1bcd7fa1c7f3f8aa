"""Encode a conversation: token ids, labels on the answers only, and what the processor makes of the images.

The rendered conversation is cut where generation would start and where it would end:

    prompt_i = template(messages before answer i, add_generation_prompt=True)   minus what came before
    answer_i = template(messages up to answer i)                                minus everything before it

Each piece is tokenised on its own. So the model is trained on exactly the tokens it sees when it generates, and labels
begin and end at piece borders instead of being searched for. The end-of-turn token is labelled, for it is what makes
generation stop; white space that the template puts behind it is not.

This needs a template that only appends: what it rendered for the first turns is how it renders them later. A template
that rewrites earlier turns (some drop the reasoning of all but the last answer) is refused with a ModelError.

Not covered: video, audio, tools, packing several conversations into one sequence, truncation (a sample that is too long
is an error, never cut silently).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floatline.errors import ConfigError, ModelError
from floatline.step.batch import IGNORED
from floatline.train.data.images import BadImage, open_image
from floatline.train.data.parse import Message
from floatline.train.data.samples import Sample


@dataclass(frozen=True)
class EncodedPrompt:
    """What generation starts from, and what it should end with.

    Attributes:
        inputs: As `SampleEncoder.encode`, without labels, up to where the last answer starts.
        truth: The text of the last answer.
        question: The text of the last user turn.
    """

    inputs: dict[str, Tensor]
    truth: str
    question: str


@dataclass(frozen=True)
class _Piece:
    """A stretch of the rendered conversation that is tokenised on its own."""

    text: str
    images: tuple[Path, ...] = ()
    answer: bool = False


class SampleEncoder:
    """Encodes samples for one model.

    Args:
        processor: A transformers processor with images, or a tokenizer for text-only models; with a chat template.
        max_length: Longest sequence in tokens, images included; None accepts all.
        max_answer_tokens: Longest answer in tokens, its end-of-turn token included; None accepts all.

    Raises:
        ConfigError: A limit below 1.
    """

    def __init__(self, processor: Any, *, max_length: int | None = None, max_answer_tokens: int | None = None) -> None:
        for name, value in (("max_length", max_length), ("max_answer_tokens", max_answer_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value} is below 1", hint="give 1 or more, or null for no limit")
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.max_length = max_length
        self.max_answer_tokens = max_answer_tokens

    def encode(self, sample: Sample) -> dict[str, Tensor]:
        """Return the tensors of a sample.

        Returns:
            `input_ids`, `labels` (-100 outside answers) and `attention_mask`, int64 of shape (L,); other tensors of the
            processor that are as long as its `input_ids` (`mm_token_type_ids`), (L,), 0 outside its pieces; its image
            tensors as they are (`pixel_values`, `image_grid_thw` ...).

        Raises:
            DataError: An image, a text, the length of an answer or of the sequence: with file and line.
            ModelError: The chat template rewrites earlier turns or does not end answers.
        """
        pieces = self._pieces(sample)
        encoded = [self._tokenise(piece, sample) for piece in pieces]
        self._check_answers(sample, pieces, encoded)
        labels = [
            tokens["input_ids"] if piece.answer else torch.full_like(tokens["input_ids"], IGNORED)
            for piece, tokens in zip(pieces, encoded)
        ]
        result = {**_join(encoded), "labels": torch.cat(labels)}
        self._check_length(sample, len(result["input_ids"]))
        return result

    def encode_prompt(self, sample: Sample) -> EncodedPrompt:
        """Return what generation of the last answer starts from.

        Raises:
            DataError, ModelError: As `encode`.
        """
        pieces = self._pieces(sample)
        last = max(place for place, piece in enumerate(pieces) if piece.answer)
        inputs = _join([self._tokenise(piece, sample) for piece in pieces[:last]])
        question = next(message.text for message in reversed(sample.messages) if message.role == "user")
        return EncodedPrompt(inputs, sample.messages[-1].text, question)

    def texts(self, sample: Sample) -> list[list[int]]:
        """Return the token ids of a sample's texts piece by piece, with each image as its one placeholder.

        Raises:
            DataError, ModelError: As `encode`, images apart.
        """
        return [self.tokenizer(piece.text, add_special_tokens=False)["input_ids"] for piece in self._pieces(sample)]

    def check(self, sample: Sample) -> None:
        """Raise what `encode` would raise for the texts; images are looked at only if there is a `max_length`."""
        if self.max_length is not None:
            self.encode(sample)
            return
        pieces = [piece for piece in self._pieces(sample) if piece.answer]
        self._check_answers(sample, pieces, [self._tokenise(piece, sample) for piece in pieces])

    def _pieces(self, sample: Sample) -> list[_Piece]:
        self._check_texts(sample)
        pieces: list[_Piece] = []
        done, first = "", 0
        for place, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            prompt = self._render(sample, place, generate=True)
            whole = self._render(sample, place + 1, generate=False)
            images = tuple(path for earlier in sample.messages[first:place] for path in earlier.images)
            pieces += [_Piece(_rest(prompt, done, sample), images), *_answer_pieces(_rest(whole, prompt, sample))]
            done, first = whole, place + 1
        return pieces

    def _check_texts(self, sample: Sample) -> None:
        if sample.images and not self.takes_images:
            raise sample.error(
                f"the sample shows {len(sample.images)} image(s), but the model takes text only",
                "choose a vision-language model, or remove the images",
            )
        for place, message in enumerate(sample.messages):
            found = self._special_text.search(message.text) if self._special_text else None
            if found:
                raise sample.error(
                    f"messages[{place}] holds {found[0]!r}, a special token of this model",
                    "remove it; the chat template writes special tokens, the data must not",
                )

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        named = dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens))
        return named | {number: token.content for number, token in added.items() if token.special}

    @cached_property
    def _special_text(self) -> re.Pattern[str] | None:
        texts = sorted(self._special_tokens.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _render(self, sample: Sample, turns: int, *, generate: bool) -> str:
        from jinja2 import TemplateError

        messages = [self._for_template(message) for message in sample.messages[:turns]]
        try:
            return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
        except (TemplateError, TypeError) as error:  # TypeError: a template that joins strings got a list
            raise sample.error(
                f"the model's chat template refuses the conversation: {error}",
                "see which roles and orders of turns the template allows",
            ) from None

    def _for_template(self, message: Message) -> dict[str, Any]:
        if not self.takes_images:
            return {"role": message.role, "content": message.text}
        parts = message.parts
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        return {"role": message.role, "content": content}

    def _tokenise(self, piece: _Piece, sample: Sample) -> dict[str, Tensor]:
        """Return the model inputs of one piece, `input_ids` first, token-aligned ones with one dimension."""
        if not piece.images:
            ids = self.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
            return {"input_ids": torch.tensor(ids, dtype=torch.long)}
        try:
            images = [open_image(path) for path in piece.images]
            output = self.processor(text=[piece.text], images=images, add_special_tokens=False, return_tensors="pt")
        except BadImage as problem:
            raise sample.error(problem.reason, problem.hint) from None
        except (ValueError, IndexError) as error:
            names = ", ".join(str(path) for path in piece.images)
            raise sample.error(f"the model's processor refuses {names}: {error}", "replace or resize it") from None
        shape = output["input_ids"].shape
        return {
            key: value[0] if value.shape == shape else value
            for key, value in output.items()
            if isinstance(value, Tensor) and key != "attention_mask"
        }

    def _check_answers(self, sample: Sample, pieces: Sequence[_Piece], encoded: Sequence[dict[str, Tensor]]) -> None:
        for piece, tokens in zip(pieces, encoded):
            if not piece.answer:
                continue
            ids = tokens["input_ids"]
            if not len(ids) or int(ids[-1]) not in self._special_tokens:
                raise ModelError(
                    f"the chat template ends an answer with {piece.text[-20:]!r}, which is no end-of-turn token",
                    hint="let chat_template.jinja write the end-of-sequence token after each answer",
                )
            if self.max_answer_tokens is not None and len(ids) > self.max_answer_tokens:
                raise sample.error(
                    f"an answer has {len(ids)} tokens, more than data.max_answer_tokens={self.max_answer_tokens}",
                    f"set data.max_answer_tokens={len(ids)} or shorten the answer",
                )

    def _check_length(self, sample: Sample, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise sample.error(
                f"the sample has {length} tokens, more than data.max_length={self.max_length}",
                f"set data.max_length={length}, shorten the text or use smaller images",
            )


def _rest(text: str, start: str, sample: Sample) -> str:
    """What `text` adds to `start`, which it must begin with."""
    if text.startswith(start):
        return text[len(start) :]
    same = next((i for i, (a, b) in enumerate(zip(text, start)) if a != b), min(len(text), len(start)))
    raise ModelError(
        f"the chat template rewrites earlier turns ({sample.where}): it rendered {start[same : same + 40]!r}, "
        f"and with the next turn {text[same : same + 40]!r}",
        hint="use a template that only appends, or give each answer a line of its own",
    )


def _answer_pieces(text: str) -> list[_Piece]:
    """The answer up to its end-of-turn token, and the white space that the template puts behind it."""
    answer = text.rstrip()
    tail = text[len(answer) :]
    return [_Piece(answer, answer=True), *([_Piece(tail)] if tail else [])]


def _join(encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate pieces: token-aligned tensors with 0 where a piece lacks them, image tensors as they are."""
    keys = dict.fromkeys(key for tokens in encoded for key in tokens)
    result = {}
    for key in keys:
        having = [tokens for tokens in encoded if key in tokens]
        if all(tokens[key].shape == tokens["input_ids"].shape for tokens in having):
            having = [tokens if key in tokens else {key: torch.zeros_like(tokens["input_ids"])} for tokens in encoded]
        result[key] = torch.cat([tokens[key] for tokens in having])
    return {**result, "attention_mask": torch.ones_like(result["input_ids"])}
