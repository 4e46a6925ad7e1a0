"""The stage `dump-hidden`: one prefill over the final token ids, hidden states straight into the store; then `store seal`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

from ..config import Recipe
from ..conversations.token_rows import answer_tokens, read_token_rows, token_row_ids
from ..logits import head_transform
from ..progress import StageProgress
from ..records import CapturedRow, EngineFailed, Reject, Summary, TokenRow, UserError
from ..runs import NotClaimed, Run, StopSignal, Unit, check_rejected, digest
from ..store import seal as store_seal
from ..store.background import BackgroundPart
from ..store.estimate import estimate, refuse_full_disk
from ..store.format import Compact, DumpSpec, last_positions
from ..store.numeric import all_finite
from ..store.places import is_remote
from ..store.target_files import BASIS, BIAS, carried, has_target, read_basis, read_index, read_target, write_target
from ..store.writer import PartWriter
from ..target.engine import Engine, States
from ..target.folder import carried_files, carried_tensors, head_tensors, text_config
from ..target.reduction import Reducer, from_storage, to_storage
from .compact import TOKENS_PER_CHANNEL, Moments, asked, captured, make_reducer
from .target import OpenTarget

STAGE = "dump-hidden"
BROKEN = 2  # units in a row during which an engine failed: the next one would fail as well
BASIS_MARGIN = 1.2  # tokens that a basis is fitted on, as a multiple of what it needs: outlier tokens do not count


def dump_spec(run: Run, recipe: Recipe, target: OpenTarget, engine: dict[str, str]) -> DumpSpec:
    """What the manifest says of this dump. engine: name and version of what ran the target."""
    shape, config = text_config(target.folder), recipe.dump
    compact = config.mode == "compact"
    return DumpSpec(
        layers=target.layers,
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        dtype=target.dtype,
        codec=config.aux_codec,
        last_codec=config.teacher_codec,
        compact=Compact(config.compact_rank(shape["hidden_size"]), config.top_k, _basis_digest(run)) if compact else None,
        target=target.fingerprint,
        engine=engine,
        max_length=target.context,
        conversation={"system_prompt": recipe.prepare.system_prompt, "regenerate": _regenerate_settings(run)},
    )


def _regenerate_settings(run: Run) -> dict | None:
    """None where tokens/ came from elsewhere."""
    try:
        return run.claimed("regenerate")
    except NotClaimed:
        return None


def _basis_digest(run: Run) -> str:
    index = read_index(run.dump) if has_target(run.dump) else {}
    if BASIS not in index:
        raise UserError(
            f"{run.dump} has no basis yet, which every unit of a compact dump is projected with: run `dump-hidden --fit-basis` once, "
            f"before the array"
        )
    return index[BASIS]["xxh3_128"]


def dump_hidden(run: Run, recipe: Recipe, target: OpenTarget, numbers: list[int] | None, stop: StopSignal) -> Summary:
    """Dump the units (all that the plan needs, for None). Sealed parts are skipped; a stop loses at most the current part."""
    spec = dump_spec(run, recipe, target, {"name": target.engine_name, "version": target.engine_version()})
    short = {"layers": list(spec.layers), "dtype": spec.dtype, "codec": spec.codec, "engine": spec.engine}
    run.claim(STAGE, {"spec": digest(spec.to_dict()), **short})
    if spec.compact is None:
        _write_target(run, target)
    plan = run.read_plan()
    needed = plan.needed(lambda u: answer_tokens(run.tokens(u.unit)))
    chosen = [unit for unit in plan.select(numbers) if unit in needed]
    todo = [unit for unit in chosen if not store_seal.sealed(run.dump, unit.unit)]
    check_space(run, spec, todo, recipe.dump.force)
    with StageProgress(STAGE, sum(len(token_row_ids(run, unit)) for unit in todo)) as progress:
        failed = _dump_units(run, todo, target, spec, recipe, stop, progress)
    if failed:
        first = min(failed)
        raise EngineFailed(f"units {sorted(failed)} are not dumped, run them again; unit {first}: {failed[first]}")
    return _summary(run, chosen, recipe)


def _dump_units(
    run: Run, units: list[Unit], target: OpenTarget, spec: DumpSpec, recipe: Recipe, stop: StopSignal, progress: StageProgress
) -> dict[int, EngineFailed]:
    """Dump them one by one; the units during which the engine failed, with the reason. The next unit gets a new engine.

    An engine that does not even start, or fails for BROKEN units in a row, is broken for good.
    """
    failed: dict[int, EngineFailed] = {}
    engine: Engine | None = None
    reducer = _reducer(run, spec)
    in_a_row = 0
    try:
        for unit in units:
            engine = engine or target.engine(run.folder / "logs" / f"sglang-dump-{unit.name}.log", recipe.dump.batch_tokens, reducer)
            try:
                _dump_unit(run, unit, engine, spec, recipe, stop, progress)
            except EngineFailed as error:
                failed[unit.unit] = error
                engine.close()
                engine, in_a_row = None, in_a_row + 1
                if in_a_row == BROKEN:
                    break
            else:
                in_a_row = 0
    finally:
        if engine is not None:
            engine.close()
    return failed


def _write_target(run: Run, target: OpenTarget, basis: dict | None = None) -> None:
    if basis is None and has_target(run.dump):
        return  # opened targets are proven to be the run's own
    tensors = {name: to_storage(tensor) for name, tensor in carried_tensors(target.folder, target.dtype).items()}
    write_target(run.dump, tensors, dict.fromkeys(tensors, target.dtype), carried_files(target.folder), basis)


def check_space(run: Run, spec: DumpSpec, units: list[Unit], force: bool) -> None:
    """Refuse to begin what the disk will not hold. For object storage that is one unit at a time, in the run folder."""
    if not units:
        return
    sizes = [_estimated_bytes(run, spec, unit) for unit in units]
    if is_remote(run.dump):
        refuse_full_disk(run.folder, max(sizes), "a unit's part", force)
    else:
        refuse_full_disk(run.dump, sum(sizes), f"the dump of {len(units)} units", force)


def _estimated_bytes(run: Run, spec: DumpSpec, unit: Unit) -> int:
    rows = read_token_rows(run.tokens(unit.unit))
    teachers = sum(len(last_positions(row.turns, len(row.input_ids))) for row in rows)
    return estimate(spec, len(rows), sum(len(row.input_ids) for row in rows), teachers).bytes


def _reducer(run: Run, spec: DumpSpec) -> Reducer | None:
    """What a compact dump is reduced with, on the engine's device."""
    if spec.compact is None:
        return None
    tensors = {name: from_storage(array.copy()) for name, array in read_target(run.dump).items()}
    transform = head_transform(json.loads(carried(run.dump)["config.json"]), tensors.get(BIAS))
    return make_reducer(spec, read_basis(run.dump), tensors["lm_head.weight"], transform)


