"""Answers from SGLang servers: many dialogues at once, each turn by turn; the servers are proven to run the plan's target first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch

from ..config import RegenerateConfig
from ..records import Message, Reject, UserError
from ..runs import NotClaimed, Run, SettingsChanged, StopSignal
from ..target.engine import Sampling
from ..target.server_pool import Server, ServerPool, Unanswered
from ..target.sglang_engine import generation_options
from ..target.sglang_server import LONGER, SglangServer, check_options, command_line
from .dialogues import Dialogue, ask, take
from .target import OpenTarget

PROBE = "The quick brown fox jumps over the lazy dog. 1 2 3 5 8 13 21 34 55"
NATS = 0.3  # mean difference of log probabilities that batches, kernels and processors may make
Done = Callable[[Dialogue], None]


class Servers:
    """Context manager over the servers of a stage: those given, or one that is started on first use and ends with the block."""

    def __init__(self, target: OpenTarget, config: RegenerateConfig, given: tuple[str, ...], run: Run):
        self.target, self.config, self.given, self.run = target, config, list(given), run
        self._own: SglangServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.stop()

    def answer_all(self, dialogues: list[Dialogue], stop: StopSignal, done: Done) -> None:
        """Bring every dialogue to its end; `done` is called as each gets there."""
        if not self.given and self._own is None:
            self._own = self._start(stop)
        urls = self.given or [self._own.url]
        asyncio.run(self._answer_all(urls, dialogues, stop, done))

    def _start(self, stop: StopSignal) -> SglangServer:
        target, cpu = self.target, not torch.cuda.is_available()
        check_options(target.sglang, {}, capture=False)
        options = generation_options(target.folder, target.dtype, target.context, target.trust_remote_code, cpu)
        server = SglangServer(command_line({**options, **target.sglang}), self.run.folder / "logs" / "sglang-regenerate.log", cpu)
        server.start()
        try:
            server.wait_until_healthy(stop)
        except BaseException:
            server.stop()
            raise
        return server

    async def _answer_all(self, urls: list[str], dialogues: list[Dialogue], stop: StopSignal, done: Done) -> None:
        config, target = self.config, self.target
        sampling = Sampling(config.temperature, config.top_p, config.top_k, config.seed, config.min_p)
        verify = partial(check_server, target=target, run=self.run)
        limits = {"concurrency": config.concurrency, "timeout": config.timeout, "attempts": config.attempts, "patience": config.patience}
        async with ServerPool(urls, verify, **limits) as pool:

            async def answer(dialogue: Dialogue) -> None:
                while dialogue.open and (request := ask(dialogue, target, config.max_tokens)) is not None:
                    try:
                        take(dialogue, request, await pool.answer(request, sampling), target)
                    except Unanswered as error:
                        dialogue.reject = Reject(str(error), id=dialogue.row.id, retry=error.retry)
                done(dialogue)

            tasks = {asyncio.create_task(answer(dialogue)) for dialogue in dialogues}
            try:
                while tasks:
                    stop.check()
                    if self._own is not None:
                        self._own.check()
                    finished, tasks = await asyncio.wait(tasks, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION)
                    for task in finished:
                        task.result()  # raises what ended it
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------------------
# Is it the plan's target?


async def check_server(pool: ServerPool, server: Server, target: OpenTarget, run: Run) -> None:
    """Refuse a server whose target, context or log probabilities are not this run's. The run's first server sets the last."""
    info = await pool.info(server)
    found, wanted = str(info.get("model_path", "")), {target.model, str(target.folder), str(target.folder.resolve())}
    if found not in wanted:
        raise UserError(f"the server {server.url} runs {found!r}; this run's target is {target.model!r} ({target.folder})")
    longest = info.get("max_req_input_len", target.context)
    if longest + LONGER < target.context:  # a prompt in between is refused by the server, and rejected
        raise UserError(
            f"the server {server.url} takes prompts of up to {longest - 1} tokens; rows of this run have up to {target.context}: "
            f"start it with a larger --context-length, or lower target.max_length"
        )
    prompt = target.template.first_prompt([Message("user", PROBE)])
    scores = await pool.fingerprint(server, prompt)
    known = _claimed_scores(run, prompt, scores)
    apart = sum(abs(a - b) for a, b in zip(scores, known, strict=True)) / max(len(known), 1)
    if not apart <= NATS:
        raise UserError(
            f"the server {server.url} gives a fixed prompt log probabilities that are {apart:.2f} nats a token from those of the run's "
            f"first server (at most {NATS} is allowed): it has other weights, or reads them otherwise"
        )


def _claimed_scores(run: Run, prompt: list[int], scores: list[float]) -> list[float]:
    try:
        known: dict[str, Any] = run.claimed("servers")
    except NotClaimed:
        known = {"prompt": prompt, "logprobs": [round(score, 4) for score in scores]}
        try:
            run.claim("servers", known)
        except SettingsChanged:  # another task was faster
            known = run.claimed("servers")
    if known["prompt"] != prompt or len(known["logprobs"]) != len(scores):
        raise UserError("this run's servers were probed with another prompt: the chat template changed; use another --run")
    return known["logprobs"]
