"""Asks running SGLang servers for answers: many requests at once, tried again with backoff, dead servers taken out and probed.

Everything a server can do wrong ends in one of three ways: `Unanswered` (this request only), `EngineFailed` (no server is left)
or `UserError` (the server is not one that token ids can be had from).
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from ..records import EngineFailed, UserError
from .engine import Completion, Request, Sampling

AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
PROBE_SECONDS = 1.0  # between probes of a dead server
PROBE_TIMEOUT = 30.0
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for


class Unanswered(Exception):
    """A request got no answer. `retry`: another run can help."""

    def __init__(self, reason: str, retry: bool):
        super().__init__(reason)
        self.retry = retry


class Temporary(Exception):
    """An attempt failed in a way that the next one may not. `after`: seconds that the server asked to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


@dataclass
class Server:
    """One server and what it does now."""

    url: str
    asked: int = 0  # requests in flight
    prober: asyncio.Task | None = None  # runs while the server is not to be asked

    @property
    def alive(self) -> bool:
        return self.prober is None


class ServerPool:
    """Async context manager over servers that all run the same target."""

    def __init__(
        self,
        urls: list[str],
        verify: Callable[[ServerPool, Server], Awaitable[None]],
        *,
        concurrency: int,
        timeout: float,
        attempts: int,
        patience: float,
        first_wait: float = 0.5,
    ):
        """verify: raises Temporary while a server is not up, UserError where it is a wrong one; called before a server is asked,
        and again before one that died is. timeout: seconds of one attempt; patience: seconds without any server to ask.
        """
        self.servers = [Server(normal_url(url)) for url in urls]
        self.verify = verify
        self.concurrency, self.timeout, self.attempts, self.patience, self.first_wait = concurrency, timeout, attempts, patience, first_wait
        self._refused: UserError | None = None

    async def __aenter__(self) -> Self:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, 10.0)), limits=limits, trust_env=False)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._changed = asyncio.Condition()
        for server in self.servers:
            self._take_out(server)  # until it is verified
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.servers:
            if server.prober is not None:
                server.prober.cancel()
        await self._http.aclose()

    async def answer(self, request: Request, sampling: Sampling) -> Completion:
        """The engine's own ids of one answer. Raises Unanswered when every attempt failed."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Temporary), stop=stop_after_attempt(self.attempts), wait=self._wait, reraise=True
        )
        try:
            async with self._slots:
                return await retrying(self._attempt, request, sampling)
        except Temporary as error:
            raise Unanswered(f"{error} ({self.attempts} attempts)", retry=True) from None

    async def info(self, server: Server) -> dict[str, Any]:
        """What a server says of itself. Raises Temporary while it is not up, UserError where it is no SGLang."""
        for path in ("/server_info", "/get_server_info"):  # the second until 0.5.17
            response = await self._probe("GET", server.url + path)
            if response.status_code == 200:
                break
        try:
            found = response.json()
        except ValueError:
            found = None
        if response.status_code != 200 or not isinstance(found, dict):
            raise UserError(
                f"{server.url} answers /server_info with {response.status_code}, {response.text[:80]!r}: it is no SGLang server"
            )
        return found

    async def fingerprint(self, server: Server, prompt: list[int]) -> list[float]:
        """Log probability of each token of a fixed prompt but the first, given those before it."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        response = await self._probe("POST", server.url + "/generate", json=body)
        try:
            return [float(entry[0]) for entry in response.json()["meta_info"]["input_token_logprobs"][1:]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{server.url} gives no log probabilities of a prompt ({response.status_code}, {error!r}), so its target is not known"
            ) from None

    async def _probe(self, method: str, url: str, **content: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, url, timeout=PROBE_TIMEOUT, **content)
        except httpx.HTTPError as error:
            raise Temporary(f"{url}: {error!r}") from None
        if response.status_code in AGAIN or response.status_code >= 500:
            raise Temporary(f"{url} answered {response.status_code}")
        return response

    # -- one attempt

    async def _attempt(self, request: Request, sampling: Sampling) -> Completion:
        server = await self._choose()
        server.asked += 1
        try:
            response = await self._http.post(server.url + "/generate", json=body_of(request, sampling))
        except httpx.TimeoutException:
            raise Temporary(f"{server.url} did not answer within {self.timeout:g} s") from None
        except httpx.TransportError as error:  # refused, reset, closed in the middle of an answer
            self._take_out(server)
            raise Temporary(f"{server.url} broke the connection: {error!r}", after=0.0) from None
        finally:
            server.asked -= 1
        return completion(server.url, request, response)

    def _wait(self, state: RetryCallState) -> float:
        """Exponential backoff with jitter, or what the server asked for."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.after if isinstance(error, Temporary) else None
        if asked is not None:
            return min(asked, LONGEST_WAIT)
        return min(self.first_wait * 2 ** (state.attempt_number - 1) * random.uniform(1, 2), LONGEST_WAIT)

    async def _choose(self) -> Server:
        """The living server with the fewest requests; waits for one where none lives."""
        try:
            async with asyncio.timeout(self.patience):
                while True:
                    if self._refused is not None:
                        raise self._refused
                    if alive := [server for server in self.servers if server.alive]:
                        return min(alive, key=lambda server: server.asked)
                    async with self._changed:
                        await self._changed.wait()
        except TimeoutError:
            urls = ", ".join(server.url for server in self.servers)
            raise EngineFailed(f"no server lives: {urls} did not answer for {self.patience:g} s; start one and run this again") from None

    def _take_out(self, server: Server) -> None:
        if server.alive:
            server.prober = asyncio.create_task(self._bring_back(server))

    async def _bring_back(self, server: Server) -> None:
        """Probe a server until it is the right one, or a wrong one."""
        while True:
            try:
                await self.verify(self, server)
                break
            except Temporary:
                await asyncio.sleep(PROBE_SECONDS)
            except UserError as error:
                self._refused = error
                break
        async with self._changed:
            server.prober = None
            self._changed.notify_all()


def normal_url(text: str) -> str:
    """`host:port` or a whole URL, as a URL without a trailing slash."""
    url = text if "://" in text else f"http://{text}"
    if not httpx.URL(url).host:
        raise UserError(f"--server {text}: expected HOST:PORT or http://HOST:PORT")
    return url.rstrip("/")


def body_of(request: Request, sampling: Sampling) -> dict[str, Any]:
    """The JSON of a request to /generate."""
    params: dict[str, Any] = {"max_new_tokens": request.max_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        params |= {"top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": sampling.min_p}
        params["sampling_seed"] = sampling.seed_of(request.id)
    return {"input_ids": request.prompt, "sampling_params": params}


def completion(url: str, request: Request, response: httpx.Response) -> Completion:
    """The answer in a response. Raises Temporary, Unanswered or UserError for everything else that it can be."""
    status = response.status_code
    if status in AGAIN or status >= 500:
        raise Temporary(f"{url} answered {status}: {response.text[:200]}", retry_after(response))
    if status != 200:
        raise Unanswered(f"{url} answered {status}: {response.text[:200]}", retry=False)
    try:
        value = response.json()
        meta = value["meta_info"]
        finish = meta["finish_reason"] or {}
        reason = finish["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise Temporary(f"{url} answered what is no SGLang answer ({error!r}): {response.text[:200]}") from None
    if reason == "abort":
        raise Temporary(f"{url} aborted the request: {finish.get('message')}")
    ids = value.get("output_ids")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(
            f"{url} returns no token ids (`output_ids`), only text: answers would have to be tokenised again, which changes them"
        )
    if meta.get("prompt_tokens", len(request.prompt)) != len(request.prompt):
        raise UserError(
            f"{url} read {meta['prompt_tokens']} prompt tokens where {len(request.prompt)} were sent: something between changes prompts"
        )
    if not ids:
        raise Unanswered("no assistant turn: the target's answer is empty", retry=True)
    return Completion(ids, "length" if reason == "length" else "stop")


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the header Retry-After asks for, given as a number or a date."""
    text = response.headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
