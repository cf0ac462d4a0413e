"""Data that sources write themselves: truly sampled from them, kept, used again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import refusal, run
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from test_lora import save_adapter
from test_tokenizers import OTHER
from test_tokenizers import save as save_with
from transformers import AutoTokenizer

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import Recipe, read_recipe
from mergekit_dam.data.written import Written, load_written, save_written
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.sample import Sampler
from mergekit_dam.model.whole import load_whole
from mergekit_dam.plan import plan_alone

ROOT = Path(__file__).parent.parent
QUIET = MergeOptions(quiet=True)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[:1] }}={{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a={% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


def whole(reference: object, options: MergeOptions = QUIET):
    source = ModelReference.parse(str(reference))
    merge = MergeConfiguration(merge_method="dam", models=[{"model": source}], dtype="float32")
    return load_whole(plan_alone(source, merge, options), "cpu")


def sampler(folder: Path, template: str | None = None, length: int = 20) -> Sampler:
    tiny.save_tokenizer(folder, template)
    return Sampler(whole(folder), AutoTokenizer.from_pretrained(folder), "./m", length)


def surprise(model, rows: Sequence[Written]) -> tuple[float, float]:
    """How much less likely the written tokens are than tokens drawn from the model itself would
    be, nats a token; and the standard error of that."""
    differences = []
    for row in rows:
        start = max(row.prompt, 1)
        p = model(torch.tensor([row.tokens])).logits[0, start - 1 : -1].log_softmax(-1)
        entropy = -(p.exp() * p).sum(-1)
        said = p.gather(1, torch.tensor(row.tokens)[start:, None])[:, 0]
        differences += (-said - entropy).tolist()
    values = torch.tensor(differences)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


# ---- the model


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gemma2", "gpt2", "mixtral"])
@torch.no_grad()
def test_the_whole_model_is_the_source(tmp_path: Path, kind: str) -> None:
    folder = tiny.save_model(tmp_path, tiny.CONFIGS[kind], seed=3)
    torch.testing.assert_close(
        whole(folder)(tiny.tokens()).logits, tiny.load(folder)(tiny.tokens()).logits
    )


def test_an_adapter_is_merged_into_it(models: list[Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", models[0], 5)
    options = MergeOptions(quiet=True, lora_merge_cache=str(tmp_path / "cache"))
    logits = whole(f"{models[0]}+{adapter}", options)(tiny.tokens()).logits
    import peft

    expected = peft.PeftModel.from_pretrained(tiny.load(models[0]), adapter)(tiny.tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---- what is sampled


@torch.no_grad()
def test_rows_are_drawn_from_the_model_itself(models: list[Path]) -> None:
    """Not sharpened, not cut off: each token as likely as the source has it."""
    rows = list(sampler(models[0], length=12).rows(200, seed=1))
    assert len(rows) == 200
    mean, error = surprise(tiny.load(models[0]), rows)
    assert abs(mean) < 4 * error < 0.2
    assert all(row.tokens[0] == 1 and row.prompt == 0 for row in rows)
    for row in rows:  # up to its end, or to its length
        assert row.tokens[-1] == 2 or len(row.tokens) == 12
        assert 2 not in row.tokens[:-1]


@torch.no_grad()
def test_answers_to_questions_of_different_length_are_drawn_from_the_model(
    models: list[Path], tmp_path: Path
) -> None:
    """They are sampled together, the shorter padded on the left."""
    folder = shutil.copytree(models[0], tmp_path / "chat")
    rows = list(sampler(folder, TEMPLATE).rows(200, seed=1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len({row.prompt for row in rows}) > 3
    for row in rows:
        prompt = tokenizer.decode(row.tokens[: row.prompt])
        assert prompt.startswith("<bos>u=") and prompt.endswith("<eos>a=")
        assert prompt.count("<eos>") == 1
        assert len(row.tokens) <= 20
    mean, error = surprise(tiny.load(folder), rows)
    assert abs(mean) < 4 * error < 0.25


def test_the_same_seed_writes_the_same_rows(models: list[Path]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (list(sampler(models[0]).rows(20, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(before, torch.get_rng_state())  # nobody else's draws change


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('no system') }}", "refuses a user's message alone (no system)"),
        ("{{ bos_token }}", "leaves a user's message out"),
    ],
)
def test_a_template_that_does_not_take_a_question_is_refused(
    models: list[Path], tmp_path: Path, template: str, part: str
) -> None:
    folder = shutil.copytree(models[0], tmp_path / "chat")
    with pytest.raises(DamError, match="give it a `path`") as caught:
        sampler(folder, template)
    assert part in caught.value.message


# ---- the file


def test_rows_are_kept_and_read_again(tmp_path: Path) -> None:
    rows = [Written([1, 5, 2], 0, "<bos>a<eos>"), Written([1, 5, 6, 2], 2, "\u2028\n")]
    save_written(tmp_path / "new" / "rows.jsonl", rows)
    read = load_written(tmp_path / "new" / "rows.jsonl", vocabulary=7)
    assert [(row.tokens, row.prompt) for row in read] == [([1, 5, 2], 0), ([1, 5, 6, 2], 2)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save_written(tmp_path / "rows.jsonl", [Written([1, 2], 0)])
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(TypeError):
        save_written(tmp_path / "rows.jsonl", [Written([1, 2], 0), Written([object()], 0)])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", "null", '{"tokens": [1, 2]}', '{"tokens": [1, 7], "prompt": 0}',
        '{"tokens": [1, -1], "prompt": 0}', '{"tokens": [1, true], "prompt": 0}',
        '{"tokens": [1, 2.0], "prompt": 0}', '{"tokens": [1, 2], "prompt": 3}',
        '{"tokens": "12", "prompt": 0}', '{"tokens": [1, 2], "prompt": -1}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"tokens": [1, 2], "prompt": 0}\n' + line + "\n")
    with pytest.raises(DamError, match=r"rows\.jsonl.* is damaged .*: remove it"):
        load_written(path, vocabulary=7)


# ---- the fit


@pytest.fixture
def generating(recipe: Callable, models: list[Path]) -> Callable[..., Path]:
    def write(sources: list = models, dam: dict | None = None, **keys) -> Path:
        dam = {"data": {"generate": 24}, "max_length": 16, **(dam or {})}
        return recipe(sources, dam=dam, **keys)

    return write


def files(config: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(config.parent.glob("dam.safetensors.data/*"))}


def test_a_fit_needs_nothing_but_the_models(generating: Callable) -> None:
    config = generating()
    shown = run("mergekit-dam", "check", config).stdout
    assert shown.count("will write 24 rows of at most 16 tokens itself, from its beginning") == 2
    assert not files(config)
    run("mergekit-dam", "fit", config)
    written = files(config)
    assert sorted(name.partition("-")[0] for name in written) == ["m0", "m1"]
    for path in written.values():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 24
        assert all(row["text"].startswith("<bos>") for row in rows)
    assert "<bos>" in run("mergekit-dam", "check", config).stdout  # now they can be shown
    before = {name: path.stat().st_mtime_ns for name, path in written.items()}
    first = prepare(read_recipe(str(config)), QUIET, device="cpu")
    assert {name: path.stat().st_mtime_ns for name, path in files(config).items()} == before
    shutil.rmtree(config.parent / "dam.safetensors.data")
    again = prepare(read_recipe(str(config)), QUIET, device="cpu")
    assert files(config).keys() == before.keys()
    assert again.data == first.data
    assert again.identity == first.identity


@pytest.mark.parametrize("change", [{"seed": 5}, {"data": {"generate": 23}}, {"max_length": 15}])
def test_other_settings_write_other_files(generating: Callable, change: dict) -> None:
    config = generating()
    prepare(read_recipe(str(config)), QUIET, device="cpu")
    before = files(config)
    prepare(read_recipe(str(generating(dam=change))), QUIET, device="cpu")
    assert len(files(config)) == 4
    assert before.keys() < files(config).keys()


def test_some_sources_may_write_and_others_read(generating: Callable, models: list[Path]) -> None:
    config = generating()
    document = yaml.safe_load(config.read_text())
    data = config.parent / "data0.jsonl"
    document["dam"]["data"] = [
        {"source": str(models[0]), "path": str(data)},
        {"source": "*", "generate": 10},
    ]
    config.write_text(yaml.safe_dump(document))
    prepared = prepare(read_recipe(str(config)), QUIET, device="cpu")
    assert [len(s.train) + len(s.held_out) for s in prepared.data] == [24, 10]
    assert len(files(config)) == 1
    document["dam"]["data"][0]["text"] = "nothing"
    shutil.rmtree(config.parent / "dam.safetensors.data")
    config.write_text(yaml.safe_dump(document))
    with pytest.raises(DamError, match="without text in 'nothing'"):
        prepare(read_recipe(str(config)), QUIET, device="cpu")
    assert not files(config)  # before anything is written


def test_answers_alone_may_count(generating: Callable, models: list[Path], tmp_path: Path) -> None:
    chat = shutil.copytree(models[1], tmp_path / "chat")
    tiny.save_tokenizer(chat, TEMPLATE)
    config = generating([models[0], chat], dam={"loss_on": "completion"}, base_model=str(models[0]))
    message = refusal("mergekit-dam", "check", config)
    assert "m0 has no chat template, so it writes plain text" in message
    assert "`loss_on: all`" in message
    document = yaml.safe_load(config.read_text())
    document["dam"]["data"] = [
        {"source": str(models[0]), "generate": 10, "loss_on": "all"},
        {"source": str(chat), "generate": 10},
    ]
    config.write_text(yaml.safe_dump(document))
    plain, chatty = prepare(read_recipe(str(config)), QUIET, device="cpu").data
    assert {row.start for row in plain.train} == {0}
    assert min(row.start for row in chatty.train) > 3


def test_tokens_of_an_aligned_vocabulary(generating: Callable, tmp_path: Path) -> None:
    """Written in the source's vocabulary, read in the merge's."""
    sources = [save_with(tmp_path / "a", tiny.LETTERS, 0), save_with(tmp_path / "b", OTHER, 1)]
    config = generating(sources, base_model=str(sources[0]), tokenizer_source="union")
    prepared = prepare(read_recipe(str(config)), QUIET, device="cpu")
    for number, path in enumerate(files(config).values()):
        expected = {json.loads(line)["text"] for line in path.read_text().splitlines()}
        data = prepared.data[number]
        rows = [*data.train, *data.held_out]
        assert {prepared.plan.tokenizer.decode(row.ids) for row in rows} == expected


def test_a_row_ends_before_a_token_that_the_merge_lacks() -> None:
    row = Written([4, 5, 6, 7], 0).row({4: 0, 5: 1, 7: 3}, 9, on_completion=False)
    assert row.ids == [0, 1]


def test_a_damaged_file_is_told_of_by_check(generating: Callable) -> None:
    config = generating()
    prepare(read_recipe(str(config)), QUIET, device="cpu")
    path = next(iter(files(config).values()))
    path.write_text("nothing")
    assert f"{path}, in which a source's own text was kept, is damaged" in refusal(
        "mergekit-dam", "check", config
    )


def test_written_rows_do_what_real_rows_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the quickstart, in fewer steps than docs/data.md reports; on real held-out rows."""
    monkeypatch.chdir(ROOT)
    document = yaml.safe_load(Path("examples/quickstart/config.yml").read_text())
    document["dam"] |= {
        "start": "average",
        "steps": 12,
        "seed": 1,
        "examples": 300,
        "held_out": 0.1,
    }

    def fitted(name: str, **dam) -> tuple[CoefficientFile, Recipe]:
        file = tmp_path / f"{name}.safetensors"
        changes = {"parameters": {"coefficients": str(file)}, "dam": {**document["dam"], **dam}}
        config = tmp_path / f"{name}.yml"
        config.write_text(yaml.safe_dump({**document, **changes}))
        recipe = read_recipe(str(config))
        fit(recipe, str(file), QUIET, device="cpu")
        return CoefficientFile(file), recipe

    real, recipe = fitted("real")
    written, _ = fitted("written", data={"generate": 100})
    prepared = prepare(recipe, QUIET, device="cpu")
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(written.get(name))
    found = evaluate(prepared.merged, [source.held_out for source in prepared.data], 512, 256)
    average, with_real, with_written = (
        sum(figures.kl for figures in results) / 4
        for results in (real.header.results.average, real.header.results.fit, found)
    )
    assert average - with_written >= 0.8 * (average - with_real)
