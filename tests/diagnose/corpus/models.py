"""Tiny models of transformers, with faults planted in them from outside."""

import torch
from torch import nn

from corpus.cases import fault, healthy
from corpus.half import autocast

NAN = float("nan")
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def llama(attention="eager"):
    import transformers as tf

    return tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=64, num_key_value_heads=1, attn_implementation=attention, **COMMON)
    )


def qwen3(attention="sdpa"):
    import transformers as tf

    config = tf.Qwen3Config(vocab_size=64, num_key_value_heads=1, head_dim=8, attn_implementation=attention, **COMMON)
    return tf.Qwen3ForCausalLM(config)


def gpt2(attention="eager"):
    import transformers as tf

    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
                           embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention)  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def bert(attention="eager"):
    import transformers as tf

    config = tf.BertConfig(vocab_size=64, max_position_embeddings=32, attn_implementation=attention, **COMMON)
    return tf.BertForSequenceClassification(config)


def vit():
    import transformers as tf

    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **COMMON))


def t5():
    import transformers as tf

    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                         decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def qwen3_vl():
    import transformers as tf

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61,
                              vision_start_token_id=62, vision_end_token_id=63)  # fmt: skip
    return tf.Qwen3VLForConditionalGeneration(config)


def pictures():
    ids = torch.tensor([[62, 60, 60, 60, 60, 63, 5, 6, 7], [62, 60, 60, 60, 60, 63, 8, 9, 10]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 60).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "labels": ids.masked_fill(ids >= 60, -100),
    }


