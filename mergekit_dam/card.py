"""Model cards: of a merge, and of a coefficient file that is published alone."""

import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dam import table
from mergekit_dam.coefficients import Header, Source
from mergekit_dam.config.data_settings import is_local
from mergekit_dam.hub import DEFAULT_NAME
from mergekit_dam.output import MERGE_RECORD

CONFIG_PLACE = "<the config goes here>"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_TAG = "dam-coefficients"  # tells a repository with coefficients alone from a model


def of_merge(merge: MergeConfiguration, text: str, name: str, header: Header | None) -> str:
    """What mergekit itself writes; below it, for a merge by dam, what its coefficients tell."""
    card = _mergekits(merge, text, name)
    if header is None:
        return card
    card = ModelCard(card + "\n" + "\n".join(_sections(header, REBUILD_MERGE)))
    card.data = _metadata(merge, header, library_name="transformers")
    return str(card)


def of_file(header: Header, repository: str) -> str:
    """The card of a repository that holds a coefficient file and no model."""
    merge = MergeConfiguration.model_validate(rebuilding(header, repository))
    data = _metadata(merge, header, library_name="mergekit")
    data.tags = [*data.tags, FILE_TAG]
    models = "\n".join(f"* {_link(model)}" for model in _models(merge))
    config = yaml.safe_dump(rebuilding(header, repository), sort_keys=False).strip()
    body = FILE_TEXT.format(name=repository.partition("/")[2], models=models, config=config)
    sections = _sections(header, "", local=unpublished(header))
    return f"---\n{data.to_yaml()}\n---\n{body}\n" + "\n".join(sections)


FILE_TEXT = """# {name}

Merge coefficients, not a model: learned by [Differentiable Adaptive
Merging](https://arxiv.org/abs/2410.08371) for these models, from which anybody rebuilds the merge
with [mergekit](https://github.com/arcee-ai/mergekit).

{models}

## Rebuild the merge

With mergekit and mergekit-dam installed, save this as `config.yml`:

```yaml
{config}
```

```sh
mergekit-yaml config.yml ./merged
```
"""

REBUILD_MERGE = f"""## Rebuild

`{DEFAULT_NAME}` beside the weights holds the coefficients. With mergekit and mergekit-dam
installed, set `coefficients` in `{MERGE_RECORD}` to that file, or to the name of this
repository, and run

```sh
mergekit-yaml {MERGE_RECORD} ./rebuilt
```
"""


def rebuilding(header: Header, coefficients: str) -> dict[str, Any]:
    """The config that rebuilds the merge with a coefficient file; parsed YAML."""
    merge = dict(header.merge) or _least_merge(header)
    parameters = {**merge.get("parameters", {}), "coefficients": coefficients}
    config = {"merge_method": "dam", **merge, "parameters": parameters}
    models = [*header.sources, *filter(None, [header.base])]
    return renamed(config, {model.reference: _pinned(model) for model in models})


def _least_merge(header: Header) -> dict[str, Any]:
    """For a file that does not record the merge: its sources."""
    models = {"models": [{"model": source.reference} for source in header.teachers]}
    bases = [source.reference for source in header.sources if not source.teaches]
    bases += [header.base.reference] if header.base else []
    return {"base_model": bases[0], **models} if bases else models


