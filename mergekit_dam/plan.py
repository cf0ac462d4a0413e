"""mergekit's own plan of the merge, read: each output tensor and where its inputs come from.

Executing the plan's gather tasks with mergekit's executor gives exactly the tensors that the
merge will see: adapters merged, vocabularies aligned, slices resolved, dtypes cast, tied names
followed. Fitting on the plan is what makes `dam` compose with all that mergekit does.
"""

import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task, TaskUniverse
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import _model_out_config, _set_chat_template, _update_config_vocab
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_dam.adapters import with_lora_cache
from mergekit_dam.compatible import require_compatible
from mergekit_dam.config import parts_of
from mergekit_dam.differences import config_differences
from mergekit_dam.errors import DamError, in_one_line
from mergekit_dam.formula import Formula
from mergekit_dam.method import TO_BE_FITTED
from mergekit_dam.opening import load_tokenizer, require_model


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
    parameters: dict[str, Any]  # of mergekit's YAML, resolved for this tensor
    input_parameters: dict[ModelReference, dict[str, Any]]


@dataclass(frozen=True)
class Vocabulary:
    """How the merge's tokens are made of the sources' tokens."""

    task: BuildTokenizer
    info: TokenizerInfo
    size: int  # rows of the merged embedding, padding included

    def known(self, source: ModelReference) -> Tensor | None:
        known = [new for new, old in self.info.permutations[source].items() if old >= 0]
        return None if len(known) == self.size else torch.tensor(sorted(known))


@dataclass(frozen=True)
class Plan:
    """A merge, planned by mergekit and not executed."""

    tensors: dict[str, OutputTensor]
    teachers: tuple[ModelReference, ...]  # the sources that have data of their own
    base: ModelReference | None  # the YAML's `base_model`
    has_base: bool  # whether the base is one more source, which teaches nothing
    dtype: str | None  # to which mergekit casts the sources
    model_config: PretrainedConfig  # the merged model's config.json
    tokenizer: PreTrainedTokenizerBase
    vocabulary: "Vocabulary | None"  # where the merge aligns the sources' vocabularies
    options: MergeOptions

    @property
    def sources(self) -> tuple[ModelReference, ...]:
        """The models with coefficients, in the order of the coefficients' first axis."""
        return (*self.teachers, self.base) if self.has_base else self.teachers

    def is_whole(self, source: ModelReference) -> bool:
        """Whether the merged model's skeleton with the source's tensors is the source: its config
        is the merge's, and each of its layers is in the merge in its own place."""
        return not self.differing_keys(source) and all(
            source in output.inputs and output.name in output.inputs[source]
            for output in self.tensors.values()
        )

    @functools.cached_property
    def models_of_their_own(self) -> tuple[ModelReference, ...]:
        """The sources with data that the merged model's skeleton cannot speak for."""
        return tuple(source for source in self.teachers if not self.is_whole(source))

    def differing_keys(self, source: ModelReference) -> list[str]:
        """In which the source's config asks for other computations than the merge's."""
        trusts = self.options.trust_remote_code
        own = source.config(trusts)
        return config_differences(own, self.model_config, trust_remote_code=trusts)

    def known_tokens(self, source: ModelReference) -> Tensor | None:
        """The merge's token ids that a source knows, ascending; None where it knows all."""
        if self.vocabulary is None:
            return None
        return self.vocabulary.known(source)

    def load(
        self, names: Iterable[str], *, quiet: bool | None = None
    ) -> Iterator[tuple[str, dict[ModelReference, Tensor]]]:
        """The inputs of some output tensors, on the CPU, in mergekit's order of reading."""
        by_task: dict[Task, str] = {self.tensors[name].gather: name for name in names}
        universe = TaskUniverse(by_task)
        cached = {}
        if self.vocabulary and (handle := universe.get_handle(self.vocabulary.task)):
            # Built once: the order of the tokens that a union adds differs from call to call.
            cached[handle] = self.vocabulary.info
        targets = [universe.get_handle(task) for task in by_task]
        executor = Executor(targets, "cpu", "cpu", cached_values=cached)
        quiet = self.options.quiet if quiet is None else quiet
        read = executor.run(quiet=quiet, desc="Reading sources")
        while True:
            try:
                task, inputs = next(read)
            except StopIteration:
                return
            except (AssertionError, KeyError, RuntimeError, ValueError) as error:
                raise DamError(f"mergekit cannot read the sources: {in_one_line(error)}") from error
            yield by_task[task], inputs


def plan_merge(
    merge: MergeConfiguration,
    options: MergeOptions,
    formula: Formula,
    *,
    use_base: bool | None = False,
) -> Plan:
    """Plan a merge by `dam` whose coefficients are yet to be fitted.

    With `use_base` a base that is not listed gets coefficients, too; None: where that is possible.
    Reads configs, headers and tokenizers, no weights. Raises DamError for what mergekit refuses.
    """
    merge = copy.deepcopy(merge)
    merge.parameters = {**(merge.parameters or {}), "coefficients": TO_BE_FITTED}
    teachers = source_models(merge, formula)
    require_compatible(merge, options)
    options = with_lora_cache(options, merge.referenced_models())
    LoaderCache().setup(options=options)
    for model in sorted(merge.referenced_models(), key=str):
        require_model(model, options)
    try:
        plan = _plan(merge, options, teachers)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise DamError(f"mergekit cannot plan this merge: {in_one_line(error)}") from error
    hindrance = _hindrance(plan, formula)
    if use_base and hindrance:
        raise DamError(f"`dam.use_base: true`: {hindrance}.")
    return replace(plan, has_base=use_base is not False and not hindrance)


