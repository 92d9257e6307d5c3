"""What making numbers small by their names does not get right, by model type."""

from typing import Any

from transformers import BertConfig, Gemma4TextConfig, ResNetConfig, ViTConfig, Wav2Vec2Config

__all__ = ["CONFIGS"]


def _resnet() -> Any:
    return ResNetConfig(out_features=["stage2", "stage3", "stage4"])


def _decoder() -> Any:
    return BertConfig(is_decoder=True, add_cross_attention=True)


def _images(name: str, token: str, count: int) -> dict[str, Any]:
    """A vocabulary that holds the tokens of images."""
    return {"vocabulary_map": {name: 100, **{token.format(i): i for i in range(count)}}}


_SWIN = {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_D = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
_HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
_DETR = {"parts": {"backbone_config": _resnet}, "use_timm_backbone": False, "backbone": None, **_HEADS}
_SEGMENTS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}

CONFIGS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 0, "audio_token_offset": 128, "text_config": {"vocab_size": 256}},
    "autoformer": _SERIES,
    "bamba": _MAMBA,
    "beit": _SEGMENTS,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "bridgetower": {"contrastive_hidden_size": 64, "logit_scale_init_value": 2.6592},
    "chameleon": _images("<image>", "IMGIMG{}Z", 1),
    "cohere_compass_text": {"rope_parameters": {kind: dict(_ROPE) for kind in ("full_attention", "sliding_attention")}},
    "conditional_detr": _DETR,
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "dab-detr": _DETR,
    "data2vec-vision": _SEGMENTS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deformable_detr": _DETR,
    "depth_pro": {"patch_size": 64},
    "detr": _DETR,
    "donut-swin": _SWIN,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "emu3": _images("<image>", "<|visual token {:06}|>", 60),
    "encoder-decoder": {"parts": {"encoder": BertConfig, "decoder": _decoder}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"num_hidden_layers": 4, "intermediate_size": [128] * 4, "num_kv_shared_layers": 0},
    "gemma4_assistant": {"parts": {"text_config": lambda: Gemma4TextConfig(hidden_size_per_layer_input=0)}},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm4v_text": _THREE_D,
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "glm_image_text": _THREE_D,
    "glm_ocr_text": _THREE_D,
    "granitemoehybrid": _MAMBA,
    "informer": _SERIES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "maskformer-swin": _SWIN,
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "perceiver": {"num_latents": 10, "d_latents": 64, "num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen2_5_omni_text": _THREE_D,
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [2, 4]},
    "resnet": _RESNET,
    "speech-encoder-decoder": {"parts": {"encoder": Wav2Vec2Config, "decoder": _decoder}},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "vision-encoder-decoder": {"parts": {"encoder": ViTConfig, "decoder": _decoder}},
    "vision-text-dual-encoder": {"parts": {"vision_config": ViTConfig, "text_config": BertConfig}},
}
"""Settings by model type; "parts": what the default configuration lacks. Parts are made small, too."""
