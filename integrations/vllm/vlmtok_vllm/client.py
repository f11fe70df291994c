"""Questions to an OpenAI server of vLLM, with the method of a request, and the server's own counts."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LIMIT = 120.0
"""Seconds of silence after which a request has failed."""


@dataclass(frozen=True)
class Question:
    """A picture and what to ask about it.

    Attributes:
        picture: as a ``data:`` URL.
        text: the question.
    """

    picture: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: without spaces around it.
        prompt_tokens: length of the prompt, visual tokens included, as the server counts it.
        output_tokens: how many were generated.
        first: seconds to the first token.
        seconds: to the last.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    first: float
    seconds: float

    @property
    def kv_tokens(self) -> int:
        """Tokens that the request held in the cache at its end; the last one generated is never read again."""
        return self.prompt_tokens + max(0, self.output_tokens - 1)


class Refused(Exception):
    """The server refused a request.

    Attributes:
        status: of HTTP.
        reason: in words.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Client:
    """Asks a server on loopback; may be used from several threads.

    Attributes:
        port: of 127.0.0.1.
        model: name that the server serves.
        begin: whether the tokenizer puts its own first token in front; vLLM leaves that to chat templates.
        limit: seconds of silence after which a request has failed.
    """

    port: int
    model: str
    begin: bool = False
    limit: float = LIMIT

    def ask(self, question: Question, method: str | None = None, tokens: int = 16, exactly: bool = False) -> Answer:
        """Asks, greedily.

        Args:
            question: about a picture.
            method: of vlmtok for this request; ``"none"`` for no reduction, None for what the server does by itself.
            tokens: that are generated at most.
            exactly: generate `tokens` even where the answer ends before.

        Raises:
            Refused: the server does not take the request.
            OSError: it does not answer, within the limit or at all.
        """
        began = time.perf_counter()
        first, text, usage = 0.0, [], None
        for event in self._stream(self._body(question, method, tokens, exactly)):
            if "error" in event:
                raise Refused(int(event["error"].get("code") or 500), str(event["error"].get("message", event)))
            for choice in event.get("choices", ()):
                first = first or time.perf_counter() - began  # the server's first event comes with the first token
                text.append(choice["delta"].get("content") or "")
            usage = event.get("usage") or usage
        if usage is None:
            raise ConnectionError("the answer ended early")
        seconds = time.perf_counter() - began
        return Answer("".join(text).strip(), usage["prompt_tokens"], usage["completion_tokens"], first, seconds)

    def _body(self, question: Question, method: str | None, tokens: int, exactly: bool) -> dict[str, Any]:
        """A request of chat completions."""
        parts = [
            {"type": "image_url", "image_url": {"url": question.picture}},
            {"type": "text", "text": question.text},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "temperature": 0,
            "add_special_tokens": self.begin,
            "ignore_eos": exactly,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body if method is None else {**body, "mm_processor_kwargs": {"vlmtok": method}}

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.limit)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise Refused(reply.status, _reason(reply.read()))
            for line in reply:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)
        except http.client.HTTPException as problem:
            raise ConnectionError(f"the answer ended early: {problem!r}") from None
        finally:
            connection.close()

    def metrics(self) -> str:
        """What the server counts, as Prometheus text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.limit)
        try:
            connection.request("GET", "/metrics")
            reply = connection.getresponse()
            said = reply.read().decode()
        finally:
            connection.close()
        if reply.status != 200:
            raise Refused(reply.status, said)
        return said


def counted(metrics: str, name: str) -> float:
    """A counter in Prometheus text, summed over its labels.

    Raises:
        KeyError: the server has no such counter.
    """
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)$", metrics, re.MULTILINE)
    if not found:
        raise KeyError(f"the server counts no {name}")
    return sum(map(float, found))


def label(metrics: str, name: str, key: str) -> str | None:
    """A label of a metric in Prometheus text; None where there is none."""
    found = re.search(rf'^{re.escape(name)}\{{[^\n]*\b{re.escape(key)}="([^"]*)"', metrics, re.MULTILINE)
    return found[1] if found else None


def _reason(said: bytes) -> str:
    """The words of a refusal, in one line."""
    text = said.decode(errors="replace")
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())
