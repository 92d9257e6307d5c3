"""A stand-in for servers that build models through Transformers: it does what vLLM and SGLang document.

They build the base model with parameters on the meta device, replace every `nn.Linear` by a parallel one, in the style
of the first pattern of the tensor-parallel plan that its name begins with, give memory to the parameters that are left,
and load tensors by name, strictly. Attention is a function of theirs. Processes are threads here.
"""

import itertools
import re
import sys
import threading
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_reparam import LowRankConfig, convert, to_pairs
from hf_reparam.errors import CheckpointError
from hf_reparam.layers.factored import Factored
from hf_reparam.model.serving import register
from tests import zoo

IDS = torch.tensor([5, 17, 3, 80, 41, 8, 22])


class Ranks:
    """Processes, as threads, that add their tensors up."""

    def __init__(self, size):
        self.size, self.tensors, self.barrier = size, [None] * size, threading.Barrier(size)

    def add(self, rank, tensor):
        self.tensors[rank] = tensor
        self.barrier.wait()
        total = sum(self.tensors)
        self.barrier.wait()
        return total


class Parallel(nn.Module):
    """A rank's part of a Linear: of its outputs, of its inputs, or all of it."""

    def __init__(self, dense, style, ranks, rank):
        super().__init__()
        self.style, self.ranks, self.rank = style, ranks, rank
        shape = list(dense.weight.shape)
        if style != "replicate":
            shape[style == "rowwise"] //= ranks.size
        self.weight, self.bias = nn.Parameter(torch.empty(shape)), None
        if dense.bias is not None:
            self.bias = nn.Parameter(torch.empty(shape[0]))
        for parameter in self.parameters():
            parameter.weight_loader = self.load

    @torch.no_grad()
    def load(self, parameter, tensor):
        dim = 1 if self.style == "rowwise" else 0
        if tensor.shape != parameter.shape:
            tensor = tensor.chunk(self.ranks.size, dim)[self.rank]
        parameter.copy_(tensor)

    def forward(self, x):
        if self.style != "rowwise":
            return linear(x, self.weight, self.bias)
        y = self.ranks.add(self.rank, linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class Server(nn.Module):
    """One rank's model, from a folder."""

    def __init__(self, folder, ranks, rank):
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        assert getattr(transformers, config.architectures[0]).is_backend_compatible()
        config._attn_implementation = "server"
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config, dtype=torch.float32)
        self.plan = {f"model.{key}": style for key, style in (self.model.tp_plan or {}).items()}
        self.styles = {}
        self.replace(self.model, "model", ranks, rank)
        self.model.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size))
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        if "LMHead" in config.architectures[0] or "CausalLM" in config.architectures[0]:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.model.get_input_embeddings().weight
        needed = {name for name, _ in self.named_parameters()}
        assert set(self.load(self, self.renamed(load_file(folder / "model.safetensors")), "")) >= needed
        self.eval()

    def replace(self, module, path, ranks, rank):
        for name, child in module.named_children():
            place = f"{path}.{name}"
            if isinstance(child, nn.Linear):
                style = next((style for pattern, style in self.plan.items() if re.match(pattern, place)), "replicate")
                self.styles[place] = style
                setattr(module, name, Parallel(child, style, ranks, rank))
            else:
                self.replace(child, place, ranks, rank)

    def renamed(self, tensors):
        """(name here, tensor) each, without what the model's class says is to be ignored."""
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        children = tuple(f"{name}." for name, _ in self.model.named_children())
        prefix = f"{self.model.base_model_prefix}."
        for name, tensor in sorted(tensors.items()):
            name = name.removeprefix(prefix) if prefix != "model." else name
            if not any(pattern.search(name) for pattern in ignored):
                yield f"model.{name}" if name.startswith(children) else name, tensor

    def load(self, module, weights, path):
        """Names of what was loaded; ValueError for a tensor that has no place."""
        if module is not self and hasattr(module, "load_weights"):
            yield from (f"{path}{name}" for name in module.load_weights(weights))
        parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
        parts = ((name.partition("."), tensor) for name, tensor in weights)
        for name, group in itertools.groupby(parts, key=lambda part: part[0][0]):
            inside = ((rest, tensor) for (_, _, rest), tensor in group)
            if name in children:
                yield from self.load(children[name], inside, f"{path}{name}.")
            elif name in parameters:
                for _, tensor in inside:
                    load = getattr(parameters[name], "weight_loader", lambda p, t: p.data.copy_(t))
                    load(parameters[name], tensor)
                    yield f"{path}{name}"
            else:
                raise ValueError(f"There is no module or parameter named {path}{name}")

    @torch.inference_mode()
    def forward(self, ids):
        """(tokens, hidden) and, of a language model, (tokens, vocabulary)."""
        found = self.model(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids))[None],
            use_cache=False,
            return_dict=False,
            attention_instances=dict.fromkeys(range(2), attend),
        )[0][0]
        return [found, *([self.lm_head(found)] if hasattr(self, "lm_head") else [])]


