"""What making numbers small by their names does not get right, by model type."""

from typing import Any

from transformers import BertConfig, ResNetConfig, SwinConfig, ViTConfig, Wav2Vec2Config

__all__ = ["CONFIGS"]


def _resnet() -> Any:
    return ResNetConfig(out_features=["stage2", "stage3", "stage4"])


def _swin() -> Any:
    return SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])


_SWIN = {"embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
_DETR = {"parts": {"backbone_config": _resnet}, "use_timm_backbone": False, "backbone": None}
_SEGMENTS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}

CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "bamba": _MAMBA,
    "beit": _SEGMENTS,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "bridgetower": {"contrastive_hidden_size": 64},
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "data2vec-vision": _SEGMENTS,
    "deformable_detr": _DETR,
    "depth_pro": {"patch_size": 64},
    "detr": _DETR,
    "donut-swin": _SWIN,
    "encoder-decoder": {"parts": {"encoder": BertConfig, "decoder": lambda: BertConfig(is_decoder=True)}},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "informer": _SERIES,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "maskformer-swin": _SWIN,
    "resnet": _RESNET,
    "speech-encoder-decoder": {"parts": {"encoder": Wav2Vec2Config, "decoder": lambda: BertConfig(is_decoder=True)}},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "vision-encoder-decoder": {"parts": {"encoder": ViTConfig, "decoder": lambda: BertConfig(is_decoder=True)}},
    "vision-text-dual-encoder": {"parts": {"vision_config": ViTConfig, "text_config": BertConfig}},
}
"""Settings by model type; "parts": what the default configuration lacks. Parts are made small, too."""
