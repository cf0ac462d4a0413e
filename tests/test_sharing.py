"""Cards, push, and coefficients from the Hub: what is published rebuilds the merge elsewhere."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import refusal, run
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from mergekit_dam import card
from mergekit_dam.coefficients import CoefficientFile, Header, Source, save
from mergekit_dam.errors import DamError
from mergekit_dam.hub import open_coefficients
from mergekit_dam.push import published


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, monkeypatch, tmp_path: Path) -> Hub:
    """Our Hub is the Hub, for this process and those forked from it."""
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def alone(hub: Hub, home: Path) -> dict[str, str]:
    """The same, as the environment of a process of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture
def fitted(models, recipe, tmp_path: Path) -> Path:
    """The YAML of a fitted merge."""
    path = recipe(models[:2], base_model=str(models[2]), dam={"learning_rate": 0.1})
    run("mergekit-dam", "fit", path, "--quiet")
    return path


# ---- the card of a merge


def test_the_card_of_a_merge(fitted: Path, models, tmp_path: Path):
    run("mergekit-dam", "merge", fitted, tmp_path / "out", "--quiet")
    readme = ModelCard.load(tmp_path / "out" / "README.md")
    assert readme.data.tags == ["mergekit", "merge", "dam"]
    assert readme.data.library_name == "transformers"
    assert readme.data.base_model is None  # local paths are no names on the Hub
    header = CoefficientFile(tmp_path / "dam.safetensors").header
    for source in header.sources:
        role = "" if source.teaches else " (the base)"
        assert f"| {source.reference}{role} |" in readme.text
        assert source.weights in readme.text
    for what in ("## Held-out results", "| mean |", "## Data", "data0.jsonl", "learning_rate: 0.1"):
        assert what in readme.text
    assert "mergekit-yaml mergekit_config.yml ./rebuilt" in readme.text
    assert fitted.read_text().strip() in readme.text


