"""The low-rank layers: two ordinary Linears that stand where one dense layer stood, as a pair or with pivots.

Layers with one and the same input, such as the queries, keys and values of an attention, may use one `down`: it hangs
in one of them, and the others hold an `up` alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_reparam.errors import PlanError
from hf_reparam.plan import LayerSpec

__all__ = ["Factored", "LowRankLinear", "PivotedLinear", "Product", "SharedLinear", "connect"]


class Factored(nn.Module):
    """Two factors in the place of a dense weight, for which `weight` answers: see `Product`."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in), whose product is the weight."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The product (out, in), formed when arithmetic asks for it, with gradients into both factors."""
        if torch.compiler.is_compiling():  # the compiler drops a product that nobody reads
            up, down = self.factors()
            return up @ down
        return Product(self)

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
    users = 1
    """Layers that use this one's `down`, itself included."""
    _memo: "_Memo | None" = None

    def __init__(self, down: nn.Linear, up: nn.Linear, *, dense_type: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = down.in_features, up.out_features, up.in_features
        self.dense_type = dense_type
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = self.up(self.hidden(x) if self.users == 1 else self.shared_hidden(x, self))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r), what `up` gets."""
        out: Tensor = self.down(x)
        return out

    def shared_hidden(self, x: Tensor, user: nn.Module) -> Tensor:
        """`hidden(x)`, computed once where all layers that use this `down` ask for it with the very same tensor.

        Each of them may take what was computed once. It is forgotten when all have, when one asks with another tensor
        or after that tensor or `down` was changed, and when gradients have come back. In a compiled graph changes in
        place between two layers that use one `down` are not seen; nothing that can be trained makes them.
        """
        compiling = torch.compiler.is_compiling()
        seen = [] if compiling else [x, *self.down.parameters()]
        if any(tensor.is_inference() for tensor in seen):  # changes of such tensors are not counted
            return self.hidden(x)
        changes = tuple(tensor._version for tensor in seen)
        state = (changes, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        memo = self._memo
        if memo is None or memo.x is not x or memo.state != state or id(user) in memo.taken:
            memo = _Memo(x, state, self.hidden(x), set())
            if memo.hidden.requires_grad and not compiling:
                memo.hidden.register_hook(self._forget)  # its graph may be gone when gradients have come back
        memo.taken.add(id(user))
        self._memo = None if len(memo.taken) == self.users else memo
        return memo.hidden

    def _forget(self, _: Tensor) -> None:
        self._memo = None

    def __getstate__(self) -> dict[str, Any]:  # what was computed stays out of copies and pickles
        return {**vars(self), "_memo": None}

    @property
    def shares(self) -> bool:
        """Whether it uses one `down` together with other layers."""
        return self.users > 1

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

    def hidden(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r), what `up` gets."""
        pivots, rest = x.gather(-1, self.order.expand_as(x)).tensor_split((self.rank,), -1)
        out: Tensor = pivots + self.down(rest)
        return out

    def basis(self) -> Tensor:
        """(r, in), `down` and the pivots as one matrix."""
        combinations = self.down.weight
        identity = torch.eye(self.rank, dtype=combinations.dtype, device=combinations.device)
        return torch.cat([identity, combinations], 1)[:, self.order.argsort()]


