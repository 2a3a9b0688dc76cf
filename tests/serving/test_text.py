"""Text while it comes: all pieces together are the decoded whole, characters stay whole, stop texts stay out."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyadapter.serving.text import TextStream

VOCAB = 49152
BYTES = st.integers(0, 300)  # the first tokens of a byte-level vocabulary: special ones, then single bytes
TOKENS = st.lists(st.one_of(BYTES, st.integers(0, VOCAB - 1)), max_size=60)
PROPERTY = settings(max_examples=150, deadline=None)


def pieces(tokenizer: Any, tokens: list[int], chunks: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What comes out when tokens go in ``chunks`` at a time, and whether a stop text ended it."""
    stream, texts, at, stopped = TextStream(tokenizer, stop), [], 0, False
    sizes = iter(chunks)
    while at < len(tokens) and not stopped:
        size = next(sizes, 1)
        text, stopped = stream.push(tokens[at : at + size])
        texts.append(text)
        at += size
    return [*texts, stream.flush()], stopped


def whole(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@PROPERTY
@given(tokens=TOKENS, chunks=st.lists(st.integers(1, 7), max_size=30))
def test_the_pieces_are_the_whole(smollm_tokenizer: Any, tokens: list[int], chunks: list[int]) -> None:
    texts, stopped = pieces(smollm_tokenizer, tokens, chunks)
    assert "".join(texts) == whole(smollm_tokenizer, tokens)
    assert not stopped


@PROPERTY
@given(data=st.binary(max_size=80))
def test_bytes_of_any_kind(smollm_tokenizer: Any, data: bytes) -> None:
    """Also where long stretches are no UTF-8 at all."""
    single = byte_tokens(smollm_tokenizer)
    data = bytes(byte for byte in data if byte in single)  # some control bytes are not in this vocabulary
    texts, _ = pieces(smollm_tokenizer, [single[byte] for byte in data], [])
    assert "".join(texts) == data.decode(errors="replace")


@lru_cache
def byte_tokens(tokenizer: Any) -> dict[int, int]:
    """The tokens of single bytes, by the byte-level alphabet of GPT-2."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in shown]
    names = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(others)}
    vocabulary = tokenizer.get_vocab()
    return {byte: vocabulary[name] for byte, name in names.items() if name in vocabulary}


def test_a_character_comes_whole_or_not_yet(smollm_tokenizer: Any) -> None:
    tokens = smollm_tokenizer("naïve 😀 日本語 🏳️‍🌈!")["input_ids"]
    stream = TextStream(smollm_tokenizer)
    texts = [stream.push([token])[0] for token in tokens]
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) + stream.flush() == "naïve 😀 日本語 🏳️‍🌈!"
    assert "" in texts, "the sample has no character of several tokens"


def test_an_unfinished_character_comes_at_the_end(smollm_tokenizer: Any) -> None:
    tokens = smollm_tokenizer("a😀")["input_ids"][:-1]
    stream = TextStream(smollm_tokenizer)
    assert stream.push(tokens)[0] == "a"
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_no_text(smollm_tokenizer: Any) -> None:
    split = smollm_tokenizer("😀")["input_ids"]
    tokens = [*split[:1], *[smollm_tokenizer.eos_token_id] * 50, *split[1:]]
    assert "".join(pieces(smollm_tokenizer, tokens, [])[0]) == whole(smollm_tokenizer, tokens) == "😀"


def reference(text: str, stops: tuple[str, ...]) -> str:
    """Cut where the stop text that is complete first begins."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@PROPERTY
@given(
    text=st.text("ab c\n😀", max_size=40),
    stops=st.lists(st.text("ab c\n😀", min_size=1, max_size=5), max_size=4),
    chunks=st.lists(st.integers(1, 5), max_size=20),
)
def test_stop_texts(smollm_tokenizer: Any, text: str, stops: list[str], chunks: list[int]) -> None:
    """They may straddle tokens, and overlap; how the tokens come does not matter."""
    tokens = smollm_tokenizer(text)["input_ids"]
    texts, stopped = pieces(smollm_tokenizer, tokens, chunks, tuple(stops))
    assert "".join(texts) == reference(text, tuple(stops))
    assert stopped == any(stop in text for stop in stops)


def test_the_beginning_of_a_stop_text_waits(smollm_tokenizer: Any) -> None:
    stream = TextStream(smollm_tokenizer, ("###END",))

    def push(text: str) -> tuple[str, bool]:
        return stream.push(smollm_tokenizer(text)["input_ids"])

    assert push("one #") == ("one ", False)
    assert push("# two") == ("## two", False)
    assert push("###") == ("", False)
    assert push("EN") == ("", False)
    assert push("D three") == ("", True)
    assert push("four") == ("", True)
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["text", "unreadable", "special"])
def test_a_token_costs_the_same_whatever_came_before(smollm_tokenizer: Any, kind: str) -> None:
    token = {
        "text": smollm_tokenizer(" the")["input_ids"][0],
        "unreadable": byte_tokens(smollm_tokenizer)[0x80],
        "special": smollm_tokenizer.eos_token_id,
    }[kind]
    stream, times = TextStream(smollm_tokenizer, ("never", "the end")), []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(500):
            stream.push([token])
        times.append(time.perf_counter() - start)
    assert len(stream.window) <= 33
    assert min(times[1:]) < 3 * times[0] + 0.05, times
