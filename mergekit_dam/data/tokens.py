"""From an example to token ids: chat templates, special tokens, where the completion begins."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mergekit_dam.config.data_settings import DataSettings, LossOn
from mergekit_dam.data.row import Row
from mergekit_dam.data.shapes import Example, Messages
from mergekit_dam.errors import DamError


@dataclass(frozen=True)
class Reader:
    """Makes rows of one source's examples."""

    entry: DataSettings
    loss_on: LossOn
    tokenizer: PreTrainedTokenizerBase  # of the merge: gives the ids
    source_tokenizer: PreTrainedTokenizerBase  # of the source: gives the chat template
    length: int  # tokens kept of a row

    def row(self, example: Example) -> Row:
        """Raises DamError for what the template refuses, or text without a completion to count."""
        on_completion = self.loss_on == "completion"
        if on_completion and example.prompt is None:
            raise DamError(
                f"{self.entry.path} has plain text, in which no completion begins: give "
                f"`loss_on: all` to the `dam.data` entry of {self.entry.source}, or data with "
                "prompts."
            )
        ids = self._ids(example)
        start = 0
        if on_completion:
            # A token in which the prompt ends and the completion begins counts.
            start = max(_shared(ids, self._prompt_ids(example)) - 1, 0)
        return Row(ids[: self.length], start, is_cut=len(ids) > self.length)

    def _ids(self, example: Example) -> list[int]:
        if conversation := self._as_conversation(example):
            messages = [*conversation.prompt, *conversation.completion]
            return self._rendered(messages, add_generation_prompt=False)
        ids = self._tokenize((example.prompt or "") + example.completion)
        end = self.tokenizer.eos_token_id
        is_ended = example.prompt is None or end is None or ids[-1:] == [end]
        return ids if is_ended else [*ids, end]

    def _prompt_ids(self, example: Example) -> list[int]:
        if not (conversation := self._as_conversation(example)):
            return self._tokenize(example.prompt)
        if not conversation.prompt:
            return []
        return self._rendered(conversation.prompt, add_generation_prompt=True)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _as_conversation(self, example: Example) -> Example | None:
        """Where it is one, or the source expects one."""
        if not isinstance(example.completion, str):
            return example
        if example.prompt is None or self.source_tokenizer.chat_template is None:
            return None
        prompt, answer = example.prompt, example.completion
        return Example(
            [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
        )

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool) -> list[int]:
        """A template writes the special tokens itself."""
        text = self._render(messages, add_generation_prompt=add_generation_prompt)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, **options: bool) -> str:
        entry = self.entry
        if self.source_tokenizer.chat_template is None:
            raise DamError(
                f"{entry.path} holds conversations, but the source {entry.source} has no chat "
                "template: give its data as a text column, or as `prompt` and `completion`."
            )
        try:
            return self.source_tokenizer.apply_chat_template(
                list(messages), tokenize=False, **options
            )
        except Exception as error:
            raise DamError(
                f"A conversation in {entry.path} does not fit the chat template of "
                f"{entry.source}: {error}"
            ) from error


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many token ids the two begin with in common."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