def _pinned(source: Source) -> str:
    """A model from the Hub with the revision that was fitted, where it is known."""
    reference = ModelReference.parse(source.reference)
    if reference.model.revision or not source.revision or not is_hub_name(reference.model.path):
        return source.reference
    model = reference.model.model_copy(update={"revision": source.revision})
    return str(reference.model_copy(update={"model": model}))


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Parsed YAML or JSON in which every text that is one of the names is another."""
    if isinstance(value, dict):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def unpublished(header: Header) -> list[str]:
    """Models of the merge that nobody else can load, those of its tokenizer too: they are no names
    on the Hub."""
    merge = MergeConfiguration.model_validate(rebuilding(header, ""))
    models = [*_models(merge), *map(ModelReference.parse, models_of_tokenizer(header))]
    local = (str(model) for model in models if len(_hub_names([model])) < _parts(model))
    return list(dict.fromkeys(local))


def models_of_tokenizer(header: Header) -> list[str]:
    """The models from which the merge takes its tokenizer, or single tokens."""
    merge = header.merge
    found = (merge.get("tokenizer"), merge.get("tokenizer_source"), header.tokenizer)
    names = (name for value in found for name in _models_in(value))
    return [name for name in dict.fromkeys(names) if name not in ("union", "base")]


def _models_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in ("source", "model"):
            yield from _models_in(value.get(key))
        for token in (value.get("tokens") or {}).values():
            yield from _models_in(token)


def _parts(model: ModelReference) -> int:
    return 1 if model.lora is None else 2


def _sections(header: Header, rebuild: str, local: Iterable[str] = ()) -> Iterator[str]:
    if rebuild:
        yield rebuild
    for model in local:
        yield (
            f"**{table.cell(model)}** is a local path of whoever made this file: put the name of "
            "the same checkpoint in its place.\n"
        )
    if header.results is not None:
        yield table.as_markdown(header)
    yield _sources(header)
    if data := header.settings.get("data"):
        yield _data(data)
    if settings := {k: v for k, v in header.settings.items() if k != "data"}:
        text = html.escape(yaml.safe_dump(settings, sort_keys=False), quote=False)
        yield (
            "## Settings of the fit\n\n"
            f"<details><summary>All</summary>\n\n<pre>{text}</pre>\n</details>\n"
        )


def _sources(header: Header) -> str:
    lines = ["| source | revision | fingerprint of the weights |", "| --- | --- | --- |"]
    for source in (*header.sources, *([header.base] if header.base else [])):
        role = "" if source in header.teachers else " (the base)"
        cells = (source.reference + role, source.revision or "", source.weights)
        lines.append(f"| {' | '.join(table.cell(cell) for cell in cells)} |")
    return "## Sources\n\n" + "\n".join(lines) + "\n"


def _data(entries: Any) -> str:
    lines = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            rest = ", ".join(f"{key}: {value}" for key, value in entry.items() if key != "source")
            lines.append(f"* {table.cell(str(entry.get('source')))}: {table.cell(rest)}")
    return "## Data\n\nEach source taught on its own:\n\n" + "\n".join(lines) + "\n"


def _metadata(merge: MergeConfiguration, header: Header, library_name: str) -> ModelCardData:
    """`base_model` names models on the Hub alone: it refuses a card with other names."""
    models = _hub_names(_models(merge))
    more = {"base_model": models, "base_model_relation": "merge"} if models else {}
    if datasets := _hub_data(header.settings.get("data")):
        more["datasets"] = datasets
    return ModelCardData(library_name=library_name, tags=["mergekit", "merge", "dam"], **more)


def _models(merge: MergeConfiguration) -> list[ModelReference]:
    """The base first, then in the order of the YAML."""
    listed = [entry.model for entry in merge.models or ()]
    others = sorted(set(merge.referenced_models()) - set(listed), key=str)
    return list(dict.fromkeys([*filter(None, [merge.base_model]), *listed, *others]))


def _hub_names(models: Iterable[ModelReference]) -> list[str]:
    paths = (part.path for model in models for part in (model.model, model.lora) if part)
    return list(dict.fromkeys(path for path in paths if is_hub_name(path)))


def is_hub_name(path: str) -> bool:
    """A local folder of that name wins, as everywhere."""
    return HUB_NAME.fullmatch(path) is not None and not os.path.exists(path)


def _hub_data(entries: Any) -> list[str]:
    paths = [e.get("path") for e in entries or () if isinstance(e, dict)]
    return list(dict.fromkeys(path for path in paths if is_hub_data(path)))


def is_hub_data(path: Any) -> bool:
    """Whether an entry's path is a data set's name on the Hub, as the fit reads it."""
    return isinstance(path, str) and is_hub_name(path) and not is_local(path)


def _link(model: ModelReference) -> str:
    parts = (part for part in (model.model, model.lora) if part)
    return " + ".join(
        f"[{part}](https://huggingface.co/{part.path})"
        if is_hub_name(part.path)
        else table.cell(str(part))
        for part in parts
    )


def _mergekits(merge: MergeConfiguration, text: str, name: str) -> str:
    """mergekit's card, made without a network: it asks the Hub about `folder/model` even where
    that folder is here, but takes an absolute path for what it is."""
    shown = {str(_absolute(model)): str(model) for model in merge.referenced_models()}
    card = generate_card(
        config=_CardConfig(
            merge_method=merge.merge_method,
            base_model=merge.base_model and _absolute(merge.base_model),
            models=[_absolute(model) for model in _models(merge)],
        ),
        config_yaml=CONFIG_PLACE,
        name=name,
    )
    for absolute in sorted(shown, key=len, reverse=True):
        card = card.replace(_as_markdown(absolute), _as_markdown(shown[absolute]))
    return card.replace(CONFIG_PLACE, text)


@dataclass(frozen=True)
class _CardConfig:
    """What mergekit's card reads of a config."""

    merge_method: str
    base_model: ModelReference | None
    models: list[ModelReference]

    def referenced_models(self) -> list[ModelReference]:
        return self.models


def _absolute(model: ModelReference) -> ModelReference:
    def local(part: ModelPath | None) -> ModelPath | None:
        if part is None or not os.path.exists(part.path):
            return part
        return part.model_copy(update={"path": os.path.abspath(part.path)})

    return model.model_copy(update={"model": local(model.model), "lora": local(model.lora)})


def _as_markdown(reference: str) -> str:
    """A model and its adapter, as the card writes them."""
    return reference.replace("+", " + ")
