"""The forms that a converted model can have, and how each is asked for: what the public API changes, changes here."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan
from hf_reparam.model.host import layer_name, opened
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.heads.attention import ROLES, find_attentions
from tests import zoo

RANK = 6
SIZES = {"table": 12, "heads": 4, "experts": 6}


class Layers(nn.Module):
    """Dense layers of `torch.nn`, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.out = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 20)

    def forward(self, states):
        return self.out(self.again(self.again(self.first(states).tanh()).tanh()).tanh())


class Encoder(nn.Module):
    """An encoder with `nn.MultiheadAttention`, and an output layer."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, 20)

    def forward(self, states):
        return self.out(self.encoder(states))


FAMILIES = {
    "BERT": "BertForMaskedLM",
    "GPT-2": "GPT2LMHeadModel",  # Conv1D, one layer for query, key and value
    "T5": "T5ForConditionalGeneration",  # encoder and decoder
    "ALBERT": "AlbertForMaskedLM",  # one layer in every place
    "Llama": "LlamaForCausalLM",  # an untied head
    "Mixtral": "MixtralForCausalLM",  # fused experts
    "plain": "",
}
FORMS = {  # and the families that have them
    "pair": ["BERT", "GPT-2", "T5", "ALBERT", "Llama", "plain"],
    "pivoted": ["BERT", "GPT-2", "T5", "ALBERT", "Llama", "plain"],
    "table": ["BERT", "GPT-2", "T5", "ALBERT", "Llama"],
    "heads": ["BERT", "GPT-2", "T5", "ALBERT", "plain"],  # rotary positions allow no narrower ones
    "multihead": ["plain"],
    "experts": ["Mixtral"],
}


@dataclass(frozen=True)
class Case:
    form: str
    family: str

    @property
    def id(self) -> str:
        return f"{self.form}-{self.family}"

    @property
    def plain(self) -> bool:
        return self.family == "plain"

    def skeleton(self):
        return (Layers() if self.form in zoo.FORMS else Encoder()).eval()

    def build(self):
        """The dense model; its attention matters, which that of fresh weights hardly does."""
        torch.manual_seed(0)
        model = self.skeleton() if self.plain else zoo.BY_BASE[FAMILIES[self.family]].build(use_cache=False)
        with torch.no_grad():
            for layer in {a.layer(role) for a in find_attentions(model) for role in ROLES}:
                layer.weight *= 0.15 / layer.weight.std()
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        if self.plain:
            return {"states": torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))}
        return zoo.BY_BASE[FAMILIES[self.family]].batch()

    def asked(self, model) -> LowRankConfig | RankPlan:
        """What `convert` and `convert_folder` are told."""
        if self.form in (*zoo.FORMS, "multihead"):
            return LowRankConfig(rank=RANK, form=self.form if self.form in zoo.FORMS else "pair")
        work = opened(model).model
        (structure,) = [known for known in STRUCTURES if self.form in known.forms]
        sites = {layer_name(work, site.name): site for site in structure.sites(work) if site.reason is None}
        entries = {name: Entry(SIZES[self.form], self.form) for name in sites}
        if self.form == "heads":  # and low-rank layers in them
            outputs = {f"{n}.{s.within('output', split=True)}" for n, s in sites.items()}
            entries |= dict.fromkeys(outputs, Entry(3, "pivoted"))
        return RankPlan(entries, None if self.plain else model.config.model_type)

    def convert(self, model, **more):
        return hf_reparam.convert(model, self.asked(model), **more)

    def stream(self, source, out):
        return hf_reparam.convert_folder(source, out, self.asked(self.build()), stream=True)

    def save(self, small, folder) -> None:
        (hf_reparam.save if self.plain else type(small).save_pretrained)(small, folder)

    def load(self, folder):
        if self.plain:
            return hf_reparam.load(self.skeleton(), folder)
        auto = zoo.BY_BASE[FAMILIES[self.family]].auto
        return getattr(zoo.tf, auto).from_pretrained(folder)

    def outputs(self, model) -> list[torch.Tensor]:
        if not self.plain:
            return zoo.outputs(model, self.batch())
        with torch.no_grad():
            return [model(**self.batch())]


CASES = [Case(form, family) for form, families in FORMS.items() for family in families]


@dataclass(frozen=True)
class Made:
    """A dense model, what became of it, and the report; tests copy what they change."""

    dense: nn.Module
    small: nn.Module
    report: hf_reparam.Report


@cache
def made(case: Case) -> Made:
    dense = case.build()
    small = case.convert(dense)
    return Made(dense, small, hf_reparam.report(small))
