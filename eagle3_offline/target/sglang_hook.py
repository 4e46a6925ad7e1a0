"""Captures hidden states inside SGLang's scheduler process, through SGLang's own argument `forward_hooks`.

SGLang calls `boundary` and `head` with the config that `hook_specs` made, and registers the hooks that they return. A prefill
batch comes as one flat run of tokens; when the head is reached, each request's piece is written to a file of its own, and
`read_row` joins a row's pieces in the process that asked for it. Nothing here may raise inside SGLang, which would take the
server down without a reason: what is wrong goes to ERROR, and from then on nothing is captured.

A row of a compact dump has a file with its teachers' positions; its states are reduced here, on the device, with the Reducer that lies
in REDUCER, before they are copied to the host.

Legend: N tokens of a batch or a piece, T tokens of a row, S states (the boundaries, then the last), H hidden size, n teachers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .engine import Asked
from .reduction import Reducer, to_storage

ALIKE = 0.99  # cosine of the last state and what the final norm should make of boundary L; without the residual it is far less
RID = "eagle3-"  # prefix of our request ids: health checks and warm-ups are not captured
ERROR = "error.txt"
REDUCER = "reducer.safetensors"
NORM = "norm.npy"  # [H] fp32, what the final norm multiplies by
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# In the process that starts the server and asks for rows


def hook_specs(layers: tuple[int, ...], folder: Path, dtype: str, depth: int) -> list[dict[str, Any]]:
    """The value of `--forward-hooks`. Boundary b is what leaves layer b - 1 (the last layer: L, before the final norm); boundary 0 is
    what leaves the embedding. depth: L, which is captured in any case, to check the first batch with."""
    config = {"folder": str(folder), "layers": list(layers), "dtype": dtype, "depth": depth}

    def spec(name: str, module: str, factory: str, **more: int) -> dict[str, Any]:
        hook_factory = f"{__name__}:{factory}"
        return {"name": name, "target_modules": [module], "hook_factory": hook_factory, "config": {**config, **more}}

    modules = {b: f"*layers.{b - 1}" if b else "*embed_tokens" for b in {*layers, depth}}
    boundaries = [spec(f"boundary {b}", modules[b], "boundary", boundary=b) for b in sorted(modules)]
    return [*boundaries, spec("head", "*logits_processor", "head")]


def write_teachers(folder: Path, rid: str, row: Asked) -> None:
    """Have the request's states reduced."""
    with open(_teachers_path(folder, rid), "wb") as handle:
        np.save(handle, row.teachers)
        np.save(handle, row.following)


def _teachers_path(folder: Path, rid: str) -> Path:
    return folder / f".{rid}.teachers"


