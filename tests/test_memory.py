"""What a fit takes, as it is predicted and as it is."""

import random
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from transformers import trainer

from mergekit_dam.check import check
from mergekit_dam.config import read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import chunks, fit, place
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.forecast import Outline, held, merged_skeleton
from mergekit_dam.fit.objective import Distillation, interference
from mergekit_dam.fit.optimizer import DifferencesAdamW, parameter_groups
from mergekit_dam.fit.place import groups_of
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.teachers import KeptTeachers
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.least_squares import least_squares, objective, walk
from mergekit_dam.least_squares import rows as calibration
from mergekit_dam.model import mixture, offload
from mergekit_dam.model.live import Live

QUIET = MergeOptions(quiet=True)
MODES = ("block", "weights", "none")
SOURCES = 2

SMALL = {**tiny.SIZES, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
# name -> config, tokens of a row
STEPS = {
    "activations": (transformers.LlamaConfig(**SMALL), 512),
    "weights": (transformers.LlamaConfig(**SMALL), 8),
    "depth": (transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 12}), 64),
    "vocabulary": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 8192}), 128),
    "chunks": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 8192}), 600),
    "tied": (transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), 128),
    "little vocabulary": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 64}), 600),
    "shared heads": (transformers.Qwen2Config(**{**SMALL, "num_key_value_heads": 1}), 256),
    "gemma3": (transformers.Gemma3TextConfig(**SMALL, head_dim=64), 128),
    "narrow": (
        transformers.LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128}), 8
    ),
    "wide": (
        transformers.LlamaConfig(**{**SMALL, "hidden_size": 512, "intermediate_size": 1024}), 8
    ),
    "window": (transformers.Gemma3TextConfig(**SMALL, head_dim=64, sliding_window=48), 400),
    "every pair of tokens": (transformers.Gemma2Config(**SMALL, head_dim=64), 400),  # eager
    "head": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 32_000}), 8),
    "caps": (transformers.Gemma2Config(**{**SMALL, "vocab_size": 8192}, head_dim=64), 128),
    "chunks of caps": (
        transformers.Gemma2Config(**{**SMALL, "vocab_size": 8192}, head_dim=64), 600
    ),
    "scaled logits": (
        transformers.CohereConfig(**{**SMALL, "vocab_size": 8192}, use_qk_norm=True), 128
    ),
    "llama4": (  # its inner model is not where its prefix says
        transformers.Llama4TextConfig(
            **{**SMALL, "vocab_size": 8192}, head_dim=64, num_local_experts=2,
            intermediate_size_mlp=320,
        ),
        128,
    ),
    "narrow head": (
        transformers.OPTConfig(
            **{**SMALL, "vocab_size": 8192, "max_position_embeddings": 256}, ffn_dim=320,
            word_embed_proj_dim=32,
        ),
        60,
    ),
    "tables": (  # one for the inputs of each layer
        transformers.Gemma4TextConfig(
            **{**SMALL, "num_hidden_layers": 4}, head_dim=64, global_head_dim=64,
            hidden_size_per_layer_input=64, vocab_size_per_layer_input=16_384, sliding_window=600,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        128,
    ),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=512, n_embd=128, n_layer=2, n_head=2, n_positions=256, bos_token_id=1,
            eos_token_id=2,
        ),
        200,
    ),
    "positions": (
        transformers.GPT2Config(
            vocab_size=64, n_embd=128, n_layer=2, n_head=2, n_positions=32_768, bos_token_id=1,
            eos_token_id=2,
        ),
        16,
    ),
}  # fmt: skip


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXERS = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
OTHERS = {
    "mixtral": (transformers.MixtralConfig(**SMALL, **EXPERTS), 200),
    "gpt_oss": (transformers.GptOssConfig(**SMALL, **EXPERTS, head_dim=64), 200),
    "qwen3_next": (
        transformers.Qwen3NextConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
            shared_expert_intermediate_size=96, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=64, linear_value_head_dim=64, head_dim=64,
            layer_types=["linear_attention", "full_attention"],
        ),
        200,
    ),
    "granite_hybrid": (
        transformers.GraniteMoeHybridConfig(
            **SMALL, **EXPERTS, **MIXERS, mamba_chunk_size=64, shared_intermediate_size=96,
            layer_types=["mamba", "attention"],
        ),
        200,
    ),
    "granite_hybrid, long parts": (  # of a row, which are made up to be whole
        transformers.GraniteMoeHybridConfig(
            **SMALL, **EXPERTS, **MIXERS, mamba_chunk_size=256, shared_intermediate_size=96,
            layer_types=["mamba", "attention"],
        ),
        100,
    ),
    "qwen3_moe": (  # norms between what sees the same input
        transformers.Qwen3MoeConfig(
            **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, head_dim=64,
            mlp_only_layers=[],
        ),
        200,
    ),
    "mamba": (transformers.MambaConfig(**SMALL, state_size=16), 60),
    "bloom": (transformers.BloomConfig(**SMALL, n_head=2, n_layer=2), 200),  # alibi
    "latent attention": (  # whose values are narrower than its keys
        transformers.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 2}, q_lora_rank=None, kv_lora_rank=32,
            qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=2,
        ),
        400,
    ),
    "opt": (  # calls a part of its inner model
        transformers.OPTConfig(
            **{**SMALL, "max_position_embeddings": 256}, ffn_dim=320, word_embed_proj_dim=128
        ),
        200,
    ),
    "phi3": (transformers.Phi3Config(**SMALL), 200),  # one wide matrix for gate and up
    "gemma3n": (  # several streams of hidden states, and layers that share keys and values
        transformers.Gemma3nTextConfig(
            **{**SMALL, "intermediate_size": [320] * 4, "num_hidden_layers": 4}, head_dim=64,
            num_kv_shared_layers=2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=512,
            laurel_rank=16, activation_sparsity_pattern=[0.0] * 4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        100,
    ),
    "wide inputs": (  # of layers, beside the hidden states
        transformers.Gemma4TextConfig(
            **{**SMALL, "num_hidden_layers": 4}, head_dim=64, global_head_dim=64,
            hidden_size_per_layer_input=256, vocab_size_per_layer_input=512, sliding_window=600,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        200,
    ),
}  # fmt: skip


# Whose blocks return weights of attention that nobody looks at.
DROPPED = {
    "bloom": (transformers.BloomConfig(**SMALL, n_head=2, n_layer=2), 600),
    "mpt": (
        transformers.MptConfig(vocab_size=512, d_model=128, n_heads=2, n_layers=2, max_seq_len=512),
        400,
    ),
    "gpt_neox_japanese": (  # many of them
        transformers.GPTNeoXJapaneseConfig(
            vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
            intermediate_multiple_size=3, bos_token_id=1, eos_token_id=2,
        ),
        600,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _chunks(request, monkeypatch):
    """Pieces of a sixteenth, so that a small vocabulary goes in several."""
    if "chunks" in request.node.name:
        for module, name in ((chunks, "CHUNK"), (calibration, "LOGITS"), (objective, "PART")):
            monkeypatch.setattr(module, name, getattr(module, name) // 16)


def prepared(
    recipe, folder: Path, config, rows: list[list[Row]], dtype="float32", *, base=False, **dam
):
    models = tiny.save_models(folder, config, len(rows) + base)
    data = [SourceData(own, own[:1]) for own in rows]
    keys = {"base_model": str(models[-1])} if base else {}
    path = recipe(models[: len(rows)], dtype=dtype, dam={"batch_size": 1, **dam}, **keys)
    return prepare(read_recipe(str(path)), QUIET, device="cpu", data=data)


def stepping(recipe, folder: Path, config, lengths: Sequence[int], dam: dict):
    rows = [Row([number + 1] * length) for number, length in enumerate(lengths)]
    found = prepared(recipe, folder, config, [[row] for row in rows], **dam)
    step = Distillation(found.merged, found.settings.objective)
    inputs = batch(rows, list(range(len(rows))))
    groups = parameter_groups(found.merged, None, found.settings.basis)
    optimizer = DifferencesAdamW(groups, fused=True)

    def run() -> None:
        step(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return found, run, optimizer


def compare(
    recipe, folder: Path, name: str, dam: dict, *, lengths: int = 1, sources: int = SOURCES
) -> None:
    """Within 15 %, counted tensor by tensor; with rows of so many lengths."""
    config, length = {**STEPS, **OTHERS}[name]
    lengths = [length - n % lengths * length // (lengths + 1) for n in range(sources)]
    found, step, optimizer = stepping(recipe, folder, config, lengths, dam)
    step()  # makes the optimiser's moments
    states = (s for state in optimizer.state.values() for s in state.values())
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    known = interference(found.merged) if "weighted_overlap" in str(dam) else ()
    there = sum(tensor.nbytes for tensor in (*states, *parameters, *known))
    for mode in MODES:
        found.merged.recompute = mode
        with Live() as live:
            step()
        assert found.needs.of(mode) == pytest.approx(there + live.most, rel=0.15), mode
        assert live.now == 0, mode  # nothing stays that the next step would find


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_what_was_predicted(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {})


@pytest.mark.parametrize("name", STEPS)
def test_so_does_one_with_rows_of_two_lengths(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {}, lengths=2)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "sources, lengths, granularity", [(3, 3, "column"), (4, 2, "row"), (4, 4, "element")]
)
def test_so_does_one_with_more_sources(recipe, tmp_path, name, sources, lengths, granularity):
    dam = {"granularity": granularity}
    compare(recipe, tmp_path, name, dam, sources=sources, lengths=lengths)


@pytest.mark.parametrize("name", OTHERS)
def test_so_does_one_of_other_architectures(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {}, sources=3, lengths=2)


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("sources, lengths", [(3, 1), (3, 2)])
def test_so_does_one_whose_blocks_return_what_nobody_looks_at(
    recipe, tmp_path, monkeypatch, name, sources, lengths
):
    monkeypatch.setitem(OTHERS, name, DROPPED[name])
    compare(recipe, tmp_path, name, {}, sources=sources, lengths=lengths)


@pytest.mark.parametrize("granularity", ["column", "element"])
def test_so_does_one_with_a_base(recipe, tmp_path, granularity):
    """Which has coefficients, and does not teach."""
    compare(recipe, tmp_path, "vocabulary", {"granularity": granularity, "base": True}, sources=3)


@pytest.mark.parametrize(
    "name, part",
    [
        *(("depth", part) for part in ("linear", "norm", "embedding")),
        *((name, "linear") for name in ("mixtral", "qwen3_next")),  # experts
    ],
)
def test_so_does_one_that_trains_a_part(recipe, tmp_path, name, part):
    compare(recipe, tmp_path, name, {"train": {part: False}}, sources=3, lengths=2)


@pytest.mark.parametrize("name", ["vocabulary", "chunks", "head"])
def test_so_does_one_whose_terms_are_made_of_a_whole_chunk(recipe, tmp_path, monkeypatch, name):
    """As on a GPU."""
    monkeypatch.setattr(chunks, "PIECES", {})
    compare(recipe, tmp_path, name, {})


@pytest.mark.parametrize("name", STEPS)
def test_so_does_one_whose_sources_teach_together(recipe, tmp_path, monkeypatch, name):
    """As on a GPU."""
    monkeypatch.setattr(mixture, "DEVICES", {"cpu"})
    compare(recipe, tmp_path, name, {})


CASTS = [  # dtypes of the sources and of the passes
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
]


@pytest.mark.parametrize(
    "name, dtype, computed",
    [
        *(
            (name, *c)
            for name in ("activations", "depth", "vocabulary", "chunks", "head", "tables")
            for c in CASTS
        ),
        ("positions", "bfloat16", "float32"),  # a teacher's block is a copy
        ("wide", "bfloat16", "bfloat16"),  # parts of weights in float32
    ],
)
def test_so_does_one_in_another_dtype_than_the_weights(recipe, tmp_path, name, dtype, computed):
    """Merged weights of no other are ever there."""
    compare(recipe, tmp_path, name, {"dtype": dtype, "compute_dtype": computed})


@pytest.mark.parametrize(
    "terms", ["jsd", "mse", "entropy", "kl jsd", "kl entropy", "kl mse", "kl reverse_kl mse"]
)
def test_so_do_other_terms(recipe, tmp_path, terms):
    compare(
        recipe, tmp_path, "vocabulary", {"objective": {"kl": 0, **dict.fromkeys(terms.split(), 1)}}
    )


@pytest.mark.parametrize("basis", ["differences", "coefficients"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_so_does_the_optimiser(recipe, tmp_path, granularity, basis):
    compare(recipe, tmp_path, "weights", {"granularity": granularity, "basis": basis})


@pytest.mark.parametrize(
    "terms",
    [
        {"similarity": 0},
        {"similarity": 0, "l1": 1, "l2": 1},
        {"similarity": 0, "overlap": 1},
        {"overlap": 1},
        {"weighted_overlap": 1},
        {"overlap": 1, "weighted_overlap": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sources", [2, 4])
def test_so_do_terms_of_the_coefficients(recipe, tmp_path, terms, sources):
    dam = {"objective": terms, "granularity": "element", "basis": "coefficients"}
    compare(recipe, tmp_path, "narrow", dam, sources=sources)


@pytest.mark.parametrize("name", ["tables", "head", "positions"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("lengths", [1, 2])
def test_so_do_tables(recipe, tmp_path, name, granularity, lengths):
    """The whole, or rows that are looked up."""
    compare(recipe, tmp_path, name, {"granularity": granularity}, lengths=lengths)


@pytest.mark.parametrize("name", ["activations", "depth", "chunks", "head"])
def test_figures_take_no_more_than_a_step(recipe, tmp_path, name):
    """They are the first to run."""
    _, length = STEPS[name]
    figures(recipe, tmp_path, name, [length], [length - n for n in range(5)])


@pytest.mark.parametrize(
    "name, lengths, held_out",
    [
        ("granite_hybrid, long parts", [100], [8] * 20),
        ("qwen3_next", [100] * 2, [8] * 40),
        ("every pair of tokens", [50] * 8, [790]),
        ("activations", [50], [300]),
    ],
)
def test_nor_do_those_of_rows_of_other_lengths(recipe, tmp_path, name, lengths, held_out):
    """Short ones that are filled up, or long ones whose pairs are kept."""
    figures(recipe, tmp_path, name, lengths, held_out)


def figures(recipe, folder: Path, name: str, lengths: list[int], held_out: list[int]) -> None:
    config = {**STEPS, **OTHERS}[name][0]
    data = [
        SourceData(*([Row([number + 1] * n) for n in own] for own in (lengths, held_out)))
        for number in range(SOURCES)
    ]
    models = tiny.save_models(folder, config, SOURCES)
    dam = {"batch_size": len(lengths), "steps": 1}
    path = recipe(models, dtype="float32", dam=dam)
    found = prepare(read_recipe(str(path)), QUIET, device="cpu", data=data)
    needs, rows = found.needs, [own.held_out for own in data]
    with Live() as live:
        evaluate(found.merged, rows, needs.tokens, needs.widest, rows=needs.rows)
        KeptTeachers(found.merged, folder / "kept", "", needs.tokens, needs.rows).keep(rows)
    assert live.most <= needs.of("block")


# name -> tokens of the longest row, rows, whether the others are shorter
STARTS = {
    "activations": (512, 6, False),
    "weights": (8, 8, True),
    "vocabulary": (64, 8, False),
    "chunks": (200, 2, True),
    "tied": (64, 8, True),
    "gemma3": (64, 8, True),
    "narrow": (20, 8, True),
    "window": (300, 4, False),
    "every pair of tokens": (1000, 3, False),
    "head": (8, 8, True),
    "gpt2": (100, 8, True),
    "tables": (64, 8, True),
    "mixtral": (64, 8, True),
    "mamba": (30, 4, False),
    "qwen3_next": (200, 2, True),
    "qwen3_moe": (60, 2, True),
    "phi3": (200, 2, True),
    "granite_hybrid": (200, 6, True),
    "bloom": (120, 4, True),
    "gemma3n": (64, 8, True),
}


@pytest.mark.parametrize(
    "name, granularity",
    [*((name, "column") for name in STARTS if name != "narrow"), ("narrow", "element")],
)
def test_the_start_takes_what_was_predicted(recipe, tmp_path, name, granularity):
    """Within 15 %, counted tensor by tensor."""
    config, (longest, count, vary) = {**STEPS, **OTHERS}[name][0], STARTS[name]
    vocabulary, draw = config.get_text_config().vocab_size, random.Random(0)
    rows = [
        [
            Row(draw.choices(range(3, vocabulary), k=longest - number % 5 * vary))
            for number in range(count)
        ]
        for _ in range(SOURCES)
    ]
    found = prepared(recipe, tmp_path, config, rows, start="least_squares", granularity=granularity)
    with Live() as live:
        least_squares(found.merged, rows)
    assert found.place.start == pytest.approx(live.most, rel=0.15)


@pytest.mark.parametrize("name", ["activations", "window", "every pair of tokens"])
def test_so_does_one_with_a_few_long_rows(recipe, tmp_path, name):
    rows = [
        [Row([number + 3] * n) for n in (50, 500, 500, *[50] * 20)] for number in range(SOURCES)
    ]
    found = prepared(recipe, tmp_path, STEPS[name][0], rows, start="least_squares")
    with Live() as live:
        least_squares(found.merged, rows)
    assert found.place.start == pytest.approx(live.most, rel=0.15)


def test_so_does_one_of_many_sources_that_are_cast(recipe, tmp_path):
    """One block of each is there, and not the one before beside it."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 64}
    config = transformers.LlamaConfig(**{**tiny.SIZES, **sizes})
    rows = [[Row([token + 3] * 9) for token in range(4)] for _ in range(10)]
    start = {"start": "least_squares", "steps": 0}
    found = prepared(recipe, tmp_path, config, rows, dtype="bfloat16", **start)
    with Live() as live:
        least_squares(found.merged, rows)
    assert found.place.start == pytest.approx(live.most, rel=0.15)


def test_it_lets_go_of_sums_before_it_makes_others(recipe, tmp_path, monkeypatch):
    sums, objectives = [], walk._Walk._objectives

    def recorded(self, *args):
        assert not any(reference() for reference in sums)
        found = objectives(self, *args)
        sums.extend(weakref.ref(own) for _, *both in found for own in both)
        return found

    monkeypatch.setattr(walk._Walk, "_objectives", recorded)
    rows = [[Row([number + 3] * 8)] * 2 for number in range(SOURCES)]
    found = prepared(recipe, tmp_path, STEPS["weights"][0], rows, start="least_squares")
    least_squares(found.merged, rows)
    assert len(sums) > 10


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dtype": "bfloat16"},
        {"tokenizer_source": "union"},
        {"dam": {"formula": "task_vectors"}},
        {"dam": {"formula": "task_vectors", "sparsify": "ties"}},
    ],
    ids=["plain", "cast", "union", "task vectors", "ties"],
)
def test_what_the_sources_take_is_foreseen(recipe, tmp_path, name, keys):
    """To the byte, for converted layouts, too; one more for a vocabulary's padding at most."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 3)
    keys = {"dtype": "float32", "base_model": str(models[2]), **keys}
    if "ties" in str(keys):
        keys["parameters"] = {"coefficients": str(tmp_path / "c.safetensors"), "density": 0.5}
    found = prepare(read_recipe(str(recipe(models[:2], **keys))), QUIET, device="cpu")
    shapes = HeaderShapes(found.plan)
    skeleton = merged_skeleton(found.plan, shapes)
    expected = held(shapes, found.settings, skeleton)
    made = held(shapes, found.settings, skeleton, only_made=True)
    for output in found.merged.coefficients():
        inputs = found.merged.stack(output).load()
        tensors = (*inputs.sources, *(inputs.prepared or ()))
        tensors += () if inputs.base is None else (inputs.base,)
        assert expected[output] == sum(t.nbytes for t in tensors), output
        assert made[output] >= sum(t.nbytes for t in inputs.prepared or ()), output
        is_told = shapes.shape(output) is not None  # unlike stacks of experts, which are made
        if is_told and "union" not in str(keys):  # which permutes and pads the vocabulary
            cast = keys["dtype"] != "float32"
            own = sum(t.nbytes for t in tensors) if cast else 0
            assert made[output] == own + sum(t.nbytes for t in inputs.prepared or ()), output
    groups = groups_of(skeleton, expected)
    assert sum(groups) > 0 and max(groups) <= sum(expected.values())
    assert shapes.dtypes() == {found.merged.stack(n).dtype for n in found.merged.coefficients()}


@pytest.mark.parametrize("name", ["activations", "weights", "depth", "head", "mixtral"])
@pytest.mark.parametrize("mode", ["block", "weights"])  # `none` keeps merged weights of all blocks
def test_blocks_that_a_gpu_fetches_are_foreseen(recipe, tmp_path, monkeypatch, name, mode):
    """Copied here as to a GPU: one that computes, and the next."""

    def copied(self, chosen, device, _stream):
        self._arrived, self._device = None, device
        self._inputs = {name: own.each(torch.clone) for name, own in chosen.items()}

    monkeypatch.setattr(offload._Copy, "__init__", copied)
    config, length = (STEPS | OTHERS)[name]
    dam = {"offload": "cpu", "start": "average"}
    found, step, _ = stepping(recipe, tmp_path, config, [length] * 3, dam)
    with monkeypatch.context() as with_gpu:
        with_gpu.setattr(place, "free_memory", lambda _: 10**12)
        shapes = HeaderShapes(found.plan)
        skeleton = merged_skeleton(found.plan, shapes)
        outline = Outline(found.plan, shapes, skeleton, "cuda:0", found.data)
        foreseen = outline.foresee(found.settings).place
    sources = foreseen.sources - foreseen.waiting
    found.merged.recompute = mode
    with Live() as live:
        for _ in range(3):
            step()
        live.most = live.now  # coefficients with their moments, and blocks of the step before
        step()
    assert sources + found.needs.of(mode) == pytest.approx(live.most, rel=0.15)


def foreseen_and_taken(recipe, folder: Path, monkeypatch, dam: dict) -> tuple[int, int]:
    """Bytes of a fit's files at most at once, but for the coefficient file."""
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 768})
    models = tiny.save_models(folder, config, SOURCES)
    loaded = read_recipe(str(recipe(models, dam={"checkpoint_every": 1, **dam})))
    found = check(
        loaded, QUIET, coefficients=loaded.coefficients, will_fit=True, will_merge=False,
        device="cpu", in_full=True,
    )  # fmt: skip
    taken, rotate = [], trainer.rotate_checkpoints
    names = ("model.safetensors", "optimizer.pt", "start.safetensors", "best.safetensors")

    def rotated(*args, **kwargs):
        files = (f for name in names for f in folder.glob(f"dam.safetensors.fit/**/{name}"))
        taken.append(sum(f.stat().st_size for f in files))
        rotate(*args, **kwargs)

    monkeypatch.setattr(trainer, "rotate_checkpoints", rotated)
    fit(loaded, loaded.coefficients, QUIET, device="cpu")
    assert len(taken) == dam["steps"]
    return found.estimate.checkpoints, max(taken)


@pytest.mark.parametrize("train", [{}, {"linear": False}])
@pytest.mark.parametrize("basis", ["differences", "coefficients"])
def test_what_checkpoints_take_is_foreseen(recipe, tmp_path, monkeypatch, train, basis):
    """Coefficients that are not trained are in them, too."""
    dam = {"train": train, "basis": basis, "start": "average", "steps": 2}
    foreseen, taken = foreseen_and_taken(recipe, tmp_path, monkeypatch, dam)
    assert taken / 1.1 < foreseen < taken  # each tensor has a name, too


def test_so_is_what_is_there_before_the_oldest_goes(recipe, tmp_path, monkeypatch):
    """And, beside checkpoints, the start's coefficients and the best."""
    dam = {"start": "least_squares", "calibration": 2, "evaluate_every": 2, "steps": 4}
    foreseen, taken = foreseen_and_taken(recipe, tmp_path, monkeypatch, dam)
    assert taken / 1.1 < foreseen < taken
