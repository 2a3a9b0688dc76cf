"""OpenAI's words: what clients send, what they get, and how an error looks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anyadapter.core.errors import ConfigError, near
from anyadapter.serving.request import Output, Sampling

UNSUPPORTED = {  # known to OpenAI's clients, and not to us
    "audio", "best_of", "function_call", "functions", "logit_bias", "metadata", "modalities", "parallel_tool_calls",
    "prediction", "reasoning_effort", "response_format", "service_tier", "store", "suffix", "tool_choice", "tools",
    "verbosity", "web_search_options",
}  # fmt: skip
SOURCES = {
    "adapter_source",
    "api_token",
    "hub",
    "repo",
    "repo_id",
    "revision",
    "source",
    "token",
    "trust_remote_code",
    "url",
}


class ApiError(Exception):
    """An error as clients see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def type(self) -> str:
        named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return named.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def only_known(cls, values: Any) -> Any:
        """The first unknown name is enough: a body full of them would become as many errors."""
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise unknown(str(key)[:128], cls.model_fields)
        return values


def unknown(key: str, known: Iterable[str]) -> ApiError:
    if key in SOURCES:
        message = f"This server takes adapters from its own folder only; {key!r} cannot be chosen by a request."
        return ApiError(403, message, param=key)
    if key in UNSUPPORTED:
        return ApiError(400, f"{key!r} is not supported by this server.", param=key, code="unsupported_parameter")
    return ApiError(400, f"Unknown parameter {key!r}. {near(key, known)}", param=key, code="unknown_parameter")


class StreamOptions(Body):
    include_usage: bool = False


Token = Annotated[int, Field(ge=0, lt=2**31)]  # tokenizers take no larger ones
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class SamplingBody(Body):
    """What completions and chats share. A null is the same as nothing."""

    model: str = Field(min_length=1, max_length=256, description="The base model, or an adapter by its name.")
    adapters: dict[str, float] | None = Field(None, description="Adapters and weights, with the base as `model`.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 keeps all.")
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    first_token_seconds: float | None = Field(None, gt=0, description="Give up if there is no token by then.")
    user: str | None = Field(None, description="Accepted and not used.")

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report at each position, or None."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, logprobs: int | None, index: int) -> Sampling:
        """The settings of the ``index``-th of n choices."""
        plain = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "ignore_eos",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
            if (value := getattr(self, name)) is not None
        }
        try:
            return Sampling(
                max_tokens=max_tokens,
                logprobs=logprobs,
                top_k=max(self.top_k or 0, 0),
                seed=None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63,
                stop=self.stops(),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                **plain,
            )
        except ConfigError as error:
            raise ApiError(400, str(error)) from None


