"""A coefficient file against the config of the merge that shall read it."""

from collections.abc import Iterator

from mergekit.config import MergeConfiguration

from mergekit_dam.coefficients import CoefficientFile, short
from mergekit_dam.config import Settings, tokenizer_of
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.hub import open_coefficients
from mergekit_dam.plan import Plan
from mergekit_dam.sources import match


def _setting_problems(
    file: CoefficientFile, settings: Settings | None, merge: MergeConfiguration
) -> Iterator[str]:
    """What the config says otherwise than the fit that wrote a file."""
    header = file.header
    pairs = [("tokenizer", header.tokenizer, tokenizer_of(merge))]
    if settings is not None:
        now = settings.model_dump(mode="json", exclude_none=True)
        pairs.append(("formula", header.formula, settings.formula))
        fitted = header.settings.get("granularity", now["granularity"])
        pairs.append(("granularity", fitted, now["granularity"]))
    for name, was, is_now in pairs:
        if was != is_now:
            yield f"{file.path} was fitted with `{name}: {short(was)}`, not {is_now}: fit it again"


def file_problems(
    path: str,
    settings: Settings | None,
    merge: MergeConfiguration,
    plan: Plan,
    shapes: HeaderShapes,
) -> Iterator[str]:
    """A coefficient file against the plan of the merge that shall read it."""
    file = open_coefficients(path)
    yield from _setting_problems(file, settings, merge)
    models = list(dict.fromkeys(filter(None, (*plan.teachers, plan.base))))
    rows = match(file.header.sources, models)
    for model, row in zip(models, rows, strict=True):
        if row is None and model in plan.teachers:
            fitted = ", ".join(source.reference for source in file.header.sources)
            yield (
                f"{path} was fitted for the sources {fitted}; {model} is not one of them, or has "
                "changed since: fit the coefficients again"
            )
    for row, source in enumerate(file.header.sources):
        if row not in rows:
            place = "among the models" if source.teaches else "the `base_model`"
            yield f"{path} was fitted for {source.reference}, which is not {place}"
    expected = set(shapes.names())
    for name in sorted(expected - file.names)[:3]:
        yield f"{path} has no coefficients for the tensor {name}: fit them with this config"
    for name in sorted(file.names - set(plan.tensors))[:3]:
        yield (
            f"{path} has coefficients for {name}, which this merge does not write: fit them with "
            "this config"
        )
    for name in sorted(expected & file.names):
        file.get(name)
        if (shape := shapes.shape(name)) is not None:
            file.check_shape(name, shape)
