"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trainer.data.tokenizer import Tokenizer

_REMEMBERED: Final = 8
"""Tokens of the prompt that are decoded along: a first token's text depends on what stands before it (a leading space)."""
_INCOMPLETE: Final = "�"


class TextStream:
    """The text of tokens that come one by one. A character made of several tokens comes with its last one."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_REMEMBERED:])
        self._begin, self._shown = 0, len(self._ids)  # the window that is decoded begins there; text up to `shown` is out

    def push(self, token: int) -> str:
        """What the text grows by; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What is left when no token follows."""
        text = self._new_text()
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def _new_text(self) -> str:
        window = self._ids[self._begin :]
        return self._tokenizer.decode(window)[len(self._tokenizer.decode(window[: self._shown - self._begin])) :]
