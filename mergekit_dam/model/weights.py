"""The sources' weights, gathered by mergekit."""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.compatible import differing_shapes
from mergekit_dam.errors import DamError
from mergekit_dam.formula import combine_all
from mergekit_dam.inputs import Inputs, Together
from mergekit_dam.model.offload import STORES, Offload, Store
from mergekit_dam.plan import OutputTensor, Plan
from mergekit_dam.task_vectors import Preparation, prepare


@dataclass(frozen=True)
class Stack:
    """One output tensor: what is known of it, and its inputs, wherever they are."""

    rows: tuple[int, ...]  # in the coefficients, of the sources that have this tensor
    teachers: int  # how many of these teach; a base that does not is the last
    shape: torch.Size
    dtype: torch.dtype  # in which the merge writes the result
    name: str
    store: Store

    def load(self, ids: Tensor | None = None) -> Inputs:
        """On the device; with `ids` these rows alone."""
        return self.store.get(self.name, ids)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.load().sources

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return self.load().parts

    def source(self, row: int, ids: Tensor | None = None) -> Tensor | None:
        """The tensor of one source, or some rows of it; None where it has none."""
        if row not in self.rows:
            return None
        return self.store.source(self.name, self.rows.index(row), ids)

    def own(self, coefficients: Tensor, count: int | None = None) -> Tensor:
        """[n, *B], of the sources that have this tensor or of so many of them, from those of all
        [N, *B]."""
        rows = self.rows[:count]
        return coefficients if len(rows) == len(coefficients) else coefficients[list(rows)]


