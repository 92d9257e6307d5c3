"""Hooks that watch what goes into layers and what gradient comes back, padding left out. They leave with the block."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """How the rows of a layer's input follow a mask (batch, length).

    Args:
        mask: which of the masks.
        form: "batch" for (batch, length, ...), "time" for (length, batch, ...), "flat" for (batch * length, d).
    """

    mask: int
    form: str


def layouts(shape: Sequence[int], masks: tuple[Tensor, ...]) -> Iterator[Layout]:
    """How an input (..., d) of this shape may follow the masks; nothing where none fits."""
    for i, mask in enumerate(masks):
        if len(shape) > 2 and tuple(shape[:2]) == mask.shape:
            yield Layout(i, "batch")
        if len(shape) > 2 and tuple(shape[:2]) == mask.T.shape:
            yield Layout(i, "time")
        if len(shape) == 2 and shape[0] == mask.numel():
            yield Layout(i, "flat")


Chosen = dict[tuple[Layout, torch.device], Tensor | None]
"""Which rows are no padding, (rows,) int64; None if all are."""


def rows(
    x: Tensor, masks: tuple[Tensor, ...], follows: frozenset[Layout] | None = None, chosen: Chosen | None = None
) -> Tensor:
    """(..., d) -> (tokens, d), without the tokens that a mask marks as padding.

    Args:
        x: what goes into a layer, or the gradient that comes back to it.
        masks: (batch, length) booleans.
        follows: how this layer's rows may follow them; None to believe any shape that fits.
        chosen: rows that are known of these masks; filled.
    """
    x, chosen = x.detach(), {} if chosen is None else chosen
    layout = next((known for known in layouts(x.shape, masks) if follows is None or known in follows), None)
    if layout is None:
        return x.reshape(-1, x.shape[-1])
    if (layout, x.device) not in chosen:
        mask = masks[layout.mask]
        real = (mask.T if layout.form == "time" else mask).reshape(-1)
        chosen[layout, x.device] = None if bool(real.all()) else real.nonzero()[:, 0].to(x.device)
    index = chosen[layout, x.device]
    if index is not None:
        x = (x if layout.form == "flat" else x.flatten(0, 1)).index_select(0, index)
    return x.reshape(-1, x.shape[-1])


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by whatever name its class gives it."""
    given: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return given


class _Reached(Exception):  # noqa: N818  # ends a forward pass early; it is no error
    pass


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, x) whenever a layer is about to be called with x, until the block ends, however it ends."""

    def told(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(name, _input(args, kwargs))

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(module.register_forward_pre_hook(told(name), with_kwargs=True))
        yield


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


def shapes_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[tuple[str, torch.Size]]:
    """The shapes of all that goes into layers while `run` lasts, with their names."""
    found: list[tuple[str, torch.Size]] = []
    with _seeing(layers, lambda name, x: found.append((name, x.shape))):
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
    """Tells of every forward and backward pass what goes into modules and what gradient comes back, without padding.

    Every forward pass goes into a block of `seeing`.

    Args:
        hooks: what `watch` has put on modules; it is taken away when the stack is closed.
    """

    def __init__(self, hooks: ExitStack) -> None:
        self.hooks = hooks
        self.masks: tuple[Tensor, ...] = ()
        self.follows: Mapping[str, frozenset[Layout]] = {}
        self.counting = False
        self._guessing = 0  # how many examples there are, if it is not known which layers follow a mask
        self._fitted: dict[str, bool] = {}
        self._chosen: Chosen = {}

    @contextmanager
    def seeing(
        self, masks: tuple[Tensor, ...], follows: Mapping[str, frozenset[Layout]] | None = None, guessing: int = 0
    ) -> Iterator[None]:
        """Count what goes into layers while the block lasts: one forward pass.

        Not what checkpointing computes again in the backward pass, which belongs behind the block.

        Args:
            masks: of the batch.
            follows: layer name -> how its rows follow them; shapes decide of a layer that is not there.
            guessing: the count of examples if there is padding and it is not known which layers follow a mask.
        """
        self.masks, self.follows, self._guessing, self._chosen = masks, follows or {}, guessing, {}
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def unfitting(self) -> list[str]:
        """Layers that get several rows for an example, and that no mask ever fitted where there was padding."""
        return [name for name, fitted in self._fitted.items() if not fitted]

    def rows(self, name: str, x: Tensor) -> Tensor:
        """(..., in) -> (tokens, in), the rows that are no padding of what goes into a layer."""
        if self._guessing:
            fits = any(True for _ in layouts(x.shape, self.masks))
            if fits or x.shape[:-1].numel() > self._guessing:
                self._fitted[name] = fits or self._fitted.get(name, False)
        return self.real(name, x)

    def real(self, name: str, x: Tensor) -> Tensor:
        """As `rows`, of a gradient, or of what is known to follow the masks."""
        return rows(x, self.masks, self.follows.get(name), self._chosen)

    def watch(
        self, module: nn.Module, add_input: Callable[[Tensor], None], add_gradient: Callable[[Tensor], None] | None
    ) -> None:
        """Put hooks on a module.

        Args:
            module: called with x, returning y.
            add_input: gets every x.
            add_gradient: gets the gradient of every y; None if it is not wanted.
        """

        def inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.counting:
                add_input(_input(args, kwargs))

        def output(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if add_gradient is None:
                return None
            if not out.requires_grad:  # parameters are frozen: the first layers to be reached start the graph
                out = out.detach().requires_grad_()
            out.register_hook(add_gradient)
            return out.clone()  # what follows may write into it: not allowed of a leaf, and a view would lose the hook

        self.hooks.enter_context(module.register_forward_pre_hook(inputs, with_kwargs=True))
        self.hooks.enter_context(module.register_forward_hook(output))
