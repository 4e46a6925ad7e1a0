"""`store import`: samples that SpecForge or speculators dumped, one file each, into a sealed dump.

    SpecForge    *.ckpt, *.ckpt.gz   input_ids [T], loss_mask [T], aux_hidden_state [1, T, n_aux * H], hidden_state [1, T, H] after the norm
    speculators  hs_*.safetensors    token_ids [T], hidden_states [T, n_aux + 1, H], the last one before the norm; loss_mask in its data set

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import Recipe
from ..progress import StageProgress
from ..records import CapturedRow, Reject, Summary, TokenRow, UserError
from ..runs import Run, StopSignal, check_rejected
from ..store.background import BackgroundPart
from ..store.format import DumpSpec, last_positions
from ..store.seal import PlannedUnit, seal, sealed
from ..store.target_files import write_target
from ..store.writer import PartWriter
from ..target.folder import carried_files, carried_tensors, head_tensors, text_config
from ..target.reduction import to_storage
from .target import OpenTarget

STAGE = "store import"
PLAIN_NORMS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Layout:
    """What the files hold."""

    name: str
    suffixes: tuple[str, ...]


SPECFORGE = Layout("specforge", (".ckpt", ".ckpt.gz"))
SPECULATORS = Layout("speculators", (".safetensors",))


@dataclass(frozen=True)
class Loaded:
    """One file's tensors in one form."""

    input_ids: Tensor  # [T]
    loss_mask: Tensor  # [T]
    aux: Tensor  # [T, n_aux * H]
    last: Tensor  # [T, H], after the norm


def import_samples(
    run: Run, recipe: Recipe, target: OpenTarget, folder: Path, masks: Path | None, trust_ckpt: bool, stop: StopSignal
) -> Summary:
    """Write the samples below `folder` as the run's dump and seal it.

    target: whose boundaries `layers` the samples hold, low to high. masks: for speculators, the data set with their loss masks.
    trust_ckpt: read .ckpt files, which are pickles (loaded with weights_only, so that none of their code runs).
    """
    layout, files = _find(folder, trust_ckpt)
    loader = _Loader(layout, folder, target, masks)
    spec = _spec(target, recipe, _first_dtype(files, loader), layout)
    tensors = {name: to_storage(tensor) for name, tensor in carried_tensors(target.folder, spec.dtype).items()}
    write_target(run.dump, tensors, dict.fromkeys(tensors, spec.dtype), carried_files(target.folder))
    units = _units(folder, files, recipe)
    with StageProgress(STAGE, len(files)) as progress:
        for unit, split, names in units:
            if sealed(run.dump, unit):
                progress.total -= len(names)
                continue
            part = PartWriter(run.dump, unit, split, spec, scratch=run.folder / "sending", threads=recipe.dump.writer_threads)
            with BackgroundPart(part) as background:
                broken = list(_write(folder, names, split, loader, spec, background, stop, progress))
                unstored = background.finish()
                for reject in broken:
                    part.reject(reject)
                rejects = [*broken, *unstored]
                run.write_rejects("import", unit, rejects)
                part.seal()
    counts = seal(run.dump, spec, units)["counts"]
    check_rejected(STAGE, counts["done"], counts["rejected"], recipe.max_rejected, run.errors("import"))
    return {"format": layout.name, **counts}


def _find(folder: Path, trust_ckpt: bool) -> tuple[Layout, list[Path]]:
    found = {
        layout.name: sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(layout.suffixes))
        for layout in (SPECFORGE, SPECULATORS)
    }
    kinds = [name for name, files in found.items() if files]
    if len(kinds) != 1:
        raise UserError(
            f"{folder} holds {' and '.join(kinds) or 'no'} samples; expected SpecForge's .ckpt or .ckpt.gz files, "
            f"or speculators' .safetensors files, and not both"
        )
    if kinds == [SPECFORGE.name] and not trust_ckpt:
        raise UserError(
            f"{folder} holds .ckpt files, which are Python pickles. They are read with weights_only, so that none of their code runs; "
            f"say --trust-ckpt if you know where they come from"
        )
    return (SPECFORGE if kinds == [SPECFORGE.name] else SPECULATORS), found[kinds[0]]


