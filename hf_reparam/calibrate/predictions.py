"""What a model predicts: which of its outputs that is, and what kind of logits they are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_reparam.errors import TargetError

_PARAMETERS = ("params", "prediction_outputs")  # of the distributions that time series are drawn from
_OF_INPUTS = ("loc", "scale", "static_features", "encoder_last_hidden_state")
_OF_HEADS = ("_embeds", "_preds", "_predictions", "prediction_output", "prediction_outputs", "regression_outputs")
_SEGMENTS = "segmentation"
_TOKENS = "tokens"
_LOGITS = {"multi_label_classification": "answers", _TOKENS: "answers", "regression": "values"}
_OF_TOKENS = {"ElectraForPreTraining", "FunnelForPreTraining", "TapasForQuestionAnswering"}
_OF_ONE_CLASS = {f"{family}ForObjectDetection" for family in ("Detr", "TableTransformer", "Yolos")}
"""Detectors whose classes, one of which is none, exclude each other."""


def by_name(outputs: Any) -> Mapping[str, Any]:
    """A model's outputs by their names; those of a plain tensor or tuple by their place."""
    if isinstance(outputs, Mapping):
        return outputs
    return {f"output_{i}": v for i, v in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs])}


def floating(outputs: Any) -> dict[str, Tensor]:
    """Tensors of floating-point numbers, those inside the outputs of a part if there are no others.

    Passed over, where there is something else: similarities of one example with the others of its batch (CLIP's
    `logits_per_text`), which depend on what is batched together, and what a head gets: the mean and scale of a time
    series' past, the encoder's states.
    """
    named = by_name(outputs)
    several = {k: v for k, v in named.items() if k in _PARAMETERS and isinstance(v, (tuple, list))}
    named = {**{f"{k}.{i}": part for k, v in several.items() for i, part in enumerate(v)}, **named}
    found = {k: v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim()}
    alone = {k: v for k, v in found.items() if not k.startswith("logits_per_") and k not in _OF_INPUTS}
    if found:
        return alone or found
    parts = {k: floating(v) for k, v in named.items() if isinstance(v, Mapping) and "cache" not in k}
    return {f"{part}.{k}": v for part, inner in parts.items() for k, v in inner.items()}


def without_logits(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model predicts that has no logits: what a head gives (embeddings of CLIP's towers, actions, forecasts), or
    else hidden states, or else all that is of floating-point numbers."""
    found = floating({key: value for key, value in outputs.items() if key != "loss"})
    hidden = {key: value for key, value in found.items() if key == "last_hidden_state"}
    return {key: value for key, value in found.items() if key.partition(".")[0].endswith(_OF_HEADS)} or hidden or found


def logits_of(outputs: Any, problem: str | None) -> dict[str, Tensor]:
    """Every kind of logits that a model returned, (..., classes), by its name.

    Independent yes-or-no answers and numbers, as `problem` says, are called "answers" and "values". Of segmentation,
    masks are answers, and a map (batch, classes, height, width) has its classes last here. One answer for each token
    or pixel, and one number for each example, has a last dimension of 1 here.
    """
    found = {}
    for key, value in outputs.items():
        beside = "coord" in key or key.startswith(("enc_", "intermediate_"))  # boxes, and earlier guesses, of detectors
        if key.endswith("logits") and isinstance(value, Tensor) and not beside:
            kind = _LOGITS.get(problem or "", "logits")
            if problem == _SEGMENTS and value.dim() == 4:
                masks = "mask" in key or value.shape[1] == 1
                kind, value = ("answers", value) if masks else ("pixel_logits", value.movedim(1, -1))
            elif problem == _SEGMENTS and key == "logits" and value.dim() == 3 and "pred_masks" not in outputs:
                kind, value = "pixel_answers", value[..., None]  # of CLIPSeg, one mask for each text
            elif value.dim() == 1 or (problem == _TOKENS and value.dim() == 2):
                value = value[..., None]
            found[key.removesuffix("logits") + kind] = value
    return found


def problem_of(model: Any) -> str | None:
    """What a model's logits are, where its class or configuration says it: "multi_label_classification", independent
    yes-or-no answers; "tokens", one such for each token; "regression", numbers; "segmentation", maps; or classes."""
    name = type(model).__name__.removeprefix("Reparam")
    if "Segmentation" in name:
        return _SEGMENTS
    if name in _OF_TOKENS:
        return _TOKENS
    if name == "ViltForQuestionAnswering" or (name.endswith("ForObjectDetection") and name not in _OF_ONE_CLASS):
        return "multi_label_classification"
    images = getattr(model, "main_input_name", None) == "pixel_values"
    if name.endswith("ForOpticalFlow") or (name.endswith("ForPreTraining") and images):  # images: of ViTMAE
        return "regression"
    return getattr(getattr(model, "config", None), "problem_type", None)


def compared(outputs: Any, problem: str | None) -> dict[str, Tensor]:
    """What `divergence` compares: logits, as `logits_of` gives them, or else what `without_logits` finds.

    Raises:
        TargetError: there is nothing of these.
    """
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    named = by_name(outputs)
    found = logits_of(named, problem) or without_logits(named)
    if not found:
        raise TargetError("the model returned no floating-point tensor: its predictions cannot be compared")
    return found