def _hindrance(plan: Plan, formula: Formula) -> str:
    """Why the base cannot be one more source; nothing where it can."""
    if plan.base is None:
        return "there is no base: set `base_model`"
    if formula == "task_vectors" or plan.base in plan.teachers:
        return "the base takes part already: leave `use_base` out"
    without = (o for o in plan.tensors.values() if plan.base not in o.inputs and not o.optional)
    output = next(without, None)
    return f"the base gives no {output.name}: add it to that slice's `sources`" if output else ""


def _plan(merge: MergeConfiguration, options: MergeOptions, teachers) -> Plan:
    architecture = get_architecture_info(merge, options)
    config = _model_out_config(merge, architecture, options.trust_remote_code)
    tasks = MergePlanner(merge, architecture, options, config).plan_to_disk(out_path="")
    vocabulary = _vocabulary(merge, tasks)
    if vocabulary is not None:
        padding = _padding(merge)
        tokenizer = vocabulary.info.tokenizer
        _update_config_vocab(config, architecture, tokenizer, pad_to_multiple_of=padding)
    else:
        tokenizer = load_tokenizer(merge.base_model or teachers[0], options)
    _set_chat_template(copy.deepcopy(tokenizer), merge)  # raises for one that is none
    return Plan(
        tensors={task.tensor_name: _output(task) for task in tasks if isinstance(task, SaveTensor)},
        teachers=teachers,
        base=merge.base_model,
        has_base=False,
        dtype=merge.dtype and merge.dtype.removeprefix("torch."),
        model_config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        options=options,
    )


def plan_alone(source: ModelReference, merge: MergeConfiguration, options: MergeOptions) -> Plan:
    """One source as it is, over its own vocabulary, in the merge's dtype."""
    alone = MergeConfiguration(
        merge_method="dam", models=[{"model": source}], dtype=merge.dtype, out_dtype=merge.out_dtype
    )
    return plan_merge(alone, options, "weights")


def plan_source(plan: Plan, source: ModelReference, merge: MergeConfiguration) -> Plan:
    """One source as it is, with its own layers, in the merge's dtype and over its vocabulary.

    A token that the source lacks gets no embedding here; it takes no part in the source's loss.
    """
    own = plan_alone(source, merge, plan.options)
    if plan.vocabulary is None:
        return own
    aligned = {
        name: _over_vocabulary(output, plan.vocabulary, merge)
        if output.vocabulary_axis is not None
        else output
        for name, output in own.tensors.items()
    }
    own.model_config.get_text_config().vocab_size = plan.vocabulary.size
    return replace(own, tensors=aligned, vocabulary=plan.vocabulary, tokenizer=plan.tokenizer)


def _over_vocabulary(
    output: OutputTensor, vocabulary: Vocabulary, merge: MergeConfiguration
) -> OutputTensor:
    permuted = PermutedVocabulary(
        gather_tensors=output.gather,
        tokenizer_task=vocabulary.task,
        tokens=None,
        pad_to_multiple_of=_padding(merge),
        base_model=None,
        vocabulary_axis=output.vocabulary_axis,
    )
    return replace(output, gather=permuted, is_aligned=True)


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
        parameters=dict(merging.parameters.items()),
        input_parameters={m: dict(v.items()) for m, v in merging.input_parameters.items()},
    )


def source_models(merge: MergeConfiguration, formula: Formula) -> tuple[ModelReference, ...]:
    """The models that the YAML lists as sources, in its order.

    Under task vectors the base's own difference is zero, so it is none even where it is listed.
    """
    listed: list[ModelReference] = []
    for part in parts_of(merge):
        listed += [entry.model for entry in part.models or ()]
        listed += [source.model for piece in part.slices or () for source in piece.sources]
    base = merge.base_model if formula == "task_vectors" else None
    if formula == "task_vectors" and base is None:
        raise DamError("`formula: task_vectors` needs the model that it subtracts: set base_model.")
    sources = tuple(model for model in dict.fromkeys(listed) if model != base)
    if not sources:
        raise DamError("The config names no source besides the base: add some under `models`.")
    return sources


def _padding(merge: MergeConfiguration) -> int | None:
    """The multiple to which the YAML pads the vocabulary."""
    return merge.tokenizer.pad_to_multiple_of if merge.tokenizer else None


def _vocabulary(merge: MergeConfiguration, tasks: Iterable[Task]) -> Vocabulary | None:
    """What mergekit makes of the YAML's tokenizer setting, where there is one."""
    for task in tasks:
        if isinstance(task, BuildTokenizer):
            ((_, info),) = Executor([task]).run(quiet=True)
            size = len(info.tokenizer.get_vocab())
            return Vocabulary(task, info, size + -size % (_padding(merge) or 1))
    return None