class SharedLinear(LowRankLinear):
    """y = up(what the `down` of another layer gives): a low-rank layer without a `down` of its own.

    The other layer, its lender, is a child of the same module and gets the same inputs: the queries' projection of an
    attention for its keys and values. Here it is no submodule, so that its factors have one name and are counted,
    trained, stored and adapted once. `connect` finds it; `replace_modules` calls that.

    Args:
        up: Linear (r -> out), with the layer's bias or none.
        in_features: of the dense layer.
        form: "pair" or "pivoted", that of the lender.
        down_of: name of the lender, "q_proj".
        dense_type: class of the dense layer it stands for, to which `merge` returns.

    Cost: r out multiply-adds for each row of x, beside the lender's r in, or r (in - r).

    >>> k = SharedLinear(nn.Linear(2, 4), 16, down_of="q")
    >>> both = nn.ModuleDict({"q": LowRankLinear(nn.Linear(16, 2, bias=False), nn.Linear(2, 8)), "k": k})
    >>> connect(both)
    >>> k(torch.zeros(3, 16)).shape, k.weight.shape, sum(p.numel() for p in both.parameters())
    (torch.Size([3, 4]), torch.Size([4, 16]), 68)
    """

    def __init__(
        self,
        up: nn.Linear,
        in_features: int,
        *,
        down_of: str,
        form: str = "pair",
        dense_type: type[nn.Module] = nn.Linear,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, up.out_features, up.in_features
        self.form, self.down_of, self.dense_type = form, down_of, dense_type
        self.up = up
        self._lender: tuple[LowRankLinear, ...] = ()  # in a tuple nn.Module does not see it

    @property
    def lender(self) -> LowRankLinear:
        """The layer whose `down` this one uses."""
        if not self._lender:
            raise RuntimeError(f"this layer uses the `down` of {self.down_of!r}, which it was not connected with")
        return self._lender[0]

    @property
    def down(self) -> Any:  # type: ignore[override]
        """The lender's."""
        return self.lender.down

    def hidden(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., r), what `up` gets."""
        return self.lender.shared_hidden(x, self)

    def basis(self) -> Tensor:
        """(r, in), the lender's."""
        return self.lender.basis()

    @property
    def shares(self) -> bool:
        """Whether it uses one `down` together with other layers: it does."""
        return True

    @property
    def spec(self) -> LayerSpec:
        """Its entry in a plan."""
        return LayerSpec(self.rank, self.form, self.down_of)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("layers that share a `down` cannot run in nn.DataParallel; use DistributedDataParallel")


def connect(model: nn.Module) -> None:
    """Let every SharedLinear find the layer whose `down` it uses.

    Raises:
        PlanError: there is no such layer beside it, or it has another rank, form or width.
    """
    users: dict[LowRankLinear, int] = {}
    for module in model.modules():
        for name, child in module.named_children():
            if not isinstance(child, SharedLinear):
                continue
            lender = module._modules.get(child.down_of)
            if not isinstance(lender, LowRankLinear) or isinstance(lender, SharedLinear):
                raise PlanError(f"{name}: it uses the `down` of {child.down_of!r}, and no layer beside it has one")
            if (lender.rank, lender.form, lender.in_features) != (child.rank, child.form, child.in_features):
                raise PlanError(f"{name}: it uses the `down` of {child.down_of!r}, which has another rank or width")
            child._lender = (lender,)
            users[lender] = users.get(lender, 1) + 1
    for lender, count in users.items():
        lender.users, lender._memo = count, None


class _Memo(NamedTuple):
    """What a `down` gave, for the other layers that use it.

    Args:
        x: the input.
        state: what else has to be the same, for it to be taken.
        hidden: what it gave.
        taken: ids of the layers that took it.
    """

    x: Tensor
    state: tuple[tuple[int, ...], bool, bool]
    hidden: Tensor
    taken: set[int]


_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_sparse"}
)


class Product(Tensor):
    """up @ down, not yet multiplied: a tensor of the right shape, dtype and device that holds no numbers."""

    _layer: Any
    _is_hf_initialized = True  # Transformers' initialisers must not draw numbers for it

    @staticmethod
    def __new__(cls, layer: Any) -> "Product":
        like = layer.up.weight
        self: Product = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=like.dtype, device=like.device
        )
        self._layer = layer
        return self

    def __init__(self, layer: Any) -> None:
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
    if isinstance(value, Product):
        up, down = value._layer.factors()
        return up @ down
    if isinstance(value, (list, tuple)):
        return type(value)(map(_formed, value))
    return value
