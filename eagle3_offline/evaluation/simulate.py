"""Simulated accept length: walk the held-out answers of a dump with a trained draft, and with the n-gram lookup."""

from __future__ import annotations

from ..config import EvaluateConfig
from ..draft.batch import to_torch
from ..draft.held_out import measure
from ..draft.measures import WalkCount, paired_difference, total
from ..draft.teacher import teacher_name, teacher_of
from ..draft.trained import TrainedDraft, load_trained
from ..logits import head_transform
from ..progress import StageProgress
from ..records import Summary, UserError
from ..runs import Run, read_json, write_json
from ..store.reader import Dump
from ..store.target_files import BIAS
from .ngram import NgramLookup


def simulate(run: Run, draft: str, config: EvaluateConfig) -> Summary:
    """Measures of drafts/DRAFT on the held-out rows; written to held_out.json there. fp32, whatever the dump's dtype."""
    folder = run.draft(draft)
    trained = load_trained(folder)
    dump = Dump.open(run.dump)
    check_dump(trained, dump)
    rows = dump.rows("eval")[: config.rows]
    if not len(rows):
        raise UserError(f"{run.dump} holds no held-out rows: prepare with eval_share, eval_rows or eval_inputs")
    key = {"draft": trained.about, "chain": config.chain, "rows": len(rows), "ngram": config.ngram}
    path = folder / "held_out.json"
    if path.is_file() and (known := read_json(path))["key"] == key and "over_ngram" in known["summary"]:
        return known["summary"]
    top_k = dump.spec.compact.top_k if dump.spec.compact else None
    target = {name: to_torch(array) for name, array in dump.target_tensors().items()}
    transform = head_transform(dump.target_json("config.json"), target.get(BIAS))
    with StageProgress("evaluate", len(rows)) as progress:

        def samples():  # noqa: ANN202
            for sample in dump.samples(rows, trained.head.settings.layers):
                yield sample
                progress.advance(1, len(sample.input_ids))

        result = measure(
            trained.head, samples(), embed=target["embed_tokens.weight"].float(), target_ids=trained.target_ids, chain=config.chain,
            aux_scale=trained.aux_scale, teacher=teacher_of(target["lm_head.weight"], trained.target_ids, top_k, transform),
        )  # fmt: skip
    ngram = ngram_walks(dump, [(dump.input_ids(int(i)), dump.turns(int(i))) for i in rows], config)
    summary = {
        **result.summary(),
        "teacher": teacher_name(top_k),
        "chain": config.chain,
        "coverage": trained.vocabulary.coverage,
        "ngram_tau": total(ngram).tau,
        "over_ngram": paired_difference([result.walks], [ngram]),
    }
    write_json(path, {"key": key, "summary": summary})
    return summary


def check_dump(trained: TrainedDraft, dump: Dump) -> None:
    """Raise UserError where the draft was trained on another dump: its held-out rows may be those that this draft saw."""
    if trained.about["dump"] != dump.manifest["digest"]:
        raise UserError(
            f"the draft was trained on the dump {trained.about['dump']}, {dump.where} is now {dump.manifest['digest']}: train it again"
        )


def ngram_walks(dump: Dump, rows: list, config: EvaluateConfig) -> list[WalkCount]:
    """The lookup's walk of each of the rows [(input_ids, turns)], its index made of the dump's train answers."""
    train = (int(i) for i in dump.rows("train"))
    lookup = NgramLookup((dump.input_ids(i)[start:end] for i in train for start, end in dump.turns(i)), config.ngram)
    return [lookup.walk(input_ids, turns, config.chain) for input_ids, turns in rows]
