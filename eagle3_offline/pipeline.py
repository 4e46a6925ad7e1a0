"""The stages in the order they happen, and the demo that runs them all on one machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import runs
from .capture import dump as capture_dump
from .capture import regenerate as capture_regenerate
from .capture.import_samples import import_samples
from .capture.target import OpenTarget, open_target
from .config import Recipe, TargetConfig
from .conversations.prepare import prepare
from .conversations.stdlib_questions import answer_pairs, documents
from .conversations.token_rows import answer_tokens, plan_of_token_rows
from .draft.check import check_export as check_exported
from .draft.export import export
from .evaluation.decode import decode
from .evaluation.report import write_report
from .evaluation.simulate import simulate
from .records import CheckFailed, Summary, UserError
from .runs import Run, SettingsChanged, StopSignal, read_json, write_json
from .store.estimate import estimate
from .store.format import Compact, DumpSpec
from .store.places import is_remote, place
from .store.reader import Dump
from .store.repair import STALE_HOURS, abandoned
from .store.seal import sealed
from .store.verify import verify as store_verify
from .target.folder import resolve_folder, target_dtype, text_config
from .target.serve import serve
from .target.sglang_engine import generation_options
from .target.smollm2 import smollm2_folder
from .target.tiny import tiny_folder
from .training.loop import train


def cache_folder() -> Path:
    """Where the demo's targets are kept: $EAGLE3_CACHE, else ~/.cache/eagle3-offline."""
    return Path(os.environ.get("EAGLE3_CACHE") or Path.home() / ".cache" / "eagle3-offline")


def target_folder(config: TargetConfig) -> Path:
    """The target as a local folder; `smollm2` and `tiny` are made on first use."""
    if config.model == "smollm2":
        return smollm2_folder(cache_folder())
    if config.model == "tiny":
        return tiny_folder(cache_folder(), answer_pairs(), documents())
    return resolve_folder(config.model, config.revision)


def _target(run: Run, recipe: Recipe) -> OpenTarget:
    return open_target(run, recipe.target, target_folder(recipe.target))


# ---------------------------------------------------------------------------------------------------------------------
# One function per stage


def regenerate_units(
    run: Run, recipe: Recipe, units: list[int] | None, stop: StopSignal, servers: tuple[str, ...] = (), retry_errors: bool = False
) -> Summary:
    return capture_regenerate.regenerate(run, recipe, _target(run, recipe), units, stop, servers, retry_errors)


def dump_units(run: Run, recipe: Recipe, units: list[int] | None, stop: StopSignal) -> Summary:
    return capture_dump.dump_hidden(run, recipe, _target(run, recipe), units, stop)


def _in_progress(run: Run) -> list[str]:
    """Unfinished parts: being written, or left by a writer that died (`store repair` removes those)."""
    parts = place(run.dump) / "parts"
    return [f"{name} (abandoned)" if abandoned(parts / name, STALE_HOURS) else name for name in parts.folders() if name.startswith(".")]


def fit_basis(run: Run, recipe: Recipe, stop: StopSignal) -> Summary:
    return capture_dump.fit_basis(run, recipe, _target(run, recipe), stop)


def seal(run: Run, recipe: Recipe, allow_partial: bool = False) -> Summary:
    made = run.claimed("dump-hidden")
    target = replace(_target(run, recipe), layers=tuple(made["layers"]))  # perhaps given by --layers alone
    return capture_dump.seal(run, capture_dump.dump_spec(run, recipe, target, made["engine"]), allow_partial)


def import_dump(run: Run, recipe: Recipe, folder: Path, masks: Path | None, trust_ckpt: bool, stop: StopSignal) -> Summary:
    return import_samples(run, recipe, _target(run, recipe), folder, masks, trust_ckpt, stop)


def estimate_dump(
    recipe: Recipe, rows: int, row_tokens: float, supervised: float, hidden_size: int | None, vocab_size: int, layers: int, dtype: str,
    rate: float | None, engines: int,
) -> Summary:  # fmt: skip
    """What a dump will take: `store estimate`."""
    if hidden_size is None:
        model = recipe.target.model
        if model not in ("smollm2", "tiny") and not (Path(model) / "config.json").is_file():
            raise UserError(f"target.model {model!r} is no local folder: give its shape with --hidden-size and --vocab-size")
        shape = text_config(target_folder(recipe.target))
        hidden_size, vocab_size = shape["hidden_size"], shape["vocab_size"]
    config = recipe.dump
    rank = config.compact_rank(hidden_size)
    spec = DumpSpec(
        layers=tuple(range(layers)), hidden_size=hidden_size, vocab_size=vocab_size, dtype=dtype, codec=config.aux_codec,
        last_codec=config.teacher_codec, compact=Compact(rank, config.top_k, "") if config.mode == "compact" else None,
        target={}, engine={}, max_length=recipe.target.max_length, conversation={},
    )  # fmt: skip
    tokens = int(rows * row_tokens)
    whole = rate * engines if rate else None
    return estimate(spec, rows, tokens, int(tokens * supervised) + 2 * rows, recipe.prepare.unit_rows, whole).to_dict()


