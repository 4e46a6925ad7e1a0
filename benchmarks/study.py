"""Tables of trained drafts: what a compact dump costs in accept length, and what each choice of the recipe brings.

    python benchmarks/study.py --data RUN_FOLDER [--table price] [--table ablation] [--seeds 3] [--steps 600]
    python benchmarks/study.py --data RUN_FOLDER --report        # the tables of what is finished, in markdown

RUN_FOLDER holds a sealed lossless dump. A cell is one draft: a variant, a seed. It is trained by the stage `train` and walks all held-out
answers of the lossless dump as served (fp32, its projection or channel scale applied to the raw states). Each finished cell leaves one
JSON with the products and verification steps of every answer in benchmarks/results/, from which the report makes paired differences.
Finished cells are skipped; one that was killed goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from eagle3_offline.capture.degrade import degrade
from eagle3_offline.config import Recipe, load_recipe, to_yaml
from eagle3_offline.draft import batch as draft_batch
from eagle3_offline.draft import loss as draft_loss
from eagle3_offline.draft.batch import DraftBatch, StepRows, collate, to_torch
from eagle3_offline.draft.measures import WalkCount, paired_difference, total, walk_hits
from eagle3_offline.draft.trained import TrainedDraft, load_trained
from eagle3_offline.draft.unroll import unroll
from eagle3_offline.records import Sample, UserError, turn_of_token
from eagle3_offline.runs import Run, StopSignal, digest, read_json, write_json
from eagle3_offline.store.reader import Dump
from eagle3_offline.training import loop, step

TOGETHER = 8  # held-out answers that are unrolled in one call


@dataclass(frozen=True)
class Variant:
    """A row of a table: what differs from the baseline."""

    name: str
    train: tuple[str, ...] = ()  # overrides of the recipe's train section
    compact: tuple[float, int] | None = None  # rank as a share of H, logits kept; None: the lossless dump
    usual_masks: bool = False


BASELINE = Variant("baseline")
# Of compact dumps: rank as a share of H, logits kept.
SIZES = ((0.5, 32), (0.75, 16), (0.25, 16), (0.25, 64), (1, 16), (1, 64), (0.125, 8), (0.0625, 4))
COMPACT = [Variant(f"compact-r{share:g}-top{top}", compact=(share, top)) for share, top in SIZES]
TABLES = {  # in the order in which they are made; the demo's recipe has K = 4
    "price": [BASELINE, Variant("unscaled", ("aux_scaling=false",)), *COMPACT],
    "ablation": [
        BASELINE,
        Variant("usual-masks", usual_masks=True),
        Variant("normalisation-token", ("normalisation=token",)),
        Variant("head-random", ("head_init=random",)),
        Variant("fc-ridge", ("fc_init=ridge",)),
        Variant("layer-target", ("layer_init=target",)),
        Variant("ridge-and-layer", ("fc_init=ridge", "layer_init=target")),
        Variant("loss-lk-lambda", ("loss=lk-lambda",)),
        Variant("loss-lk-alpha", ("loss=lk-alpha",)),
        Variant("k1", ("ttt_length=1",)),
        Variant("k3", ("ttt_length=3",)),
        Variant("k5", ("ttt_length=5",)),
        Variant("k7", ("ttt_length=7",)),
        Variant("eagle-3.1", ("fc_norm=true", "norm_output=true")),
        Variant("fc-norm", ("fc_norm=true",)),
        Variant("norm-output", ("norm_output=true",)),
    ],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The usual trainer's masks, for one row of the ablation: here alone, the library has only the exact one


def usual_rows(turn: np.ndarray, step: int, steps: int) -> np.ndarray:
    """Rows p that live at a step: those with a loss at it or a later one. A row has a loss at step k where m[p+k] = 1 (SpecForge).

    turn [T] as for shift.serving_rows. p + 1 + k, the token that is read and whose last state is the teacher, must exist.
    """
    tokens = len(turn)
    alive = np.zeros(tokens - 1, bool)
    for k in range(step, steps):
        alive[: max(0, tokens - 1 - k)] |= turn[k : tokens - 1] > 0
    return np.flatnonzero(alive)


def usual_step_rows(steps: int):  # noqa: ANN201
    """A twin of batch._step_rows; `predicted` is 0 where a row has a loss, -1 where it lives for a later step's."""

    def step_rows(samples: list[Sample], ids: list[np.ndarray], starts: np.ndarray, teacher_starts: np.ndarray, step: int) -> StepRows:
        pieces, counts, before = [], [], 0
        for number, sample in enumerate(samples):
            turn = turn_of_token(sample.turns, len(sample.input_ids))
            rows = usual_rows(turn, step, steps)
            previous = usual_rows(turn, step - 1, steps) if step else np.arange(len(turn) - 1)
            has_loss = turn[rows + step] > 0
            teacher = np.searchsorted(sample.last_positions, rows + 1 + step)
            teacher = np.where(has_loss, teacher, 0)
            if not np.array_equal(sample.last_positions[teacher[has_loss]], rows[has_loss] + 1 + step):
                raise ValueError(f"row {sample.id}: the store holds no teacher for a row of the usual mask at step {step}")
            pieces.append((
                starts[number] + rows, before + np.searchsorted(previous, rows), rows + step, ids[number][rows + 1 + step],
                np.where(has_loss, 0, -1), teacher_starts[number] + teacher,
            ))  # fmt: skip
            counts.append(len(rows))
            before += len(previous)
        return StepRows(*(torch.from_numpy(np.concatenate(column)) for column in zip(*pieces, strict=True)), tuple(counts))

    return step_rows


