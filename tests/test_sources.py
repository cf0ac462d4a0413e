"""Which model is which: fingerprints of real checkpoints, and finding a file's sources again."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file

from mergekit_dam.coefficients import Source
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import fingerprint
from mergekit_dam.sources import describe, match


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three fine-tunes with the same config and the same safetensors header."""
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_models(folder, tiny.CONFIGS["llama"], 3)


@pytest.fixture
def copy(models: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models[0], tmp_path / "copy"))


def reference(path: Path) -> ModelReference:
    return ModelReference.parse(str(path))


def recorded(*paths: Path) -> list[Source]:
    return [describe(reference(path)) for path in paths]


def raw_header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- fingerprints


def test_fine_tunes_with_the_same_header_are_told_apart(models: list[Path]) -> None:
    headers = {raw_header(model / "model.safetensors") for model in models}
    prints = [fingerprint(str(model)) for model in models]
    assert len(headers) == 1
    assert len({weights for weights, _ in prints}) == 3
    assert len({config for _, config in prints}) == 1


def test_a_copied_folder_has_the_same_fingerprint(models: list[Path], copy: Path) -> None:
    assert fingerprint(str(copy)) == fingerprint(str(models[0]))


def test_a_moved_folder_has_the_same_fingerprint(models: list[Path], copy: Path) -> None:
    moved = copy.rename(copy.with_name("elsewhere"))
    assert fingerprint(str(moved)) == fingerprint(str(models[0]))


def test_a_resharded_checkpoint_has_the_same_fingerprint(
    models: list[Path], tmp_path: Path
) -> None:
    tiny.load(models[0]).save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint(str(tmp_path / "sharded")) == fingerprint(str(models[0]))


def test_saving_again_changes_nothing(models: list[Path], tmp_path: Path) -> None:
    tiny.load(models[0]).save_pretrained(tmp_path / "again")
    edit_config(tmp_path / "again", transformers_version="99.0", _name_or_path="/elsewhere")
    assert fingerprint(str(tmp_path / "again")) == fingerprint(str(models[0]))


def test_files_that_mergekit_does_not_read_change_nothing(models: list[Path], copy: Path) -> None:
    """A merge of ours has its coefficients beside its weights; others keep adapters there."""
    for name in ("dam.safetensors", "adapter_model.safetensors"):
        save_file({"other": torch.ones(3)}, copy / name)
    (copy / "README.md").write_text("A copy.")
    assert fingerprint(str(copy)) == fingerprint(str(models[0]))


@pytest.mark.parametrize("changes", [{"rope_theta": 5.0}, {"extra": None}])
def test_another_config_is_another_model(models: list[Path], copy: Path, changes: dict) -> None:
    edit_config(copy, **changes)
    weights, config = fingerprint(str(models[0]))
    assert fingerprint(str(copy))[0] == weights
    assert fingerprint(str(copy))[1] != config


def test_the_order_of_the_configs_keys_does_not_matter(models: list[Path], copy: Path) -> None:
    path = copy / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(fields.items()))))
    assert fingerprint(str(copy)) == fingerprint(str(models[0]))


@pytest.mark.parametrize("change", ["value", "first", "last", "name", "dtype", "missing"])
def test_a_changed_tensor_is_another_model(models: list[Path], copy: Path, change: str) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    first, last = norm.clone(), norm.clone()
    first[0], last[-1] = 3.0, 3.0
    changed = {
        "value": {"model.norm.weight": norm + 1},
        "first": {"model.norm.weight": first},
        "last": {"model.norm.weight": last},
        "name": {"model.norm.bias": norm},
        "dtype": {"model.norm.weight": norm.bfloat16()},
        "missing": {},
    }
    save_file(tensors | changed[change], path)
    assert fingerprint(str(copy))[0] != fingerprint(str(models[0]))[0]


def test_a_raw_weights_file_has_no_config(models: list[Path]) -> None:
    weights, config = fingerprint(str(models[0] / "model.safetensors"))
    assert (weights, config) == (fingerprint(str(models[0]))[0], None)


def as_bin(folder: Path) -> Path:
    """The same checkpoint as people saved it before safetensors."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    return folder


def test_bin_checkpoints_are_told_apart(models: list[Path], tmp_path: Path) -> None:
    first, second = (
        as_bin(Path(shutil.copytree(model, tmp_path / model.name))) for model in models[:2]
    )
    again = as_bin(Path(shutil.copytree(models[0], tmp_path / "again")))
    assert fingerprint(str(first)) == fingerprint(str(again))
    assert fingerprint(str(first))[0] != fingerprint(str(second))[0]


def test_a_bin_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    """A fingerprint must not run what a stranger's pickle holds."""
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nabort\n(tR.")
    assert len(fingerprint(str(tmp_path))[0]) == 32


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 10**15) + b"{}", struct.pack("<Q", 500) + b"{}"],
    ids=["empty", "short", "huge", "cut_off"],
)
def test_a_file_that_is_not_safetensors_is_refused(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(DamError, match=r"model\.safetensors is not a safetensors file"):
        fingerprint(str(copy))


@pytest.mark.parametrize(
    "header",
    [b"{not json}", b"\xff\xfe\xff\xfe", b"[1, 2]", b'{"w": 3}', b'{"w": {"dtype": "F32"}}'],
    ids=["not_json", "not_text", "a_list", "no_entry", "no_offsets"],
)
def test_a_damaged_header_is_refused(copy: Path, header: bytes) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DamError, match=r"model\.safetensors has a damaged safetensors header"):
        fingerprint(str(copy))


