"""What is foreseen for a GPU is what one took, by the table of docs/performance.md."""

import json
import re
import struct
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import place
from mergekit_dam.fit.forecast import Outline, merged_skeleton
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.plan import plan_merge
from tests.benchmarks.architectures import ROWS, SIZES, SOURCES, configs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
MODES = ("block", "weights", "none")
LINE = re.compile(r"\| ([\w ,-]+) \|((?: [\d,]+ \|){6})\n")  # took, foreseen for each mode
TOOK = {name: figures for name, figures in LINE.findall(PAGE.read_text(encoding="utf-8"))}
GPU = SIZES["gpu"]
CONFIGS = configs(GPU)


def save_header(folder: Path, config: transformers.PretrainedConfig) -> Path:
    """A checkpoint in bfloat16 whose numbers are a hole in its file."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    entries, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            offsets, end = [end, end + tensor.nbytes], end + tensor.nbytes
            entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(entries).encode()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + end)
    return folder


def test_the_page_has_all_of_them() -> None:
    assert set(TOOK) == set(CONFIGS)


@pytest.mark.parametrize("name", TOOK)
def test_it_is_foreseen_on_a_machine_without_one(recipe, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(place, "free_memory", lambda _: 10**12)
    models = [save_header(tmp_path / f"m{n}", CONFIGS[name]) for n in range(SOURCES)]
    sizes = {"batch_size": ROWS, "max_length": GPU.length, "start": "average"}
    settings = read_recipe(str(recipe(models, dtype="bfloat16", dam=sizes)))
    plan = plan_merge(settings.merge, MergeOptions(quiet=True), settings.settings.formula)
    shapes, rows = HeaderShapes(plan), [Row([4] * GPU.length)] * ROWS
    data = [SourceData(rows, []) for _ in models]
    outline = Outline(plan, shapes, merged_skeleton(plan, shapes), "cuda:0", data)
    found = outline.foresee(settings.settings).needs
    figures = [int(figure.replace(",", "")) for figure in re.findall(r"[\d,]+", TOOK[name])]
    for mode, took, told in zip(MODES, figures[::2], figures[1::2], strict=True):
        assert found.of(mode) / 1e6 == pytest.approx(told, abs=1), mode
        assert told == pytest.approx(took, rel=0.05), mode