class _Loader:
    """Reads one file into a Loaded; raises ValueError with the reason where it can't."""

    def __init__(self, layout: Layout, folder: Path, target: OpenTarget, masks: Path | None):
        self.layout = layout
        self.hidden_size = text_config(target.folder)["hidden_size"]
        self.layers = len(target.layers)
        if layout is SPECULATORS:
            self.masks = _masks(masks)
            self.norm = _final_norm(target.folder)

    def __call__(self, path: Path) -> Loaded:
        loaded = self._specforge(path) if self.layout is SPECFORGE else self._speculators(path)
        length = len(loaded.input_ids)
        for name, tensor, shape in (
            ("loss_mask", loaded.loss_mask, (length,)),
            ("captured states", loaded.aux, (length, self.layers * self.hidden_size)),
            ("last states", loaded.last, (length, self.hidden_size)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} are {list(tensor.shape)}, expected {list(shape)} for {self.layers} layers")
        return loaded

    def _specforge(self, path: Path) -> Loaded:
        data = path.read_bytes()
        content = torch.load(
            io.BytesIO(gzip.decompress(data) if path.name.endswith(".gz") else data), weights_only=True, map_location="cpu"
        )
        if missing := [name for name in ("input_ids", "loss_mask", "aux_hidden_state", "hidden_state") if name not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        states = [content[name].reshape(-1, content[name].shape[-1]) for name in ("aux_hidden_state", "hidden_state")]
        return Loaded(content["input_ids"].reshape(-1), content["loss_mask"].reshape(-1), *states)

    def _speculators(self, path: Path) -> Loaded:
        content = load_file(path)
        if missing := [name for name in ("token_ids", "hidden_states") if name not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        ids, states = content["token_ids"].reshape(-1), content["hidden_states"]
        number = path.stem.rpartition("_")[2]
        known = self.masks[int(number)] if number.isdigit() and int(number) < len(self.masks) else None
        if known is None or known["input_ids"] != ids.tolist():
            raise ValueError("the data set with the loss masks has no row with its number and its token ids")
        return Loaded(ids, torch.tensor(known["loss_mask"]), states[:, :-1].flatten(1), self.norm(states[:, -1]))


def _masks(folder: Path | None) -> Any:
    """The data set, opened: by a sample's number its token ids and loss mask."""
    if folder is None:
        raise UserError("speculators keeps its loss masks in a data set of its own: name that folder with --masks")
    from datasets import load_from_disk

    rows = load_from_disk(str(folder))
    if not {"input_ids", "loss_mask"} <= set(rows.column_names):
        raise UserError(f"{folder} has columns {rows.column_names}; expected input_ids and loss_mask among them")
    return rows


def _final_norm(folder: Path) -> Any:
    """The target's RMSNorm, for last states that were taken before it."""
    config = text_config(folder)
    if config.get("model_type") not in PLAIN_NORMS:
        raise UserError(
            f"{folder} is of type {config.get('model_type')!r}, whose final norm is not known to be w * x / rms(x); last states "
            f"from before the norm can be imported for {', '.join(PLAIN_NORMS)}"
        )
    weight = head_tensors(folder, "float32")["norm.weight"]

    def norm(states: Tensor) -> Tensor:
        values = states.float()
        return (weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + config["rms_norm_eps"]))).to(states.dtype)

    return norm


def _first_dtype(files: list[Path], loader: _Loader) -> str:
    """The dtype of the first file that can be read: all others must have it."""
    errors = []
    for path in files:
        try:
            return str(loader(path).aux.dtype).removeprefix("torch.")
        except _BROKEN as error:
            errors.append(f"{path}: {error}")
    raise UserError(f"none of the {len(files)} samples can be read; the first: {errors[0]}")


def _spec(target: OpenTarget, recipe: Recipe, dtype: str, layout: Layout) -> DumpSpec:
    shape = text_config(target.folder)
    if recipe.dump.mode != "full":
        raise UserError("samples are imported as a full dump; make a compact one from it with `store degrade`")
    return DumpSpec(
        layers=target.layers,
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        dtype=dtype,
        codec=recipe.dump.aux_codec,
        last_codec=recipe.dump.teacher_codec,
        compact=None,
        target=target.fingerprint,
        engine={"name": "imported", "from": layout.name},
        max_length=target.context,
        conversation={"system_prompt": None, "imported": layout.name},
    )


def _units(folder: Path, files: list[Path], recipe: Recipe) -> list[PlannedUnit]:
    """Work units of prepare.unit_rows files; the split is by the hash of a file's path in the folder."""
    names: dict[str, list[str]] = {"train": [], "eval": []}
    for path in files:
        name = path.relative_to(folder).as_posix()
        share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        names["eval" if share < recipe.prepare.eval_share else "train"].append(name)
    size, units = recipe.prepare.unit_rows, []
    for split, members in names.items():
        for start in range(0, len(members), size):
            units.append((len(units), split, tuple(members[start : start + size])))
    return units


_BROKEN = (
    ValueError, EOFError, RuntimeError, LookupError, OSError, zlib.error, SafetensorError, AttributeError, TypeError,
    pickle.UnpicklingError,
)  # fmt: skip


def _write(
    folder: Path, names: tuple[str, ...], split: str, loader: _Loader, spec: DumpSpec, background: BackgroundPart, stop: StopSignal,
    progress: StageProgress,
) -> Iterator[Reject]:  # fmt: skip
    """Hand the samples on; those that cannot be read come back as rejects."""
    for name in names:
        stop.check()
        try:
            loaded = loader(folder / name)
            found = str(loaded.aux.dtype).removeprefix("torch.")
            if found != spec.dtype:
                raise ValueError(f"its states are {found}, those of the others {spec.dtype}")
            captured = _captured(name, split, loaded)
        except _BROKEN as error:
            yield Reject(f"{type(error).__name__}: {error}".split("\n")[0], id=name, file=str(folder / name))
            progress.advance(1, 0)
        else:
            background.add(captured)
            progress.advance(1, len(captured.row.input_ids))


def _captured(name: str, split: str, loaded: Loaded) -> CapturedRow:
    mask = np.concatenate([[0], (loaded.loss_mask > 0).int().numpy(), [0]])
    edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)  # [turns, 2] start and end of each run of ones
    turns = tuple((int(start), int(end)) for start, end in edges)
    row = TokenRow(name, "imported", split, loaded.input_ids.numpy().astype(np.int32), turns, ("stop",) * len(turns))
    kept = torch.from_numpy(last_positions(turns, len(row.input_ids)))
    return CapturedRow(row, to_storage(loaded.aux), to_storage(loaded.last[kept]))