def plan_of_run(run: Run) -> Summary:
    """The units of a run: number, split and rows. Where tokens/ came from elsewhere, they are fixed as its files say."""
    foreign = not run.plan_path.is_file() and run.tokens(0).parent.is_dir()
    plan = plan_of_token_rows(run) if foreign else run.read_plan()
    units = [{"unit": unit.unit, "split": unit.split, "rows": len(unit.rows)} for unit in plan.units]
    return {"units": len(units), "rows": sum(unit["rows"] for unit in units), "array": f"0-{len(units) - 1}", "plan": units}


def verify(run: Run, quick: bool) -> Summary:
    """Raises UserError that lists every problem."""
    problems = store_verify(run.dump, quick)
    if problems:
        raise UserError(f"{len(problems)} problems in {run.dump}:\n" + "\n".join(problems))
    return {"dump": str(run.dump), "problems": 0, "checked": "sizes and metadata" if quick else "every byte"}


def status(run: Run) -> Summary:
    """Which units are regenerated, dumped, or spare (beyond the answer-token limit)."""
    plan = run.read_plan()
    needed = {unit.unit for unit in plan.needed(lambda u: answer_tokens(run.tokens(u.unit)))}
    numbers = [unit.unit for unit in plan.units]
    return {
        "units": len(numbers),
        "regenerated": [n for n in numbers if run.tokens(n).is_file()],
        "dumped": [n for n in numbers if sealed(run.dump, n)],
        "missing": [n for n in numbers if n in needed and not sealed(run.dump, n)],
        "in_progress": _in_progress(run),
        "spare": [n for n in numbers if n not in needed],
        "sealed": (place(run.dump) / "dump.json").size() is not None,
    }


def export_draft(run: Run, recipe: Recipe) -> Summary:
    return export(run.draft(recipe.train.draft), recipe.export)


def check_export(run: Run, recipe: Recipe) -> Summary:
    """The export that is there, against the trained draft and the dump."""
    dump = Dump.open(run.dump)
    return check_exported(run.draft(recipe.train.draft), dump.manifest, dump.target_json("config.json"))


def serve_target(run: Run, recipe: Recipe, more: tuple[str, ...], stop: StopSignal, say: Callable[[str], None], **where: Any) -> Summary:
    """SGLang servers of the target until a signal comes. more: SGLang's own arguments; where: see `target.serve.serve`."""
    folder, target = target_folder(recipe.target), recipe.target
    context = min(target.max_length, text_config(folder)["max_position_embeddings"])
    options = generation_options(folder, target_dtype(target, folder), context, target.trust_remote_code, not torch.cuda.is_available())
    return {"servers": serve({**options, **target.sglang}, more, run.folder / "logs", stop, say, **where)}


def evaluate(run: Run, recipe: Recipe, stop: StopSignal) -> Summary:
    """The walk, and with evaluate.decode_rows the decoding."""
    summary = {"held_out": simulate(run, recipe.train.draft, recipe.evaluate)}
    if recipe.evaluate.decode_rows:
        summary["decoded"] = decode(run, recipe, _target(run, recipe).folder, stop)
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# The demo


