"""The report: a page that holds all it shows, says what the file says, and escapes every name."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from commands import refusal, run
from mergekit.options import MergeOptions
from PIL import Image

from mergekit_dam import inspection, report, table
from mergekit_dam.coefficients import (
    CoefficientFile,
    Figures,
    Header,
    HeldOut,
    Point,
    Results,
    Source,
    save,
)
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit
from mergekit_dam.report.page import middles
from mergekit_dam.report.plots import Limits, axes_of, colour, heat_map, held_out, short
from mergekit_dam.summary import cells, statistics

DRAWS = True
EVIL = "<script>alert('x')</script>/$a_{$ & \"b\""
KINDS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def figures(kl: float) -> Figures:
    return Figures(tokens=7, kl=kl, perplexity=3.5, source_perplexity=2.5)


def written(path: Path, sources: int = 2, layers: int = 3, **fields) -> CoefficientFile:
    """A file with one name that wants to be code."""
    torch.manual_seed(0)
    names = [EVIL, *(f"someone/model-{number}" for number in range(1, sources))]
    tensors = {
        f"model.layers.{layer}.{kind}": torch.randn(sources, 1, 4) + layer
        for layer in range(layers)
        for kind in KINDS
    }
    header = Header(
        package="0.1.0",
        formula="weights",
        granularity="column",
        sources=tuple(Source(reference=name, weights=name) for name in names),
        settings={"steps": 20, "data": [{"source": EVIL, "path": EVIL}], "objective": {"kl": 1.0}},
        merge={"merge_method": "dam", "base_model": EVIL},
        results=Results(
            average=tuple(figures(0.5 + number) for number in range(sources)),
            fit=tuple(figures(0.25) for _ in range(sources)),
            history=tuple(Point(step=step, loss=1 / step) for step in range(1, 21)),
            held_out=(HeldOut(step=0, kl=(0.4,) * sources), HeldOut(step=10, kl=(0.3,) * sources)),
        ),
    )
    fields = {"base": Source(reference=EVIL, weights="b"), **fields}
    save(
        path,
        {**tensors, "lm_head.weight": torch.randn(sources, 1, 4)},
        header.model_copy(update=fields),
    )
    return CoefficientFile(path)


class Page(HTMLParser):
    """What a browser would see: elements, their addresses, and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "action"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text += data


def pictures(page: Page) -> list[Image.Image]:
    found = []
    for address in page.addresses:
        assert address.startswith("data:image/png;base64,")  # nothing is fetched
        data = base64.b64decode(address.partition(",")[2], validate=True)
        found.append(Image.open(io.BytesIO(data)))
    return found


def test_the_page_holds_everything(tmp_path: Path):
    file = written(tmp_path / "dam.safetensors")
    out = tmp_path / "dam.html"
    report.write_page(file, str(out))
    page = Page(out)
    assert "script" not in page.elements
    # curves, shares, histogram, one heat map for each source; each light and dark
    assert len(pictures(page)) == 2 * (3 + 2)
    for image in pictures(page):
        assert image.width > 900
        assert image.mode == "RGBA"
        assert len(image.getcolors(maxcolors=10**6)) > 10  # not blank
    for row in table.rows(file.header):
        for cell in row:
            assert cell in page.text
    for what in (EVIL, "someone/model-1", "model.layers.*.mlp.up_proj.weight", "objective.kl"):
        assert what in page.text
    assert f"{EVIL}"[:8] not in out.read_text(encoding="utf-8")


def test_both_themes_differ_in_their_text_alone(tmp_path: Path):
    report.write_page(written(tmp_path / "dam.safetensors"), str(tmp_path / "dam.html"))
    images = pictures(Page(tmp_path / "dam.html"))
    for dark, light in zip(images[::2], images[1::2], strict=True):
        assert dark.size == light.size
        assert light.tobytes() != dark.tobytes()
    css = (tmp_path / "dam.html").read_text(encoding="utf-8")
    assert css.count("prefers-color-scheme: dark") == 1 + len(images) // 2