def capture(engine: Engine, spec: DumpSpec, batches: list[list[TokenRow]]) -> Iterator[list[CapturedRow]]:
    """What the dump keeps of each batch's rows."""
    if spec.compact is None:
        found = engine.prefill_batches([[row.input_ids for row in batch] for batch in batches])
        for batch, states in zip(batches, found, strict=True):
            yield [_whole(row, one) for row, one in zip(batch, states, strict=True)]
    else:
        found = engine.reduced_batches([list(map(asked, batch)) for batch in batches])
        for batch, reduced in zip(batches, found, strict=True):
            yield list(map(captured, batch, reduced))


def _whole(row: TokenRow, states: States) -> CapturedRow:
    return CapturedRow(row, states.side_by_side(), states.last[last_positions(row.turns, len(row.input_ids))])


def _dump_unit(run: Run, unit: Unit, engine: Engine, spec: DumpSpec, recipe: Recipe, stop: StopSignal, progress: StageProgress) -> None:
    rows = read_token_rows(run.tokens(unit.unit))
    limit = min(spec.max_length, engine.longest_row or spec.max_length)
    rejects = [
        Reject(f"too long: {len(row.input_ids)} tokens, the limit is {limit}", id=row.id) for row in rows if len(row.input_ids) > limit
    ]
    too_long = {reject.id for reject in rejects}
    rows = sorted((row for row in rows if row.id not in too_long), key=lambda row: len(row.input_ids))
    part = PartWriter(run.dump, unit.unit, unit.split, spec, scratch=run.folder / "sending", threads=recipe.dump.writer_threads)
    with BackgroundPart(part) as background:
        for reject in (*run.read_rejects("regenerate", unit.unit), *rejects):
            part.reject(reject)
        batches = list(token_batches(rows, recipe.dump.batch_tokens))
        for batch, found in zip(batches, capture(engine, spec, batches), strict=True):
            stop.check()
            for row in found:
                background.add(row)
            progress.advance(len(batch), sum(len(row.input_ids) for row in batch))
        rejects += background.finish()  # not finite, say: these rows only
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
    given = sum(len(token_row_ids(run, unit)) - len(run.read_rejects("regenerate", unit.unit)) for unit in units)
    check_rejected(STAGE, given - rejected, rejected, recipe.max_rejected, run.errors(STAGE))
    return {"done": given - rejected, "rejected": rejected, "units": [unit.unit for unit in units]}


