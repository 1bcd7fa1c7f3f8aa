"""Compose the UCI handwritten digits into scenes with a question and an answer, as `messages` JSONL.

The digits are the 1797 real 8x8 scans that scikit-learn ships, so nothing is downloaded. A scene is a sheet of paper
ruled into square places of 32 px, the size of one visual token of Qwen3-VL (16 px patches, merged 2x2). There are
three kinds of sheet: one place, two side by side, and a square of four of which two to four are filled. Every digit
is enlarged to 28 px, shifted a little and drawn in the scene's own dark ink.

Questions: "Which digit is at the top left?" (kind `digit`; the answer is one figure) and "How many digits are
there?" (kind `count`). `FREQUENCY` sets the mix of sheets: the single place teaches reading a digit, the others
binding a place to a question, which is the hard part.

Split: first the scans are divided (1297 train, 200 validation, 300 test), then each side composes its scenes from its
own scans, so that no handwriting of the test was ever seen in training.

One line of `train.jsonl`, `validation.jsonl` and `test.jsonl` (image paths are relative to that file):

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "images/train/00001.png"},
                                               {"type": "text", "text": "Which digit is on the left?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "7"}]}], "kind": "digit"}

The same arguments give the same bytes each time.

Not covered: overlapping digits, several images in one sample, questions about an empty place.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

PLACE = 32  # px: one visual token
DIGIT = 28  # px
PAPER = (230, 230, 230)
SCANS = {"train": 1297, "validation": 200, "test": 300}
READ_SHARE = 0.8  # of the scenes, also asked to be read
COUNT_SHARE = 0.2  # of the scenes, also asked for the number of digits

# Rows, columns and the words for each place.
SHEETS = {
    "single": (1, 1, ("there",)),
    "row": (1, 2, ("on the left", "on the right")),
    "square": (2, 2, ("at the top left", "at the top right", "at the bottom left", "at the bottom right")),
}
FREQUENCY = {"single": 1, "row": 1, "square": 1}
READ_QUESTION = "Read the digits."
COUNT_QUESTION = "How many digits are there?"


class Question(NamedTuple):
    kind: str  # "digit", "read" or "count"
    text: str
    answer: str


class Scans(NamedTuple):
    images: np.ndarray  # (n, 28, 28) uint8, 255 where the ink is full
    labels: np.ndarray  # (n,)


def split_scans(seed: int) -> dict[str, Scans]:
    """Divide the 1797 scans into train, validation and test, each scan on one side only."""
    digits = load_digits()
    order = np.random.RandomState(seed).permutation(len(digits.target))
    sides, start = {}, 0
    for side, count in SCANS.items():
        chosen = order[start : start + count]
        enlarged = np.stack([_enlarge(digits.images[index]) for index in chosen])
        sides[side] = Scans(enlarged, digits.target[chosen])
        start += count
    return sides


def _enlarge(scan: np.ndarray) -> np.ndarray:
    ink = (scan * (255 / 16)).astype(np.uint8)  # the scans hold 0..16
    return np.asarray(Image.fromarray(ink).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC))


def compose(rng: random.Random, scans: Scans) -> tuple[Image.Image, list[Question]]:
    """Draw one scene.

    Args:
        rng: Source of every choice.
        scans: Where the digits are taken from.

    Returns:
        The picture, and its questions: one about a place, for most scenes the reading, for some the count.
    """
    sheet = rng.choices(list(FREQUENCY), list(FREQUENCY.values()))[0]
    rows, columns, words = SHEETS[sheet]
    fewest = min(2, len(words))
    filled = sorted(rng.sample(range(len(words)), rng.randint(fewest, len(words))))
    ink = np.zeros((rows * PLACE, columns * PLACE, 1))
    labels = {}
    for place in filled:
        index = rng.randrange(len(scans.labels))
        top = place // columns * PLACE + rng.randint(0, PLACE - DIGIT)
        left = place % columns * PLACE + rng.randint(0, PLACE - DIGIT)
        ink[top : top + DIGIT, left : left + DIGIT, 0] = scans.images[index] / 255
        labels[place] = str(scans.labels[index])
    colour = np.array([rng.randint(0, 90) for _ in range(3)])
    picture = Image.fromarray((np.array(PAPER) * (1 - ink) + colour * ink).round().astype(np.uint8))

    place = rng.choice(filled)
    questions = [Question("digit", f"Which digit is {words[place]}?", labels[place])]
    if rng.random() < READ_SHARE:
        questions.append(Question("read", READ_QUESTION, " ".join(labels[place] for place in filled)))
    if rng.random() < COUNT_SHARE:
        questions.append(Question("count", COUNT_QUESTION, str(len(filled))))
    return picture, questions


def to_line(image: str, question: Question) -> str:
    """One JSONL line in the ecosystem's `messages` shape, with the question's kind beside it."""
    user = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
    return json.dumps({"messages": messages, "kind": question.kind}) + "\n"


def write_scenes(
    directory: str | Path, *, train: int = 7000, validation: int = 100, test: int = 500, seed: int = 0
) -> Path:
    """Write images and JSONL files of the three splits.

    Args:
        directory: Where to write; made if missing. Files of the same names are replaced.
        train, validation, test: Number of scenes; a scene gives one to three lines.
        seed: Decides the split of the scans and every scene.

    Returns:
        The directory.
    """
    directory = Path(directory)
    sides = split_scans(seed)
    for side, count in {"train": train, "validation": validation, "test": test}.items():
        rng = random.Random(f"{seed} {side}")
        (directory / "images" / side).mkdir(parents=True, exist_ok=True)
        with open(directory / f"{side}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for number in range(count):
                picture, questions = compose(rng, sides[side])
                path = f"images/{side}/{number:05d}.png"
                picture.save(directory / path)
                file.writelines(to_line(path, question) for question in questions)
    return directory


def read_texts(path: str | Path) -> list[str]:
    """Return every text of a JSONL file, questions and answers, in order."""
    with open(path, encoding="utf-8") as file:
        messages = [message for line in file for message in json.loads(line)["messages"]]
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compose digit scenes and write them as messages JSONL.")
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--train", type=int, default=7000, help="scenes for training (%(default)s)")
    parser.add_argument("--validation", type=int, default=100, help="scenes for validation (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="scenes for the test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and scenes (%(default)s)")
    args = parser.parse_args()
    write_scenes(args.out, train=args.train, validation=args.validation, test=args.test, seed=args.seed)
    print(args.out)


if __name__ == "__main__":
    main()