def test_eight_sources_and_eighty_layers(tmp_path: Path):
    """A column for each layer, a row for each kind, and colours that tell the sources apart."""
    found = cells(statistics(written(tmp_path / "dam.safetensors", sources=8, layers=80)))
    assert len({colour(number) for number in range(20)}) == 20
    kinds, layers = axes_of(found)
    light, _ = heat_map(found, 7, Limits.of(found, [1 / 8] * 8))
    image = Image.open(io.BytesIO(light)).convert("RGB")
    across = {image.getpixel((x, 60)) for x in range(image.width)}
    assert len(across) > 60  # each layer has its own mean here
    assert len(layers) == 80 and [short(kind) for kind in kinds] == [
        "input_layernorm", "mlp.up_proj", "self_attn.q_proj",
    ]  # fmt: skip


def test_colours_reach_from_the_middle_and_pass_over_outliers(tmp_path: Path):
    file = written(tmp_path / "dam.safetensors", layers=200)
    low, high = Limits.of(cells(statistics(file)), [0.5] * len(file.header.sources)).mean(0)
    assert low + high == pytest.approx(1.0)
    assert 195 < high < 201  # the mean of layer n is about n


def test_a_base_that_teaches_nothing_is_told_apart(tmp_path: Path):
    """Its coefficient in the plain average is zero."""
    sources = tuple(
        Source(reference=name, weights=name, teaches=name != "root") for name in ("a", "b", "root")
    )
    made = written(tmp_path / "made.safetensors", sources=3, results=None)
    header = made.header.model_copy(update={"sources": sources})
    save(tmp_path / "dam.safetensors", {name: made.get(name) for name in made.names}, header)
    file = CoefficientFile(tmp_path / "dam.safetensors")
    assert middles(file.header) == (0.5, 0.5, 0.0)
    report.write_page(file, str(tmp_path / "dam.html"))
    text = Page(tmp_path / "dam.html").text
    assert "3 root (the base, which teaches nothing)" in text
    assert "has 0.5 everywhere, and 0 for the base." in text
    assert "the base, which teaches nothing" in inspection.as_text(file, statistics(file))


def test_a_file_that_no_fit_has_written(tmp_path: Path):
    file = written(tmp_path / "dam.safetensors", results=None, settings={}, merge={}, base=None)
    report.write_page(file, str(tmp_path / "dam.html"))
    page = Page(tmp_path / "dam.html")
    assert "Before and after" not in page.text
    assert len(pictures(page)) == 2 * (2 + 2)


def test_a_file_without_layers(tmp_path: Path):
    header = written(tmp_path / "dam.safetensors").header
    save(tmp_path / "one.safetensors", {"a.weight": torch.full((2, 1), 0.5)}, header)
    report.write_page(CoefficientFile(tmp_path / "one.safetensors"), str(tmp_path / "one.html"))
    assert len(pictures(Page(tmp_path / "one.html"))) == 2 * 2


def test_the_held_out_curve_goes_through_all_points(tmp_path: Path):
    results = written(tmp_path / "dam.safetensors").header.results
    assert held_out(results) == [([0, 10, 20], [0.4, 0.3, 0.25])] * 2


