"""Tiny configs of many families, as config.json holds them, and the directories tests make of them."""

import json

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 512}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
LLAMA = {"model_type": "llama", **DECODER}
QWEN_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**DECODER, "rope_parameters": MROPE}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96}  # fmt: skip
SPEECH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
"vocab_size": 32,
          "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}  # fmt: skip

CONFIGS = {
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 64, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {**LLAMA, "architectures": ["LlamaForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3Model"], **DECODER, "head_dim": 8},
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **DECODER, "num_local_experts": 4},
    "bloom": {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 32, "n_layer": 2,
              "n_head": 4,
              "vocab_size": 96},
    "bert": {"model_type": "bert", "architectures": ["BertForPreTraining"], **TEXT, "max_position_embeddings": 64},
    "roberta": {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], **TEXT,
                "max_position_embeddings": 66,
                "pad_token_id": 1},
    "modernbert": {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], **TEXT, "pad_token_id": 0,
                   "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8, "d_ff": 48,
           "num_layers": 2, "num_heads": 4, "vocab_size": 96, "n_positions": 64, "eos_token_id": 1},
    "bart": {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], **BART,
             "max_position_embeddings": 64,
             "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"], **VIT, "image_size": 32,
            "num_labels": 3},
    "dinov2": {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 32, "num_hidden_layers": 2,
               "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "swin": {"model_type": "swin", "architectures": ["SwinForImageClassification"], "embed_dim": 16, "depths": [1, 1],
             "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2},
    "convnext": {"model_type": "convnext", "architectures": ["ConvNextForImageClassification"],
                 "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "resnet": {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "hidden_sizes": [8, 16],
               "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"},
    "clip": {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16,
             "text_config": {**TEXT, "max_position_embeddings": 16, "eos_token_id": 95, "bos_token_id": 94},
             "vision_config": {**VIT, "image_size": 32}},
    "siglip": {"model_type": "siglip", "architectures": ["SiglipModel"],
               "text_config": {**TEXT, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 1},
               "vision_config": {**VIT, "image_size": 32}},
    "whisper": {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **BART,
                "num_mel_bins": 8,
                "max_source_positions": 20, "max_target_positions": 12, "decoder_start_token_id": 3,
                "pad_token_id": 1,
                "bos_token_id": 1, "eos_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    "wav2vec2": {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForPreTraining"], **SPEECH},
    "hubert": {"model_type": "hubert", "architectures": ["HubertForSequenceClassification"], **SPEECH},
    "qwen2_vl": {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], **QWEN_IDS,
                 "text_config": QWEN_TEXT,
                 "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], **QWEN_IDS,
                   "text_config": QWEN_TEXT,
                   "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                                     "patch_size": 4,
                                     "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}},
    "qwen3_vl": {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], **QWEN_IDS,
                 "text_config": {**QWEN_TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
                 "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                                   "patch_size": 4,
                                   "out_hidden_size": 32, "num_position_embeddings": 16,
                                   "deepstack_visual_indexes": [0]}},
    "glm4v": {"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"], "image_token_id": 90,
              "video_token_id": 91, "image_start_token_id": 92, "image_end_token_id": 93, "video_start_token_id": 94,
              "video_end_token_id": 95,
              "text_config": {**DECODER, "pad_token_id": 0, "eos_token_id": 1, "partial_rotary_factor": 1.0,
                              "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
              "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                                "patch_size": 4,
                                "image_size": 16, "out_hidden_size": 32}},
    "gemma3": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 4,
               "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
               "text_config": {**DECODER, "head_dim": 8, "sliding_window": 8},
               "vision_config": {"model_type": "siglip_vision_model", **VIT, "image_size": 32,
                                 "vision_use_head": False}},
    "paligemma": {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"],
                  "image_token_index": 90,
                  "projection_dim": 32, "text_config": {"model_type": "gemma", **DECODER, "head_dim": 8},
                  "vision_config": {"model_type": "siglip_vision_model", **VIT, "image_size": 32,
                                    "vision_use_head": False}},
    "llava": {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 90,
              "text_config": LLAMA,
              "vision_config": {"model_type": "clip_vision_model", **VIT, "image_size": 32, "projection_dim": 16}},
    "internvl": {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
                 "image_token_id": 90,
                 "text_config": LLAMA,
                 "vision_config": {"model_type": "internvl_vision", **VIT, "patch_size": [8, 8], "image_size": [32,
                                   32]}},
    "idefics3": {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"],
                 "image_token_id": 90,
                 "scale_factor": 2, "text_config": LLAMA, "vision_config": {**VIT, "image_size": 32}},
    "smolvlm": {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 90,
                "scale_factor": 2, "text_config": LLAMA, "vision_config": {**VIT, "image_size": 32}},
}  # fmt: skip


def model_directory(folder, name, **changes):
    """Write a directory with the config.json of a tiny model, and a processor's facts where images need a limit.

    Returns its path as text.
    """
    folder = folder / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    if "vision_start_token_id" in CONFIGS[name] or "image_start_token_id" in CONFIGS[name]:
        (folder / "preprocessor_config.json").write_text('{"min_pixels": 64, "max_pixels": 1024}')
    return str(folder)