def test_the_command_on_the_card_rebuilds_the_merge(fitted: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    run("mergekit-dam", "merge", fitted, out, "--quiet")
    config = yaml.safe_load((out / "mergekit_config.yml").read_text())
    config["parameters"]["coefficients"] = "dam.safetensors"  # as the card says
    (out / "mergekit_config.yml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(out)
    run("mergekit-yaml", "mergekit_config.yml", "./rebuilt", "--quiet")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (out / "rebuilt" / name).read_bytes()


def header(*references: str, **fields) -> Header:
    sources = tuple(
        Source(reference=name, revision="abc", weights=f"{number:032x}")
        for number, name in enumerate(references)
    )
    settings = {"data": [{"source": name, "path": "someone/texts"} for name in references]}
    merge = {"merge_method": "dam", "models": [{"model": name} for name in references]}
    fields = {"settings": settings, "merge": merge, "sources": sources, **fields}
    return Header(package="0.1.0", granularity="column", **{"formula": "weights", **fields})


def test_metadata_name_the_hubs_models_in_order():
    one = header("zoe/b", "./local", "amy/a+bob/lora")
    one = one.model_copy(update={"merge": {**one.merge, "base_model": "meta/base"}})
    data = ModelCard(card.of_file(one, "me/coefficients")).data
    assert data.base_model == ["meta/base", "zoe/b", "amy/a", "bob/lora"]
    assert data.base_model_relation == "merge"
    assert data.datasets == ["someone/texts"]
    assert data.tags == ["mergekit", "merge", "dam", "dam-coefficients"]


def test_models_of_the_hub_are_pinned_to_what_was_fitted():
    models = card.rebuilding(header("zoe/b", "./local", "amy/a+bob/lora", "x/y@v2"), "me/c")[
        "models"
    ]
    assert [m["model"] for m in models] == ["zoe/b@abc", "./local", "amy/a@abc+bob/lora", "x/y@v2"]


def test_a_base_that_is_subtracted_is_pinned_and_named():
    base = Source(reference="meta/base", revision="def", weights="f" * 32)
    vectors = header("zoe/b", formula="task_vectors", base=base)
    for merge in ({"base_model": "meta/base", **vectors.merge}, {}):
        config = card.rebuilding(vectors.model_copy(update={"merge": merge}), "me/c")
        assert config["base_model"] == "meta/base@def"


def test_names_cannot_leave_their_cell():
    text = card.of_file(header("a/b", "c|d <b>x</b> # heading"), "me/c")
    assert "c\\|d &lt;b&gt;x&lt;/b&gt; # heading" in text.partition("## Sources")[2]


def test_what_is_published_tells_of_no_folder():
    data = [{"source": "/home/amy/m", "path": "/home/amy/secret/rows.jsonl"}]
    one = header("/home/amy/m", settings={"data": data})
    public = published(one, {"/home/amy/m": "amy/m"})
    assert "/home/amy" not in public.model_dump_json()
    assert public.settings["data"] == [{"source": "amy/m", "path": "rows.jsonl"}]
    assert public.sources[0].weights == one.sources[0].weights
    for path in ("clients/rows.jsonl", "clients/rows.jsonl.gz"):  # from another working directory
        local = header("amy/m", settings={"data": [{"source": "amy/m", "path": path}]})
        assert published(local, {}).settings["data"][0]["path"] == path.removeprefix("clients/")
        assert ModelCard(card.of_file(local, "me/c")).data.datasets is None
    with pytest.raises(DamError) as caught:
        published(one, {"amy": "amy/m"})
    assert "amy is none of the file's models" in caught.value.message


def test_what_is_published_tells_of_no_start_and_no_tokenizer():
    local = "/home/amy/tokens"
    one = header("amy/m", settings={"start": "/home/amy/secret/first.safetensors"}, tokenizer=local)
    one = one.model_copy(update={"merge": {**one.merge, "tokenizer_source": local}})
    assert card.unpublished(published(one, {})) == [local]
    public = published(one, {local: "amy/tokens"})
    assert card.unpublished(public) == []
    assert "/home/amy" not in public.model_dump_json()
    assert public.settings["start"] == "first.safetensors"
    assert published(header("amy/m", settings={"start": "average"}), {}).settings == {
        "start": "average"
    }


@pytest.mark.parametrize(
    "token",
    [{"source": "./b"}, {"source": {"kind": "model_token", "model": "./b", "token": "<b>"}}],
    ids=str,
)
def test_models_of_single_tokens_are_unpublished_too(token: dict):
    one = header("amy/m")
    tokenizer = {"source": "union", "tokens": {"<a>": token, "<c>": {"source": "amy/m"}}}
    one = one.model_copy(update={"merge": {**one.merge, "tokenizer": tokenizer}})
    assert card.unpublished(one) == ["./b"]
    assert "**./b** is a local path" in card.of_file(one, "me/c")


# ---- push


def test_dry_run_shows_and_publishes_nothing(fitted: Path, models, tmp_path: Path):
    """Offline, as all tests are."""
    command = ("mergekit-dam", "push", tmp_path / "dam.safetensors", "me/coefficients")
    result = run(*command, "--dry-run")
    assert "coefficients: me/coefficients" in result.stdout
    assert "Nothing was published to me/coefficients." in result.stdout
    for name in ("README.md", "dam.safetensors", "mergekit_config.yml"):
        assert f"{name}: " in result.stdout
    assert f"Others cannot rebuild this merge: {models[0]} is a local path here" in result.stderr
    names = [f"--name={model}=me/m{number}" for number, model in enumerate(models)]
    result = run(*command, "--dry-run", *names)
    assert "Others cannot" not in result.stderr
    assert str(models[0].parent) not in result.stdout


@pytest.mark.parametrize("name", ["me", "me/a/b", "me/a@v1", "./me/a", "me/dam.safetensors"])
def test_names_that_are_no_repository(name: str, tmp_path: Path):
    save(tmp_path / "dam.safetensors", {"a.weight": torch.ones(1, 1, 2)}, header("a/b"))
    message = refusal("mergekit-dam", "push", tmp_path / "dam.safetensors", name)
    assert "no name of a repository" in message


def test_published_it_rebuilds_the_merge_anywhere(
    fitted: Path, models, online: Hub, tmp_path: Path
):
    """The whole way: push, then stock mergekit-yaml with nothing but the Hub."""
    for number, model in enumerate(models):
        files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
        online.commit(f"me/m{number}", files)
    names = [f"--name={model}=me/m{number}" for number, model in enumerate(models)]
    command = ("mergekit-dam", "push", tmp_path / "dam.safetensors", "me/coefficients", *names)
    assert "coefficients: me/coefficients" in run(*command, "--private").stdout
    assert online.repositories["me/coefficients"]["private"]
    _, files = online.files("me/coefficients")
    assert set(files) == {"README.md", "dam.safetensors", "mergekit_config.yml"}
    assert str(models[0].parent).encode() not in b"".join(files.values())
    run(*command)  # our own card is replaced

    there = tmp_path / "elsewhere"
    there.mkdir()
    block = files["README.md"].decode().partition("```yaml\n")[2].partition("```")[0]
    (there / "config.yml").write_text(block)  # as the card says
    environment = alone(online, there / "home")
    run("mergekit-yaml", there / "config.yml", there / "merged", "--quiet", **environment)
    run("mergekit-dam", "merge", fitted, tmp_path / "here", "--quiet")
    name = "model.safetensors"
    here, rebuilt = load_file(tmp_path / "here" / name), load_file(there / "merged" / name)
    assert here.keys() == rebuilt.keys()
    assert all(torch.equal(tensor, rebuilt[name]) for name, tensor in here.items())


def small_file(path: Path, value: float = 1.0) -> Path:
    save(path, {"a.weight": torch.full((1, 1, 2), value)}, header("a/b"))
    return path


def test_a_models_own_card_is_kept(online: Hub, tmp_path: Path):
    online.commit("me/model", {"README.md": b"---\ntags: [mergekit]\n---\n# My model\n"})
    message = refusal("mergekit-dam", "push", small_file(tmp_path / "dam.safetensors"), "me/model")
    assert "me/model has a README.md that is not of coefficients alone" in message
    assert set(online.files("me/model")[1]) == {"README.md"}


def test_a_token_that_may_not_write(online: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    file = small_file(tmp_path / "dam.safetensors")
    assert "refuses the token" in refusal("mergekit-dam", "push", file, "me/coefficients")


# ---- coefficients from the Hub


def test_revisions_and_files(online: Hub, tmp_path: Path, monkeypatch):
    paths = [small_file(tmp_path / f"{value}.safetensors", value) for value in (1.0, 2.0)]
    first = online.commit("me/c", {"dam.safetensors": paths[0].read_bytes()})
    files = {"dam.safetensors": paths[1].read_bytes(), "sub/x.safetensors": b"x"}
    online.commit("me/c", files)
    assert "1.000 ± 0.000" in run("mergekit-dam", "inspect", f"me/c@{first}").stdout
    assert "2.000 ± 0.000" in run("mergekit-dam", "inspect", "me/c").stdout
    message = refusal("mergekit-dam", "inspect", "me/c/sub/x.safetensors")
    assert "is not a safetensors file" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache has it
    assert "2.000 ± 0.000" in run("mergekit-dam", "inspect", "me/c").stdout


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("me/none", "no repository me/none"),
        ("me/c@v9", "me/c has no revision v9"),
        ("me/c/none.safetensors", "me/c has no file none.safetensors"),
    ],
)
def test_what_the_hub_does_not_have(online: Hub, tmp_path: Path, reference: str, reason: str):
    online.commit("me/c", {"README.md": b""})
    with pytest.raises(DamError) as caught:
        open_coefficients(reference)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message
