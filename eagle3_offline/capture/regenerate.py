"""The stage `regenerate`: the target answers every user turn, and its own token ids are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Self

from ..config import Recipe, RegenerateConfig
from ..conversations.prepare import read_unit
from ..conversations.token_rows import answer_tokens, write_token_rows
from ..progress import StageProgress
from ..records import Summary, UserError
from ..runs import Run, StopSignal, Unit, check_rejected, digest, write_jsonl
from ..store.seal import sealed
from ..target.engine import Sampling
from ..target.transformers_engine import TransformersEngine
from .ask_servers import Servers
from .dialogues import Dialogue, ask, begin, take
from .journal import Journal, journal_path, reopen
from .target import OpenTarget

STAGE = "regenerate"


def settings(run: Run, recipe: Recipe, target: OpenTarget, engine: str) -> dict[str, object]:
    """What the answers depend on; how many are asked for at once, and how often, is none of it."""
    pace = ("batch_size", "concurrency", "timeout", "attempts", "patience")
    sampling = {k: v for k, v in dataclasses.asdict(recipe.regenerate).items() if k not in pace}
    return {
        **sampling,
        "engine": engine,
        "dtype": target.dtype,
        "context": target.context,
        "target": digest(target.fingerprint),
        "prepare": digest(run.claimed("prepare")),
    }


def regenerate(
    run: Run, recipe: Recipe, target: OpenTarget, numbers: list[int] | None, stop: StopSignal,
    servers: tuple[str, ...] = (), retry_errors: bool = False,
) -> Summary:  # fmt: skip
    """Answer the units (all that the plan needs, for None). Finished units are skipped; a stop loses unfinished rows only.

    servers: running SGLang servers to ask; none: the recipe's engine. retry_errors: also answer rejected rows that a retry can help.
    """
    target = dataclasses.replace(target, template=target.template.reasoned(recipe.regenerate.reasoning))
    over_http = bool(servers) or target.engine_name == "sglang"
    run.claim(STAGE, settings(run, recipe, target, "sglang" if over_http else "transformers"))
    plan = run.read_plan()
    chosen = plan.select(numbers)
    if retry_errors:
        _reopen(run, chosen)
    asker: Asker = Servers(target, recipe.regenerate, servers, run) if over_http else Batches(target, recipe.regenerate)
    with StageProgress(STAGE, sum(len(unit.rows) for unit in chosen)) as progress, asker:
        for unit in chosen:
            if unit not in plan.needed(lambda u: answer_tokens(run.tokens(u.unit))) or run.tokens(unit.unit).is_file():
                progress.total -= len(unit.rows)  # spare, since the answer-token limit is reached, or finished
                continue
            _answer_unit(run, unit, asker, progress, stop)
    result = summary(run, chosen)
    check_rejected(STAGE, result["done"], result["rejected"], recipe.max_rejected, run.errors(STAGE))
    return result


def _reopen(run: Run, units: list[Unit]) -> None:
    finished = [unit for unit in units if run.tokens(unit.unit).is_file()]
    worth = [unit for unit in finished if any(reject.retry for reject in run.read_rejects(STAGE, unit.unit))]
    if dumped := [unit.unit for unit in worth if sealed(run.dump, unit.unit)]:
        raise UserError(
            f"units {dumped} are dumped already without their rejected rows; remove their folders in {run.dump} to add the rows"
        )
    for unit in worth:
        reopen(run, unit, STAGE)


def summary(run: Run, units: list[Unit]) -> Summary:
    """Counts over the finished ones of these units: in = done + rejected."""
    finished = [unit for unit in units if run.tokens(unit.unit).is_file()]
    rejected = sum(len(run.read_rejects(STAGE, unit.unit)) for unit in finished)
    return {
        "done": sum(len(unit.rows) for unit in finished) - rejected,
        "rejected": rejected,
        "units": [unit.unit for unit in finished],
        "answer_tokens": sum(answer_tokens(run.tokens(unit.unit)) or 0 for unit in finished),
    }


def _answer_unit(run: Run, unit: Unit, asker: Asker, progress: StageProgress, stop: StopSignal) -> None:
    """Answer what an earlier attempt left open, and publish the unit."""
    dialogues = [begin(row) for row in read_unit(run, unit)]
    with Journal(journal_path(run, unit.unit)) as journal:
        asking = [dialogue for dialogue in dialogues if not journal.restore(dialogue)]
        progress.total -= len(dialogues) - len(asking)

        def done(dialogue: Dialogue) -> None:
            journal.add(dialogue)
            progress.advance(1, dialogue.answer_tokens)

        asker.answer_all(asking, stop, done)
    _write_unit(run, unit, dialogues)
    journal.path.unlink()


class Batches:
    """Answers from transformers in this process: all open dialogues' next turns, batch by batch."""

    def __init__(self, target: OpenTarget, config: RegenerateConfig):
        self.target, self.config = target, config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @cached_property
    def engine(self) -> TransformersEngine:
        return self.target.transformers()

    def answer_all(self, dialogues: list[Dialogue], stop: StopSignal, done: Callable[[Dialogue], None]) -> None:
        """Bring every dialogue to its end; `done` is called as each gets there."""
        config = self.config
        sampling = Sampling(config.temperature, config.top_p, config.top_k, config.seed, config.min_p)
        while asking := [dialogue for dialogue in dialogues if dialogue.open]:
            todo = [(dialogue, ask(dialogue, self.target, config.max_tokens)) for dialogue in asking]
            for dialogue in (dialogue for dialogue, request in todo if request is None):
                done(dialogue)
            todo = [(dialogue, request) for dialogue, request in todo if request is not None]
            todo.sort(key=lambda pair: len(pair[1].prompt))  # less padding
            for start in range(0, len(todo), config.batch_size):
                stop.check()
                batch = todo[start : start + config.batch_size]
                answers = self.engine.generate([request for _, request in batch], sampling)
                for (dialogue, request), answer in zip(batch, answers, strict=True):
                    take(dialogue, request, answer, self.target)
                    if not dialogue.open:
                        done(dialogue)


Asker = Batches | Servers


def _write_unit(run: Run, unit: Unit, dialogues: list[Dialogue]) -> None:
    """Text for people and rejects first; the parquet file last, since its presence means done."""
    done = [dialogue for dialogue in dialogues if dialogue.reject is None]
    write_jsonl(run.regenerated(unit.unit), [dialogue.text() for dialogue in done])
    run.write_rejects(STAGE, unit.unit, [d.reject for d in dialogues if d.reject is not None])
    write_token_rows(run.tokens(unit.unit), [row for dialogue in done for row in dialogue.token_rows(unit.split)])
