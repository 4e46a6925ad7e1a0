"""`store degrade`: any mode of a dump from a lossless one, without the target. Only the head in `dump/target/` is needed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import DumpConfig
from ..logits import head_transform
from ..progress import StageProgress
from ..records import CapturedRow, Reject, Sample, Summary, TokenRow, TooManyRejected, UserError
from ..runs import StopSignal
from ..store.background import BackgroundPart
from ..store.estimate import estimate, refuse_full_disk
from ..store.format import EXACT_CODECS, Compact, DumpSpec
from ..store.merge import planned_units
from ..store.numeric import to_float32
from ..store.part import read_part_json
from ..store.places import is_remote, place
from ..store.reader import Dump
from ..store.seal import seal, sealed
from ..store.target_files import BASIS, BIAS, carried, has_target, read_basis, read_index, write_target
from ..store.writer import PartWriter
from .compact import Moments, Reduction

CLAIM = "degraded.json"  # in the new dump's folder: what it is made of


def degrade(source: Path | str, into: Path | str, config: DumpConfig, stop: StopSignal) -> Summary:
    """Write the rows of a lossless dump into `into` under the codecs and mode of `config`, and seal it. Sealed parts are kept."""
    dump = Dump.open(source)
    if dump.spec.compact or {dump.spec.codec, dump.spec.last_codec} - set(EXACT_CODECS):
        kind = "compact" if dump.spec.compact else f"lossy ({dump.spec.codec}, {dump.spec.last_codec})"
        raise UserError(f"{source} is {kind} itself; degrade a full lossless dump, so that what is lost is lost once")
    _claim(dump, into, config)
    spec, reduction = _prepare(dump, into, config, stop)
    _check_space(dump, into, spec, config.force)
    rejects: list[Reject] = []
    with StageProgress("store degrade", len(dump)) as progress:
        for number, entry in enumerate(dump.manifest["parts"]):
            if not sealed(into, entry["unit"]):
                rejects += _degrade_part(dump, number, into, spec, reduction, config, stop, progress)
    counts = seal(into, spec, planned_units(dump), missing=dump.manifest["missing"]["rows"])["counts"]
    lost = counts["rejected"] - dump.manifest["counts"]["rejected"]
    if lost:
        named = "; ".join(reject.reason for reject in rejects[:3]) or "see the parts' part.json"
        raise TooManyRejected(f"{lost} of {len(dump)} rows could not be stored in {into} ({named}): choose another codec or mode")
    return {"dump": str(into), **counts, "share_of_raw": counts["stored_bytes"] / max(1, counts["raw_bytes"])}


def _check_space(dump: Dump, into: Path | str, spec: DumpSpec, force: bool) -> None:
    """Refuse to begin what the disk will not hold. For object storage that is one part at a time, before it is sent."""
    parts = [part for part in dump.manifest["parts"] if not sealed(into, part["unit"])]
    sizes = [estimate(spec, part["rows"], part["tokens"], part["last"]).bytes for part in parts]
    if sizes and is_remote(into):
        refuse_full_disk(tempfile.gettempdir(), max(sizes), "a part", force)
    elif sizes:
        refuse_full_disk(into, sum(sizes), f"what is left of {into}", force)


def _claim(dump: Dump, into: Path | str, config: DumpConfig) -> None:
    """Bind a folder to its source and settings, so that an interrupted attempt is finished with the same, and nothing else is touched."""
    wanted = {"source": dump.manifest["digest"], "mode": config.mode, "codec": config.aux_codec, "last_codec": config.last_codec}
    wanted |= {"rank": config.compact_rank(dump.spec.hidden_size), "top_k": config.top_k} if config.mode == "compact" else {}
    where = place(into) / CLAIM
    try:
        found = json.loads(where.read())
    except FileNotFoundError:
        if has_target(into):
            raise UserError(f"{into} holds another dump: name a new folder") from None
        where.write(json.dumps(wanted).encode())
    else:
        if found != wanted:
            raise UserError(f"{into} was begun with {found}, now it is {wanted}: name a new folder, or remove this one")


def _prepare(dump: Dump, into: Path | str, config: DumpConfig, stop: StopSignal) -> tuple[DumpSpec, Reduction | None]:
    """Write `target/` and return the new spec, with what reduces the rows of a compact dump."""
    dtypes = dump.target_dtypes()
    if config.mode == "full":
        write_target(into, dump.target_tensors(), dtypes, carried(dump.where))
        return replace(dump.spec, codec=config.aux_codec, last_codec=config.teacher_codec), None
    rank = config.compact_rank(dump.spec.hidden_size)
    if not has_target(into):  # an interrupted attempt's basis is used again
        write_target(
            into,
            dump.target_tensors(),
            dtypes,
            carried(dump.where),
            fit_basis_of_dump(dump, rank, stop),
        )
    compact = Compact(rank, config.top_k, read_index(into)[BASIS]["xxh3_128"])
    spec = replace(dump.spec, codec=config.aux_codec, last_codec=None, compact=compact)
    basis = read_basis(into)
    transform = head_transform(dump.target_json("config.json"), _float(dump, BIAS) if BIAS in dump.target_tensors() else None)
    return spec, Reduction(spec, basis, _float(dump, "lm_head.weight"), "cuda" if torch.cuda.is_available() else "cpu", transform)


def fit_basis_of_dump(dump: Dump, rank: int, stop: StopSignal) -> dict[str, np.ndarray]:
    """The basis from all train rows of a lossless dump."""
    moments = Moments(dump.spec.aux_channels, dump.spec.hidden_size)
    norm = _float(dump, "norm.weight")
    rows = dump.rows("train")
    with StageProgress("fit-basis", len(rows)) as progress:
        for i in rows.tolist():
            stop.check()
            sample = dump.sample(i)
            moments.add(_token_row(sample, "", "train", ()), sample.aux, sample.last, norm, dump.spec.dtype)
            progress.advance(1, len(sample.input_ids))
    return moments.basis(rank)


def _float(dump: Dump, name: str) -> Tensor:
    return torch.from_numpy(to_float32(np.array(dump.target_tensors()[name]), dump.target_dtypes()[name]))


def _degrade_part(
    dump: Dump, number: int, into: Path | str, spec: DumpSpec, reduction: Reduction | None, config: DumpConfig, stop: StopSignal,
    progress: StageProgress,
) -> list[Reject]:  # fmt: skip
    """The rows that could not be stored."""
    entry = dump.manifest["parts"][number]
    content = read_part_json(dump.where / "parts" / entry["name"], entry["part_json"])
    scratch = Path(tempfile.gettempdir()) / "eagle3-offline-sending"
    part = PartWriter(into, entry["unit"], entry["split"], spec, scratch=scratch, threads=config.writer_threads)
    with BackgroundPart(part) as background:
        for reject in content["rejects"]:
            part.reject(Reject(reject["reason"], id=reject["id"]))
        for row, sample in _rows(dump, number, content):
            stop.check()
            whole = CapturedRow(row, sample.aux, sample.last)
            background.add(whole if reduction is None else reduction(row, whole.aux, whole.last))
            progress.advance(1, len(row.input_ids))
        rejects = background.finish()
        part.seal()
    return rejects


def _rows(dump: Dump, number: int, content: dict) -> Iterator[tuple[TokenRow, Sample]]:
    """Rows of one part in stored order."""
    for i in dump.rows_of_part(number):
        sample, about = dump.sample(i), content["rows"][int(dump.places[i])]
        yield _token_row(sample, about["source"], content["split"], tuple(about["finish_reasons"])), sample


def _token_row(sample: Sample, source: str, split: str, finish_reasons: tuple[str, ...]) -> TokenRow:
    return TokenRow(sample.id, source, split, sample.input_ids, sample.turns, finish_reasons)
