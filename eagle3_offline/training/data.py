"""A sealed dump as what training needs of it: the draft's start, the teacher, and batches that are read ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import TrainConfig
from ..draft.batch import DraftBatch, collate, to_torch
from ..draft.model import DraftHead, new_head
from ..draft.settings import DraftSettings, draft_settings
from ..draft.vocabulary import DraftVocabulary, draft_vocabulary
from ..records import Sample, UserError
from ..store.reader import Dump
from .order import rank_batches, step_rows

READ_AHEAD = 4  # steps that are decoded before they are needed


@dataclass(frozen=True)
class Source:
    """A dump, opened for the training of one draft."""

    dump: Dump
    settings: DraftSettings
    vocabulary: DraftVocabulary
    aux_scale: Tensor | None  # [n_aux * H] fp32
    embed: Tensor  # [V, H]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]
    train_rows: np.ndarray
    eval_rows: np.ndarray

    @property
    def target_ids(self) -> Tensor:
        """[D] int64: the target's id of each draft token."""
        return torch.from_numpy(self.vocabulary.target_ids)

    def to(self, device: torch.device) -> Source:
        """The target's tensors on a device; samples stay on the host."""
        return replace(self, embed=self.embed.to(device), norm=self.norm.to(device), lm_head=self.lm_head.to(device))

    def held_out(self, rows: int | None) -> Iterator[Sample]:
        """The first `rows` held-out samples, all for None."""
        return (self.dump.sample(int(i)) for i in self.eval_rows[:rows])

    def new_head(self, config: TrainConfig) -> DraftHead:
        """The draft before its first step."""
        if config.head_init == "random":
            return new_head(self.settings, config.seed)
        return new_head(
            self.settings, config.seed, self.lm_head[self.target_ids.to(self.lm_head.device)].float().cpu(), self.norm.float().cpu()
        )


def open_source(path: Path | str, config: TrainConfig) -> Source:
    """Open a dump for training. Raises UserError where it is missing, damaged or has no rows to train on."""
    dump = Dump.open(path)
    if dump.spec.compact:
        raise UserError(f"{path} is a compact dump; drafts train from full dumps only so far: use the dump that it was made from")
    train_rows, eval_rows = dump.rows("train"), dump.rows("eval")
    train_rows = train_rows[dump.supervised[train_rows] > 1]  # a row with one answer token predicts nothing
    if not len(train_rows):
        raise UserError(f"{path} has no train row with at least two answer tokens: nothing to train on")
    target = dump.target_tensors()
    statistics = dump.statistics
    settings = draft_settings(dump.target_json("config.json"), dump.spec.layers, config.draft_vocab_size)
    return Source(
        dump=dump,
        settings=settings,
        vocabulary=draft_vocabulary(statistics["token_counts"], settings.draft_vocab_size, end_of_turn_ids(dump)),
        aux_scale=_aux_scale(statistics["rms"]) if config.aux_scaling else None,
        embed=to_torch(target["embed_tokens.weight"]),
        norm=to_torch(target["norm.weight"]),
        lm_head=to_torch(target["lm_head.weight"]),
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def end_of_turn_ids(dump: Dump) -> list[int]:
    """The target's ids that end an answer; the draft must be able to propose them."""
    ids = (dump.target_json("generation_config.json") or dump.target_json("config.json")).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _aux_scale(rms: np.ndarray) -> Tensor:
    return torch.from_numpy(1.0 / np.maximum(rms, 1e-6)).float()


def read_ahead(source: Source, config: TrainConfig, rank: int, world: int, first_step: int) -> Iterator[list[DraftBatch]]:
    """This rank's micro-batches of each step from `first_step` on, decoded by a thread before they are needed."""
    ready: queue.Queue = queue.Queue(READ_AHEAD)
    done = threading.Event()

    def produce() -> None:
        try:
            for step in range(first_step, config.total_steps):
                rows = source.train_rows[step_rows(config.seed, step, config.batch_size, len(source.train_rows))]
                pieces = rank_batches(rows, rank, world, config.micro_batch_size)
                _put([_batch(source, piece, config) for piece in pieces])
            _put(None)
        except Exception as error:  # noqa: BLE001 - raised again by the consumer
            _put(error)

    def _put(item: object) -> None:
        while not done.is_set():
            try:
                return ready.put(item, timeout=0.5)
            except queue.Full:
                continue

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        done.set()


def _batch(source: Source, rows: np.ndarray, config: TrainConfig) -> DraftBatch:
    return collate([source.dump.sample(int(i)) for i in rows], config.ttt_length, source.aux_scale)
