"""Hooks that watch what goes into layers and what gradient comes back, padding left out. They leave with the block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_reparam.linalg.moments import LayerMoments

__all__ = ["Watcher", "watch"]


class Watcher:
    """Adds every forward and backward pass to the moments of the layers that took part.

    Args:
        moments: layer name -> LayerMoments to add to.
    """

    def __init__(self, moments: Mapping[str, LayerMoments]) -> None:
        self.moments = moments
        self.masks: tuple[Tensor, ...] = ()

    def rows(self, x: Tensor) -> Tensor:
        """(..., d) -> (tokens, d), without the tokens that a mask of the same leading shape marks as padding."""
        flat = x.detach().reshape(-1, x.shape[-1])
        for mask in self.masks:
            if x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel()):
                return flat[mask.reshape(-1).to(flat.device)]
        return flat

    def watch_layer(self, name: str, module: nn.Module) -> list[Any]:
        """Install the hooks of one layer and return their handles."""
        layer = self.moments[name]

        def inputs(_: nn.Module, args: tuple[Any, ...]) -> None:
            layer.add_inputs(self.rows(args[0]))

        def output(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if layer.gradient_products is None:
                return None
            if not out.requires_grad:  # parameters are frozen: the first layers to be reached start the graph
                out = out.detach().requires_grad_()
            out.register_hook(lambda gradient: layer.add_gradients(self.rows(gradient)))
            return out

        return [module.register_forward_pre_hook(inputs), module.register_forward_hook(output)]


@contextmanager
def watch(layers: Mapping[str, nn.Module], moments: Mapping[str, LayerMoments]) -> Iterator[Watcher]:
    """Watch layers until the block ends, however it ends. Set `masks` on the Watcher before each forward pass.

    Args:
        layers: name -> module, called with x (..., in), returning (..., out).
        moments: name -> LayerMoments to add to.
    """
    watcher, handles = Watcher(moments), []
    try:
        for name, module in layers.items():
            handles += watcher.watch_layer(name, module)
        with torch.enable_grad():
            yield watcher
    finally:
        for handle in handles:
            handle.remove()
