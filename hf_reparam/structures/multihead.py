"""`nn.MultiheadAttention` with its four projections as layers of their own, so that each can be factored, and back."""

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.layers.dense import has_hooks
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.surgery import replace_modules


class SplitMultiheadAttention(nn.Module):
    """The function of an `nn.MultiheadAttention`, through four Linears that share its memory.

    PyTorch's encoder layers look for `in_proj_bias` before they take their fused path, which would read dense weights;
    it is None here, and they call `forward`.
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.embed_dim, self.batch_first = attention.embed_dim, attention.batch_first
        self.head_dim = self.embed_dim // self.num_heads
        self.scale: float = self.head_dim**-0.5  # stays when heads become narrower
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.split(self.embed_dim)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.split(self.embed_dim)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: shapes, masks, weights and errors."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        turned = batched and not self.batch_first

        def heads(projection: nn.Module, x: Tensor) -> Tensor:  # (batch, heads, length, width)
            x = projection(x.transpose(0, 1) if turned else x)
            return (x if batched else x[None]).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q_proj, query), heads(self.k_proj, key), heads(self.v_proj, value)
        mask = None  # of (batch, heads, length, source length), or what broadcasts to it
        if attn_mask is not None:
            mask = _as_added(attn_mask, q.dtype)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            columns = _as_added(key_padding_mask, q.dtype).reshape(-1, 1, 1, k.shape[2])
            mask = columns if mask is None else mask + columns
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropped) if dropped else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped, scale=self.scale)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if turned else out, weights

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True, which leaves out, becomes minus infinity; numbers are added as they are."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def unsplittable(attention: nn.MultiheadAttention, owners: Counter[int]) -> str | None:
    """Why an attention stays as it is, or None. `owners` counts the modules that hold each parameter, by id."""
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} is a subclass of nn.MultiheadAttention"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "add_bias_kv adds a key and a value that no projection makes"
    if attention.add_zero_attn:
        return "add_zero_attn adds a key and a value that no projection makes"
    if any(owners[id(p)] > 1 for p in attention.parameters()):
        return "tied: another module holds the same parameter"
    return "has hooks, which would be lost" if has_hooks(attention) else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of these very numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


@torch.no_grad()
def join(attention: SplitMultiheadAttention) -> nn.MultiheadAttention:
    """The `nn.MultiheadAttention` of four dense projections; its numbers are copies."""
    q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    like = q.weight
    made = nn.MultiheadAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        bias=q.bias is not None,
        kdim=k.in_features,
        vdim=v.in_features,
        batch_first=attention.batch_first,
        device=like.device,
        dtype=like.dtype,
    )
    SplitMultiheadAttention(made).load_state_dict(attention.state_dict())  # the same memory
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    parts = [getattr(made, name) for name in names]
    pairs = zip(parts, (q.weight, q.bias, q.weight, k.weight, v.weight), strict=True)
    for mine, theirs in (*pairs, (made.out_proj.weight, out.weight), (made.out_proj.bias, out.bias)):
        if mine is not None:
            mine.requires_grad_(theirs.requires_grad)
    return made.train(attention.training)


def open_attentions(model: nn.Module, kept: Collection[nn.Module] = ()) -> dict[nn.Module, nn.Module]:
    """Show the attentions of a working copy, but for `kept`, in split form over the same memory: old -> new module."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m is not model and m not in kept]
    whole = [m for m in found if unsplittable(m, owners) is None]
    splits: dict[nn.Module, nn.Module] = {attention: SplitMultiheadAttention(attention) for attention in whole}
    replace_modules(model, splits)
    return splits


def changed(attention: nn.Module) -> bool:
    """Whether it is an attention that is no longer what `open_attentions` made: low-rank, or with narrower heads."""
    if not isinstance(attention, SplitMultiheadAttention):
        return False
    low_rank = any(isinstance(child, Factored) for child in attention.children())
    return low_rank or attention.head_dim * attention.num_heads < attention.embed_dim


def close_attentions(model: nn.Module) -> None:
    """Join every attention that is dense and as wide as it was, as copies. Changes the model."""
    found = [m for m in model.modules() if isinstance(m, SplitMultiheadAttention) and not changed(m)]
    replace_modules(model, {m: join(m) for m in found if m is not model})
