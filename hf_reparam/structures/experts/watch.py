"""Calibration of fused experts: the rows that each gets and the gradients that come back, the forward unchanged."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.errors import WeightError
from hf_reparam.linalg.moments import LayerSums


class ExpertWatch:
    """Adds what each expert multiplies, and the gradients of that, to its sums until `remove` is called.

    A stand-in shadows the parameter in the experts' own attributes: it multiplies by the same numbers, and tells of it.
    The experts run in the eager implementation meanwhile, which asks for one expert's weight at a time. Rows that are
    padding are told by the routing: the eager forward takes the tokens of an expert in the order of the choices, and
    of the tokens in each. Where the rows are not those, as of classes with a forward of their own, all of them count.

    Args:
        module: the experts; their attributes are changed for the while, so that they should be a copy.
        parameter: name of the dense parameter.
        sums: what to add to for each expert, with gradients or without.
        watcher: a `Watcher`, whose `masks` (batch, length) say which rows are no padding, and whose `counting` whether
            inputs count: not what checkpointing computes again in the backward pass.
    """

    def __init__(self, module: nn.Module, parameter: str, sums: Sequence[LayerSums], watcher: Any) -> None:
        self.module, self.sums, self.watcher = module, sums, watcher
        self.chosen: Tensor | None = None  # (choices, tokens) the experts of each token in the present pass
        self.hook = module.register_forward_pre_hook(self._routed, with_kwargs=True)
        self.shadows: dict[str, Any] = {parameter: _Watched(module.get_parameter(parameter), self)}
        if hasattr(module, "config"):
            self.shadows["config"] = _Eager(module.config)
        self.before = {name: value for name, value in vars(module).items() if name in self.shadows}
        vars(module).update(self.shadows)

    def remove(self) -> None:
        """Give the experts their own attributes back."""
        self.hook.remove()
        for name in self.shadows:
            del vars(self.module)[name]
        vars(self.module).update(self.before)

    def _routed(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which token goes where, before a forward pass: experts get (tokens, d), and (tokens, choices) int64."""
        x, *others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        tokens = x.shape[:-1].numel()
        choices = [t for t in others if t.dtype == torch.int64 and t.dim() == 2 and len(t) == tokens]
        self.chosen = choices[0].T if choices else None

    def see(self, expert: int, x: Tensor, multiply: Callable[[Tensor], Tensor], *, every: bool = False) -> Tensor:
        """multiply(x), x (rows, in), with rows and gradients added to the sums of an expert.

        `every` says that all tokens go to every expert, those that are not meant for it as zeros.
        """
        seen, kept = self.sums[expert], self._kept(expert, x.detach(), every)
        if self.watcher.counting:
            seen.add_inputs(x.detach()[kept])
        out = multiply(x)
        if seen.gradient_products is None or not torch.is_grad_enabled():
            return out
        if not out.requires_grad:  # parameters are frozen: the first experts to be reached start the graph
            out = out.detach().requires_grad_()
        out.register_hook(lambda gradient: seen.add_gradients(gradient[kept]))
        return out

    def _kept(self, expert: int, x: Tensor, every: bool) -> Any:
        """Index of the rows that are no padding; with `every`, and no zeros."""
        tokens = None if every or self.chosen is None else torch.where(self.chosen == expert)[1]
        size = len(x) if self.chosen is None or every else self.chosen.shape[1]
        mask = next((mask.reshape(-1).to(x.device) for mask in self.watcher.masks if mask.numel() == size), None)
        if every:
            return x.any(-1) if mask is None else x.any(-1) & mask
        return slice(None) if mask is None or tokens is None or len(tokens) != len(x) else mask[tokens]


class _Eager:
    """A configuration with which experts run one after the other."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return "eager" if name.endswith("experts_implementation") else getattr(self.config, name)


class _Watched:
    """Stands for the parameter, or for one expert's matrix of it."""

    def __init__(self, weight: Tensor, watch: ExpertWatch, expert: int | None = None) -> None:
        self.weight, self.watch, self.expert = weight, watch, expert

    def __getitem__(self, index: Any) -> "_Watched":
        return _Watched(self.weight[index], self.watch, int(index))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.weight, name)
        if name in ("float", "to", "transpose", "type"):
            return lambda *args, **kwargs: _Watched(value(*args, **kwargs), self.watch, self.expert)
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        x, self, *rest = args
        if isinstance(self, cls) and self.expert is not None and name in ("linear", "matmul"):
            return self.watch.see(self.expert, x, lambda rows: func(rows, self.weight, *rest, **kwargs))
        if isinstance(self, cls) and self.expert is None and name == "bmm":
            many = enumerate(zip(x, self.weight, strict=True))
            seen = [self.watch.see(i, x_i, partial(torch.matmul, other=w), every=True) for i, (x_i, w) in many]
            return torch.stack(seen)
        raise WeightError(f"experts are used in a way that calibration does not know: {name}")