def usual_denominators(batches: list[DraftBatch], _normalisation: str) -> torch.Tensor:
    """[K] positions of the padded batch, the same for each step: the usual trainer's mean."""
    positions = sum(len(b.segments) * max(stop - start + 1 for start, stop in b.segments) for b in batches)
    return torch.full((len(batches[0].steps),), positions, dtype=torch.float64)


def usual_weights(batch: DraftBatch, step: int, denominator: float, _normalisation: str) -> torch.Tensor:
    """[n_k] weight of each row of a step."""
    return (batch.steps[step].predicted >= 0).float() / denominator


@contextlib.contextmanager
def usual_masks(steps: int) -> Iterator[None]:
    """Train with them inside the block."""
    changes = (
        (draft_batch, "_step_rows", usual_step_rows(steps)),
        (draft_loss, "row_weights", usual_weights),
        (step, "denominators", usual_denominators),
    )
    kept = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, kept, strict=True):
            setattr(module, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# Cells


@dataclass(frozen=True)
class Study:
    """One data set, one number of steps."""

    data: Run
    recipe: str
    steps: int
    results: Path
    stop: StopSignal

    @property
    def work(self) -> Path:
        return self.data.folder / "study"

    def result(self, variant: Variant, seed: int) -> Path:
        return self.results / f"{variant.name}-seed{seed}.json"

    def recipe_of(self, variant: Variant, seed: int) -> Recipe:
        """The recipe's training from a random start, in so many steps, without evaluations on its way (one row at its start and end)."""
        common = (f"total_steps={self.steps}", f"seed={seed}", "draft=study", "eval_every=0", "eval_rows=1", "checkpoint_every=200",
                  "fc_init=random", "layer_init=random")  # fmt: skip
        return load_recipe(self.recipe, tuple(f"train.{text}" for text in (*common, *variant.train)))

    def dump_of(self, variant: Variant) -> Path | str:
        """The dump that a variant trains from, made where it is missing."""
        if variant.compact is None:
            return self.data.dump
        share, top = variant.compact
        into = self.work / "dumps" / f"r{share:g}-top{top}"
        if not (into / "dump.json").is_file():
            config = load_recipe(None, ("dump.mode=compact", f"dump.rank={share}", f"dump.top_k={top}")).dump
            degrade(self.data.dump, into, config, self.stop)
        return into


def make_cell(study: Study, variant: Variant, seed: int) -> None:
    """Train and walk one draft, unless its result is there."""
    recipe, path = study.recipe_of(variant, seed), study.result(variant, seed)
    dump = Dump.open(study.dump_of(variant))
    made_of = {"train": dataclasses.asdict(recipe.train), "usual_masks": variant.usual_masks, "dump": dump.manifest["digest"]}
    if path.is_file():
        if read_json(path)["made_of"] != digest(made_of):
            raise UserError(f"{path} is of another dump or recipe: name another folder with --results, or remove it")
        return
    run = Run(study.work / "cells" / f"{study.steps}-{variant.name}-seed{seed}", str(dump.where))
    run.record("study", to_yaml(recipe))
    with usual_masks(recipe.train.ttt_length) if variant.usual_masks else contextlib.nullcontext():
        summary = loop.train(run, recipe, study.stop)
    lossless = Dump.open(study.data.dump)
    walks = walk_answers(load_trained(run.draft("study")), lossless, recipe.evaluate.chain)
    write_cell(path, {
        "variant": variant.name, "seed": seed, "steps": summary["steps"], "train_overrides": list(variant.train),
        "made_of": digest(made_of), "dump": dump.manifest["digest"], "held_out": lossless.manifest["digest"],
        "bytes_per_token": dump.manifest["counts"]["stored_bytes"] / dump.manifest["counts"]["tokens"],
        "raw_bytes_per_token": 2 * (len(dump.spec.layers) + 1) * dump.spec.hidden_size,
        "commit": read_json(run.folder / "provenance.json")[-1]["commit"], "train_seconds": summary["train_seconds"],
        "tau": total(walks).tau,
        "products": [w.products for w in walks], "verifications": [w.steps for w in walks],
    })  # fmt: skip
    shutil.rmtree(run.folder)


def write_cell(path: Path, value: dict[str, Any]) -> None:
    """JSON of a few kilobytes, the lists of answers on one line each."""
    lists = {key: value.pop(key) for key in ("products", "verifications")}
    value |= {key: " ".join(map(str, numbers)) for key, numbers in lists.items()}
    write_json(path, value)


@torch.no_grad()
def walk_answers(trained: TrainedDraft, dump: Dump, chain: int) -> list[WalkCount]:
    """The walk of every held-out conversation of a full dump, as held_out.measure counts it, several conversations at a time."""
    embed = to_torch(dump.target_tensors()["embed_tokens.weight"]).float()
    walks, rows = [], dump.rows("eval")
    for first in range(0, len(rows), TOGETHER):
        samples = [dump.sample(int(i), trained.head.settings.layers) for i in rows[first : first + TOGETHER]]
        read = [replace(s, aux=trained.project(to_torch(s.aux).float().numpy())) for s in samples]
        batch = collate(read, chain, trained.aux_scale)
        hits = np.zeros((len(batch.tokens), chain), bool)
        for k, logits in enumerate(unroll(trained.head, batch, embed, chain)):
            rows_k = batch.steps[k]
            hits[rows_k.rows.numpy(), k] = (trained.target_ids[logits.argmax(-1)] == rows_k.predicted).numpy()
        walks += [walk_hits(s.turns, hits[a:b]) for s, (a, b) in zip(samples, batch.segments, strict=True)]
    return walks


@contextlib.contextmanager
def shared_teacher() -> Iterator[None]:
    """All drafts of one vocabulary share a teacher, so that its argmaxes over the whole vocabulary are made once, not once a cell."""
    teachers, make = {}, loop.teacher_of

    def teacher_of(lm_head: torch.Tensor, target_ids: torch.Tensor, top_k: int | None, *more: object):  # noqa: ANN202
        key = (target_ids.cpu().numpy().tobytes(), top_k)
        if key not in teachers:
            teachers[key] = make(lm_head, target_ids, top_k, *more)
        return teachers[key]

    loop.teacher_of = teacher_of
    try:
        yield
    finally:
        loop.teacher_of = make


# ---------------------------------------------------------------------------------------------------------------------
# Report


@dataclass(frozen=True)
class Cell:
    seed: int
    walks: list[WalkCount]  # of each conversation
    about: dict[str, Any]

    @property
    def tau(self) -> float:
        return total(self.walks).tau


def read_cells(study: Study, variant: Variant) -> dict[int, Cell]:
    """The finished cells of a variant by seed."""
    cells = {}
    for path in sorted(study.results.glob(f"{variant.name}-seed*.json")):
        about = read_json(path)
        numbers = (map(int, about.pop(key).split()) for key in ("products", "verifications"))
        cells[about["seed"]] = Cell(about["seed"], [WalkCount(*pair) for pair in zip(*numbers, strict=True)], about)
    return cells


def report(study: Study, table: str) -> str:
    """A table in markdown; variants without a finished cell say so."""
    base = read_cells(study, BASELINE)
    if not base:
        return f"{table}: no baseline is finished in {study.results}"
    spread = max(c.tau for c in base.values()) - min(c.tau for c in base.values())
    answers = len(next(iter(base.values())).walks)
    lines = [f"{answers} held-out answers, {study.steps} steps; the baseline's seeds spread over {spread:.3f}", ""]
    lines += ["| variant | bytes a token, share of 8 H | tau, mean | its seeds | paired difference | 95 % interval |"]
    lines += ["|---|---|---|---|---|---|"]
    for variant in TABLES[table]:
        cells = read_cells(study, variant)
        if not {*cells} & {*base}:
            lines.append(f"| {variant.name} | not run | | | | |")
            continue
        if len({c.about["held_out"] for c in (*cells.values(), *base.values())}) > 1:
            raise UserError(f"{study.results} holds cells of different held-out answers: remove those of the other dump")
        about = next(iter(cells.values())).about
        size = f"{about['bytes_per_token']:,.0f}, {about['bytes_per_token'] / about['raw_bytes_per_token']:.3f}"
        taus = [cells[s].tau for s in sorted(cells)]
        seeds = sorted({*cells} & {*base})  # that both have
        gap = ["", ""]
        if variant != BASELINE:
            mean, low, high = paired_difference([cells[s].walks for s in seeds], [base[s].walks for s in seeds])
            gap = [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        row = [variant.name, size, f"{np.mean(taus):.3f}", " ".join(f"{t:.3f}" for t in taus), *gap]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="Run folder with a dump.")
@click.option("--table", "tables", type=click.Choice(list(TABLES)), multiple=True, default=list(TABLES), show_default=True)
@click.option("--variant", "only", multiple=True, help="These rows alone.  [default: all of the table]")
@click.option("--seeds", default=3, show_default=True, help="Drafts of each variant.")
@click.option("--steps", default=600, show_default=True, help="Optimiser steps of each draft.")
@click.option("--recipe", default="demo", show_default=True, help="Its train and evaluate sections, from a random start, are the baseline.")
@click.option("--results", type=click.Path(path_type=Path), help="[default: benchmarks/results/NAME_OF_DATA-STEPS]")
@click.option("--report", "report_only", is_flag=True, help="Print the tables of what is finished; run nothing.")
def main(data: Path, tables: tuple[str, ...], only: tuple[str, ...], seeds: int, steps: int, recipe: str, results: Path | None,
         report_only: bool) -> None:  # fmt: skip
    results = results or Path(__file__).parent / "results" / f"{data.resolve().name}-{steps}"
    with StopSignal() as stop, shared_teacher():
        study = Study(Run(data), recipe, steps, results, stop)
        for table in tables:
            for variant in (v for v in TABLES[table] if not only or v.name in only):
                for seed in range(0 if report_only else seeds):
                    make_cell(study, variant, seed)
                    stop.check()
            click.echo(f"\n## {table}\n\n{report(study, table)}")


if __name__ == "__main__":
    main()
