"""The stages with an SGLang that they start themselves, from conversations to a trained draft."""

import numpy as np
import pytest

from eagle3_offline.conversations.token_rows import read_token_rows
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.target.sglang_server import installed_version

from ..small_runs import Cli, conversations, write_recipe


@pytest.mark.timeout(900)
def test_prepare_to_train_with_sglang(sglang, random_target, tmp_path):
    """Answers of single and two-turn rows are those of transformers, token by token; a compact dump is fitted and made by SGLang alone,
    says who made it, and a draft trains from it."""
    target = {"dtype": "float32", "max_length": 160}
    compact = {"mode": "compact", "codec": "none", "rank": 1.0, "top_k": 8}
    runs = {}
    for engine in ("sglang", "transformers"):
        recipe = write_recipe(tmp_path / engine, random_target, conversations(30), target={**target, "engine": engine}, dump=compact)
        runs[engine] = Cli(recipe, tmp_path / engine / "run")
        for words in (["prepare"], ["regenerate"]):
            runs[engine].stage(*words)
    run, reference = (Run(runs[engine].run) for engine in ("sglang", "transformers"))
    turns = set()
    for unit in run.read_plan().units:
        for ours, theirs in zip(read_token_rows(run.tokens(unit.unit)), read_token_rows(reference.tokens(unit.unit)), strict=True):
            assert ours.id == theirs.id and ours.turns == theirs.turns and np.array_equal(ours.input_ids, theirs.input_ids)
            assert ours.finish_reasons == theirs.finish_reasons
            turns.add(len(ours.turns))
    assert 1 in turns
    for words in (["dump-hidden", "--fit-basis"], ["dump-hidden"], ["store", "seal"], ["train"]):
        runs["sglang"].stage(*words)
    dump = Dump.open(run.dump)
    assert dump.spec.engine == {"name": "sglang", "version": installed_version()} and dump.spec.compact.rank == 32
    sample = dump.sample(0)
    assert sample.aux.shape == (len(sample.input_ids), 32) and sample.top.ids.shape == (len(sample.last_positions), 8)
    following = np.append(sample.input_ids, -1)[sample.last_positions + 1]
    assert all(token in top for token, top in zip(following[:-1], sample.top.ids[:-1], strict=True))
