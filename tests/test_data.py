"""From files to token ids: columns, conversations, lengths, held-out rows, batches."""

import csv
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pydantic
import pytest
import tiny
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mergekit_dam.config import DataSettings, Settings
from mergekit_dam.config.data_settings import is_local
from mergekit_dam.data import Row, SourceData, benchmark_warning, load_rows
from mergekit_dam.data import load as loading
from mergekit_dam.data.load import share_out
from mergekit_dam.errors import DamError

BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[:1] }}={{ m.content }}{{ eos_token }}"
    "{% endfor %}"
)
Load = Callable[..., SourceData]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.save_tokenizer(folder / "plain")
    tiny.save_tokenizer(folder / "chat", TEMPLATE)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in ("plain", "chat")}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are cached here, not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def load(
    tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Load:
    """Loads rows that it writes as jsonl, or a path, with the entry's and the fit's settings.

    Rows that are all equal cannot be shared out, so that they are not: what a row becomes is the
    same.
    """
    share = loading.share_out

    def share_if_possible(rows: list[Row], *arguments: Any) -> SourceData:
        is_one = len(rows) > 1 and all(row == rows[0] for row in rows)
        return SourceData(rows, []) if is_one else share(rows, *arguments)

    monkeypatch.setattr(loading, "share_out", share_if_possible)

    def run(
        rows: list[dict] | Path, *, chat: bool = False, fit: dict | None = None, **entry: Any
    ) -> SourceData:
        path = rows if isinstance(rows, Path) else tiny.write_jsonl(tmp_path / "d.jsonl", rows)
        data = DataSettings(source="./m0", path=str(path), **entry)
        settings = Settings(data=(data,), **(fit or {}))
        source = tokenizers["chat" if chat else "plain"]
        return load_rows(data, settings, tokenizers["plain"], source)

    return run


def ids(text: str) -> list[int]:
    """Token ids of plain characters."""
    return [len(tiny.SPECIAL) + tiny.LETTERS.index(letter) for letter in text]


def every(data: SourceData) -> list[list[int]]:
    """All rows, without their order."""
    return sorted(row.ids for row in (*data.train, *data.held_out))


def texts(count: int = 20) -> list[dict]:
    return [{"text": text} for text in tiny.sentences(count, seed=1)]


# ---- columns


def test_text_is_tokenised_with_the_tokenizers_special_tokens(load: Load) -> None:
    data = load([{"text": "ab"}, {"text": "abc"}])
    assert every(data) == [[BOS, *ids("ab")], [BOS, *ids("abc")]]


def test_text_may_have_another_name(load: Load) -> None:
    data = load([{"content": "ab", "text": "no"}, {"content": "cd", "text": "no"}], text="content")
    assert every(data) == [[BOS, *ids("ab")], [BOS, *ids("cd")]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_named_column_goes_before_all_others(load: Load, chat: bool) -> None:
    row = {"prompt": "a=", "completion": "b", "messages": [], "text": "no", "code": "cd"}
    assert every(load([row] * 2, chat=chat, text="code")) == [[BOS, *ids("cd")]] * 2


def test_a_missing_column_is_named_with_those_there_are(load: Load) -> None:
    with pytest.raises(DamError, match=r"neither text.*\(it has code: .*, language: "):
        load([{"code": "a", "language": "b"}] * 2)


def test_a_column_without_text_is_refused(load: Load) -> None:
    with pytest.raises(DamError, match=r"neither text, nor .* \(it has text: "):
        load([{"text": 3}, {"text": 4}])


def test_rows_of_a_held_out_split_are_not_trained_on(load: Load) -> None:
    rows = [{"text": text} for text in ("ab", "cd", "ef", "gh", "ab")]
    data = load(rows, held_out="train[:1]")
    assert [row.ids for row in data.held_out] == [[BOS, *ids("ab")]]
    assert sorted(row.ids for row in data.train) == sorted(
        [BOS, *ids(text)] for text in ("cd", "ef", "gh")
    )
    with pytest.raises(DamError, match=r"All rows of .* are held out by `held_out: train`"):
        load(rows, held_out="train")


def test_prompt_and_completion_are_joined_and_ended(load: Load) -> None:
    data = load([{"prompt": "a=", "completion": "b"}, {"prompt": "c=", "completion": "d"}])
    assert every(data) == [[BOS, *ids("a=b"), EOS], [BOS, *ids("c=d"), EOS]]


def test_an_end_that_is_there_is_not_doubled(load: Load) -> None:
    data = load([{"prompt": "a=", "completion": "b<eos>"}] * 2)
    assert every(data) == [[BOS, *ids("a=b"), EOS]] * 2


def test_prompt_and_completion_go_through_the_sources_chat_template(load: Load) -> None:
    data = load([{"prompt": "a", "completion": "b"}] * 2, chat=True)
    assert every(data) == [[BOS, *ids("u=a"), EOS, *ids("a=b"), EOS]] * 2


def test_messages_are_rendered_with_the_template_and_no_second_start(load: Load) -> None:
    conversation = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    data = load([{"messages": conversation}] * 2, chat=True)
    assert every(data) == [[BOS, *ids("s=x"), EOS, *ids("u=a"), EOS, *ids("a=b"), EOS]] * 2


def test_conversations_as_prompt_and_completion(load: Load) -> None:
    prompt = [{"role": "user", "content": "a"}]
    completion = [{"role": "assistant", "content": "b"}]
    data = load([{"prompt": prompt, "completion": completion}] * 2, chat=True)
    assert every(data) == [[BOS, *ids("u=a"), EOS, *ids("a=b"), EOS]] * 2


def test_plain_text_stays_plain_where_there_is_a_template(load: Load) -> None:
    assert every(load([{"text": "ab"}] * 2, chat=True)) == [[BOS, *ids("ab")]] * 2


def test_conversations_without_a_template_are_refused(load: Load) -> None:
    with pytest.raises(DamError, match=r"the source \./m0 has no chat template"):
        load([{"messages": [{"role": "user", "content": "a"}]}] * 2)


def test_a_conversation_that_does_not_fit_the_template_is_refused(
    load: Load, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizers["chat"], "chat_template", strict)
    with pytest.raises(DamError, match=r"does not fit the chat template.*must alternate"):
        load([{"messages": [{"role": "user", "content": "a"}]}] * 2, chat=True)


def test_rows_of_several_kinds_are_each_read_as_what_they_are(load: Load) -> None:
    """A file's missing columns come as None, which is no text."""
    data = load([{"prompt": "a=", "completion": "b"}, {"text": "ab"}])
    assert every(data) == [[BOS, *ids("ab")], [BOS, *ids("a=b"), EOS]]


def test_an_empty_completion_is_no_text_of_its_own(load: Load) -> None:
    assert every(load([{"prompt": "ab", "completion": ""}] * 2)) == [[BOS, *ids("ab"), EOS]] * 2


# ---- older shapes, and columns by other names

SAID = {
    "instruction": {"instruction": "a", "output": "b"},
    "instruction with input": {"instruction": "a", "input": "c", "output": "b"},
    "instruction with an empty input": {"instruction": "a", "input": "", "output": "b"},
    "question": {"question": "a", "answer": "b"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.mark.parametrize("shape", SAID)
def test_older_shapes_are_known_by_their_columns(load: Load, shape: str) -> None:
    prompt = "a\n\nc" if "with input" in shape else "a"
    expected = load([{"prompt": prompt, "completion": "b"}] * 2, chat=True)
    assert load([SAID[shape]] * 2, chat=True) == expected


def test_columns_may_have_other_names(load: Load) -> None:
    row = {"ask": "a", "say": "b", "text": "no", "messages": []}
    columns = {"prompt": "ask", "completion": "say"}
    assert load([row] * 2, columns=columns) == load([{"prompt": "a", "completion": "b"}] * 2)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = load([{"messages": said}] * 2, chat=True)
    row = {"chosen": said, "prompt": "no", "completion": "no"}
    assert load([row] * 2, chat=True, columns={"messages": "chosen"}) == expected


def test_of_several_shapes_the_first_in_the_list_counts(load: Load) -> None:
    row = {"question": "no", "answer": "no", "text": "no", "prompt": "a", "completion": "b"}
    assert load([row] * 2) == load([{"prompt": "a", "completion": "b"}] * 2)


def test_a_column_that_is_not_there_is_named(load: Load) -> None:
    with pytest.raises(
        DamError, match=r"without prompt/completion in 'ask' and 'say' \(it has ask: "
    ):
        load([{"ask": "a", "text": "b"}] * 2, columns={"prompt": "ask", "completion": "say"})


@pytest.mark.parametrize("columns", [{}, {"prompt": "ask"}, {"promt": "a", "completion": "b"}])
def test_columns_that_make_no_row_are_refused(load: Load, columns: dict) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"makes no row: name .*{question, answer}"):
        load([{"text": "a"}] * 2, columns=columns)


def test_keys_of_messages_without_a_value_do_not_reach_the_template(
    load: Load, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` fills the keys that one message lacks and another has with None."""
    template = "{% for m in messages %}{{ 'x' if 'name' in m else m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizers["chat"], "chat_template", template)
    said = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "n"}]
    assert every(load([{"messages": said}] * 2, chat=True)) == [ids("ax")] * 2


# ---- what counts


def counted(data: SourceData) -> list[list[int]]:
    """The tokens that are predicted, without those that count for nothing."""
    return sorted(row.ids[row.start + 1 :] for row in (*data.train, *data.held_out))


def test_every_token_but_the_first_counts(load: Load) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}] * 2
    assert counted(load(rows)) == [[*ids("abcd"), EOS]] * 2


@pytest.mark.parametrize("fit", [{"loss_on": "completion"}, {}])
def test_only_the_completion_counts(load: Load, fit: dict) -> None:
    entry = {} if fit else {"loss_on": "completion"}
    rows = [{"prompt": "ab", "completion": "cd"}] * 2
    data = load(rows, fit=fit, **entry)
    assert every(data) == [[BOS, *ids("abcd"), EOS]] * 2
    assert counted(data) == [[*ids("cd"), EOS]] * 2


def test_an_entrys_own_loss_goes_first(load: Load) -> None:
    data = load([{"text": "ab"}] * 2, fit={"loss_on": "completion"}, loss_on="all")
    assert counted(data) == [ids("ab")] * 2


def test_in_a_conversation_the_last_answer_counts(
    load: Load, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}a={% endif %}"
    monkeypatch.setattr(tokenizers["chat"], "chat_template", template)
    said = [
        {"role": role, "content": text}
        for role, text in (("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "ab"))
    ]
    data = load([{"messages": said}] * 2, chat=True, loss_on="completion")
    assert counted(data) == [[*ids("ab"), EOS]] * 2
    data = load([{"prompt": "z", "completion": "ab"}] * 2, chat=True, loss_on="completion")
    assert counted(data) == [[*ids("ab"), EOS]] * 2


def test_a_row_whose_completion_is_cut_off_is_left_out(load: Load) -> None:
    rows = [{"prompt": "abcdef", "completion": "g"}, *[{"prompt": "a", "completion": "b"}] * 2]
    assert counted(load(rows, loss_on="completion", max_length=5)) == [[*ids("b"), EOS]] * 2
    with pytest.raises(DamError, match="no row with a completion within 5 tokens: raise"):
        load(rows[:1], loss_on="completion", max_length=5)


def test_plain_text_has_no_completion(load: Load) -> None:
    with pytest.raises(DamError, match=r"plain text, in which no completion begins.*\./m0"):
        load([{"text": "ab"}] * 2, loss_on="completion")


def test_a_token_across_the_border_counts(load: Load, tmp_path: Path) -> None:
    """A tokenizer with merges may put the prompt's end and the completion's begin into one."""
    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=merging)
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "ca"}] * 2)
    entry = DataSettings(source="./m0", path=str(path), loss_on="completion")
    data = load_rows(entry, Settings(data=(entry,)), fast, fast)
    assert every(data) == [[0, 3, 0]] * 2
    assert counted(data) == [[3, 0]] * 2


# ---- lengths and numbers of rows


def test_rows_are_cut_to_max_length(load: Load) -> None:
    rows = [{"text": "abcdefgh"}, {"text": "ab"}]
    assert every(load(rows, fit={"max_length": 4})) == [[BOS, *ids("ab")], [BOS, *ids("abc")]]
    assert every(load(rows, fit={"max_length": 9}, max_length=2)) == [[BOS, *ids("a")]] * 2


def test_conversations_and_completions_are_cut_too(load: Load) -> None:
    rows = [{"prompt": "abc", "completion": "def"}] * 2
    assert every(load(rows, max_length=4)) == [[BOS, *ids("abc")]] * 2
    assert every(load(rows, max_length=4, chat=True)) == [[BOS, *ids("u=a")]] * 2


def test_examples_says_how_many_rows_are_used(load: Load) -> None:
    assert len(every(load(texts(20), fit={"examples": 8}))) == 8
    assert len(every(load(texts(20), fit={"examples": 8}, examples=5))) == 5
    assert len(every(load(texts(20), examples=500))) == 20


def test_rows_that_predict_nothing_are_left_out(load: Load) -> None:
    data = load([{"text": ""}, {"text": "ab"}, {"text": ""}, {"text": "cd"}])
    assert every(data) == [[BOS, *ids("ab")], [BOS, *ids("cd")]]


def test_data_with_no_usable_row_are_refused(load: Load) -> None:
    with pytest.raises(DamError, match=r"d\.jsonl \(split train\) has no row of two tokens"):
        load([{"text": ""}] * 3)


# ---- held-out rows


@pytest.mark.parametrize(
    ("rows", "share", "held_out"), [(20, 0.05, 1), (20, 0.25, 5), (10, 0.01, 1), (2, 0.9, 1)]
)
def test_a_share_of_the_rows_is_held_out(
    load: Load, rows: int, share: float, held_out: int
) -> None:
    data = load(texts(rows), fit={"held_out": share})
    assert (len(data.train), len(data.held_out)) == (rows - held_out, held_out)


def test_an_entrys_share_goes_first(load: Load) -> None:
    assert len(load(texts(20), fit={"held_out": 0.1}, held_out=0.5).held_out) == 10


def test_no_row_is_both_trained_and_held_out(load: Load) -> None:
    rows = texts(20)
    data = load(rows, held_out=0.3)
    expected = sorted([BOS, *ids(row["text"])] for row in rows)
    assert len({tuple(row) for row in expected}) == 20
    assert every(data) == expected


def test_held_out_rows_are_not_the_files_first(load: Load) -> None:
    rows = texts(20)
    first = sorted([BOS, *ids(row["text"])] for row in rows[:10])
    assert sorted(row.ids for row in load(rows, held_out=0.5).held_out) != first


def test_one_row_cannot_be_shared(load: Load) -> None:
    with pytest.raises(DamError, match=r"one row only in which anything counts.*`max_length`"):
        load([{"text": "ab"}])


def test_what_equals_a_held_out_row_is_not_trained_on(load: Load) -> None:
    rows = [{"text": text} for text in ("ab", "cd", "ef")] * 4
    data = load(rows, held_out=0.1)
    (own,) = data.held_out
    assert len(data.train) == 8
    assert own not in data.train
    assert load(rows, held_out=0.1) == data


def test_rows_that_count_differently_are_not_equal() -> None:
    rows = [Row([1, 2, 3], 0), Row([1, 2, 3], 1)]
    assert share_out(rows, 0.5, "d").train == rows[1:]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "d has no row in which anything counts: raise `max_length`, or use `loss_on: all`."),
        ([Row([1, 2])] * 5, "d has no row that differs from those held out, within `max_length`"),
        # The rest of one text is beyond the length.
        ([Row([1, 2]), Row([1, 2], is_cut=True)], "d has no row that differs"),
    ],
    ids=["none", "equal", "cut"],
)
def test_rows_that_cannot_be_shared(rows: list[Row], told: str) -> None:
    with pytest.raises(DamError) as caught:
        share_out(rows, 0.2, "d")
    assert told in caught.value.message


def test_a_named_split_is_held_out(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", [{"text": "ab"}, {"text": "cd"}])
    tiny.write_jsonl(folder / "validation.jsonl", [{"text": "ef"}])
    data = load(folder, held_out="validation")
    assert sorted(row.ids for row in data.train) == [[BOS, *ids("ab")], [BOS, *ids("cd")]]
    assert data.held_out == [Row([BOS, *ids("ef")])]


def test_a_slice_of_a_split(load: Load) -> None:
    data = load(texts(20), split="train[:50%]", held_out="train[50%:75%]")
    assert (len(data.train), len(data.held_out)) == (10, 5)


def test_a_split_that_is_not_there_is_named(load: Load) -> None:
    with pytest.raises(DamError, match=r"\(split tset\) of the source \./m0 cannot be read: "):
        load(texts(4), split="tset")


# ---- seeds


def test_the_same_seed_gives_the_same_rows_in_the_same_order(load: Load) -> None:
    first, again = (load(texts(), fit={"seed": 3}, examples=10) for _ in range(2))
    assert first == again
    assert first.digest() == again.digest()


def test_another_seed_gives_others(load: Load) -> None:
    first, other = (load(texts(), fit={"seed": seed}, examples=10) for seed in (3, 4))
    assert every(first) != every(other)
    assert first.digest() != other.digest()


def test_the_digest_tells_train_from_held_out() -> None:
    a, b = [Row([1, 2])], [Row([3, 4])]
    assert SourceData(a, b).digest() != SourceData(b, a).digest()
    assert SourceData(a, b).digest() != SourceData([Row([1, 2], start=1)], b).digest()


# ---- formats


def write_csv(path: Path, values: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *[[value] for value in values]])


WRITERS: dict[str, Callable[[Path, list[str]], Any]] = {
    "jsonl": lambda path, values: tiny.write_jsonl(path, [{"text": v} for v in values]),
    "json": lambda path, values: tiny.write_jsonl(path, [{"text": v} for v in values]),
    "csv": write_csv,
    "txt": lambda path, values: path.write_text("\n".join(values)),
    "parquet": lambda path, values: datasets.Dataset.from_dict({"text": values}).to_parquet(path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_rows(load: Load, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    WRITERS[ending](path, ["ab", "007", "na"])
    assert every(load(path)) == sorted([BOS, *ids(text)] for text in ("ab", "007", "na"))


def test_a_compressed_file(load: Load, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write('{"text": "ab"}\n{"text": "cd"}\n')
    assert every(load(tmp_path / "data.jsonl.gz")) == [[BOS, *ids("ab")], [BOS, *ids("cd")]]


def test_a_pattern_stands_for_several_files(load: Load, tmp_path: Path) -> None:
    for name in ("ab", "cd"):
        tiny.write_jsonl(tmp_path / f"part-{name}.jsonl", [{"text": name}])
    assert every(load(tmp_path / "part-*.jsonl")) == [[BOS, *ids("ab")], [BOS, *ids("cd")]]
    with pytest.raises(DamError, match=r"none-\*\.jsonl of the source \./m0 does not exist"):
        load(tmp_path / "none-*.jsonl")


def test_a_configuration_by_name(load: Load, tmp_path: Path) -> None:
    """A folder as it is on the Hub, whose card names two configurations."""
    for name, text in (("one", "ab"), ("two", "cd")):
        (tmp_path / name).mkdir()
        tiny.write_jsonl(tmp_path / name / "train.jsonl", [{"text": text}] * 2)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/train.jsonl\n"
        "- config_name: two\n  data_files: two/train.jsonl\n---\n"
    )
    assert every(load(tmp_path, name="two")) == [[BOS, *ids("cd")]] * 2


def test_a_folder_that_save_to_disk_has_written(load: Load, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["ab", "cd"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"fit": rows}).save_to_disk(tmp_path / "several")
    expected = [[BOS, *ids("ab")], [BOS, *ids("cd")]]
    assert every(load(tmp_path / "one")) == expected
    assert every(load(tmp_path / "several", split="fit")) == expected
    with pytest.raises(DamError, match=r"has no split 'train': its splits.* are fit"):
        load(tmp_path / "several")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])  # `datasets` waits 5 s for parquet
def test_streamed_rows(load: Load, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    WRITERS[ending](path, [row["text"] for row in texts(20)])
    data = load(path, streaming=True, examples=12)
    assert data == load(path, streaming=True, examples=12)
    whole = every(load(path))
    assert len(every(data)) == 12
    assert all(row in whole for row in every(data))
    assert [row.ids for row in data.train] != whole[: len(data.train)]


def test_a_stream_that_breaks_off_is_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "ab"}\n{"text": \n')
    with pytest.raises(DamError, match=r"data\.jsonl \(split train\).*cannot be read"):
        load(tmp_path / "data.jsonl", streaming=True)


def test_an_unknown_ending_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "data.xyz").write_text("ab")
    with pytest.raises(DamError, match=r"data\.xyz has an ending that says nothing.*parquet"):
        load(tmp_path / "data.xyz")


def test_a_missing_file_is_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DamError, match=r"The data file .*gone\.jsonl of the source \./m0 does not"):
        load(tmp_path / "gone.jsonl")


def test_a_damaged_file_is_named_in_one_sentence(load: Load, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "ab"\n{"text"')
    with pytest.raises(DamError, match=r"data\.jsonl \(split train\).*cannot be read") as caught:
        load(tmp_path / "data.jsonl")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("./data", True),
        ("../data", True),
        ("/data", True),
        ("~/data", True),
        ("math.jsonl", True),
        ("data.CSV", True),
        ("org/name", False),
        ("name", False),
    ],
)
def test_what_is_a_file_and_what_a_name_on_the_hub(path: str, local: bool) -> None:
    assert is_local(path) == local


# ---- benchmarks


@pytest.mark.parametrize(
    ("entry", "benchmark"),
    [
        ({"path": "openai/gsm8k", "name": "main", "split": "test"}, "gsm8k"),
        ({"path": "openai/gsm8k", "name": "main"}, None),
        ({"path": "cais/mmlu", "name": "all", "split": "validation[:50%]"}, "mmlu"),
        ({"path": "cais/mmlu", "name": "all", "split": "auxiliary_train"}, None),
        ({"path": "allenai/ai2_arc", "name": "ARC-Challenge", "split": "test"}, "ai2 arc"),
        ({"path": "data/hellaswag_val.jsonl"}, "hellaswag"),
        ({"path": "openai/openai_humaneval", "split": "test"}, "humaneval"),
        ({"path": "TIGER-Lab/MMLU-Pro"}, "mmlu pro"),
        ({"path": "HuggingFaceH4/MATH-500"}, "math 500"),
        ({"path": "latest/math_tests.jsonl"}, None),
        ({"path": "me/raindrops", "split": "test"}, None),
    ],
)
def test_a_benchmarks_test_set_is_known_by_its_name(entry: dict, benchmark: str | None) -> None:
    warning = benchmark_warning(DataSettings(source="./m0", **entry))
    assert (warning is None) == (benchmark is None)
    assert benchmark is None or f"the test set of {benchmark}:" in warning
