"""The divergence by which refitting is judged, against PyTorch's own losses."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, QuestionAnsweringModelOutput

from hf_reparam.calibrate.objective import _noise, divergence, uniforms, unit_of
from hf_reparam.calibrate.predictions import compared
from hf_reparam.errors import TargetError

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(2)]


def apart(outputs, reference, masks, problem=None):
    return divergence(outputs, compared(reference, problem), masks, problem)


def test_logits_by_divergence_from_the_reference_over_real_tokens():
    q, p = pair(2, 4, 7)
    found = apart(MaskedLMOutput(logits=q), MaskedLMOutput(logits=p), (MASK,))
    expected = F.kl_div(q[MASK].log_softmax(-1), p[MASK].softmax(-1), reduction="sum")
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_spans_over_real_positions():
    (q, p), (s, t) = pair(2, 4), pair(2, 4)
    found = apart(
        QuestionAnsweringModelOutput(start_logits=q, end_logits=t),
        QuestionAnsweringModelOutput(start_logits=p, end_logits=s),
        (MASK,),
    )
    expected = sum(
        F.kl_div(a[i, m].log_softmax(-1), b[i, m].softmax(-1), reduction="sum")
        for a, b in ((q, p), (t, s))
        for i, m in enumerate(MASK)
    )
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_hidden_states_regressions_and_tensors_by_squares():
    a, b = pair(2, 4, 5)
    hidden = apart(BaseModelOutput(last_hidden_state=a), BaseModelOutput(last_hidden_state=b), (MASK,))
    assert hidden == pytest.approx(float((a[MASK] - b[MASK]).square().sum()) / 2, rel=1e-5)
    assert apart(a, b, ()) == pytest.approx(float((a - b).square().sum()) / 2, rel=1e-5)
    one, other = pair(3, 1)
    regression = apart(MaskedLMOutput(logits=one), MaskedLMOutput(logits=other), ())
    assert regression == pytest.approx(float((one - other).square().sum()) / 2, rel=1e-5)


def test_answers_and_several_numbers_by_what_the_configuration_says_of_logits():
    q, p = pair(3, 4)
    answers = apart(MaskedLMOutput(logits=q), MaskedLMOutput(logits=p), (), "multi_label_classification")
    entropy = F.binary_cross_entropy_with_logits(p, p.sigmoid(), reduction="sum")
    crossed = F.binary_cross_entropy_with_logits(q, p.sigmoid(), reduction="sum")
    assert answers == pytest.approx(float(crossed - entropy), rel=1e-5)
    numbers = apart(MaskedLMOutput(logits=q), MaskedLMOutput(logits=p), (), "regression")
    assert numbers == pytest.approx(float((q - p).square().sum()) / 2, rel=1e-5)


def test_units_in_which_people_read_a_divergence():
    hidden, logits = pair(2, 4, 5)
    unit, size = unit_of(BaseModelOutput(last_hidden_state=hidden), (MASK,))
    assert unit == "of the squared hidden states"
    assert size == pytest.approx(float(hidden[MASK].square().sum()) / 2, rel=1e-5)
    assert unit_of(MaskedLMOutput(logits=logits), (MASK,)) == ("nats per token", 5.0)
    assert unit_of(MaskedLMOutput(logits=logits[:, 0]), ()) == ("nats per example", 2.0)
    nothing = BaseModelOutput(last_hidden_state=torch.zeros(2, 4, 5))
    assert unit_of(nothing, (MASK,))[1] == 5


def test_nothing_to_compare():
    with pytest.raises(TargetError, match="no floating-point tensor"):
        apart({"y": torch.ones(1, dtype=torch.int64)}, {"y": torch.ones(1, dtype=torch.int64)}, ())


def test_drawn_numbers_are_uniform_normal_and_independent():
    like = torch.zeros(40, 50, 100)
    uniform, normal = uniforms(like, 100, range(40), ()), _noise(like, range(40), ())
    parts = torch.histc(uniform, 20) / uniform.numel()
    assert 0 < uniform.min() < uniform.max() < 1
    assert torch.allclose(parts, torch.full((20,), 0.05), atol=0.05 * 5 * (20 / uniform.numel()) ** 0.5)
    assert normal.mean() == pytest.approx(0, abs=4 / normal.numel() ** 0.5)
    assert normal.square().mean() == pytest.approx(1, abs=4 * (2 / normal.numel()) ** 0.5)
    for rows in (normal.reshape(40, -1), normal.reshape(-1, 100).T, normal.transpose(0, 1).reshape(50, -1)):
        between = torch.corrcoef(rows).fill_diagonal_(0)
        assert between.abs().max() < 5.5 / rows.shape[1] ** 0.5


def test_padding_and_other_examples_do_not_change_what_is_drawn():
    mask = torch.tensor([[False, True, True, True, False, True]])
    padded = _noise(torch.zeros(1, 6, 3), [7], (mask,))[0][mask[0]]
    together = _noise(torch.zeros(2, 4, 3), [9, 7], ())
    assert torch.equal(padded, together[1])
    assert not torch.equal(together[0], together[1])
