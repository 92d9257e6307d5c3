"""Hooks that watch what goes into layers and what gradient comes back, padding left out. They leave with the block."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.linalg.moments import LayerMoments
from hf_reparam.linalg.tables import TableMoments

__all__ = ["Watcher", "inputs_of", "order_of", "rows", "watch"]


def rows(x: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """(..., d) -> (tokens, d), without the tokens that a mask of the same leading shape marks as padding."""
    flat = x.detach().reshape(-1, x.shape[-1])
    for mask in masks:
        if x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel()):
            return flat[mask.reshape(-1).to(flat.device)]
    return flat


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by whatever name its class gives it."""
    given: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return given


class _Reached(Exception):  # noqa: N818  # ends a forward pass early; it is no error
    pass


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, x) whenever a layer is about to be called with x, until the block ends, however it ends."""
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, _input(args, kwargs)), with_kwargs=True
        )
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """What goes into each layer, (..., in), the first time that `run` reaches it; the pass ends at the last of them."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found.setdefault(name, x.detach())
        if len(found) == len(layers):
            raise _Reached

    with suppress(_Reached), _seeing(layers, keep):
        run()
    return found


def order_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """The layers in the order in which `run` reaches them, those that get one and the same tensor together.

    Layers that are not reached, or more than once, are left out.
    """
    calls: list[tuple[str, Tensor]] = []
    with _seeing(layers, lambda name, x: calls.append((name, x))):
        run()
    times = Counter(name for name, _ in calls)
    stages: list[list[str]] = []
    previous = None
    for name, tensor in calls:
        if times[name] == 1:
            if tensor is not previous:
                stages.append([])
            stages[-1].append(name)
            previous = tensor
    return stages


class Watcher:
    """Adds every forward and backward pass to the moments of the layers that took part.

    Args:
        moments: layer name -> LayerMoments to add to.
    """

    def __init__(self, moments: Mapping[str, LayerMoments]) -> None:
        self.moments = moments
        self.masks: tuple[Tensor, ...] = ()
        self._counting = True

    def backward(self, loss: Tensor) -> None:
        """The backward pass; what checkpointing computes again in it is not counted again."""
        self._counting = False
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._counting = True

    def watch_table(self, module: nn.Module, table: TableMoments) -> list[Any]:
        """Install the hooks of an embedding, or of an output head that is tied to one, and return their handles."""
        if isinstance(module, nn.Embedding):
            return self._watch(
                module,
                lambda ids: table.add_ids(rows(ids[..., None], self.masks)[:, 0]),
                lambda gradient: table.add_gradients(rows(gradient, self.masks)),
            )
        return self._watch(
            module,
            lambda x: table.add_head(rows(x, self.masks), None),
            lambda gradient: table.add_head(None, rows(gradient, self.masks)),
        )

    def watch_layer(self, name: str, module: nn.Module) -> list[Any]:
        """Install the hooks of one layer and return their handles."""
        layer = self.moments[name]
        gradients = layer.gradient_products is not None
        return self._watch(
            module,
            lambda x: layer.add_inputs(rows(x, self.masks)),
            (lambda gradient: layer.add_gradients(rows(gradient, self.masks))) if gradients else None,
        )

    def _watch(
        self, module: nn.Module, add_input: Callable[[Tensor], None], add_gradient: Callable[[Tensor], None] | None
    ) -> list[Any]:
        def inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._counting:
                add_input(_input(args, kwargs))

        def output(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            return None if add_gradient is None else _with_gradient(out, add_gradient)

        return [module.register_forward_pre_hook(inputs, with_kwargs=True), module.register_forward_hook(output)]


def _with_gradient(out: Tensor, see: Callable[[Tensor], None]) -> Tensor:
    """An output that tells its gradient when it comes back."""
    if out.requires_grad:
        out.register_hook(see)
        return out
    leaf = out.detach().requires_grad_()  # parameters are frozen: the first layers to be reached start the graph
    leaf.register_hook(see)
    return leaf.clone()  # what follows may write into it, and no leaf allows that


@contextmanager
def watch(
    layers: Mapping[str, nn.Module],
    moments: Mapping[str, LayerMoments],
    tables: Iterable[tuple[nn.Module, TableMoments]] = (),
) -> Iterator[Watcher]:
    """Watch layers until the block ends, however it ends. Set `masks` on the Watcher before each forward pass.

    Args:
        layers: name -> module, called with x (..., in), returning (..., out).
        moments: name -> LayerMoments to add to.
        tables: embeddings, and heads that are tied to them, with TableMoments to add to.
    """
    watcher, handles = Watcher(moments), []
    try:
        for name, module in layers.items():
            handles += watcher.watch_layer(name, module)
        for module, table in tables:
            handles += watcher.watch_table(module, table)
        with torch.enable_grad():
            yield watcher
    finally:
        for handle in handles:
            handle.remove()
