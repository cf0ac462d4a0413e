"""mergekit's own plan of the merge, read: each output tensor and where its inputs come from.

Executing the plan's gather tasks with mergekit's executor gives exactly the tensors that the
merge will see: adapters merged, vocabularies aligned, slices resolved, dtypes cast, tied names
followed. Fitting on the plan is what makes `dam` compose with all that mergekit does.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import _model_out_config, _update_config_vocab
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from mergekit_dam.errors import DamError
from mergekit_dam.formula import Formula
from mergekit_dam.method import TO_BE_FITTED


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged checkpoint."""

    name: str
    gather: Task  # gives {ModelReference: Tensor}
    inputs: dict[ModelReference, tuple[str, ...]]  # names to look for in each model, best first
    is_aligned: bool  # whether the vocabulary is permuted or cut on the way
    optional: bool
    vocabulary_axis: int | None
    out_dtype: torch.dtype | None  # what the merge saves it as, if not the inputs' dtype


@dataclass(frozen=True)
class Plan:
    """A merge, planned by mergekit and not executed."""

    tensors: dict[str, OutputTensor]
    sources: tuple[ModelReference, ...]  # the order of the coefficients' first axis
    base: ModelReference | None  # of task vectors
    model_config: PretrainedConfig  # the merged model's config.json
    tokenizer: PreTrainedTokenizerBase
    options: MergeOptions

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, dict[ModelReference, Tensor]]]:
        """The inputs of some output tensors, on the CPU, in mergekit's order of reading."""
        by_task: dict[Task, str] = {self.tensors[name].gather: name for name in names}
        executor = Executor(list(by_task), math_device="cpu", storage_device="cpu")
        for task, inputs in executor.run(quiet=self.options.quiet, desc="Reading sources"):
            yield by_task[task], inputs


def plan_merge(merge: MergeConfiguration, options: MergeOptions, formula: Formula) -> Plan:
    """Plan a merge by `dam` whose coefficients are yet to be fitted.

    Reads configs, headers and tokenizers, no weights. Raises DamError for what mergekit refuses.
    """
    merge = copy.deepcopy(merge)
    merge.parameters = {**(merge.parameters or {}), "coefficients": TO_BE_FITTED}
    sources = source_models(merge, formula)
    LoaderCache().setup(options=options)
    for model in merge.referenced_models():
        _require_model(model, options)
    try:
        return _plan(merge, options, sources)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise DamError(f"mergekit cannot plan this merge: {error}") from error


def _plan(merge: MergeConfiguration, options: MergeOptions, sources) -> Plan:
    architecture = get_architecture_info(merge, options)
    config = _model_out_config(merge, architecture, options.trust_remote_code)
    tasks = MergePlanner(merge, architecture, options, config).plan_to_disk(out_path="")
    tokenizer = _tokenizer(merge, options, tasks)
    if any(isinstance(task, BuildTokenizer) for task in tasks):
        padding = merge.tokenizer.pad_to_multiple_of if merge.tokenizer else None
        _update_config_vocab(config, architecture, tokenizer, pad_to_multiple_of=padding)
    return Plan(
        tensors={task.tensor_name: _output(task) for task in tasks if isinstance(task, SaveTensor)},
        sources=sources,
        base=merge.base_model,
        model_config=config,
        tokenizer=tokenizer,
        options=options,
    )


def _output(save: SaveTensor) -> OutputTensor:
    merging = save.tensor_task
    gather = merging.gather_tensors
    is_aligned = not isinstance(gather, GatherTensors)
    infos = (gather.gather_tensors if is_aligned else gather).weight_info
    return OutputTensor(
        name=save.tensor_name,
        gather=gather,
        inputs={
            model: (info.name, *(info.aliases or ()), *(info.tied_names or ()))
            for model, info in infos.items()
        },
        is_aligned=is_aligned,
        optional=save.optional,
        vocabulary_axis=merging.output_weight.vocabulary_axis,
        out_dtype=dtype_from_name(save.dtype),
    )


def source_models(merge: MergeConfiguration, formula: Formula) -> tuple[ModelReference, ...]:
    """The models that get coefficients, in the YAML's order.

    A `base_model` that is not listed takes no part; under task vectors the base's own
    difference is zero, so it is no source even where it is listed.
    """
    listed: list[ModelReference] = []
    for part in (merge, *(merge.modules or {}).values()):
        listed += [entry.model for entry in part.models or ()]
        listed += [source.model for piece in part.slices or () for source in piece.sources]
    base = merge.base_model if formula == "task_vectors" else None
    if formula == "task_vectors" and base is None:
        raise DamError("`formula: task_vectors` needs the model that it subtracts: set base_model.")
    sources = tuple(model for model in dict.fromkeys(listed) if model != base)
    if not sources:
        raise DamError("The config names no source besides the base: add some under `models`.")
    return sources


def _require_model(model: ModelReference, options: MergeOptions) -> None:
    try:
        model.config(trust_remote_code=options.trust_remote_code)
        LoaderCache().get(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DamError(
            f"The model {model} cannot be opened ({reason}): give the path of a folder with "
            "config.json and weights, or a name on the Hub."
        ) from error


def _tokenizer(merge: MergeConfiguration, options: MergeOptions, tasks) -> Any:
    """The merged model's tokenizer: built by mergekit, or the donor's that it would copy."""
    for task in tasks:
        if isinstance(task, BuildTokenizer):
            ((_, info),) = Executor([task]).run(quiet=True)
            return info.tokenizer
    donor = merge.base_model or source_models(merge, "weights")[0]
    return load_tokenizer(donor, options)


def load_tokenizer(model: ModelReference, options: MergeOptions) -> PreTrainedTokenizerBase:
    """A model's own tokenizer. Raises DamError where it has none."""
    try:
        return AutoTokenizer.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        logging.debug("loading a tokenizer", exc_info=error)
        raise DamError(
            f"The model {model} has no tokenizer that transformers can load: put its tokenizer "
            "files beside its weights."
        ) from error
