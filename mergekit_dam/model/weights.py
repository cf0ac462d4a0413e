"""The sources' weights, gathered by mergekit, held on one device."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.compatible import differing_shapes
from mergekit_dam.errors import DamError
from mergekit_dam.formula import combine
from mergekit_dam.plan import OutputTensor, Plan
from mergekit_dam.task_vectors import Preparation, prepare


@dataclass(frozen=True)
class Stack:
    """The inputs of one output tensor, each of shape S."""

    sources: tuple[Tensor, ...]  # of the sources that have this tensor
    rows: tuple[int, ...]  # those sources' rows in the coefficients
    base: Tensor | None  # of task vectors
    prepared: tuple[Tensor, ...] | None  # the D_i, where they are sparsified
    dtype: torch.dtype  # in which the merge writes the result

    @property
    def shape(self) -> torch.Size:
        return self.sources[0].shape

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the coefficients scale, and what is to be subtracted from it before."""
        return (self.sources, self.base) if self.prepared is None else (self.prepared, None)

    def merge(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """The formula for coefficients [n, *B] of the n sources here."""
        parts, _ = self.parts
        return combine(coefficients, parts, self.base, dtype, prepared=self.prepared is not None)

    def source(self, row: int) -> Tensor | None:
        """The tensor of one source, None where it has none."""
        return self.sources[self.rows.index(row)] if row in self.rows else None


class SourceWeights:
    """All stacks of a plan. On the CPU they stay the memory-mapped files of the checkpoints."""

    def __init__(
        self,
        plan: Plan,
        *,
        needs_base: bool,
        preparation: Preparation | None = None,
        device: torch.device | str = "cpu",
    ):
        self._preparation = preparation
        self._stacks: dict[str, Stack] = {}
        self.buffers: dict[str, Tensor] = {}  # integer tensors, which are copied, not merged
        for name, inputs in plan.load(plan.tensors):
            self._add(plan, plan.tensors[name], inputs, needs_base, device)

    def _add(self, plan: Plan, output: OutputTensor, inputs: dict, needs_base: bool, device):
        tensors = {model: tensor.to(device) for model, tensor in inputs.items()}
        rows = tuple(row for row, model in enumerate(plan.sources) if model in tensors)
        if not rows:  # only a base outside the sources has it; the merge keeps the base's
            return
        sources = tuple(tensors[plan.sources[row]] for row in rows)
        _require_one_shape(output.name, plan, tensors)
        if not sources[0].is_floating_point():
            self.buffers[output.name] = sources[0]
            return
        base = tensors.get(plan.base) if needs_base else None
        if needs_base and base is None:
            raise DamError(
                f"The base model {plan.base} has no tensor {output.name}, which "
                "`formula: task_vectors` subtracts: use `formula: weights`."
            )
        prepared = None
        if self._preparation is not None:
            aligned = [source.to(_promoted(tensors)) for source in sources]
            prepared = tuple(
                prepare(output.name, aligned, rows, base.to(aligned[0].dtype), self._preparation)
            )
        dtype = output.out_dtype or _promoted(tensors)
        self._stacks[output.name] = Stack(sources, rows, base, prepared, dtype)

    def __getitem__(self, name: str) -> Stack:
        return self._stacks[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stacks

    def names(self) -> Iterable[str]:
        """The output tensors that have coefficients, in mergekit's order of planning."""
        return self._stacks.keys()


def _promoted(tensors: dict) -> torch.dtype:
    """mergekit promotes a tensor's inputs to one dtype."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


def _require_one_shape(name: str, plan: Plan, tensors: dict) -> None:
    shapes = {model: tuple(tensor.shape) for model, tensor in tensors.items()}
    if problem := differing_shapes(name, shapes, plan.tensors[name].vocabulary_axis):
        raise DamError(f"{problem[0].upper()}{problem[1:]}.")