def text(rows=3, length=6):
    ids = torch.randint(1, 60, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@fault("forward", {"mm", "addmm"}, "overflow", module="model.layers.1.mlp.down_proj", cured=True)
def llama_mlp_overflows_fp16():
    model, batch = llama(), text()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(model.model.layers[1].mlp, name).weight.mul_(700)

    def forward():
        with autocast(torch.float16):
            return model(**batch).loss  # HERE

    return forward, model


@fault("forward", {"mm", "addmm"}, "overflow", module="model.layers.0.self_attn.q_proj")
def qwen3_in_true_fp16_overflows():
    model, batch = qwen3().half(), text()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(6e4)
        model.model.layers[0].input_layernorm.weight[1:] = 0
    return lambda: model(**batch).loss, model  # HERE


@fault("forward", "addmm", "overflow", module="model.visual.blocks.1.mlp.linear_fc1", cured=True)
def qwen3_vl_vision_mlp_overflows_fp16():
    model, batch = qwen3_vl(), pictures()
    with torch.no_grad():
        model.model.visual.blocks[1].mlp.linear_fc1.weight.fill_(3e4)
        model.model.visual.blocks[1].norm2.weight[1:] = 0
        model.model.visual.blocks[1].norm2.weight[0] = 30.0

    def forward():
        with autocast(torch.float16):
            return model(**batch).loss  # HERE

    return forward, model


@fault("input", {"convolution", "addmm"}, "bad input", module="model.visual.patch_embed.proj", tensor="pixel_values",
       samples=tuple(range(16, 32)))  # fmt: skip
def nan_in_the_pixels_of_the_second_image():
    model, batch = qwen3_vl(), pictures()
    batch["pixel_values"][16:] = NAN
    return lambda: model(**batch).loss, model  # HERE


@fault("input", "convolution", "bad input", module="vit.embeddings.patch_embeddings.projection", tensor="pixel_values",
       samples=(1,), cured=True)  # fmt: skip
def corrupt_image_for_a_vit():
    model, images = vit(), torch.randn(3, 3, 16, 16)
    images[1, :, 4:8] = NAN
    labels = torch.tensor([0, 1, 0])
    return lambda: model(pixel_values=images, labels=labels).loss, model  # HERE


@fault("parameter", "embedding", "bad parameter", module="transformer.wte", tensor="transformer.wte.weight")
def nan_row_in_a_gpt2_embedding():
    model, batch = gpt2(), text()
    with torch.no_grad():
        model.transformer.wte.weight[int(batch["input_ids"][1, 2])] = NAN
    return lambda: model(**batch).loss, model  # HERE


@fault("parameter", {"mul", "native_layer_norm"}, "bad parameter", module="bert.encoder.layer.1.output.LayerNorm",
       tensor="bert.encoder.layer.1.output.LayerNorm.bias")  # fmt: skip
def infinite_bias_in_a_bert_layer_norm():
    model, batch = bert().eval(), text()
    batch["labels"] = torch.tensor([0, 1, 0])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.bias[3] = float("inf")
    return lambda: model(**batch).loss, model  # HERE


@fault("forward", {"_softmax", "_safe_softmax"}, "fully masked row", module="model.layers.0.self_attn", cured=True)
def eager_attention_over_a_row_that_is_masked_throughout():
    model, batch = llama(), text()
    mask = torch.zeros(3, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    mask[1, :, 0] = float("-inf")
    batch["attention_mask"] = mask
    return lambda: model(**batch).loss, model  # HERE


@fault("forward", "nll_loss_forward", "no target")
def language_model_whose_labels_are_all_ignored():
    model, batch = gpt2(), text()
    batch["labels"].fill_(-100)
    return lambda: model(**batch).loss, model  # HERE


@fault("forward", "nll_loss2d_forward", "masked target")
def masked_logits_of_the_label():
    model, batch = llama(), text()

    def forward():
        logits = model(input_ids=batch["input_ids"]).logits
        banned = torch.zeros(64, dtype=torch.bool)
        banned[batch["labels"][0, 0]] = True
        logits = logits.masked_fill(banned, float("-inf"))
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"])  # HERE

    return forward, model


@fault("forward", {"mm", "addmm", "mul"}, "overflow", module="decoder.block.1.layer.2.DenseReluDense.wo")
def t5_overflows_fp16():
    model = t5()
    ids = torch.randint(1, 60, (3, 6))
    with torch.no_grad():
        model.decoder.block[1].layer[2].DenseReluDense.wi.weight.mul_(300)
        model.decoder.block[1].layer[2].DenseReluDense.wo.weight.mul_(6000)

    def forward():
        with autocast(torch.float16):
            return model(input_ids=ids, labels=ids).loss  # HERE

    return forward, model


@fault("optimizer", {"addcdiv_", "div"}, "optimizer eps underflow", module="transformer.wte",
       tensor="transformer.wte.weight")  # fmt: skip
def gpt2_in_pure_fp16_with_adam():
    model, batch = gpt2().half(), text()
    return lambda: model(**batch).loss, model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def padded(batch):
    batch["attention_mask"][0, -2:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def trained(model):
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@healthy
def llama_eager_with_padding():
    model, optimizer = trained(llama("eager"))
    batch = padded(text())
    return lambda: model(**batch).loss, model, optimizer


@healthy
def llama_sdpa_with_left_padding_in_fp16():
    model, optimizer = trained(llama("sdpa"))
    batch = text()
    batch["attention_mask"][1, :3] = 0

    def forward():
        with autocast(torch.float16):
            return model(**batch).loss

    return forward, model, optimizer


@healthy
def qwen3_in_bf16():
    model, optimizer = trained(qwen3().bfloat16())
    batch = padded(text())
    return lambda: model(**batch).loss, model, optimizer


@healthy
def gpt2_checkpointed():
    model, optimizer = trained(gpt2("sdpa"))
    model.gradient_checkpointing_enable()
    model.train()
    batch = padded(text())
    return lambda: model(**batch, use_cache=False).loss, model, optimizer


@healthy
def bert_eager_with_padding():
    model, optimizer = trained(bert("eager"))
    batch = {**padded(text()), "labels": torch.tensor([0, 1, 0])}
    return lambda: model(**batch).loss, model, optimizer


@healthy
def vit_under_bf16():
    model, optimizer = trained(vit())
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 0])

    def forward():
        with autocast(torch.bfloat16):
            return model(pixel_values=images, labels=labels).loss

    return forward, model, optimizer


@healthy
def t5_with_padding():
    model, optimizer = trained(t5())
    batch = padded(text())
    return lambda: model(**batch).loss, model, optimizer


@healthy
def qwen3_vl_with_pictures():
    model, optimizer = trained(qwen3_vl())
    batch = pictures()
    return lambda: model(**batch).loss, model, optimizer
