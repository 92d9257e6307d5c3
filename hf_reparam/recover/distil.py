"""`distillation_loss`: train a converted model towards the dense one, with the `Trainer` as it is."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_reparam.calibrate.objective import IGNORED, batch_masks, expected, position_mask
from hf_reparam.calibrate.padding import predicts_next
from hf_reparam.calibrate.predictions import logits_of, problem_of
from hf_reparam.errors import TargetError
from hf_reparam.layers.copies import frozen_copy

Loss = Callable[..., Tensor]


@contextmanager
def distillation_loss(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    hidden: float = 0.0,
) -> Iterator[Loss]:
    """A loss for `Trainer(compute_loss_func=)`: labels, the teacher's predictions and its hidden states.

        loss = (1 - alpha) CE(labels) + alpha T^2 KL(teacher || student, at temperature T) + hidden * H

    H is the mean over layers of ||h_s - h_t||^2 / ||h_t||^2, sums over real tokens. CE and KL are means over labelled
    positions, or over real tokens where there are no labels; regressions take half the squared difference for KL. The
    `Trainer` gives a loss function no inputs, so while the block runs hooks on `student` keep those of its last call
    for the teacher, and take its hidden states, if nobody else asks for them. With labels the `Trainer` takes the mean
    over `gradient_accumulation_steps`; without, the sum.

    Args:
        teacher: the dense model; it is read in evaluation mode, on the student's device, and not changed.
        student: the model that is trained, of the same family.
        temperature: above 0; higher values show more of the teacher's doubt.
        alpha: in [0, 1], weight of the teacher against labels; 1 needs no labels.
        hidden: at least 0, weight of the hidden states.

    Returns:
        In a `with` statement, the function (outputs, labels, num_items_in_batch=None) -> scalar.

    Raises:
        TargetError: a weight or the temperature is out of range, or (when called) the model returns no logits, or it
            was not called in the block.

    Cost: a forward pass of the teacher for every step.

    Source: G. Hinton, O. Vinyals, J. Dean, arXiv 1503.02531; hidden states: FitNets, arXiv 1412.6550.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_reparam import LowRankConfig, convert
    >>> shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    >>> dense = BertForSequenceClassification(BertConfig(**shape)).eval()
    >>> small = convert(dense, LowRankConfig(rank=4, target_modules="*"))
    >>> with distillation_loss(dense, small, alpha=1.0) as loss:
    ...     bool(loss(small(input_ids=torch.tensor([[1, 2, 3]])), None) > 0)
    True
    """
    if not (0 <= alpha <= 1 and 0 < temperature < math.inf and 0 <= hidden < math.inf):
        raise TargetError(
            f"alpha must be in [0, 1], temperature above 0 and hidden at least 0, got {alpha}, {temperature}, {hidden}"
        )
    judge = frozen_copy(teacher)
    with _listening(student, states=bool(hidden)) as called:

        def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
            if not called:
                raise TargetError(
                    "the student was not called inside `with distillation_loss(...)`: train in that block"
                )
            theirs = judge.to(student.device)(*called["args"], **called["kwargs"])
            masks = batch_masks(called["kwargs"])
            problem = problem_of(student)
            logits, taught = logits_of(outputs, problem), logits_of(theirs, problem)
            if not logits:
                raise TargetError("the model returned no logits to compare with the teacher's")
            own = outputs.get("loss")  # of labels by other names than `labels`, which the Trainer leaves in the batch
            if alpha < 1 and labels is None and own is None:
                raise TargetError("there are no labels: give alpha=1.0 to learn from the teacher alone")
            hard, soft, counted = (torch.zeros(()) if own is None else own), torch.zeros(()), labels
            for key, value in logits.items():
                answers = labels if key in ("logits", "answers", "values") else None
                kind = "values" if value.shape[-1] == 1 and not key.endswith("answers") else key
                floats = answers is not None and answers.is_floating_point()
                if problem is None and kind == "logits" and floats:  # as the model's own loss has it
                    kind = "answers"
                mine, target, answers = _positions(student, value.float(), taught[key].float(), answers, masks)
                counted = counted if answers is None else answers
                if not len(mine):  # no label counts
                    soft = soft + mine.sum()
                    own = hard = hard + mine.sum()
                    continue
                soft = _soft_loss(kind, mine, target, temperature) + soft
                if answers is not None and alpha < 1:
                    own = hard = _hard_loss(kind, mine, answers)
            if own is None and alpha < 1:
                raise TargetError(
                    "the labels are not of the logits' shape: give alpha=1.0 to learn from the teacher alone"
                )
            mean = (1 - alpha) * hard + alpha * soft
            if hidden:
                mean = mean + hidden * _hidden_error(called.pop("states", {}), theirs, masks)
            if num_items_in_batch is None or counted is None:
                return mean
            return mean * (counted != IGNORED).sum() / num_items_in_batch  # labels of all batches of a step

        yield loss


@contextmanager
def _listening(student: PreTrainedModel, *, states: bool) -> Iterator[dict[str, Any]]:
    """What the student was called with last, and its hidden states then, if these are wanted."""
    called: dict[str, Any] = {}

    def remember(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        called["asked"] = kwargs.get("output_hidden_states", student.config.output_hidden_states)
        if states:
            kwargs = {**kwargs, "output_hidden_states": True}
        called.update(args=args, kwargs={k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")})
        return args, kwargs

    def take(_: nn.Module, args: Any, outputs: Any) -> Any:
        called["states"] = found = _hidden_states(outputs) if states else {}
        if called["asked"] or not found:
            return outputs
        return type(outputs)(**{k: v for k, v in outputs.items() if k not in found})

    with student.register_forward_pre_hook(remember, with_kwargs=True), student.register_forward_hook(take):
        yield called


def _positions(
    student: PreTrainedModel, mine: Tensor, theirs: Tensor, labels: Tensor | None, masks: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (n, classes) of both models and labels (n, ...), of positions that count."""
    if labels is not None and labels.shape == mine.shape[:-1] and (mine.dim() > 2 or not labels.is_floating_point()):
        if mine.dim() > 2 and predicts_next(student):  # position t predicts label t + 1
            mine, theirs, labels = mine[..., :-1, :], theirs[..., :-1, :], labels[..., 1:]
        keep = labels != IGNORED
        return mine[keep], theirs[keep], labels[keep]
    if mine.dim() == 2:
        return mine, theirs, labels
    return _real(mine, masks), _real(theirs, masks), None


