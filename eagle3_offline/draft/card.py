"""The model card of an exported draft: what it was made with and what was measured."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..runs import read_json
from .trained import TrainedDraft

SERVE = {
    "sglang": """python -m sglang.launch_server --model {target} --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path THIS_FOLDER \\
  --speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5""",
    "vllm": """vllm serve {target} --speculative-config '{{"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": 4}}'""",
}
SERVE["hf"] = SERVE["sglang"] + "\n" + SERVE["vllm"]

CARD = """---
base_model: {target}
tags: [speculative-decoding, eagle3]
---
# EAGLE-3 draft for {target}

Proposes tokens that {target} verifies: the answers stay the target's own. Trained offline by eagle3_offline from the target's stored
hidden states.

## Measured

{measured}
Accept length (tau) is (generated tokens - requests) / verification steps over all requests, here on held-out answers.

## Serve

```bash
{serve}
```

## Made with

| | |
|---|---|
| target | {target}, revision {revision}, weights {weights} |
| dump | manifest digest {dump} |
| captured layers | boundaries {layers} (0 is the embedding's output) |
| draft vocabulary | {vocabulary:,} tokens, {coverage:.2%} of the train answers' tokens |
| EAGLE-3.1 | fc_norm {fc_norm}, norm_output {norm_output} |

```yaml
{recipe}```
"""


def model_card(draft_folder: Path, trained: TrainedDraft, to: str) -> str:
    """README.md of an export."""
    about, settings = trained.about, trained.head.settings
    target = about.get("target", {})
    name = target.get("model", "the target")
    return CARD.format(
        target=name,
        revision=target.get("revision") or "not pinned",
        weights=target.get("weights", "not recorded"),
        measured=_measured(draft_folder, trained),
        serve=SERVE[to].format(target=name),
        dump=about["dump"],
        layers=list(settings.layers),
        vocabulary=settings.draft_vocab_size,
        coverage=trained.vocabulary.coverage,
        fc_norm=settings.fc_norm,
        norm_output=settings.norm_output,
        recipe=yaml.safe_dump({"train": about.get("train", {})}, sort_keys=False),
    )


def _measured(folder: Path, trained: TrainedDraft) -> str:
    """A table of what was measured with this draft so far; `evaluate` before `export` fills it."""
    lines = []
    if trained.about["summary"].get("tau") is not None:
        lines.append(f"| in training, walk | {trained.about['summary']['tau']:.3f} | |")
    held_out = read_json(folder / "held_out.json") if (folder / "held_out.json").is_file() else None
    if held_out and held_out["key"]["draft"] == trained.about:
        found = held_out["summary"]
        if found["tau"] is not None:
            lines.append(f"| `evaluate`, walk, chain of {found['chain']} | {found['tau']:.3f} | {found['answers']} |")
            lines.append(f"| n-gram lookup on the same answers | {found['ngram_tau']:.3f} | {found['answers']} |")
        if found.get("over_ngram"):
            lines.append("| the draft over the lookup, 95 % interval | {:+.3f} ({:+.3f} to {:+.3f}) | |".format(*found["over_ngram"]))
    if not lines:
        return "Nothing yet: run `evaluate`, then `export` again.\n"
    return "\n".join(["| how | tau | answers |", "|---|---|---|", *lines]) + "\n"
