"""Models: for any `BertForMaskedLM` a `ReparamBertForMaskedLM(ReparamMixin, BertForMaskedLM)`, made on demand.

The base class builds its usual skeleton; the mixin then swaps the layers that the plan names for empty low-rank ones
of the same shape, before anything is initialised, tied or sharded. Weights arrive by Transformers' own loading.
"""

import contextlib
import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_reparam.compat.loading import LoadingSeam, drawing_nothing, inherit_conversions, record_outputs_as
from hf_reparam.compat.marks import NO_CODE_FILE, has_numbers, ignore_in_files
from hf_reparam.errors import PlanError, TargetError
from hf_reparam.layers.factored import Factored
from hf_reparam.model.card import prepare_upload
from hf_reparam.model.config import PREFIX, PUBLIC_MODULE, Derived, config_class, plan_of
from hf_reparam.model.drawing import deviations, draw, draw_new, out_of_sight
from hf_reparam.model.host import embeddings_of
from hf_reparam.model.naming import check_absent, low_rank, while_loading
from hf_reparam.model.parallel import factor_entries, factor_rules
from hf_reparam.model.remote import named_in_config, write_module
from hf_reparam.model.sites import check_forms, fit, note_plan
from hf_reparam.model.stored import check_factors, check_folder, marker_patterns, markers, renew_layers, stored_shapes
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.structure import Replacement

_HUB_OPTIONS = {"repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags"}


