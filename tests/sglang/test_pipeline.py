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
    """Answers of single and two-turn rows are those of transformers, token by token; the dump says who made it."""
    target = {"dtype": "float32", "max_length": 160}
    runs = {}
    for engine in ("sglang", "transformers"):
        recipe = write_recipe(tmp_path / engine, random_target, conversations(16), target={**target, "engine": engine})
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
    for words in (["dump-hidden"], ["store", "seal"], ["train"]):
        runs["sglang"].stage(*words)
    assert Dump.open(run.dump).spec.engine == {"name": "sglang", "version": installed_version()}
