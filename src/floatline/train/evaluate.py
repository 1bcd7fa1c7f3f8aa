"""Evaluation: the loss on held-out samples, and answers by greedy generation scored by exact match.

An answer counts when it equals the truth after trimming white space and folding case. Nothing here draws random
numbers or touches training state, so evaluating more or less often leaves a run's losses as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from floatline.precision import AppliedPrecision
from floatline.step import call_model, move, target_count
from floatline.train.data import Collator, EncodedPrompt, Sample, SampleDataset


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the truth."""

    images: tuple[str, ...]
    question: str
    answer: str
    truth: str
    correct: bool
    kind: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean over all target tokens.
        accuracy: Share of exact matches, None when nothing was generated.
        groups: kind -> {"correct", "total"}.
        answers: Every generated answer.
        seconds: Wall time.
    """

    split: str
    loss: float
    samples: int
    seconds: float
    accuracy: float | None = None
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def record(self, step: int) -> dict[str, Any]:
        """Return the line for metrics.jsonl."""
        values = {key: value for key, value in asdict(self).items() if key != "answers"}
        return {"kind": "eval", "step": step, **values}


class Evaluator:
    """Evaluates a model on data sets.

    Args:
        model: In training or evaluation mode; it is left as it was.
        precision: The applied policy, for its autocast.
        pad_token_id: For padding.
        batch_size: Samples per forward.
        max_new_tokens: Limit of a generated answer.
    """

    def __init__(
        self, model: nn.Module, precision: AppliedPrecision, *, pad_token_id: int, batch_size: int, max_new_tokens: int
    ) -> None:
        self.model = model
        self.precision = precision
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.collate = Collator(pad_token_id)
        self.collate_prompts = Collator(pad_token_id, padding_side="left")
        self.pad_token_id = pad_token_id

    def evaluate(self, dataset: SampleDataset, split: str, *, generate: bool) -> Evaluation:
        """Return loss and, with `generate`, answers of `dataset`."""
        start = time.perf_counter()
        with self._evaluating():
            loss = self._loss(dataset)
            answers = self._answers(dataset) if generate else []
        groups = _score(answers)
        accuracy = sum(answer.correct for answer in answers) / len(answers) if answers else None
        seconds = time.perf_counter() - start
        return Evaluation(split, loss, len(dataset), seconds, accuracy, groups, answers)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.precision.autocast():
                yield
        finally:
            self.model.train(training)

    def _loss(self, dataset: SampleDataset) -> float:
        total, targets = 0.0, 0
        for chunk in _chunks(range(len(dataset)), self.batch_size):
            batch = self.collate([dataset[index] for index in chunk])
            count = int(target_count(self.model, batch))
            total += float(call_model(self.model, move(batch, self.device)).loss) * count
            targets += count
        return total / targets if targets else float("nan")

    def _answers(self, dataset: SampleDataset) -> list[Answer]:
        answers = []
        for chunk in _chunks(range(len(dataset)), self.batch_size):
            prompts = [dataset.encoder.encode_prompt(dataset.samples[index]) for index in chunk]
            texts = self._generate(prompts, dataset)
            answers += [_answer(dataset.samples[i], p, text) for i, p, text in zip(chunk, prompts, texts, strict=True)]
        return answers

    def _generate(self, prompts: Sequence[EncodedPrompt], dataset: SampleDataset) -> list[str]:
        batch = move(self.collate_prompts([prompt.inputs for prompt in prompts]), self.device)
        tokens = self.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.pad_token_id,
        )
        fresh = tokens[:, batch["input_ids"].shape[1] :]
        return dataset.encoder.tokenizer.batch_decode(fresh, skip_special_tokens=True)


def _answer(sample: Sample, prompt: EncodedPrompt, text: str) -> Answer:
    text, truth = text.strip(), prompt.truth.strip()
    images = tuple(str(path) for path in sample.images)
    return Answer(images, prompt.question, text, truth, text.casefold() == truth.casefold(), sample.kind or "")


def _score(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for answer in answers:
        group = groups.setdefault(answer.kind or "all", {"correct": 0, "total": 0})
        group["correct"] += answer.correct
        group["total"] += 1
    return groups


def _chunks(indices: range, size: int) -> Iterator[range]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
