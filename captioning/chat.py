"""Asking a chat server that speaks OpenAI's protocol: rate limit, retries, what they end in.

The key is read from an environment variable and goes nowhere but into the requests.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from utils import UserError

LONGEST_WAIT = 60.0  # seconds between two attempts
NO_KEY = "no-key"  # given, or the client would send the Hub's token to any server
# Answers by status that asking again will not change, and that concern the one question alone.
REFUSED = (400, 413, 415, 422)
# The same, but of every question: wrong address, key or model.
HOPELESS = {401: "the key is refused", 403: "access is refused", 404: "no such address or model"}
SHOWN = 200  # characters of an error in a message


@dataclass(frozen=True)
class Question:
    """One request: a single message of the user's, and how it is answered."""

    text: str
    max_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What came back. text: "" if nothing did. problem: why it may be of no use, or ""."""

    text: str
    problem: str = ""


class Pace:
    """Lets through at most so many a minute, evenly; None: as many as come."""

    def __init__(self, per_minute: float | None):
        self._step = 60 / per_minute if per_minute else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Wait for one's turn. Raises UserError if all is stopped."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._step
        self.sleep(start - now)

    def sleep(self, seconds: float) -> None:
        """Wait so long. Raises UserError if all is stopped meanwhile."""
        if self._stopped.wait(max(0.0, seconds)):
            raise UserError("stopped")

    def hold(self, seconds: float) -> None:
        """Let nobody through for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def stop(self) -> None:
        """Wake all who wait, with an error."""
        self._stopped.set()


@dataclass(frozen=True, eq=False)
class Chat:
    """A model on a server. key: what the server asks for, or None. first_wait: seconds before the
    second attempt, doubled with each further one; attempts: how often a question is asked. As a
    context it ends with all its waits."""

    model: str
    url: str
    key: str | None
    pace: Pace
    timeout: float = 120.0
    attempts: int = 8
    first_wait: float = 1.0

    def ask(self, question: Question) -> Answer:
        """The answer to a question, asked again while the server fails.

        A refusal of this one question is an empty answer with a problem. Raises UserError if the
        server cannot be reached, fails to the last attempt, or refuses key, address or model.
        """
        problem = ""
        for attempt in range(self.attempts):
            self.pace.wait()
            try:
                return self._ask_once(question)
            except Exception as error:  # of the client, its HTTP library, JSON: as versions go
                status, headers = _response_of(error)
                problem = self._describe(error, status)
                if status in REFUSED:
                    return Answer("", f"refused: {problem}")
                if status in HOPELESS:
                    raise UserError(
                        f"--llm_url {self.url}: {HOPELESS[status]} ({problem})"
                    ) from None
            if attempt + 1 < self.attempts:
                self._wait(attempt, headers)
        raise UserError(
            f"--llm_url {self.url} fails after {self.attempts} attempts ({problem}); what is "
            "answered is kept, and the same command, without --overwrite, continues"
        )

    def _ask_once(self, question: Question) -> Answer:
        from huggingface_hub import InferenceClient

        client = InferenceClient(
            base_url=self.url, api_key=self.key or NO_KEY, timeout=self.timeout
        )
        reply = client.chat_completion(
            [{"role": "user", "content": question.text}],
            model=self.model,
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            stop=list(question.stop) or None,
        )
        choice = reply.choices[0]
        text = choice.message.content
        if text is not None and not isinstance(text, str):
            raise ValueError(f"the answer is a {type(text).__name__}, not a text")
        text = (text or "").encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        if not text.strip():
            return Answer("", "an empty answer")
        cut = choice.finish_reason == "length"
        return Answer(text, f"cut at {question.max_tokens} tokens" if cut else "")

    def _describe(self, error: Exception, status: int | None) -> str:
        """An error on one line, without the key."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self.key:
            text = text.replace(self.key, "***")
        text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        return f"{type(error).__name__}: {text}" if status is None else text

    def _wait(self, attempt: int, headers: Mapping[str, str]) -> None:
        """Wait before the next attempt: what the server asks for, or twice as long each time."""
        asked = headers.get("retry-after", "")
        if asked.replace(".", "", 1).isdigit():
            self.pace.hold(min(float(asked), LONGEST_WAIT))
        else:
            wait = min(self.first_wait * 2**attempt, LONGEST_WAIT)
            self.pace.sleep(wait * random.uniform(0.5, 1))

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *error: object) -> None:
        self.pace.stop()


def _response_of(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Status and headers of the answer that an error is about; None and {} if there was none."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status, {} if response is None else response.headers


def check_url(url: str) -> str:
    """A server's address as it is used. Raises UserError for one that is none, or holds a key."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--llm_url {url}: give an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"--llm_url {parts.scheme}://{parts.hostname}: leave keys out of the address, which is "
            "written into files; --llm_key_env names the variable that holds one"
        )
    return url.rstrip("/")