def _real(values: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """(n, width) of values (batch, length, width) at positions that are no padding."""
    mask = position_mask(values, masks)
    return values.flatten(0, -2) if mask is None else values[mask]


def _soft_loss(kind: str, mine: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    if kind.endswith("values"):
        return (mine - theirs).square().mean() / 2
    theirs, mine = theirs / temperature, mine / temperature
    if kind.endswith("answers"):
        cross = F.binary_cross_entropy_with_logits(mine, theirs.sigmoid())
        return temperature**2 * (cross - F.binary_cross_entropy_with_logits(theirs, theirs.sigmoid()))
    return temperature**2 * expected(theirs.log_softmax(-1), mine.log_softmax(-1)).sum() / len(mine)


def _hard_loss(kind: str, mine: Tensor, labels: Tensor) -> Tensor:
    if kind.endswith("answers"):
        return F.binary_cross_entropy_with_logits(mine, labels.float().reshape(mine.shape))
    if kind.endswith("values"):
        return F.mse_loss(mine, labels.to(mine.dtype).reshape(mine.shape))
    return F.cross_entropy(mine, labels, ignore_index=IGNORED)


def _hidden_states(outputs: Any) -> dict[str, tuple[Tensor, ...]]:
    return {k: v for k, v in outputs.items() if k.endswith("hidden_states") and isinstance(v, tuple)}


def _hidden_error(states: Mapping[str, tuple[Tensor, ...]], theirs: Any, masks: tuple[Tensor, ...]) -> Tensor:
    """Mean over the hidden states of every layer of ||h_s - h_t||^2 / ||h_t||^2, over real tokens."""
    errors = []
    for key, value in states.items():
        for mine, target in zip(value, theirs[key], strict=True):
            kept, wanted = _real(mine.float(), masks), _real(target.float(), masks)
            least = torch.finfo(wanted.dtype).tiny
            errors.append((kept - wanted).square().sum() / wanted.square().sum().clamp_min(least))
    if not errors:
        raise TargetError("the model returned no hidden states: leave hidden= out")
    return torch.stack(errors).mean()
