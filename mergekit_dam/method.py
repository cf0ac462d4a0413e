"""The merge method `dam`: a thin adapter between mergekit's groups and the formula.

A group method, because batch kernels see no tensor names and no model references.
"""

import re
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pydantic
from mergekit.merge_methods.base import (
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from mergekit_dam import plugin
from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.errors import DamError
from mergekit_dam.formula import combine
from mergekit_dam.hub import open_coefficients
from mergekit_dam.sources import match
from mergekit_dam.task_vectors import prepare

# The value of `coefficients` while the fit plans a merge whose file is yet to be written.
TO_BE_FITTED = "<to be fitted>"


def _require_path(value: Any) -> Any:
    """Fail while mergekit still plans, before any weight is loaded."""
    if value is None:
        raise DamError(
            "merge_method dam needs `parameters: {coefficients: FILE}`, and FILE is written by "
            "`mergekit-dam fit CONFIG`."
        )
    if value != TO_BE_FITTED:
        open_coefficients(value)
    return PlannedPath(value, getattr(_thread, "outputs", None))


@dataclass
class Outputs:
    """What a merge by YAML will write, as far as it is planned."""

    names: set[str] = field(default_factory=set)
    are_checked: bool = False  # against the coefficient file


class PlannedPath(str):
    """The path of a coefficient file, with the plan of the merge that reads it.

    None where there is no such plan: raw files (`mergekit-pytorch`) and tensors in memory may
    be a part of the model.
    """

    outputs: Outputs | None

    def __new__(cls, path: str, outputs: Outputs | None):
        self = super().__new__(cls, path)
        self.outputs = outputs
        return self


_thread = threading.local()  # `outputs`: of the merge that this thread is planning
SLICE = re.compile(r"\.slices\[\d+\]$")  # how the planner names a slice where it begins


# Parameters of mergekit's own methods, so that their configs need another method's name alone.
# The fit starts from them; the merge takes what the fit has recorded in its file.
INPUT_PARAMETERS = ("weight", "density", "gamma", "epsilon")
SHARED_PARAMETERS = {"normalize": bool, "rescale": bool, "int8_mask": bool, "lambda": float}


def _fits(name: str, scope: ParameterScope, kind: type) -> ParameterSpec:
    return ParameterSpec(name, kind | None, scope, default=None, description="read by the fit")


class DamMerge(GroupMergeMethod):
    """W = base + Σ_i c_i * D_i with coefficients from a file (arXiv 2410.08371)."""

    spec = MergeMethodSpec(
        name="dam",
        pretty_name="Differentiable Adaptive Merging (DAM)",
        reference_url="https://arxiv.org/abs/2410.08371",
        parameters=(
            ParameterSpec(
                "coefficients",
                Annotated[str | None, pydantic.AfterValidator(_require_path)],
                ParameterScope.SHARED,
                default=None,
                description="the file that `mergekit-dam fit` has written: a path, or a file "
                "on the Hub, user/repo[@revision][/file]",
            ),
            *(_fits(name, ParameterScope.INPUT, float) for name in INPUT_PARAMETERS),
            *(_fits(name, ParameterScope.SHARED, kind) for name, kind in SHARED_PARAMETERS.items()),
        ),
        contract=InputContract(),
    )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """mergekit's planner calls this for every slice, then for every output tensor, after it
        has read the tensor's parameters: so the file is known to be for these and no others."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name is None:  # tensors in memory, or raw files
            _thread.outputs = None
        elif SLICE.search(group_name):
            _thread.outputs = Outputs()
        elif (outputs := getattr(_thread, "outputs", None)) is not None:
            outputs.names.add(group_name)

    def __call__(self, groups: Sequence[TensorGroup], /, **settings: Any) -> tuple[Tensor, ...]:
        _thread.outputs = None  # tensors in memory
        return super().__call__(groups, **settings)

    def merge_group(self, group: TensorGroup, /, *, coefficients: str, **_fits: Any) -> Tensor:
        """The merged tensor, in the dtype to which mergekit has brought the inputs."""
        file, name = open_coefficients(coefficients), group.metadata.name
        _require_no_others(file, getattr(coefficients, "outputs", None))
        if name is None:
            raise DamError("merge_method dam finds coefficients by name: give the tensors names.")
        rows = _rows(file, group)
        if not rows or (name not in file.names and all(entry.is_base for entry in group.entries)):
            return group.entries[0].tensor  # an optional tensor that only the base has
        file.check_shape(name, tuple(group.entries[0].tensor.shape))
        factors = file.get(name)
        self._check_absent(file, factors, set(rows))
        tensors, base = list(rows.values()), self._base(file, group)
        dtype, preparation = tensors[0].dtype, file.header.preparation
        if preparation is not None:
            tensors = prepare(name, tensors, list(rows), base, preparation)
        chosen = factors[list(rows)].to(tensors[0].device)
        return combine(chosen, tensors, base, dtype, prepared=preparation is not None)

    @staticmethod
    def _base(file: CoefficientFile, group: TensorGroup) -> Tensor | None:
        if file.header.formula == "weights":
            return None
        if group.base is None or match([file.header.base], [group.base.id]) == [None]:
            raise DamError(
                f"{file.path} was fitted with `formula: task_vectors` on the base "
                f"{file.header.base.reference}, whose {group.metadata.name} it needs: set "
                "`base_model` to it, or fit the coefficients again."
            )
        return group.base.tensor

    @staticmethod
    def _check_absent(file: CoefficientFile, factors: Tensor, present: set[int]) -> None:
        """A source without this optional tensor had coefficients of exactly zero in the fit."""
        for row, source in enumerate(file.header.sources):
            if row not in present and factors[row].any():
                raise DamError(
                    f"{file.path} was fitted for the source {source.reference}, which is not "
                    f"{'among the models' if source.teaches else 'the `base_model`'} of the "
                    "config: put it there, or fit the coefficients again."
                )


def _require_no_others(file: CoefficientFile, outputs: Outputs | None) -> None:
    """Refuse a file with coefficients of tensors that the merge does not write. Once: a mixture
    of experts has tens of thousands."""
    if outputs is None or outputs.are_checked:
        return
    if others := file.names - outputs.names:
        raise DamError(
            f"{file.path} has coefficients for {min(others)}, which this merge does not write: fit "
            "them with this config."
        )
    outputs.are_checked = True


def _rows(file: CoefficientFile, group: TensorGroup) -> dict[int, Tensor]:
    """The group's tensors by the rows of their coefficients, in the order of the rows.

    A base that is not among the file's sources has none; another model must be a source.
    """
    is_base_apart = file.header.formula == "task_vectors"
    entries = group.non_base if is_base_apart else group.entries
    rows = match(file.header.sources, [entry.id for entry in entries])
    for row, entry in zip(rows, entries, strict=True):
        if row is None and not entry.is_base:
            raise DamError(
                f"{file.path} was fitted for the sources "
                f"{', '.join(source.reference for source in file.header.sources)}; {entry.id} is "
                "not one of them, or has changed since: fit the coefficients for these models."
            )
    found = {row: entry.tensor for row, entry in zip(rows, entries, strict=True)}
    return {row: found[row] for row in sorted(row for row in found if row is not None)}


dam = DamMerge()

plugin.autoload()  # for an import of this module that came before mergekit's registry
