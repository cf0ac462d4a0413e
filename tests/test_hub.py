"""Coefficients on the Hub: what is a reference, what is a path, what is refused in a sentence."""

from pathlib import Path

import pytest
import tiny
from commands import refusal

from mergekit_dam.hub import local_file, parse


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("user/repo", ("user/repo", None, "dam.safetensors")),
        ("user/repo@v1", ("user/repo", "v1", "dam.safetensors")),
        ("user/repo/a/b.safetensors", ("user/repo", None, "a/b.safetensors")),
        ("user/re.po-1@0a1b/b.safetensors", ("user/re.po-1", "0a1b", "b.safetensors")),
        ("dam.safetensors", None),
        ("out/dam.safetensors", None),
        ("./out/dam", None),
        ("/out/dam", None),
        ("../out/dam", None),
        ("user/repo/../../secret", None),
        ("~/out/dam", None),
        ("", None),
    ],
)
def test_references(reference: str, expected):
    assert parse(reference) == expected


def test_a_local_path_always_wins(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("user").mkdir()
    Path("user/repo").write_bytes(b"here")
    assert local_file("user/repo") == "user/repo"


def test_a_fit_writes_no_repository(recipe, tmp_path: Path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models, parameters={"coefficients": "user/repo"})
    assert "end its name with .safetensors" in refusal("mergekit-dam", "fit", path)


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-dam merge"])
def test_what_cannot_be_fetched_is_one_sentence(command, recipe, tmp_path: Path):
    """The tests run offline."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models, parameters={"coefficients": "nobody/nothing"})
    message = refusal(*command.split(), path, tmp_path / "out")
    assert "nobody/nothing does not exist here, and the Hub gives none" in message
    assert not (tmp_path / "out").exists()
