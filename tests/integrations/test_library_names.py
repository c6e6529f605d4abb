"""What gemini knows of other libraries by name is still called so in the versions that are installed.

Whoever renames a method, an argument or a file does not tell: an override is never called, a refusal never raised. So
each such name is looked up here, where the library says it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import accelerate
import lightning.pytorch as lightning_pytorch
import peft
import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from gemini import MissingLibraryError
from gemini.integrations import overrides
from gemini.integrations import transformers as trainer_integration
from gemini.nn import causal_lm
from gemini.pretrained import files
from gemini.pretrained.conversions import is_transformers_model
from gemini.pretrained.directory import _SHARD
from gemini.pretrained_model import GENERATION_CONFIG
from gemini.slicing import batch_rows


class Base:
    def old_name(self) -> int:
        return 1

    @property
    def old_property(self) -> int:
        return 1


def test_a_method_that_the_library_has_renamed_is_found_out() -> None:
    class Override(Base):
        def new_name(self) -> int:
            return 2

    Override.__module__ = "gemini.somewhere"
    with pytest.raises(MissingLibraryError, match=r"gemini\.somewhere needs Base\.new_name, which .* does not have"):
        overrides.check_overrides(Override, Base)
    overrides.check_overrides(Override, Base, added={"new_name"})


def test_a_property_that_the_library_has_renamed_is_found_out() -> None:
    class Override(Base):
        new_property = property(lambda self: 2)

    with pytest.raises(MissingLibraryError, match=r"Base\.new_property"):
        overrides.check_overrides(Override, Base)


def overridden_in(module: ModuleType) -> Iterator[tuple[type, type]]:
    """Yield the classes of a module that derive from another library's, with that one."""
    for ours in vars(module).values():
        if inspect.isclass(ours) and ours.__module__ == module.__name__:
            for theirs in ours.__mro__[1:]:
                if theirs is not object and not theirs.__module__.startswith("gemini"):
                    yield ours, theirs
                    break


@pytest.mark.parametrize(
    ("module", "name", "bases"),
    [
        ("transformers", "GeminiTrainerMixin", {transformers.Trainer}),
        ("accelerate", "GeminiAccelerator", {accelerate.Accelerator, AcceleratedOptimizer}),
        ("lightning", "GeminiStrategy", {SingleDeviceStrategy, Precision}),
    ],
)
def test_every_integration_looks_for_what_it_overrides(
    module: str, name: str, bases: set[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without one of the methods: the integration cannot be imported, and says which one it is."""
    checked: list[tuple[str, type]] = []
    real = overrides.check_overrides

    def check(ours: type, theirs: type, **options: Any) -> None:
        checked.append((ours.__name__, theirs))
        real(ours, theirs, **options)

    monkeypatch.setattr(overrides, "check_overrides", check)
    found = load_again(f"gemini.integrations.{module}")
    assert {theirs for _, theirs in checked} == bases
    assert name in {ours for ours, _ in checked}
    for ours, theirs in overridden_in(found):
        own = {each for each in vars(ours) if not each.startswith("__")}
        assert not own or (ours.__name__, theirs) in checked


def load_again(name: str) -> ModuleType:
    """Run a module's code once more, in a module of its own."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_callbacks_of_training_files_are_called() -> None:
    from gemini.recipe import progress, run

    for ours in (progress.ProgressCallback, run._StopCallback):
        events = {name for name in vars(ours) if name.startswith("on_")}
        assert events
        assert events <= set(vars(transformers.TrainerCallback))


def test_refused_arguments_are_arguments_of_a_trainer() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(trainer_integration._REFUSED_ARGUMENTS) <= fields


def test_the_number_of_gpus_is_where_it_is_set(tmp_path: Any) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3


def test_files_have_the_names_that_the_libraries_give_them() -> None:
    from peft.utils import constants
    from transformers import utils

    assert files.SINGLE_FILE == utils.SAFE_WEIGHTS_NAME
    assert files.INDEX == utils.SAFE_WEIGHTS_INDEX_NAME
    assert files.CONFIG == utils.CONFIG_NAME
    assert GENERATION_CONFIG == utils.GENERATION_CONFIG_NAME
    assert files.ADAPTER_FILE == constants.SAFETENSORS_WEIGHTS_NAME
    assert files.ADAPTER_CONFIG == constants.CONFIG_NAME


def tiny_llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_a_shard_of_a_model_is_recognised(tmp_path: Any) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(_SHARD.fullmatch(name) for name in shards)


def test_what_makes_a_transformers_model_is_found_in_every_one() -> None:
    assert is_transformers_model(tiny_llama())
    assert not is_transformers_model(torch.nn.Linear(2, 2))
    for name in ("_no_split_modules", "_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing", "_init_weights"):
        assert hasattr(transformers.PreTrainedModel, name), name
    for name in ("_from_config", "_auto_class", "loss_function", "get_output_embeddings", "loss_type"):
        assert hasattr(transformers.PreTrainedModel, name) or hasattr(tiny_llama(), name), name
    assert hasattr(tiny_llama(), "all_tied_weights_keys")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft's calls
def test_what_makes_a_model_with_adapters_is_found_in_one() -> None:
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for name in ("peft_config", "get_base_model"):
        assert hasattr(adapted, name), name
    assert adapted.base_model.prefix == "lora_"
    wrapped = next(module for name, module in adapted.named_modules() if name.endswith("q_proj"))
    assert hasattr(wrapped, "base_layer")
    assert callable(wrapped.reset_lora_parameters)
    kept = peft.utils.ModulesToSaveWrapper(torch.nn.Linear(2, 2), "default")
    assert {"original_module", "modules_to_save"} <= {name for name, _ in kept.named_children()}


def test_the_loss_of_a_causal_language_model_takes_what_the_sliced_one_does() -> None:
    loss = LOSS_MAPPING["ForCausalLM"]
    assert loss.__name__ == causal_lm._LOSS_NAME
    named = {
        name
        for name, each in inspect.signature(loss).parameters.items()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert named == causal_lm.LOSS_ARGUMENTS


def test_arguments_with_rows_are_arguments_of_some_block() -> None:
    """A name that no block has any more would let a tensor be refused that could be divided."""
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.t5.modeling_t5 import T5Block

    blocks = (BertLayer, LlamaDecoderLayer, T5Block)
    assert all(issubclass(block, GradientCheckpointingLayer) for block in blocks)
    known = {name for block in blocks for name in inspect.signature(block.forward).parameters}
    assert set(batch_rows.ROW_DIMS) <= known


def test_arguments_of_torch_s_blocks_have_the_names_of_their_rows() -> None:
    known = {name for block in batch_rows._TORCH_BLOCKS for name in inspect.signature(block.forward).parameters}
    assert set(batch_rows.TORCH_ROW_DIMS) <= known


def test_weight_averaging_of_lightning_is_refused_by_class() -> None:
    for name in ("StochasticWeightAveraging", "WeightAveraging"):
        assert inspect.isclass(getattr(lightning_pytorch.callbacks, name))
