"""The low-rank layers: two ordinary Linears that stand where one dense layer stood, as a pair or with pivots."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.plan import LayerSpec

__all__ = ["Factored", "LowRankLinear", "PivotedLinear", "Product"]


class Factored(nn.Module):
    """Two factors in the place of a dense weight, for which `weight` answers: see `Product`."""

    __jit_unused_properties__ = ("weight", "bias", "spec", "rank", "in_features", "out_features")  # TorchScript's

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in), whose product is the weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The product (out, in), formed when arithmetic asks for it, with gradients into both factors."""
        if torch.compiler.is_compiling():  # the compiler drops a product that nobody reads
            return self._product()
        like: Any = self
        return Product(self._product, like.up.weight, (like.out_features, like.in_features), like.up.weight)

    def _product(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def __setattr__(self, name: str, value: Any) -> None:
        """As the base's. Raises WeightError for `weight`, which is up @ down."""
        if name == "weight":
            raise _lost("setting it")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add an empty marker under the dense weight's name.

        What expects a dense weight there fails on the marker's shape, whoever wrote the state dict: without it, loading
        that does not mind missing keys would go on with random numbers. Not on the meta device, where loaders ask a
        skeleton which tensors it needs.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and not self.factors()[0].is_meta:
            destination[f"{prefix}weight"] = torch.empty(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Ignore the empty marker that saved checkpoints carry under the dense weight's name."""
        marker = state_dict.get(f"{prefix}weight")
        if marker is not None and marker.numel() == 0:
            del state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class LowRankLinear(Factored):
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

    form = "pair"

    def __init__(self, down: nn.Linear, up: nn.Linear, *, dense_type: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = down.in_features, up.out_features, up.in_features
        self.dense_type = dense_type
        self.keyword = list(inspect.signature(dense_type.forward).parameters)[1]
        self.down, self.up = down, up

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer is called: the input may go by the name that it has there, `x` for Conv1D."""
        if self.keyword in kwargs:
            args = (*args, kwargs.pop(self.keyword))
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that nn.Linear gives it
        """(..., in) -> (..., out)."""
        out: Tensor = self.up(self.hidden(input))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r), what `up` gets."""
        out: Tensor = self.down(x)
        return out

    @property
    def spec(self) -> LayerSpec:
        """Its entry in a plan."""
        return LayerSpec(self.rank, self.form)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in), whose product is the weight."""
        return self.up.weight, self.basis()

    def basis(self) -> Tensor:
        """(r, in), `down` as one matrix."""
        return self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, form={self.form}"


class PivotedLinear(LowRankLinear):
    """y = up(x[p] + down(x[rest])): a product of rank r that holds r^2 numbers fewer than the pair of the same rank.

    The columns of `up` are r columns of the product W, the pivots p; `down` says how every other column is combined
    from them. No entry of a fresh `down` is above 1.05, so that low precision and quantizers keep their range.

    Args:
        down: Linear (in - r -> r) without a bias.
        up: Linear (r -> out), with the layer's bias or none.
        order: (in,) int64, a permutation of the inputs: pivots first. A buffer, stored with the weights.
        dense_type: class of the dense layer it stands for, to which `merge` returns.

    Cost: r (in + out - r) multiply-adds for each row of x, and one gather of x.

    Source: PIFA, arXiv 2501.19090, which pivots rows; columns need one gather instead of a copy and a gather.

    >>> layer = PivotedLinear(nn.Linear(14, 2, bias=False), nn.Linear(2, 8), order=torch.arange(16))
    >>> layer(torch.zeros(3, 16)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 8]), torch.Size([8, 16]), 52)
    """

    form = "pivoted"
    order: Tensor

    def __init__(
        self, down: nn.Linear, up: nn.Linear, *, order: Tensor, dense_type: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__(down, up, dense_type=dense_type)
        self.in_features = order.numel()
        self.register_buffer("order", order)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As the base's. Raises CheckpointError for an `order` that is no permutation, as after a cast."""
        order = state_dict.get(f"{prefix}order")
        if isinstance(order, Tensor) and order.shape == self.order.shape:
            _check_order(order, f"{prefix}order")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def hidden(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r), what `up` gets."""
        ordered = x.gather(-1, self.order.expand_as(x))
        out: Tensor = ordered[..., : self.rank] + self.down(ordered[..., self.rank :])
        return out

    def basis(self) -> Tensor:
        """(r, in), `down` and the pivots as one matrix."""
        combinations = self.down.weight
        identity = torch.eye(self.rank, dtype=combinations.dtype, device=combinations.device)
        return torch.cat([identity, combinations], 1)[:, self.order.argsort()]


def _check_order(order: Tensor, name: str) -> None:
    if order.dtype != torch.int64:
        raise CheckpointError(
            f"{name} holds places of inputs, is int64 and cannot be cast or averaged; got {order.dtype}: take it as it "
            "was saved, and cast or average the other tensors"
        )
    if not order.is_meta and not torch.equal(order.sort()[0], torch.arange(order.numel(), device=order.device)):
        raise CheckpointError(
            f"{name} is no permutation of its {order.numel()} inputs, as after a cast or an average: take it as it was "
            "saved, and cast or average the other tensors"
        )


_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse"}
)
_WRITING = frozenset(
    {"__set__", "__setitem__", "__delitem__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
    | {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__imatmul__"}
    | {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)


def _lost(what: str) -> WeightError:
    return WeightError(
        f"{what} would be lost: the weight of a low-rank layer is up @ down, formed whenever it is read. Change "
        "layer.up.weight and layer.down.weight (of an embedding layer.table.weight), merge the model first, or take "
        "layer.weight.clone() for a tensor of its own"
    )


class Product(Tensor):
    """up @ down, not yet multiplied: a tensor of the right shape, dtype and device that holds no numbers.

    What is written into it, or into a view of it, would be lost, and raises WeightError; but a number that it is
    multiplied or divided by in place, as RWKV does between training and inference, goes to `up`.

    Args:
        form: gives the numbers.
        like: a tensor of their dtype and device.
        shape: theirs.
        up: the factor that stands for the whole in such a product.
    """

    _form: Callable[[], Tensor]
    _up: Tensor | None
    _is_hf_initialized = True  # Transformers' initialisers must not draw numbers for it

    @staticmethod
    def __new__(
        cls, form: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...], up: Tensor | None = None
    ) -> "Product":
        self: Product = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self._form, self._up = form, up
        return self

    def __init__(
        self, form: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...], up: Tensor | None = None
    ) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        getter = name == "__get__" and func.__self__.__name__
        if getter in _METADATA or func in (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point):
            return super().__torch_function__(func, types, args, kwargs)
        if name in ("mul_", "div_") and [type(value) for value in args[1:]] in ([int], [float]) and not kwargs:
            into = args[0]
            if isinstance(into, Product) and into._up is not None:
                getattr(into._up, name)(args[1])
                return into
        if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
            _refuse_writing(name, args, kwargs)
        if "out" in kwargs:
            _refuse_writing("out=", (kwargs["out"],), {})
        numbers = tuple(map(_formed, args))
        value = func(*numbers, **{key: _formed(value) for key, value in kwargs.items()})
        formed = [new for new, old in zip(numbers, args, strict=True) if isinstance(old, Product)]
        return _unwritable(value, formed, shared=getter == "data" or name == "detach")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            _refuse_writing(func.__name__, args, kwargs or {})
        return func(*map(_formed, args), **{key: _formed(value) for key, value in (kwargs or {}).items()})


def _refuse_writing(what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise WeightError if what is written into, the first argument, is or has a Product."""
    into = next(iter((*args, *kwargs.values())), None)
    if any(isinstance(tensor, Product) for tensor in (into if isinstance(into, (list, tuple)) else (into,))):
        raise _lost(what)


def _unwritable(value: Any, formed: list[Tensor], *, shared: bool) -> Any:
    """A value as it is, or as a Product if it is, or shares memory with, numbers that were formed for this call."""
    if type(value) in (list, tuple):
        return type(value)(_unwritable(item, formed, shared=shared) for item in value)
    if type(value) is Tensor and (shared or any(value is new or _root(value) is _root(new) for new in formed)):
        return Product(lambda: value, value, tuple(value.shape))
    return value


def _root(tensor: Any) -> Any:
    """The tensor that a view is of."""
    return tensor if tensor._base is None else tensor._base


def _formed(value: Any) -> Any:
    if isinstance(value, Product):
        return value._form()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_formed, value))
    return value
