"""The divergence by which refitting is judged, against PyTorch's own losses."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, QuestionAnsweringModelOutput

from hf_reparam.calibrate.objective import divergence
from hf_reparam.errors import TargetError

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(2)]


def test_logits_by_divergence_from_the_reference_over_real_tokens():
    q, p = pair(2, 4, 7)
    found = divergence(MaskedLMOutput(logits=q), MaskedLMOutput(logits=p), (MASK,))
    expected = F.kl_div(q[MASK].log_softmax(-1), p[MASK].softmax(-1), reduction="sum")
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_spans_over_real_positions():
    (q, p), (s, t) = pair(2, 4), pair(2, 4)
    found = divergence(
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
    hidden = divergence(BaseModelOutput(last_hidden_state=a), BaseModelOutput(last_hidden_state=b), (MASK,))
    assert hidden == pytest.approx(float((a[MASK] - b[MASK]).square().sum()) / 2, rel=1e-5)
    assert divergence(a, b, ()) == pytest.approx(float((a - b).square().sum()) / 2, rel=1e-5)
    one, other = pair(3, 1)
    regression = divergence(MaskedLMOutput(logits=one), MaskedLMOutput(logits=other), ())
    assert regression == pytest.approx(float((one - other).square().sum()) / 2, rel=1e-5)


def test_nothing_to_compare():
    with pytest.raises(TargetError, match="no floating-point tensor"):
        divergence({"y": torch.ones(1, dtype=torch.int64)}, {"y": torch.ones(1, dtype=torch.int64)}, ())
