"""The low-rank layers: two ordinary Linears that stand where one dense layer stood, as a pair or with pivots."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]  # which its stubs do not have

from hf_reparam.errors import CheckpointError, WeightError
from hf_reparam.layers.dense import dense_like, has_hooks, not_whole
from hf_reparam.layers.factored import Factored

_MOVE_WIDE, _MOVE_HALF = 96, 512
"""Multiply-adds in the time of moving one number, in float32 and in half precision: docs/decisions/0005."""
_ORDERING = frozenset({"cpu", "cuda"})  # devices that put weights in order faster than they multiply


class LowRankLinear(Factored):
    """y = up(down(x)): a dense layer with W (out, in) = up.weight (out, r) @ down.weight (r, in).

    The children are plain `nn.Linear`s, so that LoRA, quantizers, FSDP and tensor-parallel plans see what they know.
    The bias lives in `up`. `weight` and `bias` answer as those of the dense layer would, of class `dense_type`, because
    modelling code asks for them ("cast to `wo.weight.dtype`"): arithmetic alone forms the product.

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
        out: Tensor = self.up(self.down(input))
        return out

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.weight, self.down.weight

    def matrix(self) -> Tensor:
        kinds = [type(factor) for factor in (self.down, self.up)]
        if kinds != [nn.Linear, nn.Linear]:
            raise WeightError(
                f"its factors are {' and '.join(kind.__name__ for kind in kinds)}, not plain Linears: merge or unload "
                "the adapter (`merge_and_unload()`), or load the model without quantization"
            )
        if (reason := not_whole(self)) is not None:
            raise WeightError(reason)
        return super().matrix()

    def stand_in(self) -> nn.Module:
        return dense_like(self, (self.in_features, self.out_features))

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        first, mixing = (self.down, self.up) if self.form == "pair" else (self.up, self.down)
        yield first.weight, deviation
        yield mixing.weight, self.rank**-0.5
        if self.up.bias is not None:
            yield self.up.bias, 0.0

    def stored_shape(self, stored: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, int] | None:
        down, up = stored.get(f"{path}.down.weight", ()), stored.get(f"{path}.up.weight", ())
        if len(down) != 2 or len(up) != 2:
            return None
        return down[1] + (down[0] if f"{path}.order" in stored else 0), up[0]

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, form={self.form}"


class PivotedLinear(LowRankLinear):
    """y = up(x[p] + down(x[rest])): a product of rank r that holds r^2 fewer parameters than the pair of the same rank.

    The columns of `up` are r columns of the product W, the pivots p; `down` says how every other column is combined
    from them. No entry of a fresh `down` is above 1.05, so that low precision and quantizers keep their range.

    `order` (in,), int64, is a permutation of the inputs, pivots first; a buffer, stored with the weights.

    Cost: r (in + out - r) multiply-adds for each row of x, and a gather of x. With many rows, where multiplying is
    cheaper than moving numbers, `down` is put in the order of x instead: r (in + out) multiply-adds, and r * in moves.

    Source: PIFA, arXiv 2501.19090, which pivots rows: that takes a copy and a gather.

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
        order = state_dict.get(f"{prefix}order")
        if isinstance(order, Tensor) and order.shape == self.order.shape:
            _check_order(order, f"{prefix}order")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not is_scripting() and self._orders_weights(input):
            low = nn.functional.linear(input, self._in_order(self.down.weight))
        else:
            ordered = input.gather(-1, self.order.expand_as(input))
            low = ordered[..., : self.rank] + self.down(ordered[..., self.rank :])
        out: Tensor = self.up(low)
        return out

    @torch.jit.unused
    def _orders_weights(self, x: Tensor) -> bool:
        """Whether `down` is put in the order of x, in the place of x in its order; not where it has to be called."""
        if type(x) is not Tensor or torch.compiler.is_compiling() or is_tracing():
            return False
        rows, moves = x.numel() // self.in_features, _MOVE_WIDE if x.dtype.itemsize > 2 else _MOVE_HALF
        if self.rank**2 * rows >= moves * self.in_features * (rows - self.rank):
            return False
        if x.device.type not in _ORDERING or not _is_plain(self.down):
            return False
        return self.down.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled())  # else kept for it

    def _in_order(self, down: Tensor) -> Tensor:
        """`down` with the identity for the pivots, (r, in), in the order of the inputs."""
        pivots, others = self.order[: self.rank, None], self.order[self.rank :].expand_as(down)
        combined = down.new_zeros(self.rank, self.in_features).scatter_(1, others, down)
        return combined.scatter_(1, pivots, 1.0)  # unlike an assignment, waits for no device

    def fresh(self, deviation: float) -> Iterator[tuple[Tensor, float | Tensor]]:
        yield from super().fresh(deviation)
        yield self.order, torch.arange(self.in_features)

    def check_loaded(self, name: str) -> None:
        self.order = self.order.to(torch.int64)  # families that keep layers in float32 cast this, too
        _check_order(self.order, f"{name}.order")

    def factors(self) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            _check_order(self.order, "order")
        up, down = super().factors()
        return up, self._in_order(down)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling a layer does nothing but multiply by its weight: no adapter, quantizer, hook or part of one."""
    if type(linear) is not nn.Linear or "forward" in vars(linear) or has_hooks(linear):
        return False
    return type(linear.weight) in (nn.Parameter, Tensor) and linear.bias is None


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
