"""Prints docs/config.md: the template below, its tables made from the settings' descriptions.

To bring it up to date: `python docs/make_config_reference.py > docs/config.md`
"""

from collections.abc import Iterator, Mapping
from string import Template
from typing import Any

from mergekit_dam.config.data_settings import DataSettings
from mergekit_dam.config.settings import PRESETS, Objective, Settings, Train

TEMPLATE = """\
<!-- Made by docs/make_config_reference.py; edit that script or the descriptions in
     mergekit_dam/config/settings.py, not this file. -->
# The config

One YAML file serves both stages. `mergekit-dam fit` reads all of it and writes the coefficient
file; `mergekit-yaml` and `mergekit-dam merge` read mergekit's own keys and that file. mergekit
passes over the `dam:` block.

```yaml
merge_method: dam
base_model: ./base                      # gives config and tokenizer; see `use_base`
models:
  - model: ./math
  - model: ./code
parameters:
  coefficients: ./dam.safetensors       # written by the fit, read by the merge
dtype: bfloat16
dam:                                    # read by mergekit-dam alone
  data:                                 # one entry for each source
    - {source: ./math, path: math.jsonl}
    - source: ./code
      path: code.jsonl
      text: content
      examples: 500
  steps: 1200
  learning_rate: 0.01
  seed: 1
  train: {bias: false}
  objective: {temperature: 2.0, similarity: 0.01}
```

`mergekit-dam check CONFIG` lists every mistake in the file without loading weights. In
mergekit's part too it refuses a key that nobody reads, which mergekit itself would pass over.
Relative paths, `coefficients` among them, resolve against the working directory, as mergekit's
do, not against the folder of the YAML file.

The method has one parameter of its own, `coefficients`: a path, or a file on the Hub as
`user/repo`, `user/repo@revision`, `user/repo/folder/file.safetensors` or both together; without a
name the file is `dam.safetensors`. A local path of that name wins, and a fit writes local files
alone. Those of mergekit's other methods keep
their meaning, so that an existing config needs another `merge_method` and a `dam:` block:

- `weight`, as a number, a gradient or by filters, is where the coefficients start. With
  `formula: weights` they are divided by their sum unless `normalize: false`, as in `linear`.
  Without any `weight` the start is the plain average.
- `density`, `gamma`, `epsilon`, `rescale`, `normalize`, `lambda` and `int8_mask` mean what they
  mean in the method that `dam.sparsify` names, with that method's defaults. Before any training
  such a merge equals that method's own. A parameter without effect is refused.

What the fit used is recorded in its file, and the merge takes it from there:

```yaml
merge_method: dam                       # was: ties
base_model: ./base
models:
  - model: ./math
    parameters: {weight: [0.2, 0.8], density: 0.5}
  - model: ./code
    parameters: {weight: 0.6, density: 0.7}
parameters:
  normalize: true
  coefficients: ./dam.safetensors
dtype: bfloat16
dam:
  formula: task_vectors
  sparsify: ties
  granularity:                          # the first filter that matches a name counts
    - {filter: embed_tokens, value: tensor}
    - {value: column}
  data:
    - {source: ./math, path: math.jsonl}
    - {source: ./code, path: code.jsonl}
```

`tokenizer`, `tokenizer_source`, `slices` and `modules` are mergekit's own. Rows are tokenised with
the merge's tokenizer; a token that a source lacks takes no part in that source's loss. Where the
merge cuts out, repeats or stacks layers, each source teaches as the whole model that it is, which
costs its weights once more.

`mergekit-dam run` also takes a chain of merges, as `mergekit-multi` does: several documents in one
file, with a `name` for each but the last, by which others use them as models. Each step by `dam`
is fitted when its inputs exist.

## `dam`

Give `steps` or `epochs`, not both. One epoch passes once over the data of the source with the
most rows; shorter sources begin again.

$settings

## `dam.data`

A list with one entry for each source. `source` is the model as the YAML's `models` name it,
revision and adapter included.

$data

[data.md](data.md) says what a row may look like and what of it counts, with examples.

## `dam.train`

Tensors of a kind that is switched off keep their start.

$train

## `dam.objective`

The loss is the sum of these terms, each times its weight here; a term of weight 0 is not computed.
[method.md](method.md) has the formulas.

$objective

## `dam.preset`

`preset: paper` sets what follows, as published with arXiv 2410.08371. A key that the YAML gives
itself wins; `steps` in the YAML takes the place of the preset's `epochs`. All other keys keep
the defaults above; [method.md](method.md#what-differs-from-the-published-implementation) says what
else differs from the published script.

$preset

```yaml
merge_method: dam
models:
  - model: ./math
  - model: ./code
parameters: {coefficients: ./dam.safetensors}
dam:
  preset: paper
  data:
    - {source: ./math, path: math.jsonl}
    - {source: ./code, path: code.jsonl}
```

## Device and dtype

- **Device.** `fit` and `run` fit on a GPU where torch sees one, else on the CPU; `--device cpu` or
  `--device cuda` decides. Merging is mergekit's and stays on the CPU unless `--cuda` or `--device`
  is given.
- **Memory.** The fit holds the merged weights of one block at a time and the activations of a step
  (`dam.recompute`), and the sources' weights on its device, in host memory or in their files
  (`dam.offload`; on the CPU the files are memory-mapped anyway). What `auto` chose is printed where
  it matters. `mergekit-dam check` estimates the memory.
- **`dtype`, `out_dtype`** are mergekit's: what the sources are cast to, and what the merge is
  saved in. The fit rounds every merged weight as the merge will.
- **`dam.compute_dtype`** is the dtype of the fit's forward and backward passes. There is no loss
  scaling, so prefer bfloat16 to float16. Losses are computed in float32, and coefficients are
  float32 whatever the models are.
- **Reproducible.** The same config and seed on the same machine give the same file, on the CPU
  bit for bit.

## Checkpoints

Every `checkpoint_every` steps the fit saves coefficients and optimiser to `FILE.fit/`, where FILE
is the coefficient file. `--resume` goes on from the last; it is refused where a setting has changed
(`report_to`, `recompute` and `offload` excepted), a source, a row of data, the compute dtype or the
number of processes. The folder is removed when the fit is done. With `teacher: cached` the sources'
states are in `FILE.teachers/` as long: the next fit uses what a killed one has left there, where
its sources and rows are the same and as many go through a model at once, and removes it otherwise.
While a fit is under way, another one of the same FILE is refused.

## Logs

`report_to` names integrations of transformers' Trainer, such as tensorboard, wandb or trackio;
`check` refuses one that is unknown or not installed. Each step logs the `loss`, each of its terms
before its weight (those on a source's rows by the source, `kl/math`; those on the coefficients by
their names), `learning_rate`, `grad_norm`, the `tokens` read so far without padding, and
`tokens_per_second`. tensorboard's files stay in `FILE.fit/runs/`.
"""


