"""Completions from an OpenAI-compatible server, with retries of passing errors.

The key is read from the environment when a client is opened. It is in no setting, and it is taken out of every text
that comes back, so that a server which repeats it cannot bring it into a file.
"""

import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import as_plain
from selfalign.core.records import FinishReason
from selfalign.data.turns import as_prompt
from selfalign.engines.replies import (
    PassingError,
    RefusedError,
    Reply,
    fewest_tokens,
    read_answer,
    unescape,
)
from selfalign.metrics import catalog
from selfalign.store.artifacts import Counts
from selfalign.store.journal import Journal

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
"""Longest back-off. A server that asks for a longer wait gets it, up to a day."""

DAY_SECONDS = 86_400.0
"""Longest wait that a server can ask for: some give a date as a number of seconds."""

PROBE = "Say hello."
"""A request that every working server answers."""

SIZE = re.compile(r"(?<![a-z])(?:mini|nano|micro|tiny|small|lite|flash|turbo)(?![a-z])")
"""Words for sizes, which tell apart models of one family."""

SHORTEST_KEY = 8
"""Shortest key that counts as a secret. Placeholders are shorter, and occur in answers."""

DIRECT = dict.fromkeys(f"all://{host}" for host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0"))
"""Addresses that are reached without a proxy, whatever the environment says."""


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """Address of a server, and how it is asked.

    Attributes:
        base_url: up to and without "/chat/completions" or "/completions", such as "https://api.openai.com/v1".
        model: what the server calls the model.
        parameters: what a request says besides, or instead; null leaves a parameter out. Some models want
            {max_tokens: null, temperature: null, top_p: null, max_completion_tokens: 2048}.
        api_key_env: the environment variable that holds the key; empty where none is needed.
        concurrency: requests under way at once.
        timeout_seconds: a request that takes longer is sent again.
        retries: how often a request is sent again after a timeout, a broken answer, status 408, 429 or 5xx.
        backoff_seconds: before the first of these; it doubles each time, and a longer Retry-After is respected.
        prompt_price: of a million prompt tokens, in any currency.
        completion_price: of a million completion tokens.
    """

    base_url: str = ""
    model: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"keyed": False})
    concurrency: int = field(default=4, metadata={"keyed": False})
    timeout_seconds: float = field(default=120.0, metadata={"keyed": False})
    retries: int = field(default=6, metadata={"keyed": False})
    backoff_seconds: float = field(default=1.0, metadata={"keyed": False})
    prompt_price: float = field(default=0.0, metadata={"keyed": False})
    completion_price: float = field(default=0.0, metadata={"keyed": False})

    def check(self, key: str) -> None:
        """Check every setting. Messages name it as `key`.name.

        Raises:
            SelfalignError: one is missing or out of range.
        """
        if missing := [name for name in ("base_url", "model") if not getattr(self, name)]:
            raise SelfalignError("\n".join(f"set {key}.{name}=…; it has no default" for name in missing))
        if not re.fullmatch(r"https?://[^\s/@?#]+[^\s@?#]*", self.base_url):
            raise SelfalignError(
                f"{key}.base_url must be http(s)://host/path without user, password or query: it is saved with the "
                "run. Put a key into the environment."
            )
        try:
            httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise SelfalignError(f"{key}.base_url={self.base_url} is not a valid address ({error})") from error
        if taken := {"model", "messages", "prompt", "stream", "n"} & self.parameters.keys():
            raise SelfalignError(f"{key}.parameters cannot set {', '.join(sorted(taken))}")
        for name in ("concurrency", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise SelfalignError(f"{key}.{name} must be above 0, got {getattr(self, name)}")
        for name in ("retries", "backoff_seconds", "prompt_price", "completion_price"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"{key}.{name} must be 0 or more, got {getattr(self, name)}")
        if not re.fullmatch(r"[A-Za-z_]\w*|", self.api_key_env):
            raise SelfalignError(
                f"{key}.api_key_env must be the name of the environment variable that holds the key, not the key"
            )

    def open(self, key: str) -> "Client":
        """Return a client of the server.

        Raises:
            SelfalignError: the environment lacks the key, or has one that cannot be sent (the setting is named as
                `key`.api_key_env), or a proxy or a certificate that is none.
        """
        secret = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if self.api_key_env and not secret:
            raise SelfalignError(
                f"{key}.api_key_env: the environment variable {self.api_key_env} is not set. Set it to the key, or "
                f"set {key}.api_key_env='' if the server needs no key."
            )
        if not re.fullmatch("[!-~]*", secret):
            raise SelfalignError(
                f"{key}.api_key_env: {self.api_key_env} holds characters that no key has, maybe quotation marks. "
                "Set it to the key alone."
            )
        try:
            return Client(self, secret)
        except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:
            raise SelfalignError(
                f"{key}.base_url: the proxy or certificate settings of the environment are invalid ({error}). Check "
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE."
            ) from error

    @property
    def name(self) -> str:
        """The name of the model and server in records."""
        return f"{self.model} at {self.base_url}"

    @property
    def priced(self) -> bool:
        """Whether a price is set."""
        return bool(self.prompt_price or self.completion_price)

    def usage(self, replies: "Sequence[Reply]") -> Counts:
        """Return the number of requests and tokens of the replies.

        Their cost is among them if there is a price, and any reply tells tokens.
        """
        prompt = sum(reply.prompt_tokens for reply in replies)
        completion = sum(reply.completion_tokens for reply in replies)
        cost = (prompt * self.prompt_price + completion * self.completion_price) / 1e6
        return {
            catalog.JUDGE_REQUESTS.name: len(replies),
            catalog.JUDGE_REQUESTS_WITHOUT_USAGE.name: sum(not reply.prompt_tokens for reply in replies),
            catalog.JUDGE_PROMPT_TOKENS.name: prompt,
            catalog.JUDGE_COMPLETION_TOKENS.name: completion,
            **({catalog.JUDGE_COST.name: cost} if self.priced and (prompt or completion) else {}),
        }


class Client:
    """A connection to a server, which several threads may share."""

    def __init__(self, endpoint: Endpoint, secret: str) -> None:
        self._endpoint = endpoint
        self._secret = secret
        self._stop = threading.Event()
        self._served = threading.Event()
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._failure: SelfalignError | None = None
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._http = httpx.Client(timeout=endpoint.timeout_seconds, headers=headers, mounts=DIRECT, limits=limits)
        self._url = endpoint.base_url.rstrip("/")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def complete(self, request: dict[str, Any]) -> Reply:
        """Return the reply to one request, which is sent again as often as the endpoint's settings allow.

        Args:
            request: the body, without the model's name. With a "prompt" the model continues that, a text or token
                ids; with "messages" it answers in a chat.

        Raises:
            RefusedError: the server refuses the request.
            PassingError: it gives no usable answer however often it is asked.
        """
        trouble, tries = PassingError("stopped"), 0
        for attempt in range(self._endpoint.retries + 1):
            if self._stop.is_set() or trouble.wait_seconds > DAY_SECONDS:
                break
            tries += 1
            try:
                return self.attempt(request)
            except PassingError as error:
                trouble = error
            if attempt < self._endpoint.retries and trouble.wait_seconds <= DAY_SECONDS:
                backoff = min(LONGEST_WAIT_SECONDS, self._endpoint.backoff_seconds * 2**attempt)
                wait = max(backoff, trouble.wait_seconds)
                logger.info("%s: %s; trying again in %.1f s", self._url, trouble, wait)
                pause(self._stop, wait)
        longer = f"; it asks to wait {trouble.wait_seconds:.0f} seconds" if trouble.wait_seconds > DAY_SECONDS else ""
        raise PassingError(
            f"{self._url}: no usable answer in {tries} tries, at last: {trouble}{longer}. Finished answers are kept: "
            "the same command continues.",
            by_request=trouble.by_request,
            words=str(trouble),
        )

    def complete_all(self, requests: dict[str, dict[str, Any]], journal: Journal, size: int) -> dict[str, Reply]:
        """Return {name: reply} of many requests, several at once. Each reply is journalled when it arrives.

        Only the main process asks, because `concurrency` is a limit of the server.

        Args:
            requests: {name in the journal: body}; a name is asked for once.
            journal: those it has already are not sent again.
            size: how far the progress bar moves for each.
        """
        self._stop.clear()
        self._failure = None
        distributed.on_main(lambda: self._complete_missing(requests, journal, size))
        journal.share()
        return {name: msgspec.convert(journal.take(name), Reply) for name in requests}

    def _complete_missing(self, requests: dict[str, dict[str, Any]], journal: Journal, size: int) -> None:
        missing = [name for name in requests if name not in journal]
        journal.advance(size * (len(requests) - len(missing)))
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            futures = {pool.submit(self._answer, requests[name]): name for name in missing}
            try:
                for future in as_completed(futures):
                    if (answer := future.result()) is not None:
                        journal.keep(futures[future], answer)
                        journal.advance(size)
            except SelfalignError as error:
                raise self._failure or error from None  # The others have only given up for it.
            except BaseException:
                self._stop.set()  # Those that wait before another try give up.
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for future, name in futures.items():
                    done = name not in journal and not future.cancelled() and future.exception() is None
                    if done and (answer := future.result()) is not None:
                        journal.keep(name, answer)

    def complete_each(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """Return the replies to these requests, several at once. If one fails, the others are not waited for."""
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

    def _answer(self, request: dict[str, Any]) -> Any:
        """Return one of many replies, as the journal keeps it; None once another request has failed for all."""
        if self._stop.is_set():
            return None
        try:
            return as_plain(self._settle(request))
        except SelfalignError as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()
            raise

    def _settle(self, request: dict[str, Any]) -> Reply:
        """Return the reply to one of many requests, which may be a refusal of this request alone.

        To tell whether a refusal is of this request alone, a short request with the same parameters is sent: also where
        the first request of all is refused, where a killed run continues, and where a server refuses everything from
        some time on. It is not sent for a prompt that is too long or filtered once the server has answered any request.

        Raises:
            RefusedError: the server refuses every request.
            PassingError: it gives no usable answer however often it is asked, which is not for this request.
        """
        try:
            reply = self.complete(request)
        except (RefusedError, PassingError) as error:
            if not error.by_request or not self._serves(request):
                raise
            return Reply(error.words, FinishReason.REFUSED, 0, 0)
        if not reply.finish_reason.is_refusal:
            self._served.set()
        elif not self._served.is_set() and not self._serves(request):
            raise RefusedError(f"{self._url}: the server refuses every request, a short one too: {reply.text}", 400)
        return reply

    def _serves(self, request: dict[str, Any]) -> bool:
        """Whether the server answers a short request in place of this one."""
        if "messages" not in request:
            return False
        try:
            reply = self.complete({**request, "messages": as_prompt(PROBE)})
        except (RefusedError, PassingError):
            return False
        return not reply.finish_reason.is_refusal

    def attempt(self, request: dict[str, Any]) -> Reply:
        """Send a request once.

        Raises:
            RefusedError: the server would refuse the request again.
            PassingError: the same request may succeed later.
        """
        body = {"model": self._endpoint.model, **request, **self._endpoint.parameters}
        body = {name: value for name, value in body.items() if value is not None}
        url = f"{self._url}/{'completions' if 'prompt' in body else 'chat/completions'}"
        try:
            answer = self._http.post(url, json=body)
        except httpx.RequestError as error:
            raise PassingError(type(error).__name__) from error
        if elsewhere := answer.headers.get("Location") if 300 <= answer.status_code < 400 else None:
            words = (
                f"status {answer.status_code}: the server has moved to {self.clean(elsewhere)}; set base_url to that"
            )
            raise RefusedError(f"{url}: {words}", answer.status_code, words=words)
        try:
            reply = read_answer(answer.status_code, self.clean(unescape(answer.text)))
        except RefusedError as refused:
            raise RefusedError(f"{url}: {refused}", refused.status, refused.by_request, refused.words) from None
        except PassingError as error:
            error.wait_seconds = retry_after(answer.headers.get("Retry-After", ""))
            raise
        self._look_at(reply, body)
        return replace(reply, text=self.clean(reply.text))

    def _look_at(self, reply: Reply, body: dict[str, Any]) -> None:
        """Warn, once each, of a prompt not read whole, an unknown finish reason, another model, and no usage."""
        if reply.finish_reason is FinishReason.UNKNOWN:
            stated = reply.stated_reason
            self._warn(stated, f"a text ended for the unknown reason {stated!r}, which counts as finished")
        wanted = str(body.get("model", ""))
        if not same_model(wanted, reply.model):
            self._warn(
                f"model {reply.model}",
                f"asked for the model {wanted!r}, the server says {reply.model!r} answers; records name {wanted!r}",
            )
        sent = fewest_tokens(body.get("messages", []))
        if 0 < reply.tokens_read < sent:
            self._warn(
                "cut",
                f"the server read {reply.tokens_read} tokens of a prompt whose words make at least {sent}: it seems to "
                "cut prompts to its context, and so judges something else. Raise its context length (Ollama: "
                "OLLAMA_CONTEXT_LENGTH).",
            )

        if self._endpoint.priced and not (
            reply.finish_reason.is_refusal or reply.prompt_tokens or reply.completion_tokens
        ):
            self._warn("usage", "a reply does not say how many tokens it took, so the cost is counted without it")

    def _warn(self, name: str, message: str) -> None:
        with self._lock:
            told, self._told = name in self._told, {*self._told, name}
        if not told:
            logger.warning("%s: %s", self._url, message)

    def clean(self, text: str) -> str:
        """Return the text without the key. Placeholders such as "0" or "EMPTY" are no secret and stay."""
        return text.replace(self._secret, "[key]") if len(self._secret) >= SHORTEST_KEY else text


def same_model(asked: str, told: str) -> bool:
    """Whether two names are of one model, but for a maker, version or file ending.

    Many servers answer with the model that they have, whatever they are asked for. A word that only one of the names
    has must not be a size: gpt-4o-mini is not gpt-4o.
    """
    one, other = (name.rpartition("/")[2].casefold() for name in (asked, told))
    sizes = set(SIZE.findall(one)) ^ set(SIZE.findall(other)) if one and other else set()
    one, other = (re.sub(r"[\W_]+", "", name) for name in (one, other))
    return not sizes and (one in other or other in one)


def pause(stop: threading.Event, seconds: float) -> None:
    """Wait, or return at once when told to stop."""
    stop.wait(seconds)


def retry_after(value: str) -> float:
    """Return the seconds to wait by a Retry-After header, which is a number or a date; 0 for anything else."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
