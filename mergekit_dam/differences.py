"""In which keys two configs differ such that the same weights compute something else.

The code that runs a model tells: what a key says is without effect where neither the library's
modules of that model nor those that all its models share name the key. Fine-tuning tools leave
many of that sort.
"""

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

# What the code names, and what has no part in the logits of a text.
IRRELEVANT_KEYS = {
    # where it comes from, and in what the weights are stored
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures",
    "base_model", "prefix",
    # the vocabulary, which the merge aligns, and what its tokens are for
    "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
    # what is given back beside the logits, and the way to the same logits
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "chunk_size_feed_forward", "gradient_checkpointing", "attn_implementation",
    "_attn_implementation", "experts_implementation", "_experts_implementation",
    # heads that classify
    "id2label", "label2id", "num_labels", "problem_type",
}  # fmt: skip
# The same by their names: what training alone looks at, and GPT-2's head that sums a text up.
IRRELEVANT = re.compile(
    r"(.*_)?(dropout(_prob|_p|_rate)?|pdrop|layerdrop)|initializer_.*|.*loss_coef|summary_.*"
)
# Rotary embeddings that are the same for every length; a learnt table's length is its shape.
LENGTH = "max_position_embeddings"
LENGTHLESS = {"default", "linear", "llama3", "proportional"}
SHARED_CODE = ("modeling_*.py", "masking_utils.py", "configuration_utils.py")


def config_differences(
    first: PretrainedConfig, second: PretrainedConfig, *, trust_remote_code: bool
) -> list[str]:
    """Of models with code of their own, every key that may count."""
    both = [_names(config, trust_remote_code=trust_remote_code) for config in (first, second)]
    names = None if None in both else both[0] | both[1]
    is_idle = _is_lengthless(first) and _is_lengthless(second)
    one, other = (dict(_telling(config, names, is_idle)) for config in (first, second))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _telling(
    config: PretrainedConfig, names: set[str] | None, is_idle: bool, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in config.to_dict().items():
        own = vars(config).get(key)
        if isinstance(own, PretrainedConfig):
            yield from _telling(own, names, is_idle, f"{prefix}{key}.")
        elif names is None or (key in names and not (is_idle and key == LENGTH)):
            yield from _flat({key: value}, prefix)


def _flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in IRRELEVANT_KEYS or IRRELEVANT.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            # Older versions name a rotary embedding's `rope_type` so, too.
            inner = {k: v for k, v in value.items() if k != "type" or "rope_type" not in value}
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_lengthless(config: PretrainedConfig) -> bool:
    """Whether no rotary embedding of its depends on how long rows may be."""
    kinds = set()
    for part in _parts(config):
        rope = dict(_flat(getattr(part, "rope_parameters", None) or {}))
        kinds |= {v for name, v in rope.items() if name.split(".")[-1] in ("rope_type", "type")}
    return kinds <= LENGTHLESS


def _names(config: PretrainedConfig, *, trust_remote_code: bool) -> set[str] | None:
    """What the code of a library model names; None for code of the checkpoint's own."""
    if trust_remote_code and getattr(config, "auto_map", None):
        return None
    found = [_named_by(type(part)) for part in _parts(config)]
    return None if None in found else set().union({"model_type"}, *found)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


@functools.cache
def _named_by(kind: type[PretrainedConfig]) -> frozenset[str] | None:
    """The words in the modules that stand beside a config's, and in what the config derives."""
    modules = sorted(Path(inspect.getfile(kind)).parent.glob("modeling_*.py"))
    if not kind.__module__.startswith("transformers.models.") or not modules:
        return None
    shared = [path for name in SHARED_CODE for path in Path(transformers.__path__[0]).glob(name)]
    texts = [path.read_text(encoding="utf-8") for path in (*modules, *shared)]
    read = re.compile(r"""(?:\.|["'])(\w+)""")  # an attribute, or its name in quotes
    words = {word for text in (*texts, *_derivations(kind)) for word in read.findall(text)}
    return frozenset(words | {own for alias, own in kind.attribute_map.items() if alias in words})


def _derivations(kind: type[PretrainedConfig]) -> Iterator[str]:
    """The code of a config's properties and methods; what it makes of its keys as it is made, and
    keeps, is a key itself."""
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.models."):
            for name, member in vars(base).items():
                function = getattr(member, "fget", member)
                if not name.startswith(("__post_init__", "validate")) and _is_of(base, function):
                    yield inspect.getsource(function)


def _is_of(base: type, function: Any) -> bool:
    """Whether it is a function, and written there: a dataclass makes some by itself."""
    where = getattr(function, "__code__", None)
    return where is not None and where.co_filename == inspect.getfile(base)