class Demo:
    """All stages of one run, in order. What was made with other settings is made anew, what is there stays."""

    def __init__(self, run: Run, recipe: Recipe, stop: StopSignal):
        self.run, self.recipe, self.stop = run, recipe, stop
        self.draft = run.draft(recipe.train.draft)
        self.timings_path = run.folder / "timings.json"
        self.summaries: dict[str, Summary] = {}

    def stages(self) -> list[tuple[str, Callable[[], Summary], list[Path]]]:
        """Name, work and outputs of each stage."""
        run, recipe, folder = self.run, self.recipe, self.run.folder
        return [
            ("target", lambda: {"folder": str(target_folder(recipe.target))}, []),
            ("prepare", lambda: prepare(run, recipe.prepare, recipe.max_rejected), [folder / "conversations", run.plan_path]),
            ("regenerate", lambda: regenerate_units(run, recipe, None, self.stop), [folder / "tokens", folder / "regenerated"]),
            ("dump-hidden", self._dump, [run.dump]),
            (
                "train",
                lambda: train(run, recipe, self.stop),
                [self.draft / name for name in ("draft.json", "checkpoints", "weights.safetensors")],
            ),
            ("evaluate", lambda: simulate(run, recipe.train.draft, recipe.evaluate), [self.draft / "held_out.json"]),
            ("export", lambda: export_draft(run, recipe), [self.draft / "export"]),
            ("decode", self._decode, [self.draft / "decoded.json"]),
        ]

    def perform(self) -> None:
        """Run every stage, keeping the seconds that each took over all attempts."""
        for name, work, _ in self.stages():
            self.stop.check()
            print(f"== {name}", flush=True)
            started = time.monotonic()
            summary: Summary = {}
            try:
                summary = self._with_fresh_settings(name, work)
            finally:
                self._add_seconds(name, time.monotonic() - started, summary)
            self.summaries[name] = summary

    def _dump(self) -> Summary:
        dump_units(self.run, self.recipe, None, self.stop)
        return seal(self.run, self.recipe)

    def _decode(self) -> Summary:
        return decode(self.run, self.recipe, _target(self.run, self.recipe).folder, self.stop)

    def _with_fresh_settings(self, name: str, work: Callable[[], Summary]) -> Summary:
        try:
            return work()
        except SettingsChanged as changed:
            print(f"{name}: the settings of {changed.stage} changed, so it and what follows are made anew", flush=True)
            self._discard_from(name)
            return work()

    def _discard_from(self, first: str) -> None:
        """Remove the outputs of a stage and of all that follow."""
        names = [name for name, _, _ in self.stages()]
        later = names[names.index(first) :]
        if first == "regenerate":
            self.run.discard("target")
            self.run.discard("servers")  # what they were probed with
        for name, _, outputs in self.stages():
            if name in later:
                self.run.discard(f"train.{self.draft.name}" if name == "train" else name, *outputs)
        if "train" in later:
            shutil.rmtree(self.draft, ignore_errors=True)

    def _add_seconds(self, name: str, seconds: float, summary: Summary) -> None:
        """Add an attempt's seconds; a re-run that found everything done adds nothing."""
        timings = read_json(self.timings_path) if self.timings_path.is_file() else {}
        known = timings.get(name, {"seconds": 0.0, "summary": None})
        if summary != known["summary"]:
            done = known["summary"] is not None  # the stage was made anew
            timings[name] = {"seconds": round(seconds + (0.0 if done else known["seconds"]), 1), "summary": summary or None}
            write_json(self.timings_path, timings)

    def report(self) -> Summary:
        """The content of report.json."""
        timings = read_json(self.timings_path)
        counts = self.summaries["dump-hidden"]
        untrained = runs.read_jsonl(self.draft / "held_out.jsonl")[0]
        return {
            "recipe": self.recipe.name,
            "target": self.recipe.target.model,
            "provenance": read_json(self.run.folder / "provenance.json")[-1],
            "stages": [
                {"stage": name, "seconds": timings[name]["seconds"], "bytes": _bytes(outputs)} for name, _, outputs in self.stages()
            ],
            "rows": {
                name: {key: self.summaries[name][key] for key in ("done", "rejected")} for name in ("prepare", "regenerate", "dump-hidden")
            },
            "tokens": counts["tokens"],
            "supervised_tokens": counts["supervised"],
            "stored_bytes": counts["stored_bytes"],
            "bytes_per_token": counts["stored_bytes"] / counts["tokens"],
            "raw_bytes_per_token": counts["raw_bytes"] / counts["tokens"],
            "untrained_tau": untrained["tau"],
            "held_out": self.summaries["evaluate"],
            "decoded": self.summaries["decode"],
            "checks": checks(self.recipe, untrained["tau"], self.summaries["evaluate"], self.summaries["decode"]),
        }


def checks(recipe: Recipe, untrained_tau: float, held_out: Summary, decoded: Summary) -> list[dict[str, object]]:
    """What must hold for the demo: name, value, what was demanded, and whether it holds."""
    gap = abs(decoded["walk_tau"] - decoded["tau"])
    found = [
        (
            "speculative output identical to plain greedy",
            decoded["identical"],
            f"= {decoded['answers']}",
            decoded["identical"] == decoded["answers"],
        ),
        ("|walk - decoded| on the same prompts", gap, "<= 0.01", gap <= 0.01),
        ("tau of the untrained draft", untrained_tau, "<= 1.05", untrained_tau <= 1.05),
    ]
    if recipe.target.model == "tiny":
        found.append(("tau on held-out questions (walk)", held_out["tau"], ">= 2.5", held_out["tau"] >= 2.5))
        found.append(("first-root hit", held_out["first_root_hit"], ">= 0.85", held_out["first_root_hit"] >= 0.85))
    else:
        found.append(("tau on held-out questions (walk)", held_out["tau"], ">= 1.8", held_out["tau"] >= 1.8))
    return [dict(zip(("check", "value", "demanded", "holds"), item, strict=True)) for item in found]


def _bytes(paths: list[Path]) -> int:
    """Bytes of files and folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def demo(run: Run, recipe: Recipe, stop: StopSignal) -> Summary:
    """Run the whole job; write report.json and report.html. Raises CheckFailed when a check does not hold."""
    if is_remote(run.dump):
        raise UserError("the demo keeps its dump in the run folder: leave dump.location out")
    whole = Demo(run, recipe, stop)
    whole.perform()
    report = whole.report()
    write_json(run.folder / "report.json", report)
    write_report(run.folder / "report.html", report, whole.draft)
    for check in report["checks"]:
        print(f"{'holds' if check['holds'] else 'FAILS'}: {check['check']}: {check['value']:.4g} (demanded {check['demanded']})")
    if not all(check["holds"] for check in report["checks"]):
        raise CheckFailed(f"a check does not hold; see {run.folder}/report.json")
    return {"tau": report["decoded"]["tau"], "speedup": report["decoded"]["speedup"], "report": str(run.folder / "report.html")}
