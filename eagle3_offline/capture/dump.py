"""The stage `dump-hidden`: one prefill over the final token ids, hidden states straight into the store; then `store seal`."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Recipe
from ..conversations.token_rows import answer_tokens, read_token_rows
from ..progress import StageProgress
from ..records import CapturedRow, EngineFailed, Reject, Summary, TokenRow
from ..runs import Run, StopSignal, Unit, check_rejected, digest
from ..store import seal as store_seal
from ..store.format import DumpSpec
from ..store.target_files import write_target
from ..store.writer import BadRow, PartWriter
from ..target.engine import Engine
from ..target.folder import carried_files, head_tensors, text_config
from ..target.transformers_engine import to_storage
from .target import OpenTarget

STAGE = "dump-hidden"


def dump_spec(run: Run, recipe: Recipe, target: OpenTarget, engine: dict[str, str]) -> DumpSpec:
    """What the manifest says of this dump. engine: name and version of what ran the target."""
    shape = text_config(target.folder)
    return DumpSpec(
        layers=target.layers,
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        dtype=target.dtype,
        codec=recipe.dump.codec,
        target=target.fingerprint,
        engine=engine,
        max_length=target.context,
        conversation={"system_prompt": recipe.prepare.system_prompt, "regenerate": run.claimed("regenerate")},
    )


def dump_hidden(run: Run, recipe: Recipe, target: OpenTarget, numbers: list[int] | None, stop: StopSignal) -> Summary:
    """Dump the units (all that the plan needs, for None). Sealed parts are skipped; a stop loses at most the current part."""
    spec = dump_spec(run, recipe, target, {"name": target.engine_name, "version": target.engine_version()})
    short = {"layers": list(spec.layers), "dtype": spec.dtype, "codec": spec.codec, "engine": spec.engine}
    run.claim(STAGE, {"spec": digest(spec.to_dict()), **short})
    if not (run.dump / "target").is_dir():  # opened targets are proven to be the run's own
        tensors = {name: to_storage(tensor) for name, tensor in head_tensors(target.folder, target.dtype).items()}
        write_target(run.dump, tensors, dict.fromkeys(tensors, target.dtype), carried_files(target.folder))
    plan = run.read_plan()
    needed = plan.needed(lambda u: answer_tokens(run.tokens(u.unit)))
    chosen = [unit for unit in plan.select(numbers) if unit in needed]
    todo = [unit for unit in chosen if not store_seal.sealed(run.dump, unit.unit)]
    with StageProgress(STAGE, sum(len(unit.rows) for unit in todo)) as progress:
        failed = _dump_units(run, todo, target, spec, recipe, stop, progress)
    if failed:
        first = min(failed)
        raise EngineFailed(f"units {sorted(failed)} are not dumped, run them again; unit {first}: {failed[first]}")
    return _summary(run, chosen, recipe)


def _dump_units(
    run: Run, units: list[Unit], target: OpenTarget, spec: DumpSpec, recipe: Recipe, stop: StopSignal, progress: StageProgress
) -> dict[int, EngineFailed]:
    """Dump them one by one; the units during which the engine failed, with the reason. The next unit gets a new engine.

    An engine that does not even start, or fails twice in a row, is broken for good.
    """
    failed: dict[int, EngineFailed] = {}
    engine: Engine | None = None
    try:
        for unit in units:
            engine = engine or target.engine(run.folder / "logs" / f"sglang-dump-{unit.name}.log", recipe.dump.batch_tokens)
            try:
                _dump_unit(run, unit, engine, spec, recipe, stop, progress)
            except EngineFailed as error:
                failed[unit.unit] = error
                engine.close()
                engine = None
                if unit.unit - 1 in failed:
                    break
    finally:
        if engine is not None:
            engine.close()
    return failed


def _dump_unit(run: Run, unit: Unit, engine: Engine, spec: DumpSpec, recipe: Recipe, stop: StopSignal, progress: StageProgress) -> None:
    rows = read_token_rows(run.tokens(unit.unit))
    limit = min(spec.max_length, engine.longest_row or spec.max_length)
    rejects = [
        Reject(f"too long: {len(row.input_ids)} tokens, the limit is {limit}", id=row.id) for row in rows if len(row.input_ids) > limit
    ]
    too_long = {reject.id for reject in rejects}
    rows = sorted((row for row in rows if row.id not in too_long), key=lambda row: len(row.input_ids))
    with PartWriter(run.dump, unit.unit, unit.split, spec) as part:
        for reject in (*run.read_rejects("regenerate", unit.unit), *rejects):
            part.reject(reject)
        batches = list(token_batches(rows, recipe.dump.batch_tokens))
        for batch, captured in zip(batches, engine.prefill_batches([[row.input_ids for row in b] for b in batches]), strict=True):
            stop.check()
            for row, states in zip(batch, captured, strict=True):
                try:
                    part.add(CapturedRow(row, states.aux, states.last))
                except BadRow as error:  # not finite, say: this row only
                    rejects.append(Reject(str(error), id=row.id, retry=True))
                    part.reject(rejects[-1])
            progress.advance(len(batch), sum(len(row.input_ids) for row in batch))
        run.write_rejects(STAGE, unit.unit, rejects)  # first: a sealed part is skipped by a re-run
        part.seal()


def token_batches(rows: list[TokenRow], limit: int) -> Iterator[list[TokenRow]]:
    """Consecutive rows whose padded size stays within `limit` tokens; a longer row goes alone."""
    batch: list[TokenRow] = []
    for row in rows:
        longest = max(len(row.input_ids), *(len(r.input_ids) for r in batch)) if batch else len(row.input_ids)
        if batch and longest * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _summary(run: Run, units: list[Unit], recipe: Recipe) -> Summary:
    rejected = sum(len(run.read_rejects(STAGE, unit.unit)) for unit in units)
    given = sum(len(unit.rows) - len(run.read_rejects("regenerate", unit.unit)) for unit in units)
    check_rejected(STAGE, given - rejected, rejected, recipe.max_rejected, run.errors(STAGE))
    return {"done": given - rejected, "rejected": rejected, "units": [unit.unit for unit in units]}


def seal(run: Run, spec: DumpSpec, allow_partial: bool = False) -> Summary:
    """Join the parts of all needed units into one dump with its manifest. Refuses gaps unless allow_partial."""
    plan = run.read_plan()
    units = plan.needed(lambda u: answer_tokens(run.tokens(u.unit)))
    manifest = store_seal.seal(run.dump, spec, [(unit.unit, unit.split, unit.rows) for unit in units], allow_partial)
    return manifest["counts"]