def attend(query, key, value, scaling, causal):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)


def through_instances(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    found = attention_instances[module.layer_idx](query, key, value, scaling, module.is_causal)
    return found.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def attention():
    ALL_ATTENTION_FUNCTIONS["server"] = through_instances
    yield
    del ALL_ATTENTION_FUNCTIONS["server"]


@pytest.fixture
def plugin():
    """Called twice, as a server may; undone afterwards."""
    usual = type(transformers).__getattr__
    register()
    first = type(transformers).__getattr__
    register()
    assert type(transformers).__getattr__ is first
    yield
    type(transformers).__getattr__ = usual
    del Factored.load_weights


def served(folder, size=1):
    """A server's ranks, and what the first one computes."""
    ranks = Ranks(size)
    servers = [Server(folder, ranks, rank) for rank in range(size)]
    found = [None] * size
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, servers[i](IDS))) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return servers[0], found[0]


def converted(base, form="pair"):
    small = convert(zoo.BY_BASE[base].build(), LowRankConfig(rank=6, form="pivoted"))
    return to_pairs(small) if form == "pair" else small


@torch.no_grad()
def outputs(model):
    hidden = model.base_model(IDS[None]).last_hidden_state[0]
    return [hidden, *([model.lm_head(hidden)] if hasattr(model, "lm_head") else [])]


BASES = ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"]


@pytest.mark.slow
@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("base", BASES)
def test_a_server_computes_what_the_converted_model_does(base, form, tmp_path, plugin):
    model = converted(base, form)
    model.save_pretrained(tmp_path)
    server, found = served(tmp_path)
    assert sum(isinstance(module, Factored) for module in server.modules()) > 6
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(PreTrainedModel, "init_parallel_plans"), reason="an older Transformers")
def test_two_ranks_compute_what_one_does(tmp_path, plugin):
    model = converted("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    server, found = served(tmp_path, size=2)
    layer = "model.layers.1."
    expected = {"self_attn.q_proj.down": "replicate", "self_attn.q_proj.up": "colwise"}
    expected |= {"mlp.down_proj.down": "rowwise", "mlp.down_proj.up": "replicate"}
    assert expected.items() <= {name.removeprefix(layer): style for name, style in server.styles.items()}.items()
    torch.testing.assert_close(found, outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_layer_that_stayed_dense_is_loaded(tmp_path, plugin):
    dense = zoo.BY_BASE["LlamaForCausalLM"].build()
    model = convert(dense, LowRankConfig(rank=6, form="pair", exclude_modules="*layers.1.self_attn.o_proj"))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(served(tmp_path)[1], outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_the_plugin_pairs_load_and_pivots_are_missed(tmp_path, monkeypatch):
    """As with the one file of `remote_code=True`: the names of architectures come from its `auto_map`."""
    monkeypatch.setattr(PreTrainedModel, "is_backend_compatible", classmethod(lambda cls: True))
    for form in zoo.FORMS:
        model = converted("LlamaForCausalLM", form)
        model.save_pretrained(tmp_path / form)
        monkeypatch.setattr(transformers, type(model).__name__, type(model), raising=False)
    torch.testing.assert_close(served(tmp_path / "pair")[1][0], outputs(converted(BASES[0]))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no module or parameter named .*order"):
        served(tmp_path / "pivoted")


def test_the_plugin_is_the_entry_point_of_both_servers():
    points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points.keys() == {"vllm.general_plugins", "sglang.srt.plugins"}
    for (place,) in (group.values() for group in points.values()):
        module, _, name = place.partition(":")
        assert getattr(import_module(module), name) is register


def test_architectures_are_attributes_of_transformers(plugin):
    assert transformers.ReparamLlamaForCausalLM.base_class is transformers.LlamaForCausalLM
    assert sys.modules["transformers"].ReparamBertConfig.base_class is transformers.BertConfig
    assert not hasattr(transformers, "ReparamNothing")
    assert transformers.BertForMaskedLM.__name__ == "BertForMaskedLM"


def test_tensors_of_another_layer_are_errors(plugin):
    layer = converted("BertModel").encoder.layer[0].output.dense
    weights = [("weight", torch.empty(0)), ("up.weight", torch.ones_like(layer.up.weight))]
    assert layer.load_weights(iter(weights)) == {"up.weight"}
    assert layer.up.weight.eq(1).all()
    with pytest.raises(CheckpointError, match="has no 'order'"):
        layer.load_weights([("order", torch.arange(4))])
