"""The split form of an attention is the attention: all arguments, all masks, all layouts, and back."""

import itertools
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from hf_reparam.model.host import opened
from hf_reparam.structures.multihead import (
    SplitMultiheadAttention,
    close_attentions,
    join,
    open_attentions,
    unsplittable,
)

BATCH, LENGTH, SOURCE, HEADS, SIZE = 3, 5, 7, 4, 16


def attention(**options):
    made = nn.MultiheadAttention(SIZE, HEADS, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # PyTorch starts with biases of zero
            parameter.normal_(std=0.3)
    return made


def inputs(made, batched):
    for length, width in ((LENGTH, SIZE), (SOURCE, made.kdim), (SOURCE, made.vdim)):
        shape = [BATCH, length, width] if made.batch_first else [length, BATCH, width]
        yield torch.randn(shape if batched else [length, width], dtype=made.out_proj.weight.dtype)


def masks(batched, dtype):
    padding = torch.zeros((BATCH, SOURCE) if batched else (SOURCE,), dtype=torch.bool)
    padding[..., -2:] = True
    hidden = torch.rand(LENGTH, SOURCE) < 0.3
    hidden[:, 0] = False
    each = torch.randn((BATCH if batched else 1) * HEADS, LENGTH, SOURCE, dtype=dtype)
    return (None, padding, -3 * padding.to(dtype)), (None, hidden, torch.randn(LENGTH, SOURCE, dtype=dtype), each)


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ({}, torch.float32),
        ({"kdim": 10}, torch.float64),
        ({"vdim": 6}, torch.float64),
        ({"kdim": 10, "vdim": 6}, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch_first", "bias"), [(True, True), (False, False)])
def test_the_same_function(batch_first, bias, widths, dtype):
    made = attention(batch_first=batch_first, bias=bias, dtype=dtype, **widths)
    parts = SplitMultiheadAttention(made)
    whole = join(parts)
    for batched, need, average in itertools.product((True, False), (True, False), (True, False)):
        query, key, value = inputs(made, batched)
        for padding, hidden in itertools.product(*masks(batched, dtype)):
            options = {"key_padding_mask": padding, "attn_mask": hidden, "need_weights": need}
            options["average_attn_weights"] = average
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of masks of two types, which PyTorch still takes
                expected = made(query, key, value, **options)
            for other in (parts, whole):
                for got, wanted in zip(other(query, key, value, **options), expected, strict=True):
                    assert (got is None) == (wanted is None)
                    if got is not None:
                        torch.testing.assert_close(got, wanted, atol=1e-6 if dtype is torch.float32 else 1e-14, rtol=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal(need_weights):
    made = attention(batch_first=True)
    x = torch.randn(BATCH, LENGTH, SIZE)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(
        SplitMultiheadAttention(made)(x, x, x, **options)[0], made(x, x, x, **options)[0], atol=1e-6, rtol=0
    )
    for each in (made, SplitMultiheadAttention(made)):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            each(x, x, x, is_causal=True)


def test_gradients_and_dropout():
    made = attention(batch_first=True, dropout=0.5).train()
    parts = SplitMultiheadAttention(made)
    x = torch.randn(BATCH, LENGTH, SIZE)
    for need in (True, False):
        torch.manual_seed(1)
        one = parts(x, x, x, need_weights=need)[0]
        torch.manual_seed(2)
        assert not torch.equal(one, parts(x, x, x, need_weights=need)[0])
    parts.eval()
    made.eval()
    parts(x, x, x)[0].square().sum().backward()
    made(x, x, x)[0].square().sum().backward()
    gathered = torch.cat([p.weight.grad for p in (parts.q_proj, parts.k_proj, parts.v_proj)])
    torch.testing.assert_close(gathered, made.in_proj_weight.grad, atol=1e-4, rtol=1e-4)


def test_memory_is_shared_by_the_parts_and_not_by_the_whole():
    made = attention()
    parts = SplitMultiheadAttention(made)
    whole = join(parts)
    with torch.no_grad():
        made.in_proj_weight.zero_()
    assert not parts.v_proj.weight.any()
    assert whole.in_proj_weight.any()


@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_kept(trainable):
    made = attention(dropout=0.1, batch_first=True, dtype=torch.float64).requires_grad_(trainable).train()
    parts = SplitMultiheadAttention(made)
    assert {p.requires_grad for p in parts.parameters()} == {trainable}
    whole = join(parts)
    assert (whole.dropout, whole.batch_first, whole.training, whole.num_heads) == (0.1, True, True, HEADS)
    assert {(p.requires_grad, p.dtype) for p in whole.parameters()} == {(trainable, torch.float64)}
    assert whole.state_dict().keys() == made.state_dict().keys()
    assert all(map(torch.equal, whole.state_dict().values(), made.state_dict().values()))


class Own(nn.MultiheadAttention): ...


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        (lambda: Own(8, 2), "Own is a subclass"),
    ],
)
def test_what_cannot_be_split_says_why(made, reason):
    layer = made()
    assert reason in unsplittable(layer, Counter())
    model = nn.ModuleList([layer])
    assert open_attentions(model) == {}
    assert model[0] is layer


def test_tied_and_hooked_attentions_stay():
    one, other = attention(), attention()
    other.in_proj_weight = one.in_proj_weight
    hooked = attention()
    hooked.register_forward_hook(lambda *args: None)
    model = nn.ModuleList([one, other, hooked])
    assert open_attentions(model) == {}
    assert list(model) == [one, other, hooked]


def test_every_place_of_a_shared_attention_and_back():
    layer = attention()
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer])})
    work = opened(model).model
    assert isinstance(work["a"], SplitMultiheadAttention)
    assert work["a"] is work["b"][0]
    assert model["a"] is model["b"][0] is layer
    close_attentions(work)
    assert type(work["a"]) is nn.MultiheadAttention
    assert work["a"] is work["b"][0]
    assert all(map(torch.equal, work.state_dict().values(), model.state_dict().values()))
