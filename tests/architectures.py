"""Every architecture that mergekit describes and some that it infers, as tiny checkpoints.

`python tests/architectures.py` writes the table of docs/compatibility.md from the list below;
test_architectures.py asserts each line of it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from mergekit.common import get_auto_cls
from transformers import PretrainedConfig

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
HEADING = "## Architectures"

SIZES = tiny.SIZES
GPT = {
    "vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}


@dataclass(frozen=True)
class Architecture:
    """One line of the table: a class of transformers, and how to build a tiny one."""

    name: str  # of the class
    config: str = ""  # the class of its config
    sizes: dict[str, Any] | None = None
    untrained: tuple[str, ...] = ()  # patterns of tensors whose coefficients keep their start
    note: str = ""

    def build(self) -> PretrainedConfig:
        config = getattr(transformers, self.config)(**(SIZES | (self.sizes or {})))
        config.architectures = [self.name]
        return config


DESCRIBED = (
    Architecture("LlamaForCausalLM", "LlamaConfig"),
    Architecture("MistralForCausalLM", "MistralConfig", HEADS),
    Architecture("Qwen2ForCausalLM", "Qwen2Config"),
    Architecture("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    Architecture("GemmaForCausalLM", "GemmaConfig", HEADS),
    Architecture("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    Architecture("PhiForCausalLM", "PhiConfig"),
    Architecture("Phi3ForCausalLM", "Phi3Config"),
    Architecture("Olmo2ForCausalLM", "Olmo2Config"),
    Architecture("GraniteForCausalLM", "GraniteConfig"),
    Architecture("CohereForCausalLM", "CohereConfig"),
    Architecture("Cohere2ForCausalLM", "Cohere2Config", HEADS),
    Architecture("StableLmForCausalLM", "StableLmConfig"),
    Architecture("Starcoder2ForCausalLM", "Starcoder2Config"),
    Architecture("GPT2LMHeadModel", "GPT2Config", GPT),
    Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    Architecture("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    Architecture("FalconForCausalLM", "FalconConfig", {
        "new_decoder_architecture": True, "num_kv_heads": 1, "tie_word_embeddings": False}),
    Architecture("Glm4ForCausalLM", "Glm4Config", HEADS),
    Architecture("Lfm2ForCausalLM", "Lfm2Config", {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Architecture("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    Architecture("ApertusForCausalLM", "ApertusConfig"),
    Architecture("ArceeForCausalLM", "ArceeConfig"),
    Architecture("MixtralForCausalLM", "MixtralConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "mlp_only_layers": [], **HEADS}),
    Architecture("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 12,
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 4, "mamba_n_groups": 1}),
    Architecture("Glm4MoeForCausalLM", "Glm4MoeConfig", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **HEADS}),
    Architecture("AfmoeForCausalLM", "AfmoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "num_dense_layers": 1, "layer_types": ["sliding_attention", "full_attention"], **HEADS}),
)  # fmt: skip

INFERRED = (
    Architecture("SmolLM3ForCausalLM", "SmolLM3Config"),
    Architecture("Olmo3ForCausalLM", "Olmo3Config"),
    Architecture("Exaone4ForCausalLM", "Exaone4Config", HEADS),
    Architecture("Ministral3ForCausalLM", "Ministral3Config", HEADS),
    Architecture("OPTForCausalLM", "OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    Architecture("BloomForCausalLM", "BloomConfig", {"n_head": 2, "n_layer": 2}),
    Architecture("Mamba2ForCausalLM", "Mamba2Config", {
        "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1}),
    Architecture("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12}),
    Architecture("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("GptOssForCausalLM", "GptOssConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2, **HEADS}),
    Architecture("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, **HEADS}),
    Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}),
    Architecture("Llama4ForCausalLM", "Llama4TextConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 2, **HEADS}),
)  # fmt: skip

ALL = (*DESCRIBED, *INFERRED)