class ReparamMixin(Derived, LoadingSeam):
    """What a derived model class adds to its base: low-rank layers by plan, and checkpoints that fail loudly."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # base's contract
        on_meta = torch.get_default_device().type == "meta"
        with drawing_nothing() if on_meta else contextlib.nullcontext():  # no number there to draw
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _swap(self, strict=True)  # for classes that have no post_init, and to judge the plan on the finished skeleton
        ignore_in_files(self, marker_patterns(self))

    def post_init(self) -> None:
        """Swap the layers, then let the base initialise, tie and shard what is there."""
        _swap(self, strict=False)
        super().post_init()  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """As the base's, but for low-rank layers, which it does not know. Numbers that were loaded are left alone."""
        layers = [layer for _, layer in low_rank(self)]  # type: ignore[arg-type]
        drawn = [layer for layer in layers if not has_numbers(layer)]
        present = [layer for layer in drawn if not next(layer.parameters()).is_meta]
        with out_of_sight(layers):
            sizes = deviations(self, present)
            super().initialize_weights()  # type: ignore[misc]
        for module in drawn:
            draw(module, self.config, sizes.get(module))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base's. Raises TargetError for embeddings of low rank, which it cannot resize."""
        if any(isinstance(table, Factored) for table in embeddings_of(self)):
            if new_num_tokens is None and not args and not kwargs:
                return self.get_input_embeddings()  # type: ignore[attr-defined]
            raise TargetError(
                "embeddings of low rank cannot be resized: merge the model, resize the dense one and convert it again"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    def init_parallel_plans(self) -> None:
        """As the base's. In the tensor-parallel plan, entries for the factors of low-rank layers go before the rest."""
        super().init_parallel_plans()  # type: ignore[misc]
        plan: dict[str, str] = self.tp_plan  # type: ignore[attr-defined]
        entries = factor_entries(plan, low_rank(self))  # type: ignore[arg-type]
        rest = dict(plan)
        plan.clear()
        plan.update({**entries, **rest})

    def parallel_rules(self, rules: dict[str, str]) -> dict[str, str]:
        """The base's tensor-parallel rules, with a low-rank layer's rule for its factors."""
        for name, layer in low_rank(self):  # type: ignore[arg-type]
            rules = factor_rules(rules, name, layer)
        return rules

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # base's contract
        """As the base's. The model itself leaves markers of its low-rank layers to `save_pretrained`; inside another
        object, which may know nothing of its plan, they stay."""
        state: Any = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if not args and not {"destination", "prefix"} & kwargs.keys():
            for name, module in self.named_modules(remove_duplicate=False):  # type: ignore[attr-defined]
                marker = state.get(f"{name}.weight") if isinstance(module, Factored) else None
                if marker is not None and marker.numel() == 0:
                    del state[f"{name}.weight"]
        return state

    def save_pretrained(  # base's contract
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        *,
        remote_code: bool = PUBLIC_MODULE != "hf_reparam",
        **kwargs: Any,
    ) -> None:
        """As the base's. Adds an empty tensor under the dense weight's name of the first layer of each kind.

        The stock class would otherwise find its weights missing and go on with random numbers; the marker's shape makes
        it raise. Names are those of the live modules: conversions to older checkpoint layouts know no factors.

        With `remote_code` it also writes one Python file, with which `from_pretrained(..., trust_remote_code=True)`
        works where hf_reparam is not installed.
        """
        folder, hub = Path(save_directory), {key: kwargs.pop(key) for key in _HUB_OPTIONS & kwargs.keys()}
        send = None
        if push_to_hub and is_main_process:
            hub = {"repo_id": folder.name, "token": kwargs.get("token"), **hub}
            send = prepare_upload(self, folder, remote_code=remote_code, **hub)
        for name, layer in low_rank(self):  # type: ignore[arg-type]
            layer.check_loaded(name)
        state = dict(state_dict or self.state_dict())
        state |= {name: marker for name, marker in markers(self).items() if name not in state}
        kwargs["save_original_format"] = False
        note_plan(self)
        with named_in_config(self, remote_code=remote_code):
            super().save_pretrained(save_directory, is_main_process, state, **kwargs)  # type: ignore[misc]
        if remote_code and is_main_process:
            write_module(folder)
        if send is not None:
            send()

    def push_to_hub(  # base's contract
        self, repo_id: str, *, max_shard_size: int | str = "50GB", remote_code: bool = False, **options: Any
    ) -> Any:
        """As the base's, with its options, and with a model card that says what was converted and how.

        A card that the repository has is kept: only the section between this package's marks is replaced.
        """
        with TemporaryDirectory() as folder:
            send = prepare_upload(self, Path(folder), repo_id, remote_code=remote_code, **options)
            self.save_pretrained(folder, max_shard_size=max_shard_size, remote_code=remote_code)
            return send()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:  # base's contract
        """As the base's, from safetensors alone. Raises CheckpointError when a factor is missing, or left over."""
        source = str(args[0]) if args else str(kwargs.get("pretrained_model_name_or_path") or "")
        check_folder(Path(source) / (kwargs.get("subfolder") or ""))
        kwargs["use_safetensors"] = True  # nothing is ever unpickled
        with while_loading(ignore_mismatched_sizes=bool(kwargs.get("ignore_mismatched_sizes"))):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
            if kwargs.get("state_dict") is None:
                check_factors(model, info["missing_keys"], info["unexpected_keys"], source)
            note_plan(model)
        for name, layer in low_rank(model):
            layer.check_loaded(f"{source}: {name}")
        return (model, info) if output_loading_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the base class: Transformers draws new heads and renames tensors otherwise for code that it has not."""
        return cls.base_class.is_custom_code()

    def before_loading(self, state: Any, files: Any) -> None:
        """Look at what the file has: layers of another head than this model's become dense."""
        stored = stored_shapes(state, files)
        check_absent(self, stored)
        renew_layers(self, stored)

    def on_wrong_shapes(self, wrong: Any) -> None:
        """Raise RuntimeError, before the base draws random numbers of the configuration's shapes, and then raises."""
        name, stored, expected = wrong[0]
        raise RuntimeError(
            f"{len(wrong)} tensors do not have the shapes that config.json gives them, among them {name}: "
            f"{tuple(stored)} in the file, {tuple(expected)} in the model. If that is meant, as for a new head, "
            "ignore_mismatched_sizes=True draws these at random"
        )


@functools.cache
def model_class(base: Any) -> Any:
    """The derived model class of a stock one; a derived one is returned as it is."""
    if issubclass(base, ReparamMixin):
        return base

    @functools.wraps(base.__init__)
    def __init__(self, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: N807  # shows the base's signature
        ReparamMixin.__init__(self, *args, **kwargs)

    body = {
        "__init__": __init__,
        "__module__": PUBLIC_MODULE,
        "__doc__": f"`{base.__name__}` with low-rank layers.",
        "config_class": config_class(base.config_class),
        "base_class": base,
        "derive": staticmethod(model_class),
    }
    make: Any = type(base)
    derived = make(f"{PREFIX}{base.__name__}", (ReparamMixin, base), {**NO_CODE_FILE, **body})
    record_outputs_as(base, derived)
    inherit_conversions(base, derived)
    return derived


def _swap(model: Any, *, strict: bool) -> None:
    """Replace what the plan names by empty modules, and initialize them where there is memory."""
    plan = plan_of(model.config)
    check_forms(plan)
    for structure in STRUCTURES:
        new = []
        for found, entry in fit(plan, model, structure, strict=strict, other_heads=True).values():
            if found.site.entry is not None:
                raise PlanError(f"{found.name}: the plan holds it as {entry}, and the model as {found.site.entry}")
            new.append(structure.skeleton(found.site, entry))
        together = Replacement.joined(new)
        together.install(model)
        draw_new(together.new(), model.config)
