"""Folders that load without this package: one Python file beside the weights, and `auto_map` in `config.json`."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from pprint import pformat
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_reparam.errors import CheckpointError
from hf_reparam.layers.embedding import LowRankEmbedding
from hf_reparam.layers.heads import FusedProjections, attention_types, find_attentions
from hf_reparam.layers.linear import LowRankLinear
from hf_reparam.model.config import PREFIX
from hf_reparam.model.families import auto_classes

__all__ = ["FILE", "forget_file", "named_in_config", "write_module"]

FILE = "modeling_reparam.py"
_FOR_MODELS = ("AutoConfig", "AutoModel")
_IMPORTED = re.compile(r"# what follows up.*?# the definitions end here\n", re.DOTALL)
_BEFORE_LAYERS = '''import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

PlanError = WeightError = ValueError
CheckpointError = OSError

try:
    import hf_reparam as _installed
except ImportError:
    _installed = None


class LayerSpec(NamedTuple):
    """Rank and form of one layer."""

    rank: int
    form: str = "pair"


'''


def write_module(folder: Path) -> None:
    """Write the file: `standalone.py` with the definitions of the layers in the place of their imports."""
    package = files("hf_reparam")
    layers = (package / "layers" / "linear.py").read_text(encoding="utf-8")
    fused = inspect.getsource(FusedProjections)
    known = {name: asdict(entry) for name, entry in attention_types().items() if name.startswith("transformers.")}
    table = f"_ATTENTIONS: dict[str, dict[str, str]] = {pformat(known, width=110)}\n"
    definitions = f"{_BEFORE_LAYERS}{layers[layers.index('class Factored') :]}\n\n{fused}\n\n{table}"
    text = (package / "model" / "standalone.py").read_text(encoding="utf-8")
    (folder / FILE).write_text(_IMPORTED.sub(lambda _: f"{definitions}\n", text, count=1), encoding="utf-8")


@contextmanager
def named_in_config(model: Any, *, remote_code: bool) -> Iterator[None]:
    """While the block saves, `model.config.auto_map` names the file's classes; without `remote_code` it does not.

    Code for models that came with the source is left out: it knows no low-rank layers. Tokenizers keep theirs.

    Raises:
        CheckpointError: a layer stands for a dense type that the file does not know.
    """
    config = model.config
    old = vars(config).pop("auto_map", None)  # of this file, or of code for the dense model alone
    kept = {auto: ref for auto, ref in _other_code(old).items() if not auto.startswith(_FOR_MODELS)}
    if remote_code:
        _check_types(model)
        kept = {**kept, **_auto_map(config.base_class)}
    if kept:
        config.auto_map = kept
    try:
        yield
    finally:
        vars(config).pop("auto_map", None)
        if old is not None:
            config.auto_map = old


def forget_file(config: Any) -> None:
    """Take the file's classes out of the configuration of a model that is dense again."""
    kept = _other_code(vars(config).pop("auto_map", None))
    if kept:
        config.auto_map = kept


def _other_code(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an `auto_map` that do not name classes of the file, whose models are low-rank."""
    return {auto: ref for auto, ref in (auto_map or {}).items() if f"{Path(FILE).stem}." not in str(ref)}


def _auto_map(base: Any) -> dict[str, str]:
    names = {
        auto: found[0].__name__
        for auto, _, found in auto_classes(base)
        if auto[0] != "_" and found[0].__module__.startswith("transformers.")
    }
    names["AutoConfig"] = base.__name__
    return {auto: f"{Path(FILE).stem}.{PREFIX}{name}" for auto, name in sorted(names.items())}


def _check_types(model: Any) -> None:
    if not model.base_class.__module__.startswith("transformers."):
        raise CheckpointError(
            f"{model.base_class.__name__} is no class of Transformers, and the file of remote_code=True knows no "
            "others: save without it, and load where hf_reparam is installed and that class is registered"
        )
    if any(isinstance(module, LowRankEmbedding) for module in model.modules()):
        raise CheckpointError(
            "the file of remote_code=True knows no embeddings of low rank: save without it, and load where "
            "hf_reparam is installed, or convert with embeddings=False"
        )
    for attention in find_attentions(model):
        kind = type(attention.module)
        if attention.narrowed and not kind.__module__.startswith("transformers."):
            raise CheckpointError(
                f"{attention.name} is a {kind.__name__} with narrower heads, and the file of remote_code=True knows "
                "those of Transformers alone: save without it, and load where hf_reparam is installed"
            )
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear) and layer.dense_type not in (nn.Linear, Conv1D):
            raise CheckpointError(
                f"{name} stands for a {layer.dense_type.__name__}, and the file of remote_code=True knows Linear and "
                "Conv1D alone: save without it, and load where hf_reparam and that type are installed"
            )
