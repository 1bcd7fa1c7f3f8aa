"""Which models may be packed; what is said about the others. The verdicts are held against real outputs."""

import pytest
import torch

from floatline.errors import ConfigError
from floatline.techniques import Packing
from floatline.techniques.batches.packable import why_not_packable

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
DECODERS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Phi3", "Olmo2", "GPTNeoX", "StableLm", "Granite",
            "OPT", "Bloom", "Falcon"]  # fmt: skip


def make(kind):
    import transformers

    torch.manual_seed(0)
    extra = {"alibi": True} if kind == "Falcon" else {}
    extra |= {"pad_token_id": 0} if kind == "Phi3" else {}
    small = {key: value for key, value in SMALL.items() if key != "head_dim" or kind != "Falcon"}
    config = getattr(transformers, f"{kind}Config")(**small, **extra)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def leaks(model):
    """Say whether the second sample of a packed row sees the first; None where the model takes no positions."""
    row = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    other = torch.tensor([[11, 12, 13, 8, 9, 10]])
    with torch.no_grad():
        one, two = (model(input_ids=x, **row).logits[:, 3:] for x in (ids, other))
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    return not torch.equal(one, two) or not torch.allclose(one, alone, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_accepted_does_not_leak(kind):
    model = make(kind)
    reason = why_not_packable(model)
    if kind in ("OPT", "Bloom", "Falcon"):
        assert "samples of a row" in reason
    else:
        assert reason is None
        assert not leaks(model)


def test_a_refused_one_would_leak():
    assert leaks(make("OPT"))


@pytest.mark.parametrize(
    ("class_name", "changes", "reason"),
    [
        ("T5ForConditionalGeneration", {}, "is an encoder-decoder"),
        ("LlamaForSequenceClassification", {}, "has no language-model head"),
        ("BertForMaskedLM", {}, "has no language-model head"),
        ("MambaForCausalLM", {"state_size": 4}, "Mamba"),
        ("Qwen3NextForCausalLM", {"num_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
         "has linear_attention layers, whose state runs"),
    ],
)  # fmt: skip
def test_why_not(class_name, changes, reason):
    import transformers

    kind = getattr(transformers, class_name)
    settings = {"vocab_size": 40, "num_layers": 1, "d_model": 16, "d_ff": 24} if class_name.startswith("T5") else SMALL
    with torch.device("meta"):
        model = kind(kind.config_class(**{**settings, **changes}))
    assert reason in why_not_packable(model)


def test_plain_modules_are_refused(zoo):
    with pytest.raises(ConfigError, match="packing cannot be applied: TiedLanguageModel is no transformers model"):
        Packing().apply(zoo["tied"].build())
    assert why_not_packable(zoo["qwen3_vl"].build()) is None
