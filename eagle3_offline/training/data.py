"""A sealed dump as what training needs of it: the draft's start, the teacher, and batches that are read ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import TrainConfig
from ..draft.batch import DraftBatch, collate, to_torch
from ..draft.model import DraftHead, new_head
from ..draft.published import Published, fit, read_published, same_embedding
from ..draft.settings import DraftSettings, draft_settings
from ..draft.vocabulary import DraftVocabulary, draft_vocabulary
from ..logits import HeadTransform, head_transform
from ..records import Sample, UserError
from ..store.reader import Dump
from ..store.target_files import BIAS, LAST_LAYER
from .order import rank_batches, rank_packs, step_rows

READ_AHEAD = 4  # steps that are decoded before they are needed
READERS = 2  # threads that decode


@dataclass(frozen=True)
class Source:
    """A dump, opened for the training of one draft."""

    dump: Dump
    settings: DraftSettings
    vocabulary: DraftVocabulary
    aux_scale: Tensor | None  # [n_aux * H] fp32; None also with fc_norm, and for a compact dump, whose projection has the scale in it
    fc_norm: Tensor | None  # [n_aux * H] fp32, starting weights of its norms: the scale as it is within each layer
    embed: Tensor  # [V, H]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]
    transform: HeadTransform  # of the target's head
    train_rows: np.ndarray
    eval_rows: np.ndarray
    published: Published | None = None  # the draft to start from

    @property
    def target_ids(self) -> Tensor:
        """[D] int64: the target's id of each draft token."""
        return torch.from_numpy(self.vocabulary.target_ids)

    def to(self, device: torch.device) -> Source:
        """The target's tensors on a device; samples stay on the host."""
        return replace(self, embed=self.embed.to(device), norm=self.norm.to(device), lm_head=self.lm_head.to(device))

    def held_out(self, rows: int | None) -> Iterator[Sample]:
        """The first `rows` held-out samples, all for None."""
        return self.samples(self.eval_rows[:rows])

    def sample(self, row: int) -> Sample:
        """One row with the layers that the draft reads."""
        return self.dump.sample(int(row), self.settings.layers)

    def samples(self, rows: Iterable[int]) -> Iterator[Sample]:
        """These rows with the layers that the draft reads, decoded ahead of their use."""
        return self.dump.samples(rows, self.settings.layers, threads=READERS)

    @property
    def top_k(self) -> int | None:
        """Logits kept of each teacher in a compact dump; None: a full dump."""
        return self.dump.spec.compact.top_k if self.dump.spec.compact else None

    def new_head(self, config: TrainConfig) -> DraftHead:
        """The draft before its first step."""
        if self.published is not None:
            return self.published.head(self.aux_scale)
        start = {}
        if config.head_init == "target":
            rows = self.lm_head[self.target_ids.to(self.lm_head.device)].float().cpu()
            start = {"lm_head": rows * self.transform.scale, "norm": self.norm.float().cpu()}  # a draft's logits are plain W h when served
        if self.fc_norm is not None:
            start["fc_norm"] = self.fc_norm
        if self.settings.owns_embedding:
            start["embed"] = principal_embedding(self.embed.float().cpu(), self.settings.hidden_size)
        if config.layer_init == "target":
            start["layer"] = _last_layer(self.dump, self.settings)
        return new_head(self.settings, config.seed, **start)


def open_source(path: Path | str, config: TrainConfig) -> Source:
    """Open a dump for training. Raises UserError where it is missing, damaged or has no rows to train on."""
    dump = Dump.open(path)
    published = published_draft(config, dump) if config.start_from else None
    layers = tuple(sorted(config.layers)) or (published.settings.layers if published else dump.spec.layers)
    if dump.spec.compact:
        _refuse_on_compact(dump, layers, config)
    if published is None and (unknown := sorted({*layers} - {*dump.spec.layers})):
        raise UserError(f"train.layers asks for {unknown}, {path} holds {list(dump.spec.layers)}: choose among these, or dump again")
    train_rows, eval_rows = dump.rows("train"), dump.rows("eval")
    train_rows = train_rows[dump.supervised[train_rows] > 1]  # a row with one answer token predicts nothing
    if not len(train_rows):
        raise UserError(f"{path} has no train row with at least two answer tokens: nothing to train on")
    target = dump.target_tensors()
    statistics = dump.statistics
    settings = draft_settings(
        dump.target_json("config.json"), layers, config.draft_vocab_size, fc_norm=config.fc_norm, norm_output=config.norm_output,
        hidden_size=config.hidden_size,
    )  # fmt: skip
    embed = to_torch(target["embed_tokens.weight"])
    if published is not None:
        published = fit(published, settings, dump.spec.layers)
        same_embedding(published, embed)
        settings = published.settings
    elif settings.owns_embedding and (config.head_init == "target" or config.fc_init == "ridge"):
        raise UserError(
            f"train.hidden_size is {config.hidden_size}, the target's is {settings.target_width}: the target's rows and states don't fit a "
            f"narrower draft, so set train.head_init=random and leave train.fc_init random"
        )
    if dump.spec.compact:
        settings = replace(settings, rank=dump.spec.compact.rank)
    scale = None if dump.spec.compact or not config.aux_scaling else _aux_scale(dump, statistics["rms"], layers)
    return Source(
        dump=dump,
        settings=settings,
        vocabulary=_vocabulary(dump, statistics["token_counts"], settings, published),
        aux_scale=None if config.fc_norm else scale,
        fc_norm=_within_layers(scale, len(layers)) if config.fc_norm and scale is not None else None,
        embed=embed,
        norm=to_torch(target["norm.weight"]),
        lm_head=to_torch(target["lm_head.weight"]),
        transform=head_transform(dump.target_json("config.json"), to_torch(target[BIAS]) if BIAS in target else None),
        train_rows=train_rows,
        eval_rows=eval_rows,
        published=published,
    )


