"""Decode held-out prompts speculatively (a chain, with key/value caches, fp32) and plainly, in one run, and compare.

One verification step, chain of 3, root r (the newest token, its state not yet known):

    target reads        r   d1  d2  d3        its argmax after each:  a0  a1  a2  a3
    accepted            d1 = a0, d2 = a1, d3 != a2   ->  2 drafts and the bonus token a2
    kept in the caches  r   d1  d2                the new root is a2
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import Recipe
from ..draft.export import read_export
from ..draft.held_out import measure
from ..draft.measures import WalkCount, ratio, total
from ..draft.model import DraftHead
from ..draft.serving import ChainDrafter
from ..draft.trained import TrainedDraft, load_trained
from ..progress import StageProgress
from ..records import Sample, Summary, UserError
from ..runs import Run, StopSignal, append_jsonl, continue_jsonl, digest, read_json, write_json
from ..store.reader import Dump
from ..target.engine import States
from ..target.transformers_engine import TransformersEngine, boundary_inputs, decoder_layers
from .ngram import common_prefix
from .simulate import check_dump, ngram_walks


@dataclass(frozen=True)
class Step:
    """One verification step: what was drafted, how many of it the target accepted, and its product."""

    drafted: list[int]
    accepted: int
    product: int  # tokens of the answer that the step gave, cut at its end


@dataclass(frozen=True)
class Decoded:
    """One prompt, decoded both ways."""

    id: str
    prompt: list[int]
    plain: list[int]
    speculative: list[int]
    steps: list[Step]
    plain_seconds: float
    speculative_seconds: float


class Decoder:
    """The target in fp32 with a key/value cache, and the draft beside it."""

    def __init__(self, engine: TransformersEngine, head: DraftHead, target_ids: Tensor, chain: int, max_tokens: int):
        self.engine, self.head, self.target_ids = engine, head.to(engine.device), target_ids.to(engine.device)
        self.chain, self.max_tokens = chain, max_tokens
        self.embed = engine.model.get_input_embeddings().weight.detach()

    @torch.inference_mode()
    def plain(self, prompt: list[int]) -> list[int]:
        """The greedy answer, one token per forward pass."""
        cache, answer, ids = DynamicCache(), [], prompt
        while not self._over(answer):
            out = self.engine.model(input_ids=self._ids([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            answer.append(int(out.logits[0, -1].argmax()))
            ids = answer[-1:]
        return answer

    @torch.inference_mode()
    def speculative(self, prompt: list[int]) -> tuple[list[int], list[Step]]:
        """The answer by draft and verification."""
        cache, drafter = DynamicCache(), ChainDrafter(self.head, self.embed, self.target_ids)
        argmax, aux = self._read(prompt, cache)
        answer, steps = [int(argmax[-1])], []
        tokens = [*prompt[1:], answer[0]]  # row p pairs the feature of token p with token p + 1
        while not self._over(answer):
            drafter.extend(aux, self._ids(tokens))
            drafted = drafter.draft(self.chain)
            argmax, aux = self._read([answer[-1], *drafted], cache)
            accepted = common_prefix(drafted, argmax[:-1].tolist())
            gained = self._cut(answer, argmax[: accepted + 1].tolist())  # the accepted drafts are the target's own argmax
            cache.crop(cache.get_seq_length() - self.chain + accepted)
            aux, tokens = aux[: accepted + 1], argmax[: accepted + 1].tolist()
            answer += gained
            steps.append(Step(drafted, accepted, len(gained)))
        return answer, steps

    def _read(self, ids: list[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """The target's argmax [n] and captured states [n, A] at these new tokens."""
        with boundary_inputs(decoder_layers(self.engine.model), self.engine.layers) as captured:
            out = self.engine.model(input_ids=self._ids([ids]), past_key_values=cache, use_cache=True)
        return out.logits[0].argmax(-1), torch.cat([captured[b][0] for b in self.engine.layers], dim=-1)

    def _ids(self, ids: list) -> Tensor:
        return torch.tensor(ids, device=self.engine.device)

    def _over(self, answer: list[int]) -> bool:
        return bool(answer) and (answer[-1] in self.engine.end_ids or len(answer) >= self.max_tokens)

    def _cut(self, answer: list[int], gained: list[int]) -> list[int]:
        """The tokens up to the end of the turn (inclusive) or the token limit."""
        kept = []
        for token in gained:
            if self._over([*answer, *kept]):
                break
            kept.append(token)
        return kept


