"""Prompts to token rows, and tokens back to text as they come.

Promise: text goes into the tokenizer's chat template where there is one and it is asked for, tensors of ids go
in as they are; batches are padded on the left. `Streamer` hands out whole characters only, and its pieces add
up to the answer. Limits: text and token ids; no images, no tools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int

Messages = list[dict[str, str]]


def pad_id(tokenizer: Any) -> int:
    """The token that stands at padding, which no one reads."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def chat_text(tokenizer: Any, prompt: str | Messages, system: str | None, model_name: str) -> str:
    """A prompt (or messages) in the chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{model_name}: its tokenizer has no chat template. Generate with chat=False.")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def token_rows(
    tokenizer: Any, prompt: Any, chat: bool, system: str | None, model_name: str
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], bool]:
    """Left-padded ids, their mask, and whether one answer (not a list) is wanted."""
    if isinstance(prompt, Tensor):
        tokens = (prompt[None] if prompt.ndim == 1 else prompt).to(torch.int64)
        if tokens.numel() == 0:
            raise UserError("generate: the prompt has no tokens. Give some text.")
        return tokens, torch.ones_like(tokens), tokens.shape[0] == 1
    single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
    prompts = [prompt] if single else list(prompt)
    templated = chat and bool(getattr(tokenizer, "chat_template", None))
    texts = [chat_text(tokenizer, p, system, model_name) for p in prompts] if templated else prompts
    rows = [tokenizer(text, add_special_tokens=not templated).input_ids for text in texts]
    if not rows or min(len(row) for row in rows) == 0:
        raise UserError("generate: a prompt is empty. Give some text.")
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad_id(tokenizer), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return tokens, mask, single


class Streamer:
    """Hands out text as tokens come: what transformers' `generate` calls a streamer, for one row."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.told = 0
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:  # the first call brings the prompt
            self.prompt = False
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self._text()
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            self._tell(text)

    def end(self) -> None:
        self._tell(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.write(text[self.told :])
            self.told = len(text)