# ---------------------------------------------------------------------------------------------------------------------
# The basis of a compact dump, and the seal


def fit_basis(run: Run, recipe: Recipe, target: OpenTarget, stop: StopSignal) -> Summary:
    """Fit the basis once, on rows of all train units, and write it with the rest of `dump/target/`."""
    if recipe.dump.mode != "compact":
        raise UserError("a basis is for compact dumps only: set dump.mode=compact, or leave --fit-basis out")
    if has_target(run.dump):
        return _fitted(run, recipe, target)  # once is enough
    shape = text_config(target.folder)
    channels = len(target.layers) * shape["hidden_size"]
    moments = Moments(channels, shape["hidden_size"])
    norm = head_tensors(target.folder, target.dtype)["norm.weight"].float()
    rows = _basis_rows(run, int(BASIS_MARGIN * TOKENS_PER_CHANNEL * channels))
    batches = list(token_batches(sorted(rows, key=lambda row: len(row.input_ids)), recipe.dump.batch_tokens))
    engine = target.engine(run.folder / "logs" / "sglang-fit-basis.log", recipe.dump.batch_tokens)
    with closing(engine), StageProgress("fit-basis", len(rows)) as progress:
        for batch, found in zip(batches, engine.prefill_batches([[row.input_ids for row in b] for b in batches]), strict=True):
            stop.check()
            for row, states in zip(batch, found, strict=True):
                aux, last = states.side_by_side(), states.last[last_positions(row.turns, len(row.input_ids))]
                if all_finite(aux, target.dtype) and all_finite(last, target.dtype):  # else `dump-hidden` rejects the row
                    moments.add(row, aux, last, norm, target.dtype)
            progress.advance(len(batch), sum(len(row.input_ids) for row in batch))
    _write_target(run, target, moments.basis(recipe.dump.compact_rank(shape["hidden_size"])))
    return {**_fitted(run, recipe, target), "tokens": moments.tokens}


def _fitted(run: Run, recipe: Recipe, target: OpenTarget) -> Summary:
    """The basis that is there; UserError where it is none, or of another rank."""
    if BASIS not in read_index(run.dump):
        raise UserError(f"{run.dump} was begun as a full dump: remove it, or use another run folder for the compact one")
    rank, wanted = read_basis(run.dump)["components"].shape[1], recipe.dump.compact_rank(text_config(target.folder)["hidden_size"])
    if rank != wanted:
        raise UserError(f"the basis in {run.dump} has rank {rank}, dump.rank asks for {wanted}: remove the dump's folder to fit it anew")
    return {"basis": _basis_digest(run), "rank": rank}


def _basis_rows(run: Run, tokens: int) -> list[TokenRow]:
    """Rows of about so many tokens, an equal share from each train unit that has its answers, so that every source is seen."""
    units = [unit.unit for unit in run.read_plan().units if unit.split == "train" and run.tokens(unit.unit).is_file()]
    chosen: list[TokenRow] = []
    for number, unit in enumerate(units):
        share = (tokens - sum(len(row.input_ids) for row in chosen)) / (len(units) - number)
        for row in read_token_rows(run.tokens(unit)):
            if share <= 0:
                break
            chosen.append(row)
            share -= len(row.input_ids)
    return chosen


def seal(run: Run, spec: DumpSpec, allow_partial: bool = False) -> Summary:
    """Join the parts of all needed units into one dump with its manifest. Refuses gaps unless allow_partial."""
    plan = run.read_plan()
    units = plan.needed(lambda u: answer_tokens(run.tokens(u.unit)))
    manifest = store_seal.seal(run.dump, spec, [(unit.unit, unit.split, token_row_ids(run, unit)) for unit in units], allow_partial)
    return manifest["counts"]