class CompletionBody(SamplingBody):
    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None

    def likeliest(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)

    def likeliest(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class AdapterBody(Body):
    path: str = Field(max_length=256, description="A folder's name in the server's folder of adapters.")


class ContextBody(Body):
    """Something to read: a document, or a conversation."""

    document: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    mode: Literal["sequential", "parallel"] | None = Field(
        None, description="Whether each window is read knowing those before it, as by default, or alone."
    )
    window: int | None = Field(None, ge=1, description="Tokens read at a time.")

    def context(self) -> str | list[dict[str, str]] | None:
        """The text or the conversation; None where there is neither."""
        if self.document and self.messages:
            raise ApiError(400, "A context is a document or messages, not both.", param="messages")
        return self.document or [message.plain() for message in self.messages or ()] or None


class NewAdapterBody(ContextBody):
    name: str | None = Field(None, max_length=256, description="May be left out for an adapter made of a context.")
    path: str | None = Field(None, max_length=256, description="A folder's name in the server's folder of adapters.")


class Choice:
    """One sequence of an answer, as far as it has come."""

    def __init__(self, index: int, echo: str = "") -> None:
        self.index, self.text = index, echo
        self.tokens = 0
        self.finish: str | None = None
        self.logprobs: list[Any] = []

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += len(output.tokens)
        self.finish = output.finish
        self.logprobs += output.logprobs or ()


class Reply:
    """An answer, whole or in pieces.

    Args:
        tokenizer: for the texts of single tokens.
        prompt_tokens: of all prompts, each counted once.
        echoes: the text in front of each choice; their number is that of the choices.
        logprobs: whether they were asked for.
    """

    prefix: str
    kind: str
    kind_of_piece: str

    def __init__(
        self, id: str, model: str, tokenizer: Any, *, prompt_tokens: int, echoes: Sequence[str], logprobs: bool
    ) -> None:
        self.id, self.model, self.tokenizer = f"{self.prefix}-{id}", model, tokenizer
        self.created, self.prompt_tokens, self.asked = int(time.time()), prompt_tokens, logprobs
        self.choices = [Choice(index, echo) for index, echo in enumerate(echoes)]

    def usage(self) -> dict[str, int]:
        output = sum(choice.tokens for choice in self.choices)
        total = self.prompt_tokens + output
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": output, "total_tokens": total}

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self) -> dict[str, Any]:
        choices = [self.show(choice) for choice in self.choices]
        return {**self.head(self.kind), "choices": choices, "usage": self.usage()}

    def piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head(self.kind_of_piece), "choices": [choice]}

    def usage_piece(self) -> dict[str, Any]:
        return {**self.head(self.kind_of_piece), "choices": [], "usage": self.usage()}

    def token(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def show(self, choice: Choice) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def opening(self) -> Iterator[dict[str, Any]]:
        """What comes before all tokens."""
        raise NotImplementedError

    def show_piece(self, index: int, output: Output) -> dict[str, Any]:
        """A choice with what is new of it."""
        raise NotImplementedError


class CompletionReply(Reply):
    prefix, kind, kind_of_piece = "cmpl", "text_completion", "text_completion"

    def show(self, choice: Choice) -> dict[str, Any]:
        return self.form(choice.index, choice.text, choice.finish, choice.logprobs, 0)

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in self.choices:
            if choice.text:
                yield self.piece(self.form(choice.index, choice.text, None, [], 0))

    def show_piece(self, index: int, output: Output) -> dict[str, Any]:
        start = len(self.choices[index].text) - len(output.text)
        return self.form(index, output.text, output.finish, output.logprobs or (), start)

    def form(self, index: int, text: str, finish: str | None, logprobs: Sequence[Any], start: int) -> dict[str, Any]:
        shown = None
        if self.asked:
            texts = [self.token(position[0][0]) for position in logprobs]
            offsets = [start + sum(map(len, texts[:place])) for place in range(len(texts))]
            shown = {
                "tokens": texts,
                "token_logprobs": [finite(position[0][1]) for position in logprobs],
                "top_logprobs": [{self.token(t): finite(value) for t, value in p[1:]} for p in logprobs],
                "text_offset": offsets,
            }
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": shown}


class ChatReply(Reply):
    prefix, kind, kind_of_piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def show(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "finish_reason": choice.finish,
            "logprobs": self.form(choice.logprobs),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in self.choices:
            yield self.piece({
                "index": choice.index,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
                "logprobs": None,
            })  # fmt: skip

    def show_piece(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": output.text} if output.text else {},
            "finish_reason": output.finish,
            "logprobs": self.form(output.logprobs or ()),
        }

    def form(self, logprobs: Sequence[Any]) -> dict[str, Any] | None:
        if not self.asked:
            return None
        content = [
            {**self.entry(*position[0]), "top_logprobs": [self.entry(*pair) for pair in position[1:]]}
            for position in logprobs
        ]
        return {"content": content, "refusal": None}

    def entry(self, token: int, value: float) -> dict[str, Any]:
        text = self.token(token)
        whole = "\ufffd" not in text  # a piece of a character has no text of its own
        return {"token": text, "logprob": finite(value), "bytes": list(text.encode()) if whole else None}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this."""
    return max(logprob, -9999.0)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