def render() -> str:
    """The text of docs/config.md."""
    return Template(TEMPLATE).substitute(
        settings=_table(Settings),
        data=_table(DataSettings),
        train=_table(Train),
        objective=_table(Objective),
        preset=_preset("paper"),
    )


def _table(block: type) -> str:
    schema = block.model_json_schema()
    rows = [
        (f"`{key}`", _type(schema["properties"][key]), _default(field), field.description)
        for key, field in block.model_fields.items()
    ]
    return _markdown(("key", "type", "default", "meaning"), rows)


def _preset(name: str) -> str:
    return _markdown(("key", "value"), [(f"`{k}`", f"`{v}`") for k, v in _flat(PRESETS[name])])


def _flat(settings: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _type(schema: Mapping) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        kinds = [_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(kinds)
    if "$ref" in schema:
        return "block"
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in values)
    if schema["type"] == "array":
        item = schema["items"]
        return "list of " + ("entries" if "$ref" in item else _type(item) + "s")
    if schema["type"] == "object":
        return "names"
    words = {"number": "number", "integer": "integer", "string": "text", "boolean": "true/false"}
    return words[schema["type"]] + _bounds(schema)


def _bounds(schema: Mapping) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " " + ", ".join(limits) if limits else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default == ():
        return "—"
    if hasattr(type(field.default), "model_fields"):
        return "see below"
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(render(), end="")
