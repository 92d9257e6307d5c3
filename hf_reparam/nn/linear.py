"""The low-rank layer: two ordinary Linears that stand where one dense layer stood."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """y = up(down(x)): a dense layer with W (out, in) = up.weight (out, r) @ down.weight (r, in).

    The children are plain `nn.Linear`s, so that LoRA, quantizers, FSDP and tensor-parallel plans see what they know.
    The bias lives in `up`. `weight` and `bias` answer as the dense layer's would, because modelling code asks for
    them ("cast to `wo.weight.dtype`"): shape, dtype and device cost nothing, arithmetic on `weight` forms the product.

    Args:
        down: Linear (in -> r) without a bias.
        up: Linear (r -> out), with the layer's bias or none.
        dense_type: class of the dense layer it stands for, to which `merge` returns.

    Cost: r (in + out) multiply-adds for each row of x, against in * out for the dense layer.

    >>> layer = LowRankLinear(nn.Linear(16, 2, bias=False), nn.Linear(2, 8))
    >>> layer(torch.zeros(3, 16)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 8]), torch.Size([8, 16]), 56)
    """

    def __init__(self, down: nn.Linear, up: nn.Linear, *, dense_type: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = down.in_features, up.out_features, up.in_features
        self.dense_type = dense_type
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = self.up(self.down(x))
        return out

    @property
    def weight(self) -> Tensor:
        """The product (out, in), formed when arithmetic asks for it, with gradients into both factors."""
        if torch.compiler.is_compiling():  # the compiler drops a product that nobody reads
            return self.up.weight @ self.down.weight
        return _Product(self)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Ignore the empty marker that saved checkpoints carry under the dense weight's name."""
        marker = state_dict.get(f"{prefix}weight")
        if marker is not None and marker.numel() == 0:
            del state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)


_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse"}
)


class _Product(Tensor):
    """up @ down, not yet multiplied: a tensor of the right shape, dtype and device that holds no numbers."""

    _layer: LowRankLinear
    _is_hf_initialized = True  # Transformers' initialisers must not draw numbers for it

    @staticmethod
    def __new__(cls, layer: LowRankLinear) -> "_Product":
        like = layer.up.weight
        self: _Product = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=like.dtype, device=like.device
        )
        self._layer = layer
        return self

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        getter = getattr(func, "__name__", "") == "__get__" and func.__self__.__name__
        if getter in _METADATA or func in (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point):
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*map(_formed, args), **{key: _formed(value) for key, value in (kwargs or {}).items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*map(_formed, args), **{key: _formed(value) for key, value in (kwargs or {}).items()})


def _formed(value: Any) -> Any:
    if isinstance(value, _Product):
        return value._layer.up.weight @ value._layer.down.weight
    if isinstance(value, (list, tuple)):
        return type(value)(map(_formed, value))
    return value
