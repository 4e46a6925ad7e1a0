"""Compact dumps: the captured layers as r projected channels, teachers as their largest logits.

The draft sees the captured layers only through `fc`, whose rank is at most H; so the store may keep `aux @ P`, P [C, r], and the draft
train `fc_r` [H, r] on it; export writes `fc_r @ P.T`, an ordinary EAGLE-3 fc. P = diag(1/s) U: s each channel's rms, U the leading
eigenvectors of the uncentred second moment of the scaled states (fc has no bias), outlier tokens left out of both.

Legend: T tokens, C = n_aux * H channels, r rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..logits import HeadTransform
from ..records import CapturedRow, TokenRow, UserError
from ..store.format import DumpSpec, last_positions
from ..store.numeric import outlier_tokens, to_float32
from ..target.engine import Asked, Reduced
from ..target.reduction import Reducer, from_storage

TOKENS_PER_CHANNEL = 10  # a basis is fitted on at least so many tokens for each of the C channels
RIDGE = 1e-3  # added to the diagonal of a ridge regression, in units of the mean diagonal
_PRODUCT_TOKENS = 4096  # tokens of one product: adding up [C, C] takes longer than multiplying a short row


class Moments:
    """Sums over captured tokens, from which a basis and the ridge start follow. fp32 products, fp64 sums."""

    def __init__(self, channels: int, hidden_size: int):
        self.tokens = 0
        self.second = torch.zeros(channels, channels, dtype=torch.float64)  # of aux, all tokens but outliers
        self.rooted = torch.zeros(channels, channels, dtype=torch.float64)  # of aux[p] where m[p+1] = 1
        self.crossed = torch.zeros(channels, hidden_size, dtype=torch.float64)  # of aux[p] with last[p+1] / norm.weight there
        self._usable: list[Tensor] = []  # rows that wait for a product of many tokens at once
        self._roots: list[Tensor] = []
        self._ahead: list[Tensor] = []

    def add(self, row: TokenRow, aux: np.ndarray, last: np.ndarray, norm: Tensor, dtype: str) -> None:
        """aux [T, C] and last [T_last, H] in storage dtype; norm [H] fp32."""
        values = torch.from_numpy(to_float32(aux, dtype))
        pieces = np.split(aux, aux.shape[1] // last.shape[1], axis=1)  # the layers
        kept = ~np.any([outlier_tokens(piece, dtype) for piece in pieces], axis=0)  # [T]
        self._usable.append(values[torch.from_numpy(kept)])
        self.tokens += len(self._usable[-1])
        positions = last_positions(row.turns, len(row.input_ids))
        answers = np.flatnonzero(row.loss_mask[1:] & kept[:-1])  # p with m[p+1] = 1
        self._roots.append(values[torch.from_numpy(answers)])
        self._ahead.append(torch.from_numpy(to_float32(last, dtype))[np.searchsorted(positions, answers + 1)] / norm)
        if sum(map(len, self._usable)) >= _PRODUCT_TOKENS:
            self._multiply()

    def _multiply(self) -> None:
        """Add the products of the rows that wait."""
        if not self._usable:
            return
        usable, roots, ahead = (torch.cat(pieces) for pieces in (self._usable, self._roots, self._ahead))
        self.second += (usable.T @ usable).double()
        self.rooted += (roots.T @ roots).double()
        self.crossed += (roots.T @ ahead).double()
        self._usable, self._roots, self._ahead = [], [], []

    def basis(self, rank: int) -> dict[str, np.ndarray]:
        """The content of `target/basis.safetensors` for r = rank: see FORMAT.md."""
        self._multiply()
        channels = len(self.second)
        if rank > channels:
            raise UserError(f"dump.rank asks for {rank} channels; the captured layers have only {channels} together")
        if self.tokens < TOKENS_PER_CHANNEL * channels:
            raise UserError(
                f"the basis of {channels} channels needs at least {TOKENS_PER_CHANNEL * channels} tokens, found {self.tokens}: "
                f"prepare and regenerate more rows first"
            )
        scale = (self.second.diagonal() / self.tokens).sqrt().clamp(min=1e-12)  # s [C]
        values, vectors = torch.linalg.eigh(self.second / self.tokens / scale[:, None] / scale)  # ascending
        components = vectors.flip(1)[:, :rank]  # U [C, r]
        components = components * torch.where(components.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
        projection = components / scale[:, None]
        gram = projection.T @ self.rooted @ projection
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(rank, dtype=torch.float64)
        start = torch.linalg.solve(gram + ridge, projection.T @ self.crossed)  # [r, H]
        found = {"components": components, "scale": scale, "eigenvalues": values.flip(0), "ridge": start.T}
        return {name: tensor.float().contiguous().numpy() for name, tensor in found.items()}


class Reduction:
    """Reduces captured rows that are on the host to what a compact dump keeps; `dump-hidden` does it on the engine's device instead."""

    def __init__(
        self,
        spec: DumpSpec,
        basis: Mapping[str, np.ndarray],
        lm_head: Tensor,
        device: torch.device | str = "cpu",
        transform: HeadTransform | None = None,
    ):
        """lm_head [V, H]; transform: what the target does to W h, None: nothing"""
        self.device = torch.device(device)
        self.reducer = make_reducer(spec, basis, lm_head, transform).on(self.device)

    def __call__(self, row: TokenRow, aux: np.ndarray, last: np.ndarray) -> CapturedRow:
        """aux [T, C] and last [T_last, H] in storage dtype."""
        following = asked(row).following
        return captured(row, self.reducer(from_storage(aux).to(self.device), from_storage(last).to(self.device), following))


def make_reducer(spec: DumpSpec, basis: Mapping[str, np.ndarray], lm_head: Tensor, transform: HeadTransform | None = None) -> Reducer:
    """lm_head [V, H]"""
    projection = torch.from_numpy(basis["components"].copy()) / torch.from_numpy(basis["scale"].copy())[:, None]
    if projection.shape[1] != spec.compact.rank:
        raise UserError(
            f"the basis has rank {projection.shape[1]}, the dump's is {spec.compact.rank}: remove the dump's folder to fit it anew"
        )
    return Reducer(projection, lm_head, spec.compact.top_k, transform)


def asked(row: TokenRow) -> Asked:
    """What an engine reads of a row for a compact dump."""
    return Asked(row.input_ids, last_positions(row.turns, len(row.input_ids)))


def captured(row: TokenRow, reduced: Reduced) -> CapturedRow:
    return CapturedRow(row, reduced.aux, None, reduced.top)
