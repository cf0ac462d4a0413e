"""Coefficient files of the same sources, added up with a weight each; or one of them, scaled."""

from collections.abc import Sequence

import torch
from torch import Tensor

import mergekit_dam
from mergekit_dam.coefficients import CoefficientFile, Header, Source
from mergekit_dam.errors import DamError


def blend(
    files: Sequence[CoefficientFile], weights: Sequence[float]
) -> tuple[dict[str, Tensor], Header]:
    """Σ_k weight_k · c_k for each output tensor, and the header of the new file.

    Of granularities that differ the finer one results. The sources keep the first file's order.
    Raises DamError where the files are not of the same sources, formula and tensors.
    """
    rows = [_rows(files[0], file) for file in files]
    for file in files[1:]:
        _require_alike(files[0], file)
    tensors = {name: _sum(name, files, rows, weights) for name in sorted(files[0].names)}
    header = files[0].header
    granularities = {file.header.granularity for file in files}
    return tensors, Header(
        package=mergekit_dam.__version__,
        formula=header.formula,
        granularity=granularities.pop() if len(granularities) == 1 else "mixed",
        sources=header.sources,
        base=header.base,
        preparation=header.preparation,
        tokenizer=header.tokenizer,
        merge=header.merge,
        origin=_origin(files, weights),
    )


def _rows(first: CoefficientFile, other: CoefficientFile) -> list[int]:
    """The rows of `other` in the order of the first file's sources; by contents, not by name."""
    own = [_contents(source) for source in first.header.sources]
    theirs = [_contents(source) for source in other.header.sources]
    if len(set(own)) == len(own) and sorted(own) == sorted(theirs):
        return [theirs.index(contents) for contents in own]
    if own == theirs:  # one checkpoint twice
        return list(range(len(own)))
    names = ", ".join(source.reference for source in other.header.sources)
    raise DamError(
        f"{other.path} was fitted for other sources ({names}) than {first.path}: blend files of "
        "the same models."
    )


def _contents(source: Source) -> tuple[str, str]:
    return source.weights, source.config or ""


def _require_alike(first: CoefficientFile, other: CoefficientFile) -> None:
    """What a sum of coefficients makes sense for."""
    one, two = first.header, other.header
    for what, differs in (
        ("formula", one.formula != two.formula),
        ("base model", (one.base and _contents(one.base)) != (two.base and _contents(two.base))),
        ("sparsification", one.preparation != two.preparation),
        ("set of tensors", first.names != other.names),
    ):
        if differs:
            raise DamError(
                f"{other.path} has another {what} than {first.path}, so their coefficients scale "
                "different things: blend files that were fitted alike."
            )


def _sum(
    name: str,
    files: Sequence[CoefficientFile],
    rows: Sequence[Sequence[int]],
    weights: Sequence[float],
) -> Tensor:  # [N, *B]
    parts = [file.get(name)[list(order)] for file, order in zip(files, rows, strict=True)]
    shapes = {part.shape for part in parts}
    try:
        shape = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        shape = None
    if shape not in shapes:
        raise DamError(
            f"The coefficients of {name} have the shapes "
            f"{', '.join(str(list(s[1:])) for s in sorted(shapes))} for each source, of which "
            "none holds the others: blend files of one granularity."
        )
    result = torch.zeros(shape, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        result += weight * part.double()
    if not torch.isfinite(result.float()).all():
        raise DamError(
            f"The sum of the coefficients of {name} is no finite number: give other weights."
        )
    return result.float()


def _origin(files: Sequence[CoefficientFile], weights: Sequence[float]) -> str:
    """Names a file by its identity: its path is nobody else's business."""
    parts = [
        f"{weight:g} × {file.header.identity or file.header.origin}"
        for file, weight in zip(files, weights, strict=True)
    ]
    return "blend of " + " + ".join(parts)