def decode(run: Run, recipe: Recipe, target_folder: Path, stop: StopSignal) -> Summary:
    """Decode evaluate.decode_rows held-out prompts with the exported draft; compare with plain decoding and with the walk.

    Every prompt is kept in decoded.jsonl as it is done; a re-run goes on behind the last one.
    """
    folder, config = run.draft(recipe.train.draft), recipe.evaluate
    if not (folder / "export" / "config.json").is_file():
        raise UserError(f"{folder}/export does not exist: run `export` first")
    dump = Dump.open(run.dump)
    rows = dump.rows("eval")[: config.decode_rows]
    trained = load_trained(folder)
    check_dump(trained, dump)
    key = {
        "dump": dump.manifest["digest"],
        "export": [_sha256(folder / "export" / name) for name in ("config.json", "model.safetensors")],
        "chain": config.chain,
        "ngram": config.ngram,
        "rows": len(rows),
        "max_tokens": recipe.regenerate.max_tokens,
    }
    result = folder / "decoded.json"
    if result.is_file() and (known := read_json(result))["key"] == key:
        return known["summary"]
    engine = TransformersEngine(target_folder, trained.head.settings.layers, "float32", recipe.target.trust_remote_code)
    decoder = Decoder(engine, *read_export(folder / "export"), config.chain, recipe.regenerate.max_tokens)
    decoded = _decode_rows(decoder, dump, rows, folder / f"decoded-{digest(key)}.jsonl", stop)
    summary = {**_compare(decoded), **_walk(engine, decoded, trained, config.chain)}
    ngram_rows = [(np.array(d.prompt + d.plain), ((len(d.prompt), len(d.prompt) + len(d.plain)),)) for d in decoded]
    summary["ngram_tau"] = total(ngram_walks(dump, ngram_rows, config)).tau
    write_json(result, {"key": key, "summary": summary, "answers": [asdict(d) for d in decoded]})
    return summary


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _decode_rows(decoder: Decoder, dump: Dump, rows: np.ndarray, path: Path, stop: StopSignal) -> list[Decoded]:
    decoded = [_from_json(value) for value in continue_jsonl(path)]
    with StageProgress("decode", len(rows) - len(decoded)) as progress:
        for i in rows[len(decoded) :]:
            stop.check()
            start = dump.turns(int(i))[0][0]
            decoded.append(_decode_one(decoder, dump.ids(int(i)), dump.input_ids(int(i))[:start].tolist()))
            append_jsonl(path, asdict(decoded[-1]))
            progress.advance(1, len(decoded[-1].plain))
    return decoded


def _from_json(value: dict) -> Decoded:
    return Decoded(**{**value, "steps": [Step(**step) for step in value["steps"]]})


def _decode_one(decoder: Decoder, name: str, prompt: list[int]) -> Decoded:
    began = time.perf_counter()
    plain = decoder.plain(prompt)
    between = time.perf_counter()
    speculative, steps = decoder.speculative(prompt)
    return Decoded(name, prompt, plain, speculative, steps, between - began, time.perf_counter() - between)


def _compare(decoded: list[Decoded]) -> Summary:
    count = WalkCount(sum(step.product for d in decoded for step in d.steps), sum(len(d.steps) for d in decoded))
    drafts = sum(step.accepted for d in decoded for step in d.steps)
    plain, speculative = sum(d.plain_seconds for d in decoded), sum(d.speculative_seconds for d in decoded)
    return {
        "answers": len(decoded),
        "answer_tokens": sum(len(d.plain) for d in decoded),
        "identical": sum(d.plain == d.speculative for d in decoded),
        "tau": count.tau,
        "tau_uncut": ratio(count.steps + drafts, count.steps),
        "verification_steps": count.steps,
        "plain_seconds": plain,
        "speculative_seconds": speculative,
        "speedup": ratio(plain, speculative),
    }


def _walk(engine: TransformersEngine, decoded: list[Decoded], trained: TrainedDraft, chain: int) -> Summary:
    """The walk of the trainer's draft over the same prompts' fp32 answers and states: it must give the decoded tau."""

    def samples():  # noqa: ANN202
        for d in decoded:
            ids = np.array(d.prompt + d.plain, np.int32)
            states: States = engine.prefill([ids])[0]
            yield Sample(d.id, ids, ((len(d.prompt), len(ids)),), trained.project(states.side_by_side()), states.last, np.arange(len(ids)))

    embed = engine.model.get_input_embeddings().weight.detach()
    result = measure(
        trained.head.to(engine.device), samples(), embed=embed, target_ids=trained.target_ids, chain=chain, aux_scale=trained.aux_scale
    )
    return {"walk_tau": result.walk.tau, "first_root_hit": result.summary()["first_root_hit"]}
