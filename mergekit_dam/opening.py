"""Models and tokenizers, opened or refused in a sentence."""

import logging
import os
import re

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mergekit_dam.errors import DamError
from mergekit_dam.sources import signature

LOG = logging.getLogger(__name__)


def require_model(model: ModelReference, options: MergeOptions) -> None:
    """Raises DamError for a model whose config or weights cannot be opened."""
    try:
        model.config(trust_remote_code=options.trust_remote_code)
        _forget_if_changed(model)
        LoaderCache().get(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if re.match(r"[./]|\w:\\", path := model.model.path) and not os.path.exists(path):
            reason = "there is no such folder"
        raise DamError(
            f"The model {model} cannot be opened ({reason}): give the path of a folder with "
            "config.json and weights, or a name on the Hub."
        ) from error


_SEEN: dict[ModelReference, tuple] = {}


def _forget_if_changed(model: ModelReference) -> None:
    """mergekit keeps the files of a model open, by its name, as long as a process lives."""
    folder = model.model.path
    if os.path.isdir(folder):
        found = signature([folder])
        if _SEEN.get(model, found) != found:
            LoaderCache().loaders.pop(model, None)
        _SEEN[model] = found


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
        LOG.debug("loading a tokenizer", exc_info=error)
        raise DamError(
            f"The model {model} has no tokenizer that transformers can load: put its tokenizer "
            "files beside its weights."
        ) from error
