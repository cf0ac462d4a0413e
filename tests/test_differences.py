"""Keys of configs: those that change what the same weights compute, and those that do not."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_dam.differences import IRRELEVANT, IRRELEVANT_KEYS, config_differences

SIZES = {**tiny.SIZES, "head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_dynamic": transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
    "llama_yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=4),
    "mixtral": tiny.CONFIGS["mixtral"],
    "qwen2": transformers.Qwen2Config(**tiny.SIZES),
    "qwen2_windows": transformers.Qwen2Config(**tiny.SIZES, **WINDOWS),
    "gemma2": transformers.Gemma2Config(**SIZES, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, sliding_window=4),
    "granite": transformers.GraniteConfig(**tiny.SIZES, **GRANITE),
    "cohere2": transformers.Cohere2Config(**SIZES, sliding_window=4, logit_scale=0.5),
    "phi3": transformers.Phi3Config(**tiny.SIZES),
    "gpt2": tiny.CONFIGS["gpt2"],
}
UNREAD = {
    "unsloth_version": "2025.1", "unsloth_fixed": True, "use_flash_attention_2": True,
    "_attn_implementation_autoset": True, "auto_map": {"AutoModel": "a.B"}, "use_mrope": False,
    "pretraining_tp": 2, "id2label": {0: "good"}, "label2id": {"good": 0}, "eos_token_id": 5,
    "pad_token_id": 3, "use_cache": False, "torch_dtype": "bfloat16", "initializer_range": 0.5,
    "gradient_checkpointing": True, "task_specific_params": {"a": {"b": 1}}, "model_max_length": 9,
    "language": "en", "base_model": "a", "task": "b", "prefix": "c", "rank": 8, "model_name": "d",
}  # fmt: skip


def changed(config: PretrainedConfig, **keys: Any) -> PretrainedConfig:
    """As from a config.json with other keys."""
    return type(config).from_dict({**config.to_dict(), **keys})


def differ(first: PretrainedConfig, second: PretrainedConfig, *, trusts: bool = False) -> list[str]:
    return config_differences(first, second, trust_remote_code=trusts)


@torch.no_grad()
def logits(config: PretrainedConfig, weights: dict | None = None) -> tuple[torch.Tensor, dict]:
    """Of random weights, or of these, on rows longer than what a rotary embedding was made for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5 + (parameter == 1))
    model.load_state_dict(weights or model.state_dict())
    return model(tiny.tokens(length=60)).logits, model.state_dict()


def others(value: Any) -> Iterator[Any]:
    """Values that a key might have as well."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, value + 1, type(value)(value / 2))
    elif value in ("silu", "gelu_pytorch_tanh", "gelu_new"):
        yield "relu"
    elif isinstance(value, dict):
        yield from ({**value, key: new} for key in value for new in others(value[key]))
    elif isinstance(value, list):
        yield value[::-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_changes_the_logits_counts(name):
    """Every key of a config, changed in turn. Those of which a model of other shapes is made are
    found as such elsewhere."""
    config = CONFIGS[name]
    expected, weights = logits(config)
    counted = set()
    for key, value in config.to_dict().items():
        for new in others(value):
            try:
                other = changed(config, **{key: new})
                found, _ = logits(other, weights)
            except Exception:
                continue
            if not torch.equal(found, expected):
                assert differ(config, other), (key, value, new)
                counted.add(key)
    assert counted
    assert not any(key in IRRELEVANT_KEYS or IRRELEVANT.fullmatch(key) for key in counted)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_changes_no_logits_does_not_count(name):
    config = CONFIGS[name]
    dropouts = {key: 0.25 for key in config.to_dict() if "drop" in key}
    other = changed(config, **UNREAD, **dropouts)
    expected, weights = logits(config)
    assert torch.equal(logits(other, weights)[0], expected)
    assert differ(config, other) == differ(other, config) == []


@pytest.mark.parametrize(
    ("name", "counts"),
    [("llama", False), ("qwen2", False), ("llama_dynamic", True), ("llama_yarn", True)],
)
def test_the_longest_row_counts_where_the_rotation_depends_on_it(name, counts):
    config, other = (changed(CONFIGS[name], max_position_embeddings=n) for n in (32, 16))
    assert bool(differ(config, other)) is counts
    if not counts:
        assert torch.equal(logits(config)[0], logits(other)[0])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"rope_theta": 500000.0, "rope_parameters": None}),
        ("llama", {"rope_parameters": {**DYNAMIC, "rope_type": "linear"}}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"head_dim": 4}),  # which its config does not know, and its model reads
        ("qwen2", {**WINDOWS, "layer_types": None}),
        ("qwen2_windows", {"sliding_window": 5}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gemma2", {"layer_types": ["full_attention"] * 2}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere2", {"logit_scale": 2.0}),
        ("mixtral", {"num_experts_per_tok": 1}),
    ],
    ids=str,
)
def test_real_differences_count(name, keys):
    assert differ(CONFIGS[name], changed(CONFIGS[name], **keys))


def test_base_and_instruct_of_qwen_2_5():
    shared = {**tiny.SIZES, "use_sliding_window": False}
    of_base = {"max_position_embeddings": 131072, "sliding_window": 131072, "use_mrope": False}
    base = transformers.Qwen2Config(**{**shared, **of_base, "max_window_layers": 28})
    tuned = {"max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 21}
    assert differ(base, transformers.Qwen2Config(**{**shared, **tuned})) == []


def test_parts_of_a_model_that_sees():
    config = transformers.Gemma3Config(text_config=SIZES)
    for key, value, found in (
        ("hidden_activation", "relu", ["text_config.hidden_activation"]),
        ("attention_dropout", 0.5, []),
        ("unsloth_version", "2025.1", []),
    ):
        text = {**config.to_dict()["text_config"], key: value}
        assert differ(config, changed(config, text_config=text)) == found


def test_what_a_config_derives_from_its_keys():
    """A property of the config's own reads them, and the model reads the property."""
    config = transformers.JambaConfig()
    assert differ(config, transformers.JambaConfig(attn_layer_offset=2)) == ["attn_layer_offset"]


def test_an_older_word_in_a_rotary_embedding():
    old = changed(CONFIGS["llama"], rope_parameters={**YARN, "type": "yarn"})
    assert differ(CONFIGS["llama_yarn"], old) == []


def test_code_of_the_checkpoints_own_may_read_any_key():
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    own, other = (OwnConfig(**SIZES, some_key=n) for n in range(2))
    assert differ(own, other) == ["some_key"]
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    first, second = (transformers.LlamaConfig(**SIZES, some_key=n, **code) for n in range(2))
    assert differ(first, second) == []  # transformers' own class is taken
    assert differ(first, second, trusts=True) == ["some_key"]
    assert differ(OwnConfig(attention_dropout=0.1), OwnConfig()) == []


def test_code_of_ones_own_for_one_of_them_makes_no_key_count_that_is_the_same():
    config = CONFIGS["llama"]
    other = changed(config, auto_map={"AutoModelForCausalLM": "a.B"})
    found = differ(config, other, trusts=True)
    assert found == differ(other, config, trusts=True) == ["auto_map.AutoModelForCausalLM"]
