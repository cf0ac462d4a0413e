"""`mergekit-dam compare`: one ground for all, honest choices, numbers that stock tools confirm."""

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from commands import refusal, run
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.compare import candidates, compare, ground, in_memory, records, search, stage
from mergekit_dam.compare.answers import Answer, exact_matches, load_answers
from mergekit_dam.compare.cost import metered
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import alone as lock
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.resume import folder_of
from mergekit_dam.fit.rows import load_data
from mergekit_dam.plan import plan_merge

OPTIONS = MergeOptions(quiet=True)
SOME = ("linear", "slerp", "dare_ties", "karcher", "evolution", "dam config")


def rows(count: int, seed: int) -> list[dict]:
    texts = tiny.sentences(count, seed)
    return [{"prompt": text[: len(text) // 2], "completion": text[-3:]} for text in texts]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two sources and a base, all different; rows with prompts."""
    folder = tmp_path_factory.mktemp("compare")
    models = tiny.save_models(folder, tiny.CONFIGS["llama"], 3)
    data = [
        {
            "source": str(model),
            "path": str(tiny.write_jsonl(folder / f"{model.name}.jsonl", rows(40, seed))),
        }
        for seed, model in enumerate(models[1:])
    ]
    document = {
        "merge_method": "dam",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dtype": "bfloat16",
        "dam": {"data": data, "held_out": 0.25, "steps": 3, "batch_size": 2, "learning_rate": 0.1},
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def run_compare(config: Path, out: Path, **arguments):
    said: list[str] = []
    arguments = {"search_rows": 8, "evaluations": 9, "only": SOME, **arguments}
    results = compare(read_recipe(str(config)), str(out), OPTIONS, say=said.append, **arguments)
    return results, said


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results, said = run_compare(config, out)
    return out, results, "\n".join(said)


def prepared(config: Path):
    recipe = read_recipe(str(config))
    plan = plan_merge(recipe.merge, OPTIONS, "weights")
    return recipe, plan, load_data(recipe, plan, "none", "cpu")


@pytest.fixture(scope="module")
def laid(config) -> ground.Ground:
    recipe, plan, data = prepared(config)
    return ground.Ground(recipe, plan, data, [[], []], device="cpu", search_rows=8)


def ingredients(config: Path) -> candidates.Ingredients:
    recipe, plan, _ = prepared(config)
    return candidates.ingredients(yaml.safe_load(recipe.text), plan)


# --- The whole comparison -------------------------------------------------------------------------


def test_models_and_merges_are_measured_on_every_source(compared, config):
    _, results, _ = compared
    assert [e.name for e in results.entries if e.kind == "source"] == list(results.sources)
    assert {e.name for e in results.entries if e.kind == "merge"} == set(SOME)
    assert sum(e.kind == "base" for e in results.entries) == 1
    for entry in results.entries:
        assert entry.reason is None
        for scores in entry.scores:
            assert scores.kl >= -1e-6 and scores.perplexity >= 1 and 0 <= scores.agreement <= 1
    for number, name in enumerate(results.sources):
        scores = results.find(name, "source").scores
        assert scores[number].kl == pytest.approx(0, abs=1e-6) and scores[number].agreement == 1
        assert scores[1 - number].kl > 0.01


def test_the_folder_has_tables_pictures_and_configs(compared):
    out, results, said = compared
    assert records.read(out / "results.json") == results
    page = (out / "results.md").read_text()
    for entry in results.entries:
        name = records.short_name(entry.name)
        assert name in said and f"| {name} |" in page
        if entry.kind == "merge":
            assert MergeConfiguration.model_validate(
                yaml.safe_load((out / entry.config).read_text())
            )
    for name in ("quality.png", "retention.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and name in page


@pytest.mark.parametrize("name", ["dare_ties", "evolution", "slerp", "karcher", "dam config"])
def test_stock_mergekit_makes_what_was_measured(compared, config, tmp_path, name):
    """The YAML, through `mergekit-yaml` and transformers alone, gives the scores of the table."""
    out, results, _ = compared
    entry, merged = results.find(name), tmp_path / "merged"
    first = (out / entry.config).read_text().splitlines()[0]
    run(*first.removeprefix("# ").replace("OUT", str(merged)).split(), "--quiet")
    _, plan, data = prepared(config)
    model = tiny.load(merged)
    for number, source in enumerate(results.sources):
        kl, nll = alone(model, tiny.load(Path(source)), data[number].held_out)
        assert entry.scores[number].kl == pytest.approx(kl, rel=1e-4)
        assert entry.scores[number].perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    merge = MergeConfiguration.model_validate(yaml.safe_load((out / entry.config).read_text()))
    tensors = in_memory.merge_in_memory(merge, plan, stage.SEED)
    stored = {k: v for f in merged.glob("model*.safetensors") for k, v in load(f).items()}
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in stored)


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@torch.no_grad()
def alone(model, source, rows) -> tuple[float, float]:
    """KL and negative log-likelihood, row by row, by transformers' own forward pass."""
    kl, nll, count = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        # A checkpoint in another dtype computes as the merge rounds it.
        p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (rounded(source), model))
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        nll += F.nll_loss(q, ids[0, 1:], reduction="sum").item()
        count += len(row.ids) - 1
    return kl / count, nll / count


def rounded(model):
    return model.to(torch.bfloat16).float()


def test_called_again_it_computes_nothing(compared, config, monkeypatch):
    out, results, _ = compared

    def none(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(stage, "merge_in_memory", none)
    monkeypatch.setattr(stage, "fit", none)
    again, said = run_compare(config, out)
    assert again == results
    assert not any(line.startswith("linear:") for line in said)


def test_merges_are_computed_anew_when_asked(compared, config, tmp_path):
    _, whole, _ = compared
    first, _ = run_compare(config, tmp_path, only=("linear", "karcher", "dam config"))
    file = tmp_path / "dam_config.safetensors"
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    again, said = run_compare(config, tmp_path, only=("linear",), again=("dam config", "karcher"))
    assert file.read_bytes() == before and file.stat().st_mtime_ns > written
    assert {e.name: e.scores for e in again.entries} == {e.name: e.scores for e in first.entries}
    assert again.find("dam config").scores == whole.find("dam config").scores
    anew = {name for name in SOME if any(line.startswith(f"{name}:") for line in said)}
    assert anew == {"dam config", "karcher"}


def test_a_folder_of_another_comparison_loses_nothing(compared, config):
    out, *_ = compared
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(DamError, match="another folder"):
        run_compare(config, out, search_rows=7, again=("linear", "dam config"))
    with pytest.raises(DamError, match="no merge liner"):
        run_compare(config, out, again=("liner",))
    with lock.alone(folder_of(out / "dam_config.safetensors")), pytest.raises(lock.BusyError):
        run_compare(config, out, again=("dam config", "linear"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_interrupted_it_goes_on(compared, config, tmp_path, monkeypatch):
    _, whole, _ = compared
    with monkeypatch.context() as patch:
        patch.setattr(stage, "evolve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_compare(config, tmp_path)
    kept = records.read(tmp_path / "results.json")
    assert kept.find("karcher") and not kept.find("evolution")
    results, _ = run_compare(config, tmp_path)
    assert {e.name: e.scores for e in results.entries} == {e.name: e.scores for e in whole.entries}


def test_a_fit_under_way_is_waited_for_by_the_user(config, tmp_path, monkeypatch):
    """It is none that failed, of which a comparison would say so for good."""
    busy = lock.BusyError("busy")
    monkeypatch.setattr(stage, "fit", lambda *_, **__: (_ for _ in ()).throw(busy))
    with pytest.raises(lock.BusyError):
        run_compare(config, tmp_path, only=["dam"])
    kept = records.read(tmp_path / "results.json")
    assert kept is None or not kept.find("dam")


def test_the_command_line(config, tmp_path):
    said = run(
        "mergekit-dam", "compare", config, "--out", tmp_path / "out", "--only", "ties,model_stock",
        "--search-rows", "4",
    ).stdout  # fmt: skip
    assert "model_stock" in said and "exact match" in said.lower()
    assert records.read(tmp_path / "out" / "results.json").find("ties").tried == 12
    assert "quality.png" in {path.name for path in (tmp_path / "out").iterdir()}


# --- Honest choices -------------------------------------------------------------------------------


def test_fits_and_searches_see_no_held_out_row(config, tmp_path, monkeypatch):
    _, _, data = prepared(config)
    held_out = {tuple(row.ids) for source in data for row in source.held_out}
    seen = []

    def spy(*_, data, **__):
        seen.extend(row.ids for source in data for row in (*source.train, *source.held_out))
        raise DamError("enough")

    monkeypatch.setattr(stage, "fit", spy)
    results, _ = run_compare(config, tmp_path, only=["dam config"])
    assert results.find("dam config").reason == "enough"
    assert seen and not held_out & set(map(tuple, seen))
    assert len(seen) == sum(len(source.train) for source in data)


@pytest.mark.parametrize("name, value", [("HELD", 0), ("KEPT", 0), ("KEPT", 4096), ("TOKENS", 30)])
def test_what_is_held_and_kept_changes_no_figure(laid, config, monkeypatch, name, value):
    """Weights that are fetched block by block, teachers that speak again, smaller batches."""
    (plain, *_) = candidates.GRIDS["linear"](ingredients(config))
    tensors = in_memory.merge_in_memory(search.configuration(plain), laid.plan, 0)
    expected = laid.score(laid.merge(tensors)), laid.score(laid.source(1)), laid.score(laid.base())
    monkeypatch.setattr(ground, name, value)
    recipe, plan, data = prepared(config)
    other = ground.Ground(recipe, plan, data, [[], []], device="cpu", search_rows=8)
    students = other.merge(tensors), other.source(1), other.base()
    assert (name == "HELD") == isinstance(students[1].view, int)
    for scores, student in zip(expected, students, strict=True):
        for one, found in zip(scores, other.score(student), strict=True):
            numbers = one.model_dump(exclude={"exact"})
            assert found.model_dump(exclude={"exact"}) == pytest.approx(numbers, rel=1e-4, abs=1e-7)


def test_searches_use_fit_rows(laid, config):
    _, _, data = prepared(config)
    for exam, source in zip(laid._search, data, strict=True):
        used = {tuple(ids) for batch in exam.batches for ids in unpadded(batch)}
        assert used == {tuple(row.ids) for row in source.train[:8]}


def unpadded(batch) -> list[list[int]]:
    pairs = zip(batch["input_ids"].tolist(), batch["lengths"].tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


def test_the_grids_best_on_fit_rows_is_taken(laid, config):
    given = ingredients(config)
    choice = search.best_of(candidates.GRIDS["linear"](given), laid, 0)
    kls = {
        str(c.chosen): laid.search_kl(
            laid.merge(in_memory.merge_in_memory(search.configuration(c), laid.plan, 0))
        )
        for c in candidates.GRIDS["linear"](given)
    }
    assert choice.tried == len(kls) == 3
    assert str(choice.best.chosen) == min(kls, key=kls.get)


def test_evolution_begins_with_the_average_and_betters_it(laid, config):
    given = ingredients(config)
    with metered(laid.layers, "cpu") as meter:
        choice = search.evolve(given, laid, 0, 30)
    assert choice.tried == 1 + 3 * 8  # whole generations
    assert meter.cost.forward_passes == choice.tried * 2 * 8

    def kl(candidate) -> float:
        tensors = in_memory.merge_in_memory(search.configuration(candidate), laid.plan, 0)
        return laid.search_kl(laid.merge(tensors))

    average = candidates.weighted(given, [0.5, 0.5], [1.0, 1.0])
    assert kl(choice.best) < kl(average)
    tensors = in_memory.merge_in_memory(search.configuration(average), laid.plan, 0)
    states = [load(Path(str(s)) / "model.safetensors") for s in given.sources]
    for name, tensor in tensors.items():
        mean = sum(state[name].to(torch.bfloat16).float() for state in states) / 2
        torch.testing.assert_close(tensor.float(), mean, atol=0.02, rtol=0.02)


def test_linear_leaves_the_base_out(config, laid):
    plain = next(candidates.GRIDS["linear"](ingredients(config)))
    tensors = in_memory.merge_in_memory(search.configuration(plain), laid.plan, 0)
    states = [load(Path(str(s)) / "model.safetensors") for s in laid.plan.sources]
    for name, tensor in tensors.items():
        mean = sum(state[name].to(torch.bfloat16).float() for state in states) / 2
        torch.testing.assert_close(tensor, mean.to(torch.bfloat16))


def test_a_merge_without_numbers_is_never_chosen(laid):
    broken = {name: torch.full_like(laid._merged.stack(name).source(0), torch.nan)
              for name in laid._merged._weights.names()}  # fmt: skip
    assert laid.search_kl(laid.merge(broken)) == math.inf


def test_the_base_is_the_model_itself(compared, config):
    _, results, _ = compared
    _, plan, data = prepared(config)
    base = rounded(tiny.load(Path(str(plan.base))))
    entry = results.find(str(plan.base), "base")
    for number, source in enumerate(results.sources):
        kl, _ = alone(base, tiny.load(Path(source)), data[number].held_out)
        assert entry.scores[number].kl == pytest.approx(kl, rel=1e-4)


def test_every_grid_is_mergekits_own_yaml(config):
    given = ingredients(config)
    for name, grid in candidates.GRIDS.items():
        for candidate in grid(given):
            merge = MergeConfiguration.model_validate(candidate.document)
            assert merge.merge_method == name and merge.dtype == "bfloat16"
            assert "dam" not in candidate.document


def test_slices_keep_their_layers():
    document = {
        "merge_method": "dam",
        "base_model": "a",
        "slices": [{"sources": [{"model": m, "layer_range": [0, 1]} for m in "ab"]}],
        "dam": {},
    }

    class Plan:
        base, sources = None, ()

    given = candidates.Ingredients(
        candidates.ingredients(document, Plan).document, Plan
    ).write("ties", {"lambda": 1.0})  # fmt: skip
    assert given["slices"] == document["slices"] and given["parameters"] == {"lambda": 1.0}


# --- Exact match ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_exact_match_is_greedy_decoding_to_the_last_token(kind, recipe, tmp_path):
    path = recipe(tiny.save_models(tmp_path, tiny.CONFIGS[kind], 2))
    _, plan, _ = prepared(path)
    merged = prepare(read_recipe(str(path)), OPTIONS, device="cpu").merged
    model = tiny.load(Path(str(plan.sources[0])))
    prompts = [[1, 5, 9], [1, 7, 7], [1, 30, 12, 8, 4]]
    right = [
        Answer(tuple(ids), tuple(greedy(model, ids, 5))) for ids in prompts
    ]  # fmt: skip
    wrong = [Answer(a.prompt, (*a.completion[:-1], a.completion[-1] + 1)) for a in right]
    with merged.speaking_as(0) as source:
        assert exact_matches(source, right, plan.tokenizer) == 1
        assert exact_matches(source, wrong, plan.tokenizer) == 0
        assert exact_matches(source, [*right, *wrong], plan.tokenizer) == 0.5


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """Without a cache, up to the end."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[start:]


def test_answers_are_the_completions_of_held_out_prompts(config):
    recipe, plan, data = prepared(config)
    answers = load_answers(recipe.settings, plan, data, "none")
    for found, source in zip(answers, data, strict=True):
        rows = {a.prompt + a.completion for a in found}
        assert rows == {tuple(row.ids) for row in source.held_out}
        for answer in found:  # three characters and the end
            assert len(answer.completion) == 4
            assert answer.completion[-1] == plan.tokenizer.eos_token_id


def test_an_answer_ends_where_decoding_does(config, tmp_path):
    """Templates write a line break after the end."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}a{% endif %}{% endfor %}"
    )
    document = yaml.safe_load(config.read_text())
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    for model, entry in zip(models, document["dam"]["data"], strict=True):
        tiny.save_tokenizer(model, template)
        entry["source"] = str(model)
    document["models"] = [{"model": str(model)} for model in models]
    path = tmp_path / "chat.yml"
    path.write_text(yaml.safe_dump(document))
    recipe, plan, data = prepared(path)
    answers = load_answers(recipe.settings, plan, data, "none")
    for own, rows in zip(answers, data, strict=True):
        assert len(own) == len(rows.held_out) > 0
        assert all(answer.completion[-1] == plan.tokenizer.eos_token_id for answer in own)
        assert all(row.ids[-1] != plan.tokenizer.eos_token_id for row in rows.held_out)


def test_text_has_no_answers(recipe, tmp_path):
    path = recipe(tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2))
    loaded, plan, data = prepared(path)
    assert load_answers(loaded.settings, plan, data, "none") == [[], []]


# --- Cost -----------------------------------------------------------------------------------------


def test_passes_are_rows_through_one_model(config):
    merged = prepare(read_recipe(str(config)), OPTIONS, device="cpu").merged
    ids = tiny.tokens(rows=3, length=7)
    with metered(2, "cpu") as meter:
        tiny.teach(merged, 0, ids)
        merged(ids).sum().backward()  # computes its layers again
    assert meter.cost.forward_passes == 6
    assert meter.cost.backward_passes == 3
    assert meter.cost.tokens == 6 * 7
    assert meter.cost.seconds > 0 and meter.cost.peak_memory > 2**20


def test_a_layer_that_is_left_halfway_is_half_a_pass(config):
    """A start may run a block up to one of its layers."""
    _, plan, _ = prepared(config)
    model, ids = tiny.load(Path(str(plan.sources[0]))), tiny.tokens(rows=8, length=7)

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with metered(2, "cpu") as meter, torch.no_grad(), pytest.raises(Enough):
        model(ids)
    layer = model.model.layers[1]
    before = sum(p.numel() for p in layer.parameters()) - sum(
        p.numel() for p in layer.mlp.parameters()
    )
    share = (1 + before / sum(p.numel() for p in layer.parameters())) / 2
    assert meter.cost.forward_passes == round(8 * share)
    assert meter.cost.backward_passes == 0


def test_a_fits_cost_counts_teachers_and_its_own_figures(compared):
    """3 steps of 2 rows of each source, teachers too; held-out rows before and after."""
    _, results, _ = compared
    cost = results.find("dam config").cost
    assert cost.backward_passes == 3 * 4
    assert cost.forward_passes >= 2 * 3 * 4
    assert cost.is_whole


# --- Mistakes -------------------------------------------------------------------------------------


def test_another_comparisons_folder_is_refused(compared, config, tmp_path):
    out, _, _ = compared
    other = yaml.safe_load(config.read_text())
    other["dam"]["held_out"] = 0.5
    path = tmp_path / "other.yml"
    path.write_text(yaml.safe_dump(other))
    before = (out / "results.json").read_bytes()
    message = refusal("mergekit-dam", "compare", path, "--out", out)
    assert "holds a comparison of other models, rows or settings" in message
    assert (out / "results.json").read_bytes() == before


def test_other_fits_of_the_same_names_are_refused(config, tmp_path):
    def run_own(steps: int) -> None:
        fits = {"own": {"steps": steps, "start": "average"}}
        run_compare(config, tmp_path / "out", only=["own"], fits=fits)

    run_own(steps=0)
    with pytest.raises(DamError, match="holds a comparison of other"):
        run_own(steps=1)


def test_another_source_of_the_same_name_is_refused(config, tmp_path):
    document = yaml.safe_load(config.read_text())
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    for number, model in enumerate(models):
        document["models"][number]["model"] = str(model)
        document["dam"]["data"][number]["source"] = str(model)
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump(document))
    run_compare(path, tmp_path / "out", only=["linear"])
    tiny.save_model(models[1], tiny.CONFIGS["llama"], seed=7)
    with pytest.raises(DamError, match="holds a comparison of other models"):
        run_compare(path, tmp_path / "out", only=["linear"])


def test_the_ground_computes_in_the_dtype_of_a_fit(config, monkeypatch):
    seen = []

    def chosen(settings, dtypes, device):
        seen.append(set(dtypes))
        return torch.float32

    monkeypatch.setattr(ground, "choose_dtype", chosen)
    recipe, plan, data = prepared(config)
    ground.Ground(recipe, plan, data, [[], []], device="cpu", search_rows=2)
    assert seen == [{torch.bfloat16}]


def test_a_foreign_results_file_is_refused(config, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"mine": 1}))
    assert "not a comparison" in refusal("mergekit-dam", "compare", config, "--out", tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {"mine": 1}


def test_a_file_is_no_folder(config, tmp_path):
    (tmp_path / "out").write_text("mine")
    said = refusal("mergekit-dam", "compare", config, "--out", tmp_path / "out")
    assert "is a file" in said and (tmp_path / "out").read_text() == "mine"


def test_an_unknown_merge_is_refused(config, tmp_path):
    said = refusal("mergekit-dam", "compare", config, "--out", tmp_path, "--only", "tis")
    assert "tis" in said and "ties" in said


def test_what_cannot_be_made_is_left_out_with_the_reason(recipe, tmp_path):
    """Three sources and no base: no slerp, no task vectors; linear and karcher are made."""
    path = recipe(tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 3))
    only = ["slerp", "ties", "linear", "karcher", "evolution"]
    results, said = run_compare(path, tmp_path / "out", only=only)
    assert "two sources" in results.find("slerp").reason
    assert "base_model" in results.find("ties").reason
    for name in ("linear", "karcher", "evolution"):
        assert results.find(name).scores
    assert any("slerp: left out" in line for line in said)


def test_without_the_libraries_it_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    monkeypatch.setitem(sys.modules, "mergekit_dam.compare.plots", None)
    results, said = run_compare(config, tmp_path, only=["evolution", "karcher"])
    assert "mergekit-dam[evolve]" in results.find("evolution").reason
    assert any("mergekit-dam[report]" in line for line in said)
    assert results.find("karcher").scores and "![" not in (tmp_path / "results.md").read_text()


# --- Other shapes of merges -----------------------------------------------------------------------


def test_sources_of_different_vocabularies_are_compared_on_the_tokens_they_know(recipe, tmp_path):
    first, second = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    letters = tiny.LETTERS[::-1]  # the same tokens under other numbers
    tiny.save_tokenizer(second, letters=letters)
    path = recipe([first, second], base_model=str(first), tokenizer={"source": "union"})
    results, _ = run_compare(path, tmp_path / "out", only=["linear", "karcher"])
    for number, name in enumerate(results.sources):
        own = results.find(name, "source").scores[number]
        assert own.kl == pytest.approx(0, abs=1e-6)
    assert results.find("linear").scores[0].kl > 0.001
    assert results.find("karcher").scores


def test_a_source_with_layers_of_its_own_teaches_as_itself(recipe, tmp_path):
    """Slices: the merge is another model than its sources."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models)
    document = yaml.safe_load(path.read_text())
    del document["models"]
    document["slices"] = [
        {"sources": [{"model": str(m), "layer_range": [0, 1]} for m in models]},
        {"sources": [{"model": str(models[1]), "layer_range": [1, 2]}]},
    ]
    path.write_text(yaml.safe_dump(document))
    results, _ = run_compare(path, tmp_path / "out", only=["linear"])
    assert results.find(str(models[0]), "source").scores[0].kl == pytest.approx(0, abs=1e-6)
    assert results.find("linear").reason is None
