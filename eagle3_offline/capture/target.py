"""The target of a run, opened: its folder, what is captured from it, and proof that it is the one the run began with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ..config import TargetConfig
from ..conversations.template import ChatTemplate
from ..logits import head_transform
from ..records import STORAGE_DTYPE
from ..runs import NotClaimed, Run, SettingsChanged
from ..target.engine import Engine, capture_layers
from ..target.folder import quick_fingerprint, target_dtype, text_config, weights_hash
from ..target.reduction import Reducer
from ..target.sglang_engine import SglangEngine
from ..target.sglang_server import installed_version, require_tested_version
from ..target.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class OpenTarget:
    """Everything about the target but its weights in memory."""

    model: str  # as the recipe names it
    folder: Path
    layers: tuple[int, ...]  # boundaries, low to high
    dtype: str
    context: int  # the longest row, in tokens: target.max_length or the model's own positions
    template: ChatTemplate
    fingerprint: dict[str, Any]
    trust_remote_code: bool
    engine_name: str  # "sglang" or "transformers"
    sglang: dict[str, Any]  # arguments for the SGLang that is started here

    def transformers(self, reducer: Reducer | None = None) -> TransformersEngine:
        """Load the weights into this process."""
        return TransformersEngine(self.folder, self.layers, self.dtype, self.trust_remote_code, reducer)

    def engine_version(self) -> str:
        """Of the engine that runs here; UserError where it is SGLang and not to be used for a dump."""
        return require_tested_version() if self.engine_name == "sglang" else transformers.__version__

    def engine(self, log: Path, batch_tokens: int, reducer: Reducer | None = None) -> Engine:
        """Load the weights, to read hidden states. log: file for SGLang's output; batch_tokens: of one prefill batch; reducer: of a
        compact dump."""
        if self.engine_name == "transformers":
            return self.transformers(reducer)
        token_bytes = (len(self.layers) + 1) * text_config(self.folder)["hidden_size"] * STORAGE_DTYPE[self.dtype].itemsize
        return SglangEngine(
            self.folder,
            self.layers,
            self.dtype,
            context=self.context,
            log=log,
            options=self.sglang,
            trust_remote_code=self.trust_remote_code,
            batch_bytes=max(batch_tokens, self.context) * token_bytes,
            reducer=reducer,
        )


def engine_name(wanted: str) -> str:
    """`auto` is SGLang where it is installed and there is a GPU."""
    if wanted != "auto":
        return wanted
    return "sglang" if installed_version() and torch.cuda.is_available() else "transformers"


def open_target(run: Run, config: TargetConfig, folder: Path) -> OpenTarget:
    """Check the target in `folder` against the run's (or make it the run's). The weights are hashed once per run."""
    shape = text_config(folder)
    head_transform(shape)  # refuses one that no teacher could be made of
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.chat_template)
    return OpenTarget(
        model=config.model,
        folder=folder,
        layers=capture_layers(config.layers, shape["num_hidden_layers"]),
        dtype=target_dtype(config, folder),
        context=min(config.max_length, shape["max_position_embeddings"]),
        template=template,
        fingerprint=_claim_fingerprint(run, config, folder, template.digest),
        trust_remote_code=config.trust_remote_code,
        engine_name=engine_name(config.engine),
        sglang=config.sglang,
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
