"""What a fit takes, as it is predicted and as it is."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import transformers
from mergekit.options import MergeOptions

from mergekit_dam.check import check
from mergekit_dam.config import Settings, read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit import chunks, container, fit, memory, stage
from mergekit_dam.fit import place as place_module
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.forecast import held, merged_skeleton
from mergekit_dam.fit.memory import Needs
from mergekit_dam.fit.objective import Distillation, interference
from mergekit_dam.fit.optimizer import DifferencesAdamW, parameter_groups
from mergekit_dam.fit.place import choose_recompute, groups_of, place, remedies, require_memory
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.least_squares import least_squares, objective
from mergekit_dam.least_squares import rows as calibration
from mergekit_dam.model import mixture
from mergekit_dam.model.activations import Activations
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
    "window": (transformers.Gemma3TextConfig(**SMALL, head_dim=64, sliding_window=48), 400),
    "every pair of tokens": (transformers.Gemma2Config(**SMALL, head_dim=64), 400),  # eager
    "head": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 32_000}), 8),
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


@pytest.fixture(autouse=True)
def _chunks(request, monkeypatch):
    """Pieces of a sixteenth, so that a small vocabulary goes in several."""
    if "chunks" in request.node.name:
        for module, name in ((chunks, "CHUNK"), (calibration, "LOGITS"), (objective, "PART")):
            monkeypatch.setattr(module, name, getattr(module, name) // 16)


def prepared(recipe, folder: Path, config, rows: list[list[Row]], dtype="float32", **dam):
    models = tiny.save_models(folder, config, len(rows))
    data = [SourceData(own, own[:1]) for own in rows]
    path = recipe(models, dtype=dtype, dam={"batch_size": 1, **dam})
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
    config, length = STEPS[name]
    lengths = [length - n % lengths * length // (lengths + 1) for n in range(sources)]
    found, step, optimizer = stepping(recipe, folder, config, lengths, dam)
    for mode in MODES:
        found.merged.recompute = mode
        step()
        states = (s for state in optimizer.state.values() for s in state.values())
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        known = interference(found.merged) if "weighted_overlap" in str(dam) else ()
        there = sum(tensor.nbytes for tensor in (*states, *parameters, *known))
        with Live() as live:
            step()
        assert found.needs.of(mode) == pytest.approx(there + live.most, rel=0.15), mode


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_what_was_predicted(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {})


# Shorter rows have fewer pairs of tokens than the longest, as which all are foreseen.
PAIRS = ("window", "every pair of tokens")


@pytest.mark.parametrize("name", [name for name in STEPS if name not in PAIRS])
def test_so_does_one_with_rows_of_two_lengths(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {}, lengths=2)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in PAIRS])
@pytest.mark.parametrize(
    "sources, lengths, granularity", [(3, 3, "column"), (4, 2, "row"), (4, 4, "element")]
)
def test_so_does_one_with_more_sources(recipe, tmp_path, name, sources, lengths, granularity):
    dam = {"granularity": granularity}
    compare(recipe, tmp_path, name, dam, sources=sources, lengths=lengths)


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
            for name in ("activations", "depth", "chunks", "head", "tables")
            for c in CASTS
        ),
        ("positions", "bfloat16", "float32"),  # a teacher's block is a copy
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
    config, length = STEPS[name]
    rows = [[Row([number + 1] * (length - n)) for n in range(5)] for number in range(SOURCES)]
    found = prepared(recipe, tmp_path, config, rows)
    with Live() as live:
        evaluate(found.merged, rows, found.needs.tokens, found.needs.widest)
    assert live.most <= found.needs.of("block")


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
    "every pair of tokens": (300, 4, False),
    "head": (8, 8, True),
    "gpt2": (100, 8, True),
    "tables": (64, 8, True),
}


@pytest.mark.parametrize(
    "name, granularity",
    [*((name, "column") for name in STARTS if name != "narrow"), ("narrow", "element")],
)
def test_the_start_takes_what_was_predicted(recipe, tmp_path, name, granularity):
    """Within 15 %, counted tensor by tensor."""
    config, (longest, count, vary) = STEPS[name][0], STARTS[name]
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


NEEDS = Needs(
    tokens=10,
    groups=(10,),
    widest=10,
    kept=Activations(all=1000, largest=200, inputs=50, widest=20),
    states=100,
    blocks=50_000,
    block=1000,
    matrix=300,
)


@pytest.mark.parametrize(
    "free, mode", [(10**6, "none"), (40_000, "weights"), (12_000, "block"), (1, "block")]
)
def test_auto_takes_the_fastest_that_fits(free, mode):
    settings = Settings(data=())
    chosen, why = choose_recompute(settings, NEEDS, free)
    assert chosen == mode
    assert f"recompute: {mode}, with about" in why
    settings = Settings(data=(), recompute="weights")
    assert choose_recompute(settings, NEEDS, free) == ("weights", "")


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


def place_on(
    monkeypatch, device: str, groups: list[int], *, gpu: int, host: int, own: float = 0, **settings
):
    memory = {"cpu": host, device: gpu}
    monkeypatch.setattr(place_module, "free_memory", memory.__getitem__)
    return place(Settings(data=(), **settings), device, NEEDS, sum(groups), groups, own=own)


def test_where_a_fit_keeps_what_it_needs(monkeypatch):
    groups = [5000, 20_000, 20_000, 20_000, 100, 5000]
    large = place_on(monkeypatch, "cuda:0", groups, gpu=10**6, host=10**6)
    assert (large.offload, large.sources, large.host) == ("none", 70_100, 0)
    small = place_on(monkeypatch, "cuda:0", groups, gpu=70_000, host=10**6)
    assert (small.offload, small.sources, small.host) == ("cpu", 60_000, 70_100)
    assert "70.1 KB of host memory" in str(small) and "offload: cpu, since" in small.told[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")  # each process keeps them
    shared = place_on(monkeypatch, "cuda:0", groups, gpu=70_000, host=10**6)
    assert (shared.offload, shared.sources, shared.host) == ("disk", 20_000, 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    mapped = place_on(monkeypatch, "cpu", groups, gpu=10**6, host=10**6)
    assert (mapped.offload, mapped.sources, mapped.mapped) == ("none", 0, 70_100)


def refused(monkeypatch, *, needs=None, **settings) -> str:
    """What is said to a fit whose settings do not fit beside 4 KB; `needs` tells what others
    need, by their settings."""
    groups, chosen = [500, 2000, 2000, 2000], Settings(data=(), **settings)

    def again(changed: Settings):
        found = place_on(monkeypatch, "cuda:0", groups, gpu=6000, host=10**4)
        return replace(found, step=(needs or {}).get(settings_of(changed, chosen), 10**6))

    found = place_on(monkeypatch, "cuda:0", groups, gpu=6000, host=10**4, **settings)
    with pytest.raises(DamError) as error:
        require_memory(replace(found, step=10**6), chosen, again)
    return error.value.message


def settings_of(changed: Settings, before: Settings) -> str:
    own = {k: v for k, v in changed.model_dump().items() if v != before.model_dump()[k]}
    return ", ".join(f"{key} {value}" for key, value in own.items())


@pytest.mark.parametrize(
    "settings, helps, told",
    [
        ({"recompute": "none"}, "recompute block", "set `dam.recompute: block`."),
        ({"offload": "none"}, "offload cpu", "set `dam.offload: cpu`."),
        ({"offload": "cpu"}, "offload disk", "set `dam.offload: disk`."),
        (
            {"recompute": "none", "offload": "none"},
            "offload disk, recompute block",
            "set `dam.recompute: block` and `dam.offload: disk`.",
        ),
        ({"batch_size": 8}, "batch_size 2", "set `dam.batch_size: 2`."),
        ({}, "batch_size 1", "set `dam.batch_size: 1`."),
        ({"batch_size": 1}, "max_length 256", "set `dam.max_length: 256`."),
        (
            {"batch_size": 4},
            "max_length 256, batch_size 1",
            "set `dam.batch_size: 1` and `dam.max_length: 256`.",
        ),
        ({}, "nothing", "no setting would fit."),
    ],
)
def test_what_does_not_fit_names_a_remedy_that_is_one(monkeypatch, settings, helps, told):
    names = [", ".join(order) for order in itertools.permutations(helps.split(", "))]
    message = refused(monkeypatch, needs=dict.fromkeys(names, 0), **settings)
    held = settings.get("offload") == "none"
    lack = "The sources need 6.5 KB" if held else "A step needs about 1 MB of memory beside"
    assert message.startswith(lack)
    assert message.endswith(told)


@pytest.mark.parametrize("train", [{}, {"linear": False}])
@pytest.mark.parametrize("basis", ["differences", "coefficients"])
def test_what_checkpoints_take_is_foreseen(recipe, tmp_path, train, basis):
    """Coefficients that are not trained are in them, too."""
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 768})
    models = tiny.save_models(tmp_path, config, SOURCES)
    dam = {"train": train, "basis": basis, "start": "average", "steps": 2, "checkpoint_every": 1}
    loaded = read_recipe(str(recipe(models, dam=dam)))
    found = check(
        loaded, QUIET, coefficients=loaded.coefficients, will_fit=True, will_merge=False,
        device="cpu", in_full=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "discard", lambda folder: None)
        fit(loaded, loaded.coefficients, QUIET, device="cpu")
    files = (f for name in ("model.safetensors", "optimizer.pt") for f in tmp_path.rglob(name))
    taken = sum(f.stat().st_size for f in files if f.parent.name.startswith("checkpoint-"))
    assert taken / 1.1 < found.estimate.checkpoints < taken  # each tensor has a name, too


def test_no_remedy_is_tried_twice(monkeypatch):
    found = place_on(monkeypatch, "cpu", [5], gpu=10**6, host=10**6)
    for settings in ({"offload": "none"}, {"offload": "none", "recompute": "none"}, {}):
        tried = list(remedies(Settings(data=(), **settings), found))
        assert all(changes not in tried[:number] for number, changes in enumerate(tried))


def test_a_start_that_does_not_fit_is_smaller_or_another(monkeypatch):
    found = place_on(monkeypatch, "cpu", [5], gpu=10**6, host=10**6)
    large = replace(found, start=10**7)
    for fits, told in (("calibration", "`dam.calibration: 8`"), ("start", "`dam.start: average`")):

        def again(changed: Settings, fits: str = fits):
            small = changed.calibration == 8 if fits == "calibration" else changed.start
            return found if small else large

        with pytest.raises(DamError, match=told) as error:
            require_memory(large, Settings(data=()), again)
        assert error.value.message.startswith("The least-squares start needs about 10 MB")


def test_sources_that_are_models_of_their_own_have_copies_too(monkeypatch):
    groups, free = [900, 900, 900], {"gpu": 10**5, "host": 10**6, "offload": "cpu"}
    alone = place_on(monkeypatch, "cuda:0", groups, **free)
    beside = place_on(monkeypatch, "cuda:0", groups, own=1 / 3, **free)
    assert (alone.sources, beside.sources) == (2700, 3600)


def test_sources_that_host_memory_does_not_hold(monkeypatch):
    groups = [5000, 20_000, 20_000, 20_000]
    found = place_on(monkeypatch, "cuda:0", groups, gpu=10**5, host=10**4, offload="cpu")
    with pytest.raises(DamError, match=r"need 65 KB of host memory .* set `dam.offload: disk`"):
        require_memory(
            found,
            Settings(data=(), offload="cpu"),
            lambda changed: replace(found, host=0 if changed.offload == "disk" else found.host),
        )


def test_too_little_memory_for_a_start_ends_before_it(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, STEPS["head"][0], SOURCES)
    path = recipe(models, dam={"start": "least_squares"})
    monkeypatch.setattr(place_module, "free_memory", lambda device: 100 * 10**6)
    with pytest.raises(DamError, match=r"start needs about .* set `dam.start: average`"):
        prepare(read_recipe(str(path)), QUIET, device="cpu")


def test_rows_of_the_start():
    assert Settings(data=()).calibration_rows == 32
    assert Settings(data=(), steps=0).calibration_rows == 128
    assert Settings(data=(), steps=0, calibration=7).calibration_rows == 7


# --- Containers -----------------------------------------------------------------------------------


def grouped(root: Path, line: str, group: str, files: dict[str, object]) -> Path:
    """A system's files, as far as they tell of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpu:/x\n{line}\n")
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return root