def test_a_bin_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02 an old pickle")
    with pytest.raises(DamError, match=r"pytorch_model\.bin is not a PyTorch checkpoint"):
        fingerprint(str(tmp_path))


def test_a_damaged_config_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(DamError, match=r"config\.json"):
        fingerprint(str(copy))


# ---- describe


def test_describe_gives_reference_and_fingerprint(models: list[Path]) -> None:
    source = describe(reference(models[0]))
    assert source.reference == str(models[0])
    assert (source.weights, source.config) == fingerprint(str(models[0]))
    assert source.revision is None


def test_a_snapshot_of_the_hub_has_its_commit_as_revision(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    snapshot = copy.rename(tmp_path / "snapshots" / "0a1b2c")
    assert describe(reference(snapshot)).revision == "0a1b2c"


def test_an_adapter_is_part_of_the_identity(models: list[Path], tmp_path: Path) -> None:
    adapters = []
    for index in range(2):
        folder = tmp_path / f"adapter{index}"
        folder.mkdir()
        save_file({"lora_A": torch.full((4,), float(index))}, folder / "adapter_model.safetensors")
        adapters.append(folder)
    alone = describe(reference(models[0]))
    first, second = (
        describe(ModelReference.parse(f"{models[0]}+{adapter}")) for adapter in adapters
    )
    assert len({alone.weights, first.weights, second.weights}) == 3
    assert first.reference == f"{models[0]}+{adapters[0]}"


def test_a_change_on_disk_is_noticed_within_one_process(copy: Path) -> None:
    before = describe(reference(copy))
    path = copy / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert describe(reference(copy)).weights != before.weights


# ---- match


def test_models_are_found_by_reference_in_any_order(models: list[Path]) -> None:
    sources = recorded(*models)
    assert match(sources, [reference(models[i]) for i in (2, 0, 1)]) == [2, 0, 1]


def test_a_moved_model_is_found_by_its_contents(models: list[Path], copy: Path) -> None:
    sources = recorded(*models)
    assert match(sources, [reference(models[2]), reference(copy)]) == [2, 0]


def test_a_stranger_is_none_of_the_sources(models: list[Path]) -> None:
    sources = recorded(*models[:2])
    assert match(sources, [reference(m) for m in models]) == [0, 1, None]


def test_copies_of_one_model_are_matched_in_order_of_position(
    models: list[Path], copy: Path, tmp_path: Path
) -> None:
    sources = recorded(models[0], models[1], copy)
    others = [Path(shutil.copytree(copy, tmp_path / name)) for name in "xy"]
    assert match(sources, [reference(path) for path in others]) == [0, 2]
    assert match(sources, [reference(copy), reference(models[0])]) == [2, 0]  # names go first


def test_a_copy_does_not_take_the_row_of_a_model_named_later(
    models: list[Path], copy: Path
) -> None:
    sources = recorded(models[0], models[1])
    assert match(sources, [reference(copy), reference(models[0])]) == [None, 0]


def test_changed_contents_at_the_same_path_are_none_of_the_sources(
    models: list[Path], copy: Path
) -> None:
    sources = recorded(copy, models[1])
    shutil.copy(models[2] / "model.safetensors", copy / "model.safetensors")
    assert match(sources, [reference(copy), reference(models[1])]) == [None, 1]


def test_two_models_that_swapped_places_are_matched_by_contents(
    models: list[Path], tmp_path: Path
) -> None:
    a, b = (Path(shutil.copytree(models[i], tmp_path / str(i))) for i in (0, 1))
    sources = recorded(a, b)
    a.rename(tmp_path / "2")
    b.rename(a)
    (tmp_path / "2").rename(b)
    assert match(sources, [reference(a), reference(b)]) == [1, 0]


def test_another_config_at_the_same_path_is_another_model(copy: Path) -> None:
    sources = recorded(copy)
    edit_config(copy, rope_theta=5.0)
    assert match(sources, [reference(copy)]) == [None]


def test_a_raw_weights_file_is_found_by_its_weights(models: list[Path]) -> None:
    sources = recorded(*models)
    assert match(sources, [reference(models[1] / "model.safetensors")]) == [1]


def test_models_without_files_go_by_name_or_number(models: list[Path]) -> None:
    sources = recorded(*models)
    assert match(sources, [1, str(models[0]), "stranger", 3]) == [1, 0, None, None]
