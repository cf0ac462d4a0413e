"""Tiny real checkpoints, made in a second: random models of any architecture, a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789=+ "
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = len(LETTERS) + len(SPECIAL)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),  # biases
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8),  # tied, soft caps
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=8),
    "gpt2": transformers.GPT2Config(  # Conv1D: weights are [in, out]
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    ),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def save_tokenizer(folder: Path, chat_template: str | None = None, letters: str = LETTERS) -> None:
    """A character-level tokenizer that writes <bos> first."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_model(
    folder: Path, config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> Path:
    """A random model with distinct values in every tensor, biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_models(
    folder: Path, config: PretrainedConfig, count: int, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """`count` different models under folder/m0, folder/m1, ..."""
    return [save_model(folder / f"m{seed}", config, seed, dtype) for seed in range(count)]


def cast(folder: Path, copy: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint in another dtype."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(copy)
    save_tokenizer(copy)
    return copy


def load(folder: Path) -> transformers.PreTrainedModel:
    """A checkpoint, loaded strictly: nothing missing, nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    left = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(left.values()), left
    return model.eval()


def tokens(rows: int = 3, length: int = 9, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


def sentences(count: int, seed: int, longest: int = 20) -> list[str]:
    """Random text, rows of different length."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return [
        "".join(LETTERS[number(0, len(LETTERS))] for _ in range(number(4, longest)))
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def teach(merged, source: int, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocabulary] of one source on its own."""
    with merged.speaking_as(source) as model:
        return model(input_ids)