def read_row(folder: Path, rid: str, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Token ids [T] of a finished request and its arrays, joined from its pieces; their files are removed.

    Arrays: the states [S, T, H]; of a reduced row the projection [T, r], ids and log probabilities [n, k], normaliser [n, 1].
    Raises CaptureError where the pieces are not the row's `length` tokens exactly once.
    """
    paths = sorted(folder.glob(f"{rid}.*.npy"))  # the prefix length in the name has leading zeros
    ids, pieces, end = [], [], 0
    for path in paths:
        start = int(path.name.split(".")[-2])
        first, *arrays = _load(path)
        ids.append(first)
        pieces.append(arrays)
        if start != end:
            break
        end += len(ids[-1])
    found = [(int(path.name.split(".")[-2])) for path in paths]
    for path in (*paths, _teachers_path(folder, rid)):
        path.unlink(missing_ok=True)
    if not paths or end != length or sum(map(len, ids)) != length:
        raise CaptureError(f"{end} tokens in pieces that start at {found}, expected {length} without a gap")
    return np.concatenate(ids), pieces[0] if len(pieces) == 1 else [np.concatenate(parts, axis=-2) for parts in zip(*pieces, strict=True)]


def _load(path: Path) -> list[np.ndarray]:
    """All arrays of a file."""
    found = []
    with open(path, "rb") as handle:
        while handle.tell() < path.stat().st_size:
            found.append(np.load(handle))
    return found


class CaptureError(Exception):
    """What was captured is not the row that was asked for."""


# ---------------------------------------------------------------------------------------------------------------------
# In the scheduler process


def boundary(config: dict[str, Any]) -> Callable[..., None]:
    """The hook of a decoder layer (or the embedding): keep the residual stream that leaves it."""
    capture = _capture(config)

    def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
        capture.guard(capture.keep, config["boundary"], output, args, hasattr(module, "ffn_boundary"))

    return hook


def head(config: dict[str, Any]) -> Callable[..., None]:
    """The hook of the logits processor, the last module of a forward pass: write what was kept."""
    capture = _capture(config)

    def hook(_module: torch.nn.Module, args: tuple, _output: Any) -> None:
        capture.guard(capture.write, args)

    return hook


class Capture:
    """What one forward pass has left so far."""

    def __init__(self, folder: Path, layers: tuple[int, ...], dtype: torch.dtype, depth: int):
        self.folder, self.layers, self.dtype, self.depth = folder, layers, dtype, depth
        self.checked = False  # whether boundary L was seen to be what the final norm reads
        self.kept: dict[int, Tensor] = {}  # boundary -> [N, H]
        self.failed = False
        self._reducer: Reducer | None = None

    def guard(self, work: Callable[..., None], *args: Any) -> None:
        """Do the work; note the first thing that goes wrong. Layers are read on, since sums over ranks need every rank's hook."""
        try:
            work(*args)
        except Exception as error:
            self.kept.clear()
            if self.failed:
                return
            self.failed = True
            temporary = self.folder / f".{ERROR}"
            temporary.write_text(f"{type(error).__name__}: {error}" if not isinstance(error, CaptureError) else str(error))
            temporary.rename(self.folder / ERROR)

    def keep(self, number: int, output: Any, args: tuple = (), streams: bool = False) -> None:
        """The sum of hidden states and residual, as a tensor of its own: SGLang's norms work in place.

        Layers of some models (Llama) return both. Those of others (Qwen3, gpt-oss) return what they add, and leave the residual with
        the batch, one of their arguments. streams: the layer is one of these.
        """
        if self.checked and number not in self.layers:
            return
        if number in self.kept:
            raise CaptureError(f"two modules of the target look like the one of boundary {number}; it has more than one stack of layers")
        stream = next((arg.residual_stream for arg in args if getattr(arg, "residual_stream", None) is not None), None)
        if stream is not None:
            self.kept[number] = _snapshot(stream, output)
            return
        if streams:
            raise CaptureError(f"the layer of boundary {number} leaves its residual where it was not found; use the transformers engine")
        parts = output if isinstance(output, tuple) else (output, None)
        if len(parts) != 2 or not isinstance(parts[0], Tensor) or not isinstance(parts[1], Tensor | None):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise CaptureError(f"the module of boundary {number} returns ({kinds}), expected hidden states and residual")
        hidden, residual = parts
        if any(getattr(part, "_sglang_needs_allreduce_fusion", False) for part in parts):
            raise CaptureError("SGLang deferred an all-reduce, so a rank has partial sums only; switch the all-reduce fusion off")
        self.kept[number] = hidden.clone() if residual is None else hidden + residual

    def write(self, args: tuple) -> None:
        """One file for each request's piece of the batch, on the first rank."""
        kept, self.kept = self.kept, {}
        if self.failed:
            return
        if len(args) < 4:
            raise CaptureError(f"the logits processor got {len(args)} positional arguments, expected ids, states, head and batch")
        input_ids, last, _, batch = args[:4]
        rids = getattr(batch, "rids", None) or []
        if not batch.forward_mode.is_extend() or not any(rid.startswith(RID) for rid in rids):
            return
        if batch.forward_mode.is_mixed():
            raise CaptureError("a batch mixes prefill and decoding; start SGLang without --enable-mixed-chunk")
        if missing := sorted({*self.layers, *([] if self.checked else [self.depth])} - {*kept}):
            raise CaptureError(f"no module of the target looks like the one of boundaries {missing}: its decoder layers were not found")
        lengths, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
        if wrong := [list(state.shape) for state in (*kept.values(), last) if state.dim() != 2 or len(state) != sum(lengths)]:
            raise CaptureError(f"states are {wrong}, expected [{sum(lengths)}, H]: the batch is split over ranks, or padded")
        self._check(kept, last)
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return  # every rank has the same states; the first one writes
        states = [kept[b] for b in self.layers] + [last]
        ids, start = input_ids.to(torch.int32).cpu().numpy(), 0
        for rid, length, prefix in zip(rids, lengths, prefixes, strict=True):
            if rid.startswith(RID):
                piece = [state[start : start + length].to(self.dtype) for state in states]
                self._write_piece(rid, prefix, [ids[start : start + length], *self._arrays(rid, prefix, piece)])
            start += length

    def _check(self, kept: dict[int, Tensor], last: Tensor) -> None:
        """Once: the final norm makes the last states of boundary L. A residual that the hooks do not see would show here."""
        if self.checked:
            return
        norm = torch.from_numpy(np.load(self.folder / NORM)).to(last.device)  # [H]
        alike = torch.nn.functional.cosine_similarity(kept[self.depth].float() * norm, last.float(), dim=-1)  # [N]; no scale of a token's
        if not (found := float(alike.median())) >= ALIKE:
            raise CaptureError(
                f"what leaves the last layer is not what the final norm reads (cosine {found:.2f}, expected 1): the whole residual stream "
                f"is not seen in this model; use the transformers engine"
            )
        self.checked = True

    def _arrays(self, rid: str, prefix: int, states: list[Tensor]) -> list[np.ndarray]:
        """What is written of a piece's states, each [N, H]: see `read_row`."""
        path = _teachers_path(self.folder, rid)
        if not path.is_file():
            return [to_storage(torch.stack(states))]
        *aux, last = states
        teachers, following = _load(path)  # [n] of the whole row
        here = (teachers >= prefix) & (teachers < prefix + len(last))
        if self._reducer is None:
            self._reducer = Reducer.load(self.folder / REDUCER).on(last.device)
        at = torch.from_numpy(teachers[here] - prefix).to(last.device)
        reduced = self._reducer(torch.cat(aux, dim=1), last[at], following[here])
        return [reduced.aux, reduced.top.ids, reduced.top.log_probs, reduced.top.log_normaliser[:, None]]

    def _write_piece(self, rid: str, prefix: int, arrays: list[np.ndarray]) -> None:
        if prefix == 0:  # a request that was taken back starts again
            for old in self.folder.glob(f"{rid}.*.npy"):
                old.unlink()
        temporary = self.folder / f".{rid}.{os.getpid()}"
        with open(temporary, "wb") as handle:
            for array in arrays:
                np.save(handle, array)
        temporary.rename(self.folder / f"{rid}.{prefix:09d}.npy")


def _snapshot(stream: Any, output: Any) -> Tensor:
    """[N, H]: the residual with what the layer adds; sums over ranks that the layer owes are done on a copy, by every rank's hook."""
    try:
        return stream.snapshot(output)
    except NotImplementedError as error:
        raise CaptureError(
            f"SGLang leaves part of a layer's work to the next one ({error}): set "
            f"target.sglang.enforce_disable_flashinfer_allreduce_fusion=true, or use the transformers engine"
        ) from None


_captures: dict[str, Capture] = {}  # one per server; the hooks of all modules share it


def _capture(config: dict[str, Any]) -> Capture:
    folder = config["folder"]
    if folder not in _captures:
        _captures[folder] = Capture(Path(folder), tuple(config["layers"]), STORED[config["dtype"]], config["depth"])
    return _captures[folder]
