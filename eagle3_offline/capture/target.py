"""The target of a run, opened: its folder, what is captured from it, and proof that it is the one the run began with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..config import TargetConfig
from ..conversations.template import ChatTemplate
from ..runs import NotClaimed, Run, SettingsChanged
from ..target.engine import Engine, capture_layers
from ..target.folder import quick_fingerprint, target_dtype, text_config, weights_hash
from ..target.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class OpenTarget:
    """Everything about the target but its weights in memory."""

    folder: Path
    layers: tuple[int, ...]  # boundaries, low to high
    dtype: str
    context: int  # the longest row, in tokens: target.max_length or the model's own positions
    template: ChatTemplate
    fingerprint: dict[str, Any]
    trust_remote_code: bool

    def engine(self) -> Engine:
        """Load the weights."""
        return TransformersEngine(self.folder, self.layers, self.dtype, self.trust_remote_code)


def open_target(run: Run, config: TargetConfig, folder: Path) -> OpenTarget:
    """Check the target in `folder` against the run's (or make it the run's). The weights are hashed once per run."""
    shape = text_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.chat_template)
    return OpenTarget(
        folder=folder,
        layers=capture_layers(config.layers, shape["num_hidden_layers"]),
        dtype=target_dtype(config, folder),
        context=min(config.max_length, shape["max_position_embeddings"]),
        template=template,
        fingerprint=_claim_fingerprint(run, config, folder, template.digest),
        trust_remote_code=config.trust_remote_code,
    )


def _claim_fingerprint(run: Run, config: TargetConfig, folder: Path, template_digest: str) -> dict[str, Any]:
    quick = {"model": config.model, "revision": config.revision, **quick_fingerprint(folder, template_digest)}
    try:
        known = run.claimed("target")
    except NotClaimed:
        known = {**quick, "weights": weights_hash(folder)}
        run.claim("target", known)
    if {**known, **quick} != known:
        raise SettingsChanged(run.folder, "target", known, {**known, **quick})
    return known
