"""Text that a model writes by itself: sampled at temperature 1 from the whole vocabulary.

At that temperature the mean over such rows of KL(source ‖ merge) token by token is the divergence
of the two models' distributions over whole texts, so nothing is left out that the source would
say. A model with a chat template writes a user's message first, then its own answer (Xu et al.,
Magpie, arXiv 2406.08464).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_dam.data.written import Written
from mergekit_dam.errors import DamError

ROWS = 16  # sampled together, fewer where memory is short
MARK = "MESSAGE"  # put in the place of a message to see what a template writes around it


class Sampler:
    """Samples rows of at most `length` tokens from one model."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, length: int
    ):
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._length, self._rows = length, ROWS
        self._ends = _ids(model.config.get_text_config().eos_token_id) | _ids(
            tokenizer.eos_token_id
        )
        if tokenizer.chat_template is not None:
            before, after = self._around_a_message()
            self._opening, self._closing = self._encode(before), after
            if closing := self._encode(after)[:1]:
                self._ends |= set(closing) & set(tokenizer.all_special_ids)
        else:
            self._opening, self._closing = self._beginning(), None

    def rows(self, count: int, seed: int) -> Iterator[Written]:
        """The same rows for a seed, on one machine."""
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            done, tries = 0, 0
            while done < count:
                tries += 1
                if tries > count + 100:
                    raise DamError(
                        f"{self._name} writes nothing after its beginning, so it cannot make data "
                        "for itself: give it a `path`."
                    )
                for row in self._batch(min(self._rows, count - done)):
                    done += 1
                    yield row

    def _batch(self, count: int) -> list[Written]:
        """Up to `count` rows; fewer where some say nothing, or memory is short."""
        try:
            prompts = [self._opening] * count
            if self._closing is None:
                return [self._written(row, 0) for row in self._sample(prompts, self._length)]
            budget = max(self._length // 2, len(self._opening) + 1)
            prompts = [self._question(row) for row in self._sample(prompts, budget)]
            prompts = [p for p in prompts if p and len(p) < self._length]
            answers = self._sample(prompts, self._length) if prompts else []
            return [self._written(a, len(p)) for a, p in zip(answers, prompts, strict=True)]
        except torch.OutOfMemoryError:
            if self._rows == 1:
                raise
            self._rows //= 2
            torch.cuda.empty_cache()
            return []

    def _written(self, tokens: list[int], prompt: int) -> Written:
        return Written(tokens, prompt, self._tokenizer.decode(tokens))

    def _question(self, tokens: list[int]) -> list[int]:
        """A user's message that was sampled, as the prompt of an answer; empty if it is."""
        text = self._tokenizer.decode(tokens[len(self._opening) :], skip_special_tokens=True)
        closing = self._closing.strip()
        text = (text.partition(closing)[0] if closing else text).strip()
        return text and self._encode(self._render(text, add_generation_prompt=True))

    @torch.no_grad()
    def _sample(self, prompts: Sequence[list[int]], length: int) -> list[list[int]]:
        """Each prompt with what the model writes after it, its end included."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        pairs = list(zip(padding, prompts, strict=True))
        inputs = torch.tensor([[0] * pad + prompt for pad, prompt in pairs])
        mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in pairs])
        sampled = self._generate(inputs, mask, max(length, longest + 1))
        return [
            self._until_end(row[pad:].tolist(), len(prompt))[:length]
            for row, (pad, prompt) in zip(sampled, pairs, strict=True)
        ]

    def _generate(self, inputs: Tensor, mask: Tensor, length: int) -> Tensor:
        device, size = self._model.device, self._model.config.get_text_config().vocab_size
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=length,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=0,
            # Rows of the embedding that pad it are no tokens.
            suppress_tokens=list(range(len(self._tokenizer), size)) or None,
        )
        inputs, mask = inputs.to(device), mask.to(device)
        return self._model.generate(inputs, attention_mask=mask, generation_config=config).cpu()

    def _until_end(self, tokens: list[int], prompt: int) -> list[int]:
        for place in range(prompt, len(tokens)):
            if tokens[place] in self._ends:
                return tokens[: place + 1]
        return tokens

    def _beginning(self) -> list[int]:
        """What stands before every text: what the tokenizer writes before none, else the special
        token that begins texts, or separates them."""
        tokenizer = self._tokenizer
        tokens = list(tokenizer("")["input_ids"])
        while len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
            tokens.pop()
        for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if not tokens and special is not None:
                tokens = [special]
        if not tokens:
            raise DamError(
                f"{self._name} has no token that begins a text, so it cannot write one by itself: "
                "give it a `path`."
            )
        return tokens

    def _around_a_message(self) -> tuple[str, str]:
        """What the chat template writes before a user's message, and after it."""
        before, mark, after = self._render(MARK, add_generation_prompt=False).partition(MARK)
        if not mark:
            raise DamError(
                f"The chat template of {self._name} leaves a user's message out, so the model "
                "cannot write one: give it a `path`."
            )
        return before, after

    def _render(self, text: str, *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            raise DamError(
                f"The chat template of {self._name} refuses a user's message alone ({error}), so "
                "the model cannot write one: give it a `path`."
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(value: int | Sequence[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
