"""One test class for each family and form: `python -m pytest conformance -k BERT_pair`.

The files of Transformers are used as they are, but for the names by which they choose labels and expectations: a
derived class counts as its base.
"""

import sys
import unittest
from typing import Any

import torch

from conformance.families import BATCH, DENSE, FAMILIES, FORMS, LENGTH, Family
from conformance.sources import cache

sys.path.insert(0, str(cache()))

from transformers_common import test_modeling_common as common
from transformers_common import test_tensor_parallel_mixin as parallel
from transformers_common.generation.test_utils import GenerationTesterMixin
from transformers_common.test_configuration_common import ConfigTester
from transformers_common.test_fsdp_mixin import FSDPTesterMixin
from transformers_common.test_training_mixin import TrainingTesterMixin

from hf_reparam.model.config import PREFIX

parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # Llama is not among the families that Transformers singles out

_get_values = common.get_values
common.get_values = lambda mapping: [n for name in _get_values(mapping) for n in (name, PREFIX + name)]


class FamilyTester:
    """What the common tests ask about a family."""

    batch_size, seq_length, encoder_seq_length, decoder_seq_length = BATCH, LENGTH, LENGTH, LENGTH
    num_choices, is_training, num_hidden_layers, num_attention_heads, hidden_size = 4, True, 2, 4, 32
    pad_token_id = 0

    def __init__(self, family: Family, form: str) -> None:
        config = family.config()
        self.family, self.form = family, form
        self.base_model_class = family.model_class(family.classes[0], form)
        self.causal_lm_class = family.model_class(family.causal, form)
        self.sequence_classification_class = family.model_class(family.classifier, form)
        self.image_size, self.patch_size = (getattr(config, n, None) for n in ("image_size", "patch_size"))
        if self.image_size:
            self.mask_length = (self.image_size // self.patch_size) ** 2
            self.num_masks = self.mask_length // 2
            self.seq_length = self.encoder_seq_length = self.mask_length + 1

    def get_config(self) -> Any:
        return self.family.make_config(self.form)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        return config, self.family.inputs(config)


def _make(family: Family, form: str) -> type[unittest.TestCase]:
    generates = any(family.stock(name).can_generate() for name in family.classes)

    def set_up(self: Any) -> None:
        self.model_tester = FamilyTester(family, form)
        given = {} if form == DENSE else {"reparam": family.plan(form).to_dict()}
        self.config_tester = ConfigTester(
            self, config_class=family.config_class(form), has_text_modality=family.name != "ViT", **given
        )

    def with_labels(self: Any, inputs: Any, model: Any, return_labels: bool = False) -> Any:
        found = common.ModelTesterMixin._prepare_for_class(self, inputs, model, return_labels=return_labels)
        for name in dict(family.labels).get(model.__name__.removeprefix(PREFIX), ()) if return_labels else ():
            found[name] = torch.zeros(BATCH, LENGTH)[:, : LENGTH if name == "labels" else 1].squeeze(1).long()
        return found

    body = {
        "__module__": __name__,
        "all_model_classes": tuple(family.model_class(name, form) for name in family.classes),
        "model_tester": None,
        "setUp": set_up,
        "_prepare_for_class": with_labels,
        "test_config": lambda self: self.config_tester.run_common_tests(),
        **dict(family.traits),
    }
    mixins = [common.ModelTesterMixin, parallel.TensorParallelTesterMixin, FSDPTesterMixin]
    mixins += [GenerationTesterMixin] * generates + [TrainingTesterMixin] * bool(family.causal)
    name = f"{family.name.replace('-', '')}_{form}"
    return type(name, (*mixins, unittest.TestCase), body)


for _family in FAMILIES:
    for _form in FORMS:
        _class = _make(_family, _form)
        globals()[_class.__name__] = _class
