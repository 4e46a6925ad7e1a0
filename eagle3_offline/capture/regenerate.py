"""The stage `regenerate`: the target answers every user turn, and its own token ids are kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from ..config import Recipe
from ..conversations.prepare import read_unit
from ..conversations.token_rows import answer_tokens, write_token_rows
from ..progress import StageProgress
from ..records import Conversation, Message, Reject, Summary, TokenRow, UserError
from ..runs import Run, StopSignal, Unit, check_rejected, digest, write_jsonl
from ..target.engine import Completion, Engine, Request, Sampling
from .target import OpenTarget

STAGE = "regenerate"


@dataclass
class Dialogue:
    """A conversation while it is answered, turn by turn."""

    row: Conversation
    pending: list[Message]  # user messages not yet asked
    history: list[Message]  # messages so far, answers as text
    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    reject: Reject | None = None

    @property
    def open(self) -> bool:
        """Whether there is a turn to ask: after an answer that was cut by length none is."""
        return self.reject is None and bool(self.pending) and "length" not in self.finish_reasons


def settings(run: Run, recipe: Recipe, target: OpenTarget) -> dict[str, object]:
    """What the answers depend on; the batch size is none of it."""
    sampling = {k: v for k, v in dataclasses.asdict(recipe.regenerate).items() if k != "batch_size"}
    return {
        **sampling,
        "dtype": target.dtype,
        "context": target.context,
        "target": digest(target.fingerprint),
        "prepare": digest(run.claimed("prepare")),
    }


def regenerate(run: Run, recipe: Recipe, target: OpenTarget, numbers: list[int] | None, stop: StopSignal) -> Summary:
    """Answer the units (all that the plan needs, for None). Finished units are skipped; a stop loses at most the current one."""
    run.claim(STAGE, settings(run, recipe, target))
    plan = run.read_plan()
    chosen = plan.select(numbers)
    engine: Engine | None = None
    with StageProgress(STAGE, sum(len(unit.rows) for unit in chosen)) as progress:
        for unit in chosen:
            if unit not in plan.needed(lambda u: answer_tokens(run.tokens(u.unit))) or run.tokens(unit.unit).is_file():
                progress.total -= len(unit.rows)  # spare, since the answer-token limit is reached, or finished
                continue
            engine = engine or target.engine()
            _answer_unit(run, unit, engine, target, recipe, stop, progress)
    result = summary(run, chosen)
    check_rejected(STAGE, result["done"], result["rejected"], recipe.max_rejected, run.errors(STAGE))
    return result


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


def _answer_unit(
    run: Run, unit: Unit, engine: Engine, target: OpenTarget, recipe: Recipe, stop: StopSignal, progress: StageProgress
) -> None:
    config = recipe.regenerate
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.seed)
    dialogues = [_begin(row) for row in read_unit(run, unit)]
    while asking := [dialogue for dialogue in dialogues if dialogue.open]:
        requests = [_ask(dialogue, target, config.max_tokens) for dialogue in asking]
        todo = [(d, r) for d, r in zip(asking, requests, strict=True) if r is not None]
        todo.sort(key=lambda pair: len(pair[1].prompt))  # less padding
        for start in range(0, len(todo), config.batch_size):
            stop.check()
            batch = todo[start : start + config.batch_size]
            answers = engine.generate([request for _, request in batch], sampling)
            for (dialogue, request), answer in zip(batch, answers, strict=True):
                _take(dialogue, request, answer, target)
            over = sum(not dialogue.open for dialogue, _ in batch)
            progress.advance(over, sum(len(answer.token_ids) for answer in answers))
    _write_unit(run, unit, dialogues)


def _begin(row: Conversation) -> Dialogue:
    history = [message for message in row.messages if message.role == "system"]
    return Dialogue(row, [message for message in row.messages if message.role == "user"], history)


def _ask(dialogue: Dialogue, target: OpenTarget, max_tokens: int) -> Request | None:
    """The request for the next answer; None (and a reject) where it can't be asked."""
    dialogue.history.append(dialogue.pending.pop(0))
    try:
        prompt = (
            target.template.next_prompt(dialogue.ids, dialogue.history)
            if dialogue.turns
            else target.template.first_prompt(dialogue.history)
        )
    except UserError as error:
        dialogue.reject = Reject(str(error), id=dialogue.row.id)
        return None
    if len(prompt) >= target.context:
        dialogue.reject = Reject(
            f"the prompt has {len(prompt)} tokens; with at least one answer token the limit is {target.context}", id=dialogue.row.id
        )
        return None
    return Request(f"{dialogue.row.id}#{len(dialogue.turns)}", prompt, min(max_tokens, target.context - len(prompt)))


def _take(dialogue: Dialogue, request: Request, answer: Completion, target: OpenTarget) -> None:
    """Append an answer. One without any text is no answer: the row is rejected."""
    text = target.template.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    if not text.strip():
        dialogue.reject = Reject(
            f"no assistant turn: the target's answer to turn {len(dialogue.turns)} is empty", id=dialogue.row.id, retry=True
        )
        return
    start = len(request.prompt)
    dialogue.ids = [*request.prompt, *answer.token_ids]
    dialogue.turns.append((start, len(dialogue.ids)))
    dialogue.finish_reasons.append(answer.finish_reason)
    dialogue.history.append(Message("assistant", text))


def _write_unit(run: Run, unit: Unit, dialogues: list[Dialogue]) -> None:
    """Text for people and rejects first; the parquet file last, since its presence means done."""
    done = [dialogue for dialogue in dialogues if dialogue.reject is None]
    rows = [
        TokenRow(d.row.id, d.row.source, unit.split, np.array(d.ids, np.int32), tuple(d.turns), tuple(d.finish_reasons))
        for d in done
    ]  # fmt: skip
    texts = [{"id": d.row.id, "conversations": [dataclasses.asdict(m) for m in d.history], "source": d.row.source} for d in done]
    write_jsonl(run.regenerated(unit.unit), texts)
    run.write_rejects(STAGE, unit.unit, [d.reject for d in dialogues if d.reject is not None])
    write_token_rows(run.tokens(unit.unit), rows)
