"""Factors in the place of a dense weight, for which `weight` answers without being formed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.compat.marks import set_initialized
from hf_reparam.errors import WeightError
from hf_reparam.plan import Entry


class Factored(nn.Module):
    """Factors in the place of a dense weight, for which `weight` answers: see `Product`.

    Attributes:
        form: what an entry of a plan calls it.
        stands_for: name of the tensor that it stands for, beside its own; empty where it has the tensor's own name.
        rank: inner width of the factors.
        in_features, out_features: of the dense weight (out, in).
        error: ||W - W'|| / ||W|| as it was made, in the norm of `metric`; None where that is not known.
        metric: "svd", "activation" or "fisher"; None where that is not known.
        from_rank: the rank that it had before it was made again.
    """

    __jit_unused_properties__ = ("weight", "bias", "entry", "rank", "in_features", "out_features")  # TorchScript's
    __jit_ignored_attributes__ = ("dense_type",)

    form = ""
    stands_for = "weight"
    dense_type: type[nn.Module]
    rank: int
    in_features: int
    out_features: int
    error: float | None = None
    metric: str | None = None
    from_rank: int | None = None

    @property
    def entry(self) -> Entry:
        """Its entry in a plan."""
        return Entry(self.rank, self.form)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in), whose product is the weight."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The product (out, in), formed in float64, detached."""
        up, down = self.factors()
        return up.detach().double() @ down.detach().double()

    def stand_in(self) -> nn.Module:
        """A dense module of the type and shape that it stands for; its values are not set."""
        raise NotImplementedError

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        """Its tensors, each with the deviation to draw it with, or with the numbers that it is to have.

        One factor has the deviation of the product, the other mixes its r rows or columns with variance 1 / r.
        """
        raise NotImplementedError

    def check_loaded(self, name: str) -> None:
        """Raise CheckpointError for numbers, loaded or to be saved, that cannot be; `name` is the module's path."""

    def stored_shape(self, stored: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, int] | None:
        """(in, out) of the product of this kind that a file has under a path, from names and shapes; None if none. Its
        own, where it is in no head."""
        return self.in_features, self.out_features

    @property
    def weight(self) -> Tensor:
        """The product (out, in), formed when arithmetic asks for it, with gradients into both factors."""

        def product() -> Tensor:
            up, down = self.factors()
            return up @ down

        if torch.compiler.is_compiling():  # the compiler drops a product that nobody reads
            return product()
        like: Any = self
        return Product(product, like.up.weight, (self.out_features, self.in_features), like.up.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise _lost("setting it")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add an empty marker under the dense weight's name, on whose shape fails what expects a dense weight there.

        Without it, loading that does not mind missing keys would go on with random numbers. Not on the meta device,
        where loaders ask a skeleton which tensors it needs.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stands_for and not keep_vars and not next(self.parameters()).is_meta:
            destination[f"{prefix}{self.stands_for}"] = torch.empty(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        marker = state_dict.get(f"{prefix}weight")
        if marker is not None and marker.numel() == 0:
            del state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)


_METADATA = {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse"}
_WRITING = {
    *("__set__", "__setitem__", "__delitem__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__imatmul__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}


def _lost(what: str) -> WeightError:
    return WeightError(
        f"{what} would be lost: the weight of a low-rank layer is up @ down, formed whenever it is read. Change "
        "layer.up.weight and layer.down.weight (of an embedding layer.table.weight), merge the model first, or take "
        "layer.weight.clone() for a tensor of its own"
    )


class Product(Tensor):
    """up @ down, not yet multiplied: a tensor of the right shape, dtype and device that holds no numbers.

    `form` gives the numbers, which are of a shape, with the dtype and device of `like`. What is written into it, or
    into a view of it, would be lost, and raises WeightError; but a number that it is multiplied or divided by in place,
    as RWKV does between training and inference, goes to the factor `up`.
    """

    _form: Callable[[], Tensor]
    _up: Tensor | None

    @staticmethod
    def __new__(
        cls, form: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...], up: Tensor | None = None
    ) -> "Product":
        self: Product = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self._form, self._up = form, up
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        getter = name == "__get__" and func.__self__.__name__
        if getter in _METADATA or func in (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point):
            return super().__torch_function__(func, types, args, kwargs)
        up = args[0]._up if args and isinstance(args[0], Product) else None
        if up is not None and name in ("mul_", "div_") and [*map(type, args[1:])] in ([int], [float]) and not kwargs:
            getattr(up, name)(args[1])
            return args[0]
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


set_initialized(Product)  # Transformers' initialisers must not initialize it


def _refuse_writing(what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise WeightError if what is written into, the first argument, is or has a Product."""
    into = next(iter((*args, *kwargs.values())), None)
    if any(isinstance(tensor, Product) for tensor in (into if isinstance(into, (list, tuple)) else (into,))):
        raise _lost(what)


def _unwritable(value: Any, formed: list[Tensor], *, shared: bool) -> Any:
    """A value as it is, or as a Product if it is, or shares memory with, numbers that were formed for this call."""
    if type(value) in (list, tuple):
        return type(value)(_unwritable(item, formed, shared=shared) for item in value)
    if type(value) is Tensor and (shared or any(_root(value) is _root(new) for new in formed)):
        return Product(lambda: value, value, tuple(value.shape))
    return value


def _root(tensor: Any) -> Any:
    """The tensor that a view is of."""
    return tensor if tensor._base is None else tensor._base


def _formed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_formed, value))
    return value._form() if isinstance(value, Product) else value
