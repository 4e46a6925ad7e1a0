"""Samples of the store to the flat tensors of an unroll. Legend: N rows of all conversations, n_k rows alive at step k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..records import Sample, turn_of_token
from .shift import input_token, predicted_token, serving_rows


@dataclass(frozen=True)
class StepRows:
    """The rows that are alive at one step, over all conversations of a batch."""

    rows: Tensor  # [n_k] flat row index
    kept: Tensor  # [n_k] index of each row among the previous step's rows (step 0: among all rows)
    positions: Tensor  # [n_k] rotary position p + k
    tokens: Tensor  # [n_k] token that the row reads, x[p+1+k]
    predicted: Tensor  # [n_k] token that followed, x[p+2+k]
    teacher: Tensor  # [n_k] index into the rows of DraftBatch.last or DraftBatch.top
    counts: tuple[int, ...]  # rows per conversation; sums to n_k


@dataclass(frozen=True)
class TopRows:
    """The teachers of a compact dump (records.TopLogits) as tensors."""

    ids: Tensor  # [n, k] int64 target ids, the whole vocabulary's argmax first
    log_probs: Tensor  # [n, k] fp32: logit - log-sum-exp of the whole vocabulary


def _each_tensor(value: object, apply: Callable[[Tensor], Tensor]) -> object:
    """The value with all of its tensors replaced, those of its records too."""
    if isinstance(value, Tensor):
        return apply(value)
    if is_dataclass(value):
        return replace(value, **{f.name: _each_tensor(getattr(value, f.name), apply) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(_each_tensor(item, apply) for item in value)
    return value


@dataclass(frozen=True)
class DraftBatch:
    """Several conversations side by side: no padding, segments instead."""

    ids: tuple[str, ...]
    aux: Tensor  # [N, A] captured states (or their projection) of tokens 0..T-2 of every conversation, as stored
    aux_scale: Tensor | None  # [A] fp32
    tokens: Tensor  # [N] the token of each row at step 0, x[p+1]
    positions: Tensor  # [N] p
    segments: tuple[tuple[int, int], ...]  # flat row range of each conversation
    last: Tensor | None  # [n, H] the target's post-norm last states; None: from a compact dump
    top: TopRows | None  # the teachers of a compact dump
    teacher_counts: tuple[int, ...]  # rows of `last` or `top` per conversation
    steps: tuple[StepRows, ...]

    @property
    def scaled(self) -> Tensor:
        """[N, A] the captured channels as the draft reads them."""
        return self.aux if self.aux_scale is None else self.aux * self.aux_scale

    def to(self, device: torch.device) -> DraftBatch:
        """The same batch on a device; from pinned memory the copy waits for nothing."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> DraftBatch:
        """The same batch in pinned memory, which torch keeps and uses again."""
        return _each_tensor(self, Tensor.pin_memory)


def to_torch(array: np.ndarray) -> Tensor:
    """Storage dtype to torch: uint16 holds the bits of bfloat16. Copies only what is read-only (a mapped file)."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def collate(samples: list[Sample], steps: int, aux_scale: Tensor | None = None) -> DraftBatch:
    """The batch of these samples, unrolled over `steps` steps.

    aux_scale [A] multiplies the captured channels (training with channel scaling; export folds it into fc). All in numpy, so that
    a thread beside the training starts no torch threads of its own, which would take the cores from the training's.
    """
    starts = np.cumsum([0, *(len(sample.input_ids) - 1 for sample in samples)])
    teacher_starts = np.cumsum([0, *(len(sample.last_positions) for sample in samples)])
    ids = [sample.input_ids.astype(np.int64) for sample in samples]
    return DraftBatch(
        ids=tuple(sample.id for sample in samples),
        aux=to_torch(np.concatenate([sample.aux[:-1] for sample in samples])),
        aux_scale=aux_scale,
        tokens=torch.from_numpy(np.concatenate([x[1:] for x in ids])),
        positions=torch.from_numpy(np.concatenate([np.arange(len(x) - 1) for x in ids])),
        segments=tuple((int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)),
        last=to_torch(np.concatenate([sample.last for sample in samples])) if samples[0].last is not None else None,
        top=_top_rows(samples) if samples[0].top is not None else None,
        teacher_counts=tuple(len(sample.last_positions) for sample in samples),
        steps=tuple(_step_rows(samples, ids, starts, teacher_starts, step) for step in range(steps)),
    )


def _top_rows(samples: list[Sample]) -> TopRows:
    ids = np.concatenate([sample.top.ids for sample in samples]).astype(np.int64)
    log_probs = np.concatenate([sample.top.log_probs for sample in samples]).astype(np.float32)
    return TopRows(torch.from_numpy(ids), torch.from_numpy(log_probs))


def _step_rows(samples: list[Sample], ids: list[np.ndarray], starts: np.ndarray, teacher_starts: np.ndarray, step: int) -> StepRows:
    pieces, counts, before = [], [], 0
    for number, sample in enumerate(samples):
        turn = turn_of_token(sample.turns, len(sample.input_ids))
        rows = serving_rows(turn, step)
        previous = serving_rows(turn, step - 1) if step else np.arange(len(turn) - 1)
        teacher = np.searchsorted(sample.last_positions, input_token(rows, step))
        if not np.array_equal(sample.last_positions[teacher], input_token(rows, step)):
            raise ValueError(f"row {sample.id}: the store holds no teacher for a supervised row at step {step}")
        pieces.append((
            starts[number] + rows,
            before + np.searchsorted(previous, rows),
            rows + step,
            ids[number][input_token(rows, step)],
            ids[number][predicted_token(rows, step)],
            teacher_starts[number] + teacher,
        ))  # fmt: skip
        counts.append(len(rows))
        before += len(previous)
    rows, kept, positions, tokens, predicted, teacher = (torch.from_numpy(np.concatenate(column)) for column in zip(*pieces, strict=True))
    return StepRows(rows, kept, positions, tokens, predicted, teacher, tuple(counts))
