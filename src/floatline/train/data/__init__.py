"""From a user's messages JSONL to batches for a Hugging Face model, resumable at any batch."""

from floatline.train.data.checks import CheckResult, check_samples, load_samples
from floatline.train.data.collate import Collator, TokenCounts, token_counts
from floatline.train.data.dataset import SampleDataset
from floatline.train.data.encode import EncodedPrompt, SampleEncoder
from floatline.train.data.lengths import token_lengths
from floatline.train.data.loader import make_loader
from floatline.train.data.micro import MicroBatches
from floatline.train.data.parse import Message
from floatline.train.data.sampler import EpochSampler
from floatline.train.data.samples import BadSample, Sample, read_samples

__all__ = [
    "BadSample",
    "CheckResult",
    "Collator",
    "EncodedPrompt",
    "EpochSampler",
    "Message",
    "MicroBatches",
    "Sample",
    "SampleDataset",
    "SampleEncoder",
    "TokenCounts",
    "check_samples",
    "load_samples",
    "make_loader",
    "read_samples",
    "token_counts",
    "token_lengths",
]