def _last_layer(dump: Dump, settings: DraftSettings) -> dict[str, Tensor]:
    """The target's last decoder layer by a draft's names, fp32."""
    if settings.owns_embedding:
        raise UserError(
            f"train.hidden_size is {settings.hidden_size}: the target's layer does not fit a narrower draft, set train.layer_init=random"
        )
    found = {name: tensor for name, tensor in dump.target_tensors().items() if name.startswith(LAST_LAYER)}
    if not found:
        raise UserError(
            f"{dump.where} holds no last layer of the target (only newer dumps of Llamas and Mistrals without biases do): "
            f"set train.layer_init=random"
        )
    return {name.removeprefix(LAST_LAYER): to_torch(tensor).float() for name, tensor in found.items()}


def published_draft(config: TrainConfig, dump: Dump) -> Published:
    """The draft that the recipe starts from."""
    if dump.spec.compact:
        raise UserError(
            f"train.start_from is {config.start_from}, whose fc reads the captured states, but {dump.where} is a compact dump: "
            f"it holds a projection of them. Train from a full dump, or from a new draft"
        )
    return read_published(Path(config.start_from), dump.target_json("config.json"))


def _vocabulary(dump: Dump, counts: np.ndarray, settings: DraftSettings, published: Published | None) -> DraftVocabulary:
    """The draft's tokens: the most frequent ones, or those of the draft to start from."""
    if published is None:
        return draft_vocabulary(counts, settings.draft_vocab_size, end_of_turn_ids(dump))
    ids = published.target_ids.numpy()
    return DraftVocabulary(ids, float(counts[ids].sum() / max(1, counts.sum())))


def principal_embedding(embed: Tensor, width: int) -> Tensor:
    """[V, width]: the target's embedding [V, H] along the leading eigenvectors of its second moment, with which narrower drafts start."""
    _, vectors = torch.linalg.eigh(embed.T @ embed)  # ascending
    leading = vectors.flip(1)[:, :width]
    return embed @ (leading * torch.where(leading.sum(0) < 0, -1.0, 1.0))  # eigenvectors have no sign of their own


def end_of_turn_ids(dump: Dump) -> list[int]:
    """The target's ids that end an answer; the draft must be able to propose them."""
    ids = (dump.target_json("generation_config.json") or dump.target_json("config.json")).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _refuse_on_compact(dump: Dump, layers: tuple[int, ...], config: TrainConfig) -> None:
    """Raise UserError for what a projection of all layers together can't give."""
    if layers != dump.spec.layers:
        raise UserError(
            f"train.layers is {list(layers)}, but {dump.where} is a compact dump: it holds a projection of layers {list(dump.spec.layers)} "
            f"together, which can't be taken apart. Leave train.layers out, or dump again"
        )
    if config.fc_norm:
        raise UserError(
            f"train.fc_norm norms each layer before they are mixed, but {dump.where} is a compact dump: it holds them mixed. "
            f"Leave it false, or train from a full dump"
        )
    if not config.aux_scaling:
        raise UserError(f"train.aux_scaling is false, but {dump.where} is a compact dump: its projection holds the scaling. Leave it true")
    if dump.spec.compact.top_k < 2:
        raise UserError(f"{dump.where} keeps one logit of each teacher, that of the token that followed; training needs 2 or more")


def _aux_scale(dump: Dump, rms: np.ndarray, layers: tuple[int, ...]) -> Tensor:
    """[n_aux * H] of the layers that the draft reads; rms is of all captured channels."""
    rms = np.concatenate([dict(zip(dump.spec.layers, np.split(rms, len(dump.spec.layers)), strict=True))[layer] for layer in layers])
    return torch.from_numpy(1.0 / np.maximum(rms, 1e-6)).float()


def _within_layers(scale: Tensor, layers: int) -> Tensor:
    """The scale of channels that a norm of their layer has brought to a root mean square of 1 together."""
    return torch.cat([piece * piece.pow(-2).mean().sqrt() for piece in scale.split(len(scale) // layers)])


def read_ahead(source: Source, config: TrainConfig, rank: int, world: int, first_step: int) -> Iterator[list[DraftBatch]]:
    """This rank's micro-batches of each step from `first_step` on, decoded by threads before they are needed."""
    ready: queue.Queue = queue.Queue(READ_AHEAD)
    done = threading.Event()

    def produce() -> None:
        try:
            steps = range(first_step, config.total_steps)  # a training that ends before closes this
            plans, ahead = tee(micro_batches(source, config, rank, world, step) for step in steps)
            with closing(source.samples(row for plan in ahead for rows in plan for row in rows)) as samples:
                for plan in plans:
                    _put([_batch(source, list(islice(samples, len(rows))), config) for rows in plan])
                    if done.is_set():
                        return
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


def micro_batches(source: Source, config: TrainConfig, rank: int, world: int, step: int) -> list[np.ndarray]:
    """Rows of the dump in each of this rank's micro-batches of a step."""
    rows = source.train_rows[step_rows(config.seed, step, config.batch_size, len(source.train_rows))]
    if config.micro_batch_tokens:
        return rank_packs(rows, source.dump.lengths[rows], rank, world, config.micro_batch_tokens)
    return rank_batches(rows, rank, world, config.micro_batch_size)


def _batch(source: Source, samples: list[Sample], config: TrainConfig) -> DraftBatch:
    batch = collate(samples, config.ttt_length, source.aux_scale)
    return batch.pinned() if source.embed.is_cuda else batch
