"""Forward passes over one batch, again and again, of a model that changes further and further behind."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Replay:
    """Passes over one batch in which blocks that were complete before what changes are not computed again.

    Blocks are the members of lists of modules, and the modules that have such lists.

    For the time of a pass, blocks get a `forward` of their own: give a copy of a model.

    Args:
        room: bytes that outputs of blocks may take; 0 to compute every pass as a whole.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.rows = 0  # of the largest input of a layer
        self.outputs: dict[nn.Module, Any] = {}
        self.starts: dict[nn.Module, int] = {}
        self.ends: dict[nn.Module, int] = {}
        self.once: list[nn.Module] = []

    def first(self, model: nn.Module, run: Callable[[], T]) -> T:
        """The first pass, which tells the order."""
        lists = [(m, part) for m in model.modules() for part in m.children() if type(part) is nn.ModuleList]
        blocks = {block for owner, items in lists for block in (owner, *items)} - {model}
        clock, calls = 0, Counter[nn.Module]()

        def start(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal clock
            clock += 1
            calls[module] += 1
            if getattr(module, "weight", None) is not None and args and isinstance(args[0], Tensor):
                self.rows = max(self.rows, args[0].shape[:-1].numel())
            self.starts.setdefault(module, clock)

        def end(module: nn.Module, *_: Any) -> None:
            self.ends[module] = clock

        with ExitStack() as hooks:
            for module in model.modules():
                hooks.enter_context(module.register_forward_pre_hook(start))
            for block in blocks:
                hooks.enter_context(block.register_forward_hook(end))
            result = run()
        self.once = [block for block in blocks if calls[block] == 1] if self.room else []
        return result

    def repeats(self, run: Callable[[], Any]) -> bool:
        """Whether a pass that skips blocks gives what it gives without; if it does not, none is skipped from now on.

        Some models see inside of a block otherwise than by its output, as those that record hidden states do.
        """
        room = self.room
        with self._keeping(self.once):
            expected = [value for value in _tensors(run()) if value.is_floating_point()]
        try:
            with self._skipping(self.once):
                found = [value for value in _tensors(run()) if value.is_floating_point()]
        except Exception:  # whatever the model's own code raises of what it does not find
            found = []
        alike = [v.shape for v in found] == [v.shape for v in expected] and all(map(_alike, found, expected))
        self.once = self.once if alike else []
        self.outputs, self.room = {}, room  # they hold only while nothing in the blocks changes
        return alike

    def __call__(self, run: Callable[[], T], changes: Collection[nn.Module] = ()) -> T:
        """One more pass.

        Args:
            run: a pass, of the model or of one in which other modules stand in the place of those that change.
            changes: modules of the first pass that changed since.
        """
        since = min((self.starts.get(module, 0) for module in changes), default=math.inf)
        final = [block for block in self.once if self.ends[block] < since]
        with self._skipping(final), self._keeping(final):
            return run()

    @contextmanager
    def _skipping(self, final: Collection[nn.Module]) -> Iterator[None]:
        """Have blocks whose output is known give it at once."""
        own = {block: vars(block).get("forward") for block in final if block in self.outputs}
        for block in own:
            output = self.outputs[block]
            vars(block)["forward"] = lambda *_, output=output, **__: copy.deepcopy(output)  # it may be written into
        try:
            yield
        finally:
            for block, forward in own.items():
                del vars(block)["forward"]
                if forward is not None:
                    vars(block)["forward"] = forward

    @contextmanager
    def _keeping(self, final: Collection[nn.Module]) -> Iterator[None]:
        """Keep the outputs of blocks that are computed, while there is room."""

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            size = sum(tensor.nbytes for tensor in _tensors(output))
            if size <= self.room:
                self.room -= size
                self.outputs[block] = copy.deepcopy(output)

        with ExitStack() as hooks:
            for block in set(final) - self.outputs.keys():
                hooks.enter_context(block.register_forward_hook(keep))
            yield


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same but for rounding."""
    scale = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
