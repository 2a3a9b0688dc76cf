"""From tokens to text while they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

UNREADABLE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
PENDING = 3  # of them at most may still become one: a character has up to four bytes
CONTEXT, LONG_CONTEXT = 2, 16  # tokens kept to decode the next ones; the longer where bytes are unreadable


class TextStream:
    """The text of one sequence of tokens, piece by piece.

    All pieces together are what ``tokenizer.decode`` gives for all tokens, without special tokens and without tidying
    up spaces. A piece is kept back while it may be part of a character, or the beginning of a stop text. The time a token
    takes does not depend on those before it.

    (A tokenizer with byte fallback turns a whole run of byte tokens unreadable when one of them is wrong; what was given out
    of such a run stays.)

    Args:
        tokenizer: of transformers.
        stop: texts that end the output. The one that is complete first counts; the text is cut in front of it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.special = special_tokens(tokenizer)
        self.window: list[int] = []  # the latest tokens
        self.given = 0  # characters of the window's text that were taken from it
        self.kept = ""  # taken, but perhaps the beginning of a stop text
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text that new tokens add, and whether a stop text has ended the output."""
        self.window += [token for token in tokens if token not in self.special]
        text = self.decode(self.window)
        unreadable = len(text) - len(text.rstrip(UNREADABLE))
        stable = max(self.given, len(text) - min(unreadable, PENDING))
        new, self.given = text[self.given : stable], stable
        self.shorten(text)
        return self.release(new), self.stopped

    def flush(self) -> str:
        """The rest: what was kept back and is no beginning of anything any more."""
        text = self.decode(self.window)
        rest, self.given = self.release(text[self.given :]), len(text)
        kept, self.kept = self.kept, ""
        return rest + kept

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def shorten(self, text: str) -> None:
        """Forget tokens whose text has been given, but for those that the next ones need beside them."""
        pending = len(text) - self.given
        if not pending and len(self.window) > 2 * CONTEXT:
            self.window = self.window[-CONTEXT:]
        elif len(self.window) > 2 * LONG_CONTEXT:  # after four bytes a decoder is in step again, wherever it began
            self.window = self.window[-LONG_CONTEXT:]
        else:
            return
        self.given = len(self.decode(self.window)) - pending

    def release(self, new: str) -> str:
        """What may be given out of kept and new text."""
        if self.stopped or not self.stop:
            return "" if self.stopped else new
        text = self.kept + new
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.kept = True, ""
            return text[: min(ends)[1]]
        keep = max(beginning(text, stop) for stop in self.stop)
        self.kept = text[len(text) - keep :]
        return text[: len(text) - keep]


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)


def beginning(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop``, but not all of it, that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
