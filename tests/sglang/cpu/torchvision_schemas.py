"""PyPI's torchvision links CUDA, so beside a CPU build of torch its operators are missing and its import fails.

SGLang's import wants torchvision, and transformers imports it where it is installed. Nothing here ever calls its operators: it
is enough to define their schemas just before torchvision registers shape functions for them. Imported when Python starts, by
the .pth file that install.sh writes (Debian's Python has a sitecustomize of its own, which would hide another).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept = []  # a library's definitions last as long as the object


class DefineFirst:
    """A finder that finds nothing; it only sees the import coming."""

    @staticmethod
    def find_spec(name: str, _path: Sequence[str] | None = None, _target: object = None) -> None:
        if name == "torchvision._meta_registrations" and not _kept:
            define()


def define() -> None:
    """Define the operators that torchvision's own library did not bring."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + schema)
    _kept.append(library)


sys.meta_path.insert(0, DefineFirst)
