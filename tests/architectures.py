"""Every architecture that mergekit describes, and some that it infers, as tiny checkpoints.

The table of docs/compatibility.md is made of the lists below (see compatibility.py);
test_architectures.py asserts each of their lines.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tiny
import torch
import transformers
from mergekit.common import get_auto_cls
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

GPT = {
    "vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}
IMAGES = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One line of the table: a class of transformers, how to build a tiny one, what is expected."""

    name: str  # of the class
    config: str = ""  # the class of its config
    sizes: dict[str, Any] = field(default_factory=dict)  # besides tiny.SIZES
    note: str = ""
    untrained: tuple[str, ...] = ()  # parts of the names whose coefficients keep their start
    reason: str = ""  # why it is refused: a part of the message
    published: tuple[str, str] | None = None  # where published checkpoints have other names
    extra: Callable[[], dict[str, Tensor]] | None = None  # and tensors of their own

    def build(self) -> PretrainedConfig:
        sizes = dict(self.sizes)
        if "text_config" in sizes:
            sizes["text_config"] = tiny.SIZES | sizes["text_config"]
        else:
            sizes = tiny.SIZES | sizes
        config = getattr(transformers, self.config)(**sizes)
        config.architectures = [self.name]
        return config

    def save(self, folder: Path, seed: int) -> Path:
        """A random checkpoint with distinct values in every tensor, buffers too."""
        torch.manual_seed(seed)
        model = get_auto_cls(self.name).from_config(self.build())
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn_like(tensor) * 0.2 + (tensor == 1))
        model.save_pretrained(folder)
        tiny.save_tokenizer(folder)
        self._as_published(folder / "model.safetensors")
        return folder

    def _as_published(self, path: Path) -> None:
        tensors = load_file(path)
        if self.published:
            tensors = {re.sub(*self.published, name): t for name, t in tensors.items()}
        if self.extra:
            tensors |= self.extra()
        save_file(tensors, path, metadata={"format": "pt"})


def load(folder: Path, name: str) -> transformers.PreTrainedModel:
    """A checkpoint of any class, loaded strictly: nothing missing, nothing left over."""
    model, info = get_auto_cls(name).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    left = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(left.values()), left
    return model.eval()


def _gpt_neox_buffers() -> dict[str, Tensor]:
    """What Pythia's checkpoints hold besides weights, and mergekit asks for."""
    return {
        f"gpt_neox.layers.{layer}.attention.{name}": value.clone()
        for layer in range(2)
        for name, value in {
            "bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
            "masked_bias": torch.tensor(-1e9),
            "rotary_emb.inv_freq": torch.tensor([1.0, 0.01]),
        }.items()
    }


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
    Architecture("CohereForCausalLM", "CohereConfig", {"use_qk_norm": True},
        "with norms of queries and keys (Command R+)"),
    Architecture("Cohere2ForCausalLM", "Cohere2Config", HEADS),
    Architecture("StableLmForCausalLM", "StableLmConfig"),
    Architecture("Starcoder2ForCausalLM", "Starcoder2Config"),
    Architecture("GPT2LMHeadModel", "GPT2Config", GPT),
    Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {},
        "checkpoints with the old buffers, such as Pythia's",
        ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
        extra=_gpt_neox_buffers),
    Architecture("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    Architecture("FalconForCausalLM", "FalconConfig", {
        "new_decoder_architecture": True, "num_kv_heads": 1, "tie_word_embeddings": False}),
    Architecture("Glm4ForCausalLM", "Glm4Config", HEADS),
    Architecture("Lfm2ForCausalLM", "Lfm2Config", {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Architecture("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    Architecture("ApertusForCausalLM", "ApertusConfig", untrained=("act_fn.beta", "act_fn.eps")),
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
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **HEADS},
        untrained=("e_score_correction_bias",)),
    Architecture("AfmoeForCausalLM", "AfmoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "num_dense_layers": 1, "layer_types": ["sliding_attention", "full_attention"], **HEADS},
        untrained=("expert_bias",)),
)  # fmt: skip

