"""The YAML's settings of tokenizer and chat template: what they name and is not there."""

import importlib.resources
import os
from collections.abc import Iterator

from huggingface_hub import HfApi, try_to_load_from_cache
from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig

from mergekit_dam.errors import DamError
from mergekit_dam.nearest import did_you_mean
from mergekit_dam.opening import load_tokenizer

SECONDS = 10  # for the Hub to say whether it has a model; loading would try for a minute


def token_problems(merge: MergeConfiguration, options: MergeOptions) -> Iterator[str]:
    """Needs tokenizers and no weights; where a model has none, that is told elsewhere."""
    yield from _source_problems(merge, options)
    yield from _template_problems(merge.chat_template)
    if merge.tokenizer is None:
        return
    padding = merge.tokenizer.pad_to_multiple_of
    if padding is not None and padding < 0:
        yield f"`tokenizer.pad_to_multiple_of` is {padding}: give a number above zero"
    for token, config in (merge.tokenizer.tokens or {}).items():
        if problem := _embedding_problem(token, config, merge, options):
            yield f"`tokenizer.tokens.{token}` {problem}"


def _source_problems(merge: MergeConfiguration, options: MergeOptions) -> Iterator[str]:
    key = "tokenizer.source" if merge.tokenizer else "tokenizer_source"
    source = merge.tokenizer.source if merge.tokenizer else merge.tokenizer_source
    if not isinstance(source, ModelReference):
        return
    name = source.model.path
    if os.path.exists(name):
        try:
            load_tokenizer(source, options)
        except DamError as error:
            yield f"`{key}`: {error.message}"
    elif reason := _lacking(source, options):
        known = ["base", "union", *map(str, merge.referenced_models())]
        yield (
            f"`{key}` is {name}, which is neither base nor union nor a model that is there "
            f"({reason}){did_you_mean(name, known)}"
        )


def _lacking(model: ModelReference, options: MergeOptions) -> str | None:
    """Why a model that is no folder here cannot be had; None where the Hub or its cache has it."""
    name, revision = model.model.path, model.model.revision
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "there is no such folder"
    cached = {"revision": revision, "cache_dir": options.transformers_cache}
    if isinstance(try_to_load_from_cache(name, "tokenizer_config.json", **cached), str):
        return None
    try:
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except Exception as error:
        return f"no folder, and the Hub gives none: {type(error).__name__}"
    return None


def _template_problems(template: str | None) -> Iterator[str]:
    """By mergekit's own rule of what a template is."""
    if not template or template == "auto" or (len(template) >= 20 and "{" in template):
        return
    folder = importlib.resources.files(chat_templates)
    known = [f.name.removesuffix(".jinja") for f in folder.iterdir() if f.name.endswith(".jinja")]
    if template not in known:
        yield (
            f"`chat_template` is {template!r}, which is neither auto nor one of mergekit's "
            f"({', '.join(sorted(known))}) nor a Jinja template{did_you_mean(template, known)}"
        )


def _embedding_problem(
    token: str, config: TokenEmbeddingConfig, merge: MergeConfiguration, options: MergeOptions
) -> str | None:
    """What is wrong with the place from which a token's embedding shall come."""
    source, models = config.source, merge.referenced_models()
    if source is None:
        vocabularies = [v for model in models if (v := _vocabulary(model, options)) is not None]
        if config.force or not all(token in vocabulary for vocabulary in vocabularies):
            return "has no `source`: name the model whose embedding it gets"
        return None
    is_of_model = isinstance(source, ModelTokenEmbedding)
    model = source.model if is_of_model else source
    if not isinstance(model, ModelReference):  # zeros
        return None
    if model not in models:
        hint = did_you_mean(model, models, otherwise=": name one of them")
        return f"takes its embedding from {model}, which is none of the merge's models{hint}"
    if is_of_model and source.token_id is not None:
        size = model.config(options.trust_remote_code).get_text_config().vocab_size
        if not 0 <= source.token_id < size:
            return f"takes token_id {source.token_id} of {model}, which has {size} tokens"
        return None
    wanted, vocabulary = source.token if is_of_model else token, _vocabulary(model, options)
    if vocabulary is not None and wanted not in vocabulary:
        return (
            f"takes the embedding of {wanted!r} from {model}, whose tokenizer has no such token: "
            "name another with `{kind: model_token, model: ..., token: ...}`, or another model"
        )
    return None


def _vocabulary(model: ModelReference, options: MergeOptions) -> dict[str, int] | None:
    try:
        return load_tokenizer(model, options).get_vocab()
    except DamError:
        return None
