"""A converted model proposes tokens, and its dense one accepts them: the text is the dense model's."""

import pytest
import torch

from hf_reparam import LowRankConfig, convert
from tests import zoo


def varied(base):
    """A model whose text does not repeat itself, and does not end."""
    model = zoo.BY_BASE[base].build()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter *= 10 if parameter.dim() == 2 else 1
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), list(zip(["GPT2LMHeadModel", "LlamaForCausalLM"], zoo.FORMS, strict=True)))
def test_the_text_is_the_dense_models(base, form):
    dense = varied(base)
    small = convert(dense, LowRankConfig(rank=12, form=form))
    ids = torch.tensor([[5, 17, 3, 80, 41]])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
    expected, proposed = dense.generate(ids, **options), small.generate(ids, **options)
    assert not torch.equal(proposed, expected), "some proposals are rejected"
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(dense.generate(ids, assistant_model=small, **options), expected)
    assert len(calls) < 16, "some proposals are accepted"
