"""Dense layers of Transformers: Conv1D, and subclasses of `nn.Linear` by name, whose modules are not imported."""

from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reparam.layers.dense import register_dense

# y = x W^T + b; those of routers, grouped experts, decoupled tokens and scaled heads compute something else
_LINEARS = {
    "transformers.models.falcon.modeling_falcon": "FalconLinear",
    "transformers.models.esm.modeling_esmfold": "EsmFoldLinear",
}


def _build_conv1d(n_in, n_out, bias, device, dtype):  # type: ignore[no-untyped-def]  # always has a bias
    return Conv1D(n_out, n_in).to(device=device, dtype=dtype)


def _register_linear(module: str, name: str) -> None:
    def build(n_in: int, n_out: int, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
        kind: Any = getattr(import_module(module), name)
        made: nn.Module = kind(n_in, n_out, bias=bias).to(device=device, dtype=dtype)
        return made

    register_dense(f"{module}.{name}", matrix=lambda linear: linear.weight, build=build)


register_dense(Conv1D, matrix=lambda module: module.weight.T, build=_build_conv1d)
for _module, _name in _LINEARS.items():
    _register_linear(_module, _name)