def test_plots_as_files(tmp_path: Path):
    file = written(tmp_path / "dam.safetensors")
    shown = run("mergekit-dam", "report", file.path, "--png", tmp_path / "plots").stdout
    assert str(tmp_path / "dam.html") in shown
    names = {"curves", "histogram", "shares", "source-1", "source-2"}
    expected = {f"{name}{theme}.png" for name in names for theme in ("", "-dark")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == expected
    for path in (tmp_path / "plots").iterdir():
        Image.open(path).verify()


def test_a_page_of_somebody_elses_is_kept(tmp_path: Path):
    file = written(tmp_path / "dam.safetensors")
    (tmp_path / "dam.html").write_text("mine")
    assert "is no report of ours" in refusal("mergekit-dam", "report", file.path)
    assert (tmp_path / "dam.html").read_text() == "mine"
    run("mergekit-dam", "report", file.path, "--html", tmp_path / "other.html")
    run("mergekit-dam", "report", file.path, "--html", tmp_path / "other.html")  # our own: replaced


def test_without_matplotlib(tmp_path: Path, monkeypatch):
    file = written(tmp_path / "dam.safetensors")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = run("mergekit-dam", "report", file.path).stdout
    assert table.as_text(file.header) in shown
    assert shown.rstrip().endswith(report.HOW_TO_DRAW)
    assert not (tmp_path / "dam.html").exists()
    with pytest.raises(DamError):
        report.write_page(file, str(tmp_path / "dam.html"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


def test_a_fit_ends_with_its_report(models, recipe, tmp_path: Path):
    path = recipe(models, dam={"steps": 5, "evaluate_every": 2})
    shown = run("mergekit-dam", "fit", path).stdout
    assert f"The report is in {tmp_path / 'dam.html'}." in shown
    page = Page(tmp_path / "dam.html")
    header = CoefficientFile(tmp_path / "dam.safetensors").header
    assert [point.step for point in header.results.held_out] == [0, 2, 4]
    for row in table.rows(header):
        assert row[3] in page.text


def test_a_quiet_fit_and_one_without_matplotlib_draw_nothing(models, recipe, tmp_path, monkeypatch):
    run("mergekit-dam", "fit", recipe(models, dam={"steps": 1}), "--quiet")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = run("mergekit-dam", "fit", recipe(models, dam={"steps": 2})).stdout
    assert shown.count(report.HOW_TO_DRAW) == 1
    assert not (tmp_path / "dam.html").exists()


def test_a_fit_does_not_fail_over_its_report(models, recipe, tmp_path: Path):
    (tmp_path / "dam.html").write_text("mine")
    shown = run("mergekit-dam", "run", recipe(models, dam={"steps": 1}), tmp_path / "out").stdout
    assert "The report could not be drawn" in shown
    assert (tmp_path / "dam.html").read_text() == "mine"
    tiny.load(tmp_path / "out")


def test_evaluating_on_the_way_changes_no_coefficient(models, recipe, tmp_path: Path):
    first, second = (
        fit(read_recipe(str(path)), str(tmp_path / name), MergeOptions(quiet=True), device="cpu")
        for path, name in ((recipe(models), "a"), (recipe(models, dam={"evaluate_every": 1}), "b"))
    )
    a, b = CoefficientFile(tmp_path / "a"), CoefficientFile(tmp_path / "b")
    assert all(torch.equal(a.get(name), b.get(name)) for name in a.names)
    assert [point.step for point in second.results.held_out] == [0, 1, 2]
    assert first.results.fit == second.results.fit


def test_no_name_can_leave_its_place(tmp_path: Path):
    """Every place of a header that takes text, with text that would close an element."""
    path = tmp_path / "dam.safetensors"
    written(path, origin=EVIL, tokenizer=EVIL, identity=EVIL)
    source = Source(reference=EVIL, revision=EVIL, weights=EVIL, config=EVIL)
    save(
        path,
        {f"{EVIL}.0.{EVIL}": torch.ones(1, 1, 3)},
        CoefficientFile(path).header.model_copy(
            update={
                "sources": (source,),
                "results": None,
                "settings": {EVIL: EVIL, "data": [{EVIL: EVIL}, EVIL], "x": {EVIL: [EVIL]}},
                "merge": {EVIL: EVIL},
            }
        ),
    )
    report.write_page(CoefficientFile(path), str(tmp_path / "dam.html"))
    page = Page(tmp_path / "dam.html")
    assert "script" not in page.elements
    assert not re.search(r"<script", (tmp_path / "dam.html").read_text(encoding="utf-8"))
