"""Tiny models of transformers in which the weights of one named layer make fp16 overflow."""

import torch
from audit_corpus.cases import Program, fault

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def llama(attention="sdpa"):
    import transformers as tf

    return tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=96, num_key_value_heads=1, attn_implementation=attention, **COMMON)
    )


def bert():
    import transformers as tf

    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=96, max_position_embeddings=32, attn_implementation="eager", **COMMON)
    ).eval()


def t5():
    import transformers as tf

    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.1,
                         decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    return tf.T5ForConditionalGeneration(config).eval()


def vit():
    import transformers as tf

    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, num_labels=5, **COMMON)).eval()


def mixtral():
    import transformers as tf

    config = tf.MixtralConfig(
        vocab_size=96, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **COMMON
    )
    return tf.MixtralForCausalLM(config)


def tokens(rows=3, length=12):
    ids = torch.randint(5, 96, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def padded(rows=4, length=12):
    mask = (torch.arange(length) < torch.tensor([12, 9, 7, 6])[:rows, None]).long()
    ids = torch.randint(5, 96, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def scale(module, by):
    with torch.no_grad():
        module.weight.mul_(by)


@fault("fp16", "mixed", "range", "model.layers.1.mlp.down_proj", hardware="a100-40gb")
def llama_down_projection(faulty):
    model = llama()
    if faulty:
        scale(model.model.layers[1].mlp.up_proj, 1e4)
        scale(model.model.layers[1].mlp.down_proj, 1e5)
    return Program(model, tokens())


@fault("fp16", "mixed", "range", "bert.encoder.layer.0.intermediate.dense", hardware="a100-40gb")
def bert_intermediate(faulty):
    model = bert()
    if faulty:
        scale(model.bert.encoder.layer[0].intermediate.dense, 2e6)
        scale(model.bert.encoder.layer[0].output.dense, 1e-5)
    return Program(model, padded())


@fault("fp16", "mixed", "range", "encoder.block.1.layer.1.DenseReluDense.wo", hardware="a100-40gb")
def t5_wo(faulty):
    model = t5()
    if faulty:
        scale(model.encoder.block[1].layer[1].DenseReluDense.wo, 5e5)
    return Program(model, tokens())


@fault("fp16", "mixed", "range", "model.visual.blocks.0.mlp.linear_fc2", hardware="a100-40gb")
def qwen3_vl_vision_mlp(faulty):
    import zoo

    model = zoo.qwen3_vl()
    if faulty:
        scale(model.model.visual.blocks[0].mlp.linear_fc2, 1e8)
    return Program(model, zoo.seen_text(0))


@fault(
    "fp16",
    "mixed",
    "range",
    ("vit.encoder.layer.1.attention.attention.value", "vit.layers.1.attention.v_proj"),
    hardware="a100-40gb",
)
def vit_value(faulty):
    model = vit()
    block = _vit_layers(model)[1]
    value = next(m for n, m in block.named_modules() if n.endswith(("value", "v_proj")))
    out = next(m for n, m in block.named_modules() if n.endswith(("attention.output.dense", "o_proj")))
    if faulty:
        scale(value, 5e6)
        scale(out, 1e-5)
    return Program(model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 3])})


def _vit_layers(model):
    base = model.vit
    return base.encoder.layer if hasattr(base, "encoder") else base.layers
