"""Completions of an OpenAI-compatible server, with patience for what goes wrong on the way.

The key is read from the environment when a request is sent. It is in no setting, and it is taken out of every text
that comes back, so that a server which repeats it cannot bring it into a file.
"""

import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from selfalign import processes
from selfalign.errors import SelfalignError
from selfalign.journal import Journal
from selfalign.store import Counts

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
"""Back-off stops doubling there; a server that asks for more is given it."""

DIRECT = {"all://localhost": None, "all://127.0.0.1": None}
"""What is asked without a proxy, whatever the environment says of one."""


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """Where completions come from.

    Attributes:
        base_url: up to and without "/chat/completions" or "/completions", such as "https://api.openai.com/v1".
        model: what the server calls the model.
        parameters: what a request says besides, or instead; null leaves a parameter out. Some models want
            {max_tokens: null, temperature: null, top_p: null, max_completion_tokens: 2048}.
        key_variable: the environment variable that holds the key; empty where none is needed.
        concurrency: requests under way at once.
        timeout_seconds: a request that takes longer is sent again.
        retries: how often a request is sent again after a timeout, a broken answer, status 408, 429 or 5xx.
        first_wait_seconds: before the first of these; it doubles each time, and a longer Retry-After is respected.
        prompt_price: of a million prompt tokens, in any currency.
        completion_price: of a million completion tokens.
    """

    base_url: str = ""
    model: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    key_variable: str = field(default="OPENAI_API_KEY", metadata={"keyed": False})
    concurrency: int = field(default=4, metadata={"keyed": False})
    timeout_seconds: float = field(default=120.0, metadata={"keyed": False})
    retries: int = field(default=6, metadata={"keyed": False})
    first_wait_seconds: float = field(default=1.0, metadata={"keyed": False})
    prompt_price: float = field(default=0.0, metadata={"keyed": False})
    completion_price: float = field(default=0.0, metadata={"keyed": False})

    def check(self, key: str) -> None:
        """Checks every setting; messages name it as `key`.name.

        Raises:
            SelfalignError: one is missing or out of range.
        """
        if not self.model:
            raise SelfalignError(f"{key}.model must say what the server calls the model")
        if not re.fullmatch(r"https?://[^\s/@?#]+[^\s@?#]*", self.base_url):
            raise SelfalignError(
                f"{key}.base_url must be http(s)://host/path without user, password or query (it is saved with the "
                "run; a key belongs into the environment)"
            )
        try:
            httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise SelfalignError(f"{key}.base_url={self.base_url} is no address ({error})") from error
        if taken := {"model", "messages", "prompt", "stream", "n"} & self.parameters.keys():
            raise SelfalignError(f"{key}.parameters cannot set {', '.join(sorted(taken))}")
        for name in ("concurrency", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise SelfalignError(f"{key}.{name} must be above 0, got {getattr(self, name)}")
        for name in ("retries", "first_wait_seconds", "prompt_price", "completion_price"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"{key}.{name} must be 0 or more, got {getattr(self, name)}")
        if not re.fullmatch(r"[A-Za-z_]\w*|", self.key_variable):
            raise SelfalignError(
                f"{key}.key_variable must be the name of an environment variable, which holds the key; not the key"
            )

    def open(self, key: str) -> "Client":
        """A client of the server.

        Raises:
            SelfalignError: the environment lacks the key, or has one that cannot be sent (the setting is named as
                `key`.key_variable), or a proxy or a certificate that is none.
        """
        secret = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if self.key_variable and not secret:
            raise SelfalignError(
                f"{key}.key_variable: the environment variable {self.key_variable} is not set; set it to the key, "
                f"or {key}.key_variable='' where the server needs none"
            )
        if not re.fullmatch("[!-~]*", secret):
            raise SelfalignError(
                f"{key}.key_variable: {self.key_variable} holds characters that no key has, maybe quotation marks; "
                "set it to the key alone"
            )
        try:
            return Client(self, secret)
        except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:
            raise SelfalignError(
                f"{key}.base_url: nothing can be asked as the environment stands ({error}); look at HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
            ) from error

    @property
    def name(self) -> str:
        """Who answers, as records say it."""
        return f"{self.model} at {self.base_url}"

    def usage(self, replies: "Sequence[Reply]") -> Counts:
        """How many requests and tokens the answers took, and what these cost."""
        prompt = sum(reply.prompt_tokens for reply in replies)
        completion = sum(reply.completion_tokens for reply in replies)
        return {
            "judge/requests": len(replies),
            "judge/requests_without_usage": sum(not reply.prompt_tokens for reply in replies),
            "judge/prompt_tokens": prompt,
            "judge/completion_tokens": completion,
            "judge/cost": (prompt * self.prompt_price + completion * self.completion_price) / 1e6,
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the server.

    `finish` is "stop", "length", …; "too_long" where it refused the prompt's length, "content_filter" its content.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


class RefusedError(SelfalignError):
    """A server that will not do what it was asked, however often it is asked; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Sends requests; several threads may share it."""

    def __init__(self, endpoint: Endpoint, secret: str) -> None:
        self._endpoint = endpoint
        self._secret = secret
        self._stop = threading.Event()
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._http = httpx.Client(timeout=endpoint.timeout_seconds, headers=headers, mounts=DIRECT, limits=limits)
        self._url = endpoint.base_url.rstrip("/")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def complete(self, request: dict[str, Any]) -> Reply:
        """The answer to one request, sent again as often as the endpoint's settings allow.

        Args:
            request: the body, without the model's name. With a "prompt" the model continues that, a text or token
                ids; with "messages" it answers in a chat.

        Raises:
            SelfalignError: the server refuses the request, or gives no usable answer however often it is asked.
        """
        trouble = ""
        for attempt in range(self._endpoint.retries + 1):
            if self._stop.is_set():
                break
            reply, trouble, asked = self.attempt(request)
            if reply is not None:
                return reply
            if attempt < self._endpoint.retries:
                backoff = min(LONGEST_WAIT_SECONDS, self._endpoint.first_wait_seconds * 2**attempt)
                wait = max(backoff, asked)
                logger.info("%s: %s; trying again in %.1f s", self._url, trouble, wait)
                pause(self._stop, wait)
        raise SelfalignError(
            f"{self._url}: no usable answer in {self._endpoint.retries + 1} tries, at last: {trouble or 'stopped'}; "
            "what was answered is kept, the same command continues"
        )

    def complete_all(self, requests: dict[str, dict[str, Any]], journal: Journal, size: int) -> dict[str, Reply]:
        """{name: answer} of many requests, several at once; each is journalled when it comes, in whatever order.

        Of several processes only the main one asks, because `concurrency` is about the server and not about them.

        Args:
            requests: {name in the journal: body}; a name is asked for once.
            journal: those it has already are not sent again.
            size: how far the progress bar moves for each.
        """
        self._stop.clear()
        missing = [name for name in requests if name not in journal and processes.is_main()]
        journal.advance(size * (len(requests) - len(missing)))
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            futures = {pool.submit(self._complete, requests[name]): name for name in missing}
            try:
                for future in as_completed(futures):
                    journal.keep(futures[future], future.result())
                    journal.advance(size)
            except BaseException:
                self._stop.set()  # Those that wait before another try give up.
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for future, name in futures.items():
                    if name not in journal and not future.cancelled() and future.exception() is None:
                        journal.keep(name, future.result())
        journal.share()
        return {name: Reply(*journal.take(name)) for name in requests}

    def complete_each(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """The answers to these requests, several at once; where one fails, the others are not waited for."""
        self._stop.clear()
        pool = ThreadPoolExecutor(self._endpoint.concurrency)
        try:
            futures = [pool.submit(self.complete, request) for request in requests]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def _complete(self, request: dict[str, Any]) -> tuple[Any, ...]:
        return astuple(self.complete(request))

    def attempt(self, request: dict[str, Any]) -> tuple[Reply | None, str, float]:
        """Sends a request once: the reply, or what went wrong and how many seconds the server asks to wait.

        Raises:
            RefusedError: asking again is of no use.
        """
        body = {"model": self._endpoint.model, **request, **self._endpoint.parameters}
        body = {name: value for name, value in body.items() if value is not None}
        url = f"{self._url}/{'completions' if 'prompt' in body else 'chat/completions'}"
        try:
            answer = self._http.post(url, json=body)
        except httpx.RequestError as error:
            return None, type(error).__name__, 0.0
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            return None, f"status {answer.status_code}", retry_after(answer.headers.get("Retry-After", ""))
        said = self.clean(answer.text)
        if answer.status_code == 413 or (answer.status_code == 400 and re.search("context[_ ]length", said)):
            return Reply("", "too_long", 0, 0), "", 0.0
        if answer.status_code == 400 and re.search("content[_ ](filter|policy|management)", said):
            return Reply("", "content_filter", 0, 0), "", 0.0
        if answer.status_code != 200:
            reason = " ".join(said.split())[:200]
            raise RefusedError(f"{url}: status {answer.status_code}: {reason}", answer.status_code)
        try:
            return self._read(answer.json()), "", 0.0
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return None, f"status 200 without a completion ({type(error).__name__})", 0.0

    def _read(self, answer: Any) -> Reply:
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        return Reply(
            text=self.clean(str((choice["text"] if "text" in choice else choice["message"].get("content")) or "")),
            finish=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )

    def clean(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._secret, "[key]") if self._secret else text


def pause(stop: threading.Event, seconds: float) -> None:
    """Waits, until it is told to stop."""
    stop.wait(seconds)


def retry_after(value: str) -> float:
    """Seconds to wait by a Retry-After header: a number of them, or a date; 0 where it says neither."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
