"""`nn.MultiheadAttention` with its four projections as layers of their own, so that each can be factored, and back."""

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reparam.layers.dense import shape_of
from hf_reparam.layers.factored import Factored
from hf_reparam.layers.surgery import has_hooks, replace_modules

__all__ = ["SplitMultiheadAttention", "changed", "close_attentions", "join", "open_attentions", "unsplittable"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class SplitMultiheadAttention(nn.Module):
    """The same function of the same arguments as an `nn.MultiheadAttention`, through four projections.

    PyTorch's encoder layers look for `in_proj_bias` before they take their fused path, which would read dense weights;
    it is None here, and they call `forward`.

    Args:
        q_proj, k_proj, v_proj: Linear or LowRankLinear, (embed_dim -> embed_dim), from kdim, from vdim.
        out_proj: (embed_dim -> embed_dim).
        num_heads: heads, each embed_dim / num_heads wide unless they were made narrower.
        dropout: of attention weights, in training.
        batch_first: whether inputs are (batch, length, width) instead of (length, batch, width).
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        *,
        num_heads: int,
        dropout: float,
        batch_first: bool,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.num_heads, self.dropout, self.batch_first = num_heads, dropout, batch_first
        self.embed_dim = shape_of(q_proj)[1]
        self.head_dim = self.embed_dim // num_heads
        self.scale: float = self.head_dim**-0.5  # stays when heads become narrower

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
        """As `nn.MultiheadAttention.forward`: shapes, masks, weights and errors.

        Raises:
            RuntimeError: is_causal without attn_mask, as there.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, first = query.dim() == 3, self.batch_first
        q, k, v = (
            self._heads(projection(x if not batched or first else x.transpose(0, 1)))
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(q, k, attn_mask, key_padding_mask)
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
        return out if first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) or (length, embed_dim) -> (batch, heads, length, width)."""
        x = x if x.dim() == 3 else x[None]
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one to be added to scores, (batch, heads, length, source length) or what broadcasts to it."""
        added = None
        if attention is not None:
            added = _as_added(attention, q.dtype)
            added = added.unflatten(0, (-1, self.num_heads)) if added.dim() == 3 else added
        if padding is not None:
            columns = _as_added(padding, q.dtype).reshape(-1, 1, 1, k.shape[2])
            added = columns if added is None else added + columns
        return added

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


def split(attention: nn.MultiheadAttention) -> SplitMultiheadAttention:
    """The projections of an attention as Linears that share its memory."""
    size = attention.embed_dim
    if attention.in_proj_weight is not None:
        parts = attention.in_proj_weight.split(size)
    else:
        parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.split(size)
    q, k, v = (_linear(weight, bias) for weight, bias in zip(parts, biases, strict=True))
    out = _linear(attention.out_proj.weight, attention.out_proj.bias)
    options = {"dropout": attention.dropout, "batch_first": attention.batch_first}
    made = SplitMultiheadAttention(q, k, v, out, num_heads=attention.num_heads, **options)
    return made.train(attention.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of these very numbers."""
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


@torch.no_grad()
def join(attention: SplitMultiheadAttention) -> nn.MultiheadAttention:
    """The `nn.MultiheadAttention` of four dense projections; its numbers are copies."""
    q, k, v, out = (attention.get_submodule(name) for name in _PROJECTIONS)
    like, bias = q.get_parameter("weight"), q.bias is not None
    made = nn.MultiheadAttention(
        out.in_features,
        attention.num_heads,
        attention.dropout,
        bias=bias,
        kdim=k.in_features,
        vdim=v.in_features,
        batch_first=attention.batch_first,
        device=like.device,
        dtype=like.dtype,
    )
    target = split(made)
    for name in _PROJECTIONS:
        source, place = attention.get_submodule(name), target.get_submodule(name)
        place.get_parameter("weight").copy_(source.get_parameter("weight"))
        if source.bias is not None:
            place.get_parameter("bias").copy_(source.get_parameter("bias"))
    for parameter in made.parameters():
        parameter.requires_grad_(like.requires_grad)
    return made.train(attention.training)


def open_attentions(model: nn.Module, kept: Collection[nn.Module] = ()) -> dict[nn.Module, nn.Module]:
    """Show every attention of a working copy in split form, over the same memory. Changes the copy.

    Args:
        model: the working copy.
        kept: attentions that stay whole.

    Returns:
        Attention -> what is in its place.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m is not model and m not in kept]
    splits: dict[nn.Module, nn.Module] = {m: split(m) for m in found if unsplittable(m, owners) is None}
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
