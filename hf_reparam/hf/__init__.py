"""Hugging Face Transformers: the only folder below `convert` and `merge` that imports transformers."""

from transformers.pytorch_utils import Conv1D

from hf_reparam.hf.heads import register_all
from hf_reparam.nn.dense import register_dense


def _build_conv1d(n_in, n_out, bias, device, dtype):  # type: ignore[no-untyped-def]  # always has a bias
    return Conv1D(n_out, n_in).to(device=device, dtype=dtype)


register_dense(Conv1D, matrix=lambda module: module.weight.T, build=_build_conv1d)
register_all()