STAT = "anon 5\nactive_file 20\ninactive_file 30\ntotal_active_file 1\ntotal_inactive_file 2"
SECOND = {"memory.max": 1000, "memory.current": 400, "memory.stat": STAT}
FIRST = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 400, "memory.stat": STAT}


@pytest.mark.parametrize(
    "line, group, files, left",
    [
        ("0::/pod/a", "pod/a", SECOND, 650),
        ("0::/pod/a", "pod", SECOND, 650),  # the limit of a group above
        ("0::/", ".", SECOND, 650),  # as a container sees itself
        ("9:blkio,memory:/docker/a", "memory", FIRST, 603),  # its own is not to be seen
        ("9:memory:/docker/a", "memory/docker/a", FIRST, 603),
        ("0::/pod", "pod", {**SECOND, "memory.max": "max"}, math.inf),
        ("0::/pod", "pod", {**SECOND, "memory.current": 5000}, 0),
        ("0::/pod", "other", SECOND, math.inf),
    ],
)
def test_what_a_container_leaves(tmp_path, line, group, files, left):
    assert container.memory_left(grouped(tmp_path, line, group, files)) == left


def test_a_containers_limit_is_what_is_free(monkeypatch, tmp_path):
    assert container.memory_left(tmp_path) == math.inf  # a system without such files
    monkeypatch.setattr(memory, "memory_left", lambda: 12_345)
    assert memory.free_memory("cpu") == 12_345


@pytest.mark.parametrize(
    "count, told",
    [(0, "0 B"), (999.4, "999 B"), (999.6, "1 KB"), (999.6e6, "1 GB"), (1.234e9, "1.23 GB")],
)
def test_sizes_in_words(count, told):
    assert memory.size(count) == told
