"""Calibration of fused experts: the rows that each expert gets and the gradients that come back, the forward unchanged.

While it lasts, a stand-in shadows the parameter in the experts' own attributes: it multiplies by the same numbers, and
tells what it multiplied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.compat.marks import one_by_one
from hf_reparam.errors import WeightError
from hf_reparam.linalg import LayerMoments
from hf_reparam.structures.experts.structure import ExpertSite

__all__ = ["Pass", "watching"]


class Batch(Protocol):
    """What is known of the batch that runs.

    Args:
        masks: (batch, length) booleans, which rows are no padding; none where there is no padding.
        counting: whether inputs count: not what checkpointing computes again in the backward pass.
    """

    @property
    def masks(self) -> tuple[Tensor, ...]: ...

    @property
    def counting(self) -> bool: ...


@dataclass
class Pass:
    """A batch as `Batch` says; by default one without padding that counts."""

    masks: tuple[Tensor, ...] = ()
    counting: bool = True


@contextmanager
def watching(site: ExpertSite, moments: Sequence[LayerMoments], batch: Batch | None = None) -> Iterator[None]:
    """Add what each expert multiplies, and the gradients of that, to its moments until the block ends.

    The experts run in the eager implementation meanwhile, which asks for one expert's weight at a time. Rows that are
    padding are told by the routing: the eager forward takes the tokens of an expert in the order of the choices, and
    of the tokens in each. Where the rows are not those, as of classes with a forward of their own, all of them count.

    Args:
        site: dense; its module's attributes are changed for the while, so that it should be a copy.
        moments: what to add to for each expert, with gradients or without.
        batch: what is known of the batch that runs, asked in every pass.
    """
    module, parameter = site.module, site.parameter
    watcher = _Watcher(moments, batch or Pass())
    hook = module.register_forward_pre_hook(watcher.routed, with_kwargs=True)
    before = dict(vars(module))
    shadows: dict[str, Any] = {parameter: _Watched(module.get_parameter(parameter), watcher)}
    config = one_by_one(getattr(module, "config", None))
    if config is not None:
        shadows["config"] = config
    vars(module).update(shadows)
    try:
        yield
    finally:
        hook.remove()
        for name in shadows:
            if name in before:
                vars(module)[name] = before[name]
            else:
                del vars(module)[name]


class _Watcher:
    """Adds rows to the moments of experts, without padding.

    Args:
        moments: of each expert.
        batch: as of `watching`.
    """

    def __init__(self, moments: Sequence[LayerMoments], batch: Batch) -> None:
        self.moments, self.batch = moments, batch
        self.chosen: Tensor | None = None  # (choices, tokens) the experts of each token in the present pass

    def routed(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which token goes where, before a forward pass: experts get (tokens, d), and (tokens, choices) int64."""
        x, *others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        tokens = x.shape[:-1].numel()
        choices = [t for t in others if t.dtype == torch.int64 and t.dim() == 2 and len(t) == tokens]
        self.chosen = choices[0].T if choices else None

    def see(self, expert: int, x: Tensor, multiply: Callable[[Tensor], Tensor], *, every: bool = False) -> Tensor:
        """multiply(x), x (rows, in), with rows and gradients added to the moments of an expert.

        Args:
            expert: whose.
            x: its rows.
            multiply: by its weight.
            every: whether all tokens go to every expert, those that are not meant for it as zeros.
        """
        moments, kept = self.moments[expert], self._zeros_out(x) if every else self._padding_out(expert, len(x))
        if self.batch.counting:
            moments.add_inputs(kept(x.detach()))
        out = multiply(x)
        if moments.gradient_products is None or not torch.is_grad_enabled():
            return out
        if not out.requires_grad:  # parameters are frozen: the first experts to be reached start the graph
            out = out.detach().requires_grad_()
        out.register_hook(lambda gradient: moments.add_gradients(kept(gradient)))
        return out

    def _padding_out(self, expert: int, rows: int) -> Callable[[Tensor], Tensor]:
        """What leaves padding out of the rows that were routed to an expert."""
        if self.chosen is not None:
            tokens = torch.where(self.chosen == expert)[1]
            mask = self._mask(self.chosen.shape[1])
            if mask is not None and len(tokens) == rows:
                real = mask.to(tokens.device)[tokens]
                return lambda x: x[real]
        return lambda x: x

    def _zeros_out(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What leaves padding and zeros out of rows for all tokens."""
        mask, real = self._mask(len(x)), x.detach().any(-1)
        if mask is not None:
            real = real & mask.to(x.device)
        return lambda rows: rows[real]

    def _mask(self, tokens: int) -> Tensor | None:
        return next((mask.reshape(-1) for mask in self.batch.masks if mask.numel() == tokens), None)


class _Watched:
    """Stands for the parameter, or for one expert's matrix of it.

    Args:
        weight: its numbers.
        watcher: is told of what is multiplied.
        expert: whose matrix; None for the whole parameter.
    """

    def __init__(self, weight: Tensor, watcher: _Watcher, expert: int | None = None) -> None:
        self.weight, self.watcher, self.expert = weight, watcher, expert

    def __getitem__(self, index: Any) -> "_Watched":
        return _Watched(self.weight[index], self.watcher, int(index))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.weight, name)
        if name in ("float", "to", "transpose", "type"):
            return lambda *args, **kwargs: _Watched(value(*args, **kwargs), self.watcher, self.expert)
        return value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        x, self = args[:2]
        if name == "linear" and isinstance(self, cls) and self.expert is not None:
            rest = args[2:]
            return self.watcher.see(self.expert, x, lambda rows: F.linear(rows, self.weight, *rest, **kwargs))
        if name == "matmul" and isinstance(self, cls) and self.expert is not None:
            return self.watcher.see(self.expert, x, partial(_times, self.weight))
        if name == "bmm" and isinstance(self, cls) and self.expert is None:
            many = enumerate(zip(x, self.weight, strict=True))
            return torch.stack([self.watcher.see(i, x_i, partial(_times, w), every=True) for i, (x_i, w) in many])
        raise WeightError(f"experts are used in a way that calibration does not know: {name}")


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight
