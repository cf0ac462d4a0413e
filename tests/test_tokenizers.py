"""Sources with vocabularies of their own, aligned by mergekit's tokenizer settings."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from commands import refusal, run
from compatibility import shows
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row
from mergekit_dam.fit import fit
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import Fit, prepare

QUIET = MergeOptions(quiet=True)
FEWER = tiny.LETTERS[:-9]  # without the digits from 4 and the signs
OTHER = tiny.LETTERS[5:] + "!?"  # moved, some lacking, two of its own


def save(folder: Path, letters: str, seed: int) -> Path:
    sizes = {**tiny.SIZES, "vocab_size": len(letters) + len(tiny.SPECIAL)}
    tiny.save_model(folder, transformers.LlamaConfig(**sizes), seed)
    tiny.save_tokenizer(folder, letters=letters)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    vocabularies = (tiny.LETTERS, FEWER, OTHER)
    return [save(folder / f"m{n}", letters, n) for n, letters in enumerate(vocabularies)]


def named(setting: dict, models: list[Path]) -> dict:
    """A setting with M0, M1, ... replaced by the models."""
    text = json.dumps(setting)
    for number, model in enumerate(models):
        text = text.replace(f"M{number}", str(model))
    return json.loads(text)


def fitted(path: Path) -> Fit:
    """A finished fit, its merged model holding the fitted coefficients."""
    recipe = read_recipe(str(path))
    fit(recipe, recipe.coefficients, QUIET, device="cpu")
    prepared = prepare(recipe, QUIET, device="cpu")
    file = CoefficientFile(recipe.coefficients)
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(file.get(name))
    return prepared


@shows(
    "settings",
    "`tokenizer`, `tokenizer_source`: union, base or a model; `tokens`, `pad_to_multiple_of`",
    "sources with different vocabularies",
)
@pytest.mark.parametrize(
    "setting",
    [
        {"tokenizer_source": "union"},
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
        {"tokenizer": {"source": "M2"}},
        {"tokenizer_source": "M1"},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 16}},
        {"tokenizer": {"source": "union", "tokens": {"!": {"source": "M2", "force": True}}}},
        {"tokenizer": {"source": "union", "tokens": {"new": {"source": {"kind": "zero"}}}}},
        {
            "tokenizer": {
                "source": "M2",
                "tokens": {
                    "new": {"source": {"kind": "model_token", "model": "M2", "token": "?"}},
                    "old": {"source": {"kind": "model_token", "model": "M1", "token_id": 5}},
                },
            }
        },
    ],
    ids=str,
)
def test_aligned_vocabularies(recipe, models, tmp_path, setting):
    setting = named(setting, models)
    path = recipe(models, base_model=str(models[0]), **setting)
    prepared = fitted(path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    fits = prepared.plan.tokenizer.get_vocab()
    ids = tiny.tokens() % len(fits)
    tokens = sorted(fits)  # mergekit numbers the tokens that a union adds in an arbitrary order
    assert sorted(merged) == tokens
    torch.testing.assert_close(
        tiny.load(tmp_path / "out")(ids).logits[..., [merged[token] for token in tokens]],
        prepared.merged(ids)[..., [fits[token] for token in tokens]],
    )


@shows("settings", "data of aligned vocabularies", "tokenised with the merge's tokenizer")
def test_rows_are_tokenised_with_the_merges_tokenizer(recipe, models):
    path = recipe(models, base_model=str(models[0]), tokenizer_source="union")
    prepared = prepare(read_recipe(str(path)), QUIET, device="cpu")
    vocabulary = prepared.plan.tokenizer.get_vocab()
    assert set("!?0a") <= vocabulary.keys()
    for source in prepared.data:
        for row in source.train:
            assert row.ids[0] == vocabulary["<bos>"]


@shows("settings", "tokens that a source lacks", "take no part in that source's loss")
def test_a_token_that_a_source_lacks_takes_no_part_in_its_loss(recipe, models):
    path = recipe(models, base_model=str(models[0]), tokenizer_source="union")
    prepared = prepare(read_recipe(str(path)), QUIET, device="cpu")
    known = prepared.plan.known_tokens(prepared.plan.sources[1])
    vocabulary = prepared.plan.tokenizer.get_vocab()
    assert set(known.tolist()) == {vocabulary[t] for t in (*tiny.SPECIAL, *FEWER)}
    everything = [prepared.plan.known_tokens(source) for source in prepared.plan.sources]
    distillation = Distillation(
        prepared.merged, Objective(similarity=0, temperature=2.0), everything
    )
    ids = [vocabulary[token] for token in ("<bos>", "a", "b", "c")]
    loss = distillation(**batch([Row(ids)], [1]))["loss"]
    p = tiny.teach(prepared.merged, 1, torch.tensor([ids]))[0, :-1, known].div(2).log_softmax(-1)
    q = prepared.merged(torch.tensor([ids]))[0, :-1, known].div(2).log_softmax(-1)
    torch.testing.assert_close(loss, 4 * (p.exp() * (p - q)).sum(-1).mean())


def test_different_vocabularies_need_a_setting(recipe, models):
    message = refusal("mergekit-dam", "check", recipe(models, base_model=str(models[0])))
    assert "model.embed_tokens.weight" in message
    assert "tokenizer: {source: union}" in message


@pytest.mark.parametrize("has_base", [True, False])
def test_embeddings_are_cut_where_the_config_says_so_alone(recipe, models, has_base):
    """mergekit cuts them, and leaves the config as it is."""
    base = {"base_model": str(models[0])} if has_base else {}
    path = recipe(models[:2], **base)
    message = refusal("mergekit-dam", "check", path, "--unsafe-truncate-embeddings")
    few, many = len(FEWER) + len(tiny.SPECIAL), tiny.VOCABULARY
    told = (
        f"has shape [{few}, 16] in the sources, but config.json of the merge makes it [{many}, 16]"
    )
    assert (told if has_base else "differ in vocab_size, and mergekit would take either") in message


def tokens(**embeddings: dict) -> dict:
    return {"tokenizer": {"source": "union", "tokens": embeddings}}


MISTAKES = {
    "source": ({"tokenizer": {"source": "unoin"}}, "did you mean `union`?"),
    "tokenizer_source": ({"tokenizer_source": "bse"}, "did you mean `base`?"),
    "folder": ({"tokenizer": {"source": "./gone"}}, "`tokenizer.source` is ./gone"),
    "hub name": ({"tokenizer": {"source": "no/such-model"}}, "the Hub gives none"),
    "model": (tokens(new={"source": "./gone"}), "./gone, which is none of the merge's models"),
    "near model": (tokens(new={"source": "M1x"}), "did you mean `M1`?"),
    "token of a model": (
        tokens(new={"source": "M0"}),
        "'new' from M0, whose tokenizer has no such",
    ),
    "token": (
        tokens(new={"source": {"kind": "model_token", "model": "M0", "token": "qq"}}),
        "'qq' from M0, whose tokenizer has no such token",
    ),
    "token_id": (
        tokens(new={"source": {"kind": "model_token", "model": "M0", "token_id": 999}}),
        "token_id 999 of M0, which has 43 tokens",
    ),
    "no source": (tokens(new={}), "`tokenizer.tokens.new` has no `source`"),
    "key": (tokens(new={"sorce": "M0", "source": {"kind": "zero"}}), "did you mean `source`?"),
    "padding": ({"tokenizer": {"pad_to_multiple_of": -8}}, "`tokenizer.pad_to_multiple_of` is -8"),
    "template": ({"chat_template": "chatmll"}, "did you mean `chatml`?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_setting_names_and_is_not_there(recipe, models, monkeypatch, mistake):
    """Told before any weight is read, and before transformers asks the Hub again and again."""
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", None)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", None)
    setting, sentence = MISTAKES[mistake]
    path = recipe(models, base_model=str(models[0]), **named(setting, models))
    message = refusal("mergekit-dam", "check", path)
    (expected,) = named({"": sentence}, models).values()
    assert expected in message
    assert len(message.splitlines()) == 1
