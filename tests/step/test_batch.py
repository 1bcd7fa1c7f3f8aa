"""What a batch weighs, and the models that shift labels."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.step import target_count


class Plain(nn.Module):
    pass


class Causal(nn.Module):
    loss_type = "ForCausalLM"


class EncoderDecoder(nn.Module):
    loss_type = "ForConditionalGeneration"

    class config:
        is_encoder_decoder = True


LABELS = torch.tensor([[1, 2, -100], [3, -100, -100]])


@pytest.mark.parametrize(
    ("model", "batch", "count"),
    [
        (Plain(), {"labels": LABELS}, 3),
        (Causal(), {"labels": LABELS}, 1),
        (EncoderDecoder(), {"labels": LABELS}, 3),
        (Causal(), {"labels": torch.tensor([1, -100, 2])}, 2),
        (Plain(), {"x": torch.ones(5, 2), "labels": torch.ones(5, 1)}, 5),
        (Plain(), (torch.ones(7, 2), torch.ones(7)), 7),
        (Plain(), torch.ones(4), 4),
        (Plain(), {"scale": torch.tensor(1.0)}, 1),
    ],
)
def test_target_count(model, batch, count):
    assert int(target_count(model, batch)) == count


def test_the_count_is_what_the_loss_of_a_real_model_averages_over():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 17, (2, 6))
    labels = ids.clone()
    labels[0, :4] = -100
    losses = model(input_ids=ids, labels=labels).loss
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(losses * target_count(model, {"labels": labels}), total)


def test_workload_builds_and_refuses():
    work = fl.Workload(model=lambda: nn.Linear(2, 1), batch=lambda: (torch.ones(1, 2),))
    model = work.build_model()
    assert work.build_batch()[0].shape == (1, 2)
    assert isinstance(work.build_optimizer(model), torch.optim.AdamW)
    with pytest.raises(ConfigError, match="pass a module or a factory"):
        fl.Workload(model=3, batch=())
    with pytest.raises(ConfigError, match="callable"):
        fl.Workload(model=model, batch=(), optimizer=torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(ConfigError, match="returned a int"):
        fl.Workload(model=lambda: 3, batch=()).build_model()
