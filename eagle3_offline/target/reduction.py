"""What a compact dump keeps of a row, computed where the engine left the states: projected layers, and the largest logits.

No store and no transformers in here: SGLang's scheduler imports it. Legend: T tokens, C = n_aux * H channels, r rank, n teachers,
V vocabulary, k kept logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..logits import HeadTransform
from ..records import TopLogits
from .engine import Reduced

_TEACHER_ROWS = 256  # logits [rows, V] in fp32 at a time


class Reducer:
    """Reduces the states of one row. All products are in fp32."""

    def __init__(self, projection: Tensor, lm_head: Tensor, top_k: int, transform: HeadTransform | None = None):
        """projection [C, r] fp32; lm_head [V, H]; transform: what the target does to W h, None: nothing"""
        self.projection, self.lm_head, self.top_k, self.transform = projection, lm_head, top_k, transform or HeadTransform()

    def on(self, device: torch.device | str) -> Reducer:
        """Ready for states on this device: the head takes 4 V H bytes there."""
        return Reducer(self.projection.to(device), self.lm_head.to(device).float(), self.top_k, self.transform.to(device))

    def __call__(self, aux: Tensor, last: Tensor, following: np.ndarray) -> Reduced:
        """aux [T, C] and last [n, H] in the engine's dtype; following [n]: the token after each teacher, -1 for none."""
        projected = (aux.float() @ self.projection).to(aux.dtype)
        return Reduced(to_storage(projected), top_logits(last.float(), self.lm_head, following, self.top_k, self.transform))

    @property
    def bytes(self) -> int:
        """Size of the file that `save` writes."""
        return self.projection.nbytes + self.lm_head.nbytes

    def save(self, path: Path) -> None:
        tensors = {"projection": self.projection.contiguous(), "lm_head": self.lm_head.contiguous()}
        if self.transform.bias is not None:
            tensors["bias"] = self.transform.bias.contiguous()
        numbers = {"top_k": self.top_k, "scale": self.transform.scale, "cap": self.transform.cap}
        save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})

    @classmethod
    def load(cls, path: Path) -> Reducer:
        with safe_open(path, framework="pt") as handle:
            numbers = json.loads(handle.metadata()["numbers"])
            bias = handle.get_tensor("bias") if "bias" in handle.keys() else None  # noqa: SIM118
            transform = HeadTransform(numbers["scale"], numbers["cap"], bias)
            return cls(handle.get_tensor("projection"), handle.get_tensor("lm_head"), numbers["top_k"], transform)


def top_logits(last: Tensor, lm_head: Tensor, following: np.ndarray, k: int, transform: HeadTransform | None = None) -> TopLogits:
    """The k largest logits of last [n, H] with their exact log-sum-exp; the token that followed ([n], -1 for none) among them."""
    transform = transform or HeadTransform()
    ids, log_probs, normaliser = [], [], []
    after = torch.from_numpy(following.astype(np.int64)).to(last.device)
    for start in range(0, len(last), _TEACHER_ROWS):
        logits = transform((last[start : start + _TEACHER_ROWS].to(lm_head.dtype) @ lm_head.T).float())  # [rows, V]
        values, index = logits.topk(k)
        wanted = after[start : start + len(logits), None]
        absent = (wanted >= 0) & (index != wanted).all(1, keepdim=True)  # the last of the k gives way
        index[:, -1:] = torch.where(absent, wanted, index[:, -1:])
        values[:, -1:] = torch.where(absent, logits.gather(1, wanted.clamp(min=0)), values[:, -1:])
        total = logits.logsumexp(1)
        ids.append(index.int().cpu())
        log_probs.append((values - total[:, None]).clamp(min=torch.finfo(torch.float16).min).half().cpu())
        normaliser.append(total.cpu())
    if not ids:
        return TopLogits(np.empty((0, k), np.int32), np.empty((0, k), np.float16), np.empty(0, np.float32))
    return TopLogits(*(torch.cat(pieces).numpy() for pieces in (ids, log_probs, normaliser)))


def to_storage(tensor: Tensor) -> np.ndarray:
    """A tensor to numpy, bfloat16 as its bits in uint16."""
    tensor = tensor.detach().contiguous().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_storage(states: np.ndarray) -> Tensor:
    """The reverse."""
    tensor = torch.from_numpy(states)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