class SourceWeights:
    """All stacks of a plan."""

    def __init__(
        self,
        plan: Plan,
        *,
        needs_base: bool,
        preparation: Preparation | None = None,
        device: torch.device | str = "cpu",
        offload: Offload = "none",
    ):
        self._plan, self._needs_base, self._preparation = plan, needs_base, preparation
        self._store = STORES[offload](torch.device(device), self._read)
        self.is_prepared = preparation is not None  # sparsified task vectors
        self.is_fetched = offload != "none"  # for each use, a block at a time
        self._stacks: dict[str, Stack] = {}
        self.stored: set[torch.dtype] = set()  # the dtypes of the sources' tensors
        self._blocks: dict[tuple[str, ...], Together] = {}  # whose tensors stay on the device
        self._found: dict[tuple, Mapping[str, Tensor]] = {}  # of one source, used as they lie there
        for name, inputs in plan.load(plan.tensors):
            self._add(plan.tensors[name], inputs)

    def _add(self, output: OutputTensor, tensors: dict) -> None:
        name, rows = output.name, self._rows(tensors)
        if not rows:  # only a base outside the sources has it; the merge keeps the base's
            return
        first = tensors[self._plan.sources[rows[0]]]
        _require_one_shape(name, self._plan, tensors)
        if not first.is_floating_point():  # it is copied, not merged
            return
        if self._needs_base and self._plan.base not in tensors:
            raise DamError(
                f"The base model {self._plan.base} has no tensor {name}, which "
                "`formula: task_vectors` subtracts: use `formula: weights`."
            )
        self.stored |= {tensor.dtype for tensor in tensors.values()}
        self._store.put(name, lambda: self._inputs(name, tensors))
        self._stacks[name] = Stack(
            rows=rows,
            teachers=sum(row < len(self._plan.teachers) for row in rows),
            shape=first.shape,
            dtype=output.out_dtype or _promoted(tensors),
            name=name,
            store=self._store,
        )

    def _rows(self, tensors: dict) -> tuple[int, ...]:
        """The sources that have a tensor; none where the base alone has it."""
        rows = [row for row, model in enumerate(self._plan.sources) if model in tensors]
        return tuple(rows) if rows and rows[0] < len(self._plan.teachers) else ()

    def _inputs(self, name: str, tensors: dict) -> Inputs:
        """Of what mergekit has gathered for an output tensor."""
        rows = self._rows(tensors)
        sources = tuple(tensors[self._plan.sources[row]] for row in rows)
        base, prepared = tensors.get(self._plan.base) if self._needs_base else None, None
        if self._preparation is not None:
            aligned = [source.to(_promoted(tensors)) for source in sources]
            prepared = tuple(
                prepare(name, aligned, rows, base.to(aligned[0].dtype), self._preparation)
            )
        return Inputs(sources, base, prepared)

    def _read(self, names: Collection[str]) -> dict[str, Inputs]:
        gathered = self._plan.load(names, quiet=True)
        return {name: self._inputs(name, tensors) for name, tensors in gathered}

    def group(self, groups: Iterable[Collection[str]]) -> None:
        """Which output tensors are needed together, so that they are read together."""
        self._store.group([[name for name in names if name in self] for names in groups])

    def merge(
        self,
        names: Sequence[str],
        coefficients: Sequence[Tensor],  # of each [N, *B], of all sources
        dtype: torch.dtype,
        ids: Tensor | None = None,  # of rows that share their coefficients: these alone
    ) -> tuple[Tensor, ...]:
        """The formula, for tensors that are needed together: rounded as the merge will write them,
        given in `dtype`. Gradients are not rounded."""
        own = [self[n].own(c) for n, c in zip(names, coefficients, strict=True)]
        written = [self[name].dtype for name in names]

        def found(names: Iterable[str]) -> Together:
            if ids is None:
                return self._together(tuple(names))
            return Together(self[name].load(ids) for name in names)

        def again(numbers: Iterable[int]) -> Together:
            return found(names[number] for number in numbers)

        return combine_all(own, found(names), written, stored=dtype, again=again)

    def average(self, name: str, dtype: torch.dtype) -> Tensor:
        """Of the sources that teach, rounded likewise."""
        stack = self[name]
        sources = stack.sources[: stack.teachers]
        share = torch.full((len(sources), *[1] * len(stack.shape)), 1 / len(sources))
        inputs, share = Inputs(sources, None, None), share.to(sources[0].device)
        return combine_all([share], [inputs], [stack.dtype], stored=dtype)[0]

    def _together(self, names: tuple[str, ...]) -> Together:
        """Inputs; those that stay on the device are found once."""
        if (found := self._blocks.get(names)) is None:
            found = Together(self[name].load() for name in names)
            if not self.is_fetched:
                self._blocks[names] = found
        return found

    def is_copied(self, dtype: torch.dtype) -> bool:
        """Whether a source's own weights are not used where they lie, in the passes' dtype."""
        return self.is_fetched or self.stored != {dtype}

    def of_source(
        self, row: int, names: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> Mapping[str, Tensor]:
        """A source's own weights. Where they lie as they are used, they are found once."""
        key = (row, tuple(names), device, dtype)
        if (found := self._found.get(key)) is None:
            own = {name: self.of_one(row, name) for name in names}
            found = {name: weight.to(device, dtype) for name, weight in own.items()}
            if not self.is_fetched and all(own[name] is found[name] for name in names):
                self._found[key] = found
        return found

    def of_one(self, row: int, name: str, ids: Tensor | None = None) -> Tensor:
        """A source's own tensor, or some rows of it."""
        weight = self[name].source(row, ids)
        if weight is None:
            raise DamError(
                f"Source number {row + 1} has no tensor {name}, which the merged model needs, so "
                "it cannot teach: leave it out, or give it as the base alone."
            )
        return weight

    def not_finite(self) -> tuple[int, str] | None:
        """(source, output tensor) of the first weight that is NaN or infinite."""
        for row in range(len(self._plan.sources)):  # a block's tensors of one source come together
            for name, stack in self._stacks.items():
                if row in stack.rows and not torch.isfinite(stack.source(row)).all():
                    return row, name
        return None

    def __getitem__(self, name: str) -> Stack:
        return self._stacks[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stacks

    def dtypes(self) -> set[torch.dtype]:
        """Of the merged tensors."""
        return {stack.dtype for stack in self._stacks.values()}

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
