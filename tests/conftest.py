"""Fixtures shared by the tests: recipes over tiny checkpoints."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# The tests compute on the CPU, as a fork of a process that has seen a GPU cannot use it; those that
# need one (test_cuda.py, test_kernels.py) run with MERGEKIT_DAM_GPU=1.
if not os.environ.get("MERGEKIT_DAM_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports transformers or datasets: the tests never ask the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny  # noqa: E402  after the settings above
import yaml  # noqa: E402

from mergekit_dam import report  # noqa: E402
from mergekit_dam.model import MergedModel  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _keeps_what_is_there() -> None:
    """What is imported and cached by now stays: a collection of garbage, of which a fit makes two,
    would look through it for half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _draws_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of a report take longer than a fit of tiny models; a module that looks at them
    says `DRAWS = True`."""
    if not getattr(request.module, "DRAWS", False):
        monkeypatch.setattr(report, "can_draw", lambda: False)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config, its data and its models' names; returns the path of the YAML."""

    def write(models: list[Path], *, rows: int = 24, dam: dict | None = None, **keys) -> Path:
        data = [
            {
                "source": str(model),
                "path": str(
                    tiny.write_jsonl(
                        tmp_path / f"data{index}.jsonl",
                        [{"text": text} for text in tiny.sentences(rows, seed=index)],
                    )
                ),
            }
            for index, model in enumerate(models)
        ]
        document = {
            "merge_method": "dam",
            "models": [{"model": str(model)} for model in models],
            "parameters": {"coefficients": str(tmp_path / "dam.safetensors")},
            "dtype": "float32",
            "dam": {
                "data": data,
                "start": "weights",
                "steps": 3,
                "batch_size": 2,
                "held_out": 0.2,
                **(dam or {}),
            },
            **keys,
        }
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def watch(monkeypatch) -> Callable[[MergedModel], list[tuple[str, int | None]]]:
    """Lists what a model makes of its merge from now on: output tensors, each with how many rows;
    None if all."""

    def watch(merged: MergedModel) -> list[tuple[str, int | None]]:
        made, merged_weights = [], merged._views.merged

        def counting(names, ids=None):
            made.extend((name, None if ids is None else len(ids)) for name in names)
            return merged_weights(names, ids)

        monkeypatch.setattr(merged._views, "merged", counting)
        return made

    return watch