EXPERTS_TRANSPOSED = "kept as [experts, in, out]: the experts' columns are their outputs"
INFERRED = (
    Architecture("SmolLM3ForCausalLM", "SmolLM3Config"),
    Architecture("Olmo3ForCausalLM", "Olmo3Config"),
    Architecture("Exaone4ForCausalLM", "Exaone4Config", HEADS),
    Architecture("Ministral3ForCausalLM", "Ministral3Config", HEADS),
    Architecture(
        "BertLMHeadModel", "BertConfig", {"is_decoder": True, "max_position_embeddings": 128},
        note="as a decoder",
    ),
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
        "shared_expert_intermediate_size": 12,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **HEADS}),
    Architecture("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **HEADS}),
    Architecture("Gemma4ForCausalLM", "Gemma4TextConfig", {
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": tiny.VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, **HEADS},
        untrained=("layer_scalar",)),
    Architecture("Gemma3nForCausalLM", "Gemma3nTextConfig", {
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": tiny.VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [24, 24], **HEADS}),
    Architecture("Zamba2ForCausalLM", "Zamba2Config", {
        "layers_block_type": ["hybrid", "hybrid"], "mamba_d_state": 4, "mamba_headdim": 8,
        "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "use_shared_attention_adapter": False, "adapter_rank": 4},
        "its layers share a block"),
    Architecture("GraniteMoeForCausalLM", "GraniteMoeConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("FalconH1ForCausalLM", "FalconH1Config", {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
        "mamba_n_groups": 1, **HEADS}),
    Architecture("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {
        "num_local_experts": 4, "num_experts_per_tok": 2, **HEADS},
        untrained=("e_score_correction_bias",)),
    Architecture("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "head_dim": 4}, "where every layer has experts"),
    Architecture("Llama4ForCausalLM", "Llama4TextConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 2, **HEADS}, EXPERTS_TRANSPOSED),
)  # fmt: skip


def with_sections(*sections: int) -> dict[str, Any]:
    """Rotary positions of text, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


QWEN3_SIGHT = {
    "depth": 3, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 16,
    "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
TOKENS = {
    "image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 38,
    "vision_end_token_id": 39,
}  # fmt: skip
SEEING = (
    Architecture(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": HEADS, "vision_config": IMAGES | {"vision_use_head": False},
         "mm_tokens_per_image": 4, "image_token_index": 40, "boi_token_index": 41,
         "eoi_token_index": 42},
        "checkpoints as Google published them",
        untrained=("vision_tower.", "multi_modal_projector."),
        published=(r"^vision_tower\.", "vision_tower.vision_model.")),
    Architecture(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": with_sections(1, 1, 2),
         "vision_config": {
             "depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2,
             "out_hidden_size": 16, "patch_size": 4, "window_size": 16,
             "fullatt_block_indexes": [0]}, **TOKENS},
        untrained=("visual.",)),
    Architecture(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        {"text_config": {**HEADS, **with_sections(2, 1, 1)},
         "vision_config": QWEN3_SIGHT, **TOKENS},
        untrained=("model.visual.",)),
    Architecture(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": {**HEADS, "num_experts": 4, "num_experts_per_tok": 2,
                         "moe_intermediate_size": 12, **with_sections(2, 1, 1)},
         "vision_config": QWEN3_SIGHT, **TOKENS},
        untrained=("model.visual.",)),
    Architecture(
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"text_config": {"model_type": "mistral", **HEADS},
         "vision_config": IMAGES | {"model_type": "pixtral", "head_dim": 4},
         "image_token_index": 40},
        untrained=("vision_tower.", "multi_modal_projector.")),
    Architecture(
        "Llama4ForConditionalGeneration", "Llama4Config",
        {"text_config": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 1,
                         "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
         "vision_config": IMAGES | {
             "intermediate_size": 32, "projector_input_dim": 16, "projector_output_dim": 16,
             "vision_output_dim": 16},
         "image_token_index": 40, "boi_token_index": 41, "eoi_token_index": 42},
        EXPERTS_TRANSPOSED, untrained=("vision_model.", "multi_modal_projector.")),
)  # fmt: skip

FITTED = (*DESCRIBED, *INFERRED, *SEEING)

DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
EXPERTS_DROPPED = "mergekit drops the experts, because the first layers have none"
LAYERS_UNLIKE = "mergekit drops what not every layer has, and the layers are of different kinds"
REFUSED = (
    Architecture(
        "CohereForCausalLM", "CohereConfig", {},
        "mergekit asks for norms of queries and keys, which Command R lacks",
        reason="q_norm.weight"),
    Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {},
        "mergekit asks for the old buffers, which transformers 5 no longer saves",
        reason="attention.bias"),
    Architecture(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, EXPERTS_DROPPED,
        reason="experts.gate_up_proj"),
    Architecture(
        "Lfm2MoeForCausalLM", "Lfm2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
         "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, EXPERTS_DROPPED,
        reason="experts.gate_up_proj"),
    Architecture(
        "JambaForCausalLM", "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4},
        LAYERS_UNLIKE, reason="drops tensors that some of them lack"),
    Architecture(
        "NemotronHForCausalLM", "NemotronHConfig",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8,
         "ssm_state_size": 4, "n_groups": 1, **HEADS},
        LAYERS_UNLIKE, reason="drops tensors that some of them lack"),
    Architecture(
        "RwkvForCausalLM", "RwkvConfig", {"attention_hidden_size": 16},
        "it rescales its weights in place as it runs", reason="rescales its weights in place"),
    Architecture(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "llama"}, "image_token_index": 40,
         "vision_config": {**IMAGES, "model_type": "clip_vision_model", "projection_dim": 8}},
        "its tensors have other names in its files than in transformers, and mergekit keeps those",
        reason="by the names that the sources' files have"),
    Architecture(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": with_sections(1, 1, 2),
         "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 16, "mlp_ratio": 2,
                           "num_heads": 2, "patch_size": 4}, **TOKENS},
        "mergekit looks for the number of layers where transformers 5 no longer has it",
        reason="num_hidden_layers"),
)  # fmt: skip

# Class and config: mergekit describes them, and nothing in them predicts a next token.
NOT_CAUSAL = {
    "BertForMaskedLM": "BertConfig",
    "DistilBertForTokenClassification": "DistilBertConfig",
    "RobertaForSequenceClassification": "RobertaConfig",
    "LlamaForSequenceClassification": "LlamaConfig",
    "T5ForConditionalGeneration": "T5Config",
    "WhisperForConditionalGeneration": "WhisperConfig",
}

# mergekit describes them; their classes are not in transformers, but beside the checkpoints.
OWN_CODE = (
    "BaichuanForCausalLM", "ChatGLMModel", "ExaoneForCausalLM", "InternLM2ForCausalLM",
    "JAISLMHeadModel", "MixFormerSequentialForCausalLM", "Phi3SmallForCausalLM",
    "QWenLMHeadModel", "SolarForCausalLM", "StableLMEpochForCausalLM",
)  # fmt: skip


def table() -> str:
    """The section of docs/compatibility.md, without its heading."""
    lines = ["| architecture | mergekit | fit | remarks |", "|---|---|---|---|"]
    for known, group in (("described", DESCRIBED), ("described", SEEING), ("inferred", INFERRED)):
        lines += [_line(a, known, "yes") for a in group]
    lines += [_line(a, _known(a.name), "refused") for a in REFUSED]
    own = "transformers has no such class; the checkpoint's own code, untested"
    lines += [_line(Architecture(name, note=own), "described", "refused") for name in OWN_CODE]
    other = "BERT, DistilBERT, RoBERTa, T5, Whisper and classifiers"
    lines.append(f"| {other} | described | refused | they predict no next token from the left |")
    return "\n".join(lines) + "\n"


def _known(name: str) -> Literal["described", "inferred"]:
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    return "described" if name in NAME_TO_ARCH else "inferred"


def _line(architecture: Architecture, known: str, fit: str) -> str:
    remarks = [architecture.note] if architecture.note else []
    if architecture.untrained:
        tensors = ", ".join(f"`{part.strip('.')}`" for part in architecture.untrained)
        remarks.append(f"keep their start: {tensors}")
    return f"| {architecture.name} | {known} | {fit} | {'; '.join(remarks)} |"
