"""Steps of the fit with models of other architectures: their peaks against what is foreseen.

    python -m tests.benchmarks.architectures [--shape tiny|gpu] [--only NAME] [--repeat 3]

Two random models of each are saved in a temporary folder. What a fit refuses is tried, too: that a
model sees later tokens, as one whose experts round a token otherwise in another batch could seem.
"""

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import transformers
from transformers import PretrainedConfig

from mergekit_dam.fit.causal import require_causal
from tests.benchmarks.fit_step import PLAIN, made, measured, plain_step, prepared, steps_of
from tests.benchmarks.measuring import machine

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SOURCES, ROWS = 2, 2


@dataclass(frozen=True)
class Sizes:
    width: int
    layers: int
    heads: int
    shared: int  # of keys and values
    head: int
    inner: int
    expert: int
    experts: int
    used: int  # of these, by a token
    words: int  # of a vocabulary; of Gemma 2's, Gemma 3's and Qwen 2's
    words_of_gemma_2: int
    words_of_gemma_3: int
    words_of_qwen_2: int
    window: int
    length: int  # of a row


SIZES = {
    "tiny": Sizes(
        width=32, layers=2, heads=4, shared=2, head=8, inner=64, expert=16, experts=4, used=2,
        words=64, words_of_gemma_2=64, words_of_gemma_3=64, words_of_qwen_2=64, window=8, length=16,
    ),
    "gpu": Sizes(
        width=2048, layers=6, heads=16, shared=4, head=128, inner=5632, expert=1024, experts=16,
        used=4, words=64_000, words_of_gemma_2=256_000, words_of_gemma_3=262_144,
        words_of_qwen_2=151_936, window=512, length=1000,
    ),
}  # fmt: skip


def configs(s: Sizes) -> dict[str, PretrainedConfig]:
    own = {
        "hidden_size": s.width, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.shared, "vocab_size": s.words, **SPECIAL,
    }  # fmt: skip
    dense, experts = {"intermediate_size": s.inner}, {"num_experts_per_tok": s.used}
    latent = {
        "num_key_value_heads": s.heads, "q_lora_rank": None, "kv_lora_rank": 2 * s.head,
        "qk_rope_head_dim": s.head // 2, "qk_nope_head_dim": s.head, "v_head_dim": s.head,
    }  # fmt: skip
    t = transformers
    return {
        "Mixtral": t.MixtralConfig(
            **own, **dense, num_local_experts=s.experts // 2, num_experts_per_tok=2
        ),
        "Qwen 3 MoE": t.Qwen3MoeConfig(
            **own, **dense, **experts, num_experts=s.experts, moe_intermediate_size=s.expert,
            head_dim=s.head,
        ),
        "OLMoE": t.OlmoeConfig(
            **own, **experts, num_experts=s.experts, intermediate_size=s.expert
        ),
        "DeepSeek V3": t.DeepseekV3Config(
            **(own | latent), **dense, **experts, n_routed_experts=s.experts, n_group=2,
            topk_group=1, moe_intermediate_size=s.expert, first_k_dense_replace=0,
        ),
        "GPT-OSS": t.GptOssConfig(
            **own, **experts, num_local_experts=s.experts, intermediate_size=s.expert,
            head_dim=s.head // 2,
        ),
        "Gemma 2": t.Gemma2Config(
            **(own | {"vocab_size": s.words_of_gemma_2}), **dense, head_dim=s.head
        ),
        "Gemma 3": t.Gemma3TextConfig(
            **(own | {"vocab_size": s.words_of_gemma_3}), **dense, head_dim=s.head,
            sliding_window=s.window,
        ),
        "Qwen 2, tied": t.Qwen2Config(
            **(own | {"vocab_size": s.words_of_qwen_2}), **dense, tie_word_embeddings=True
        ),
        "Phi-3": t.Phi3Config(**own, **dense),
        "Mamba 2": t.Mamba2Config(
            hidden_size=s.width, num_hidden_layers=s.layers, vocab_size=s.words, **SPECIAL,
            num_heads=4 * s.width // s.head, head_dim=s.head // 2, state_size=s.head // 2,
            n_groups=1,
        ),
        "OPT": t.OPTConfig(
            hidden_size=s.width, word_embed_proj_dim=s.width // 2, num_hidden_layers=s.layers,
            ffn_dim=s.inner, num_attention_heads=s.heads, vocab_size=s.words,
        ),
    }  # fmt: skip


@click.command()
@click.option("--shape", type=click.Choice(list(SIZES)), default="gpu")
@click.option("--only", default="", help="the architectures whose names have this in them")
@click.option("--repeat", default=3)
@click.option("--device", default=None)
def main(shape: str, only: str, repeat: int, device: str | None) -> None:
    device, sizes = device or ("cuda" if torch.cuda.is_available() else "cpu"), SIZES[shape]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    print(f"{machine(device)}; {SOURCES} x {ROWS} rows of {sizes.length} tokens, {dtype}")
    for name, config in configs(sizes).items():
        if only in name:
            print(f"\n{name}\n{_measured(config, dtype, sizes.length, repeat, device)}", flush=True)
            gc.collect()


def _measured(
    config: PretrainedConfig, dtype: torch.dtype, length: int, repeat: int, device: str
) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models, _, ids = made(folder, config, dtype, SOURCES, False, ROWS, length, device)
        plain = {PLAIN: plain_step(models[0], torch.cat(ids), dtype, device)}
        fit = prepared(folder, models, None, ids, dtype, device, "none")
        require_causal(fit.merged)
        own = {n: s for n, s in steps_of(fit, folder, device).items() if "live" in n}
        return measured(fit, plain, own, repeat, device)


if __name__ == "__main__":
    main()
