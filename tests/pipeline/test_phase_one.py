"""prepare, regenerate, dump-hidden and seal: what the rows are, and what bad input does."""

import json

import numpy as np
import pytest
import torch

from eagle3_offline.conversations.token_rows import read_token_rows
from eagle3_offline.machine import cpu_multiplies_bfloat16
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump

from ..small_runs import Cli, conversations, write_recipe

COMPUTED = torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32  # in what the embedded engine runs a bfloat16 target


def test_counts_add_up_and_every_row_is_there(dumped):
    run = Run(dumped.run)
    planned = [row for unit in run.read_plan().units for row in unit.rows]
    assert sorted(planned) == sorted(f"row-{i}" for i in range(30))
    dump = Dump.open(run.dump)
    rejected = [
        reject.id
        for unit in run.read_plan().units
        for stage in ("regenerate", "dump-hidden")
        for reject in run.read_rejects(stage, unit.unit)
    ]
    assert sorted([dump.ids(i) for i in range(len(dump))] + rejected) == sorted(planned)  # input = done + rejected
    assert (run.folder / "recipe.yaml").is_file() and json.loads((run.folder / "provenance.json").read_text())[0]["stage"] == "prepare"


def test_the_dump_holds_the_engines_ids_turns_and_states(dumped, random_target):
    """Against a plain forward pass: ids, turns, boundary states and the post-norm last state, which are stored in bf16."""
    from transformers import AutoModelForCausalLM

    run = Run(dumped.run)
    rows = {row.id: row for unit in run.read_plan().units for row in read_token_rows(run.tokens(unit.unit))}
    dump = Dump.open(run.dump)
    model = AutoModelForCausalLM.from_pretrained(random_target, dtype=COMPUTED)
    two_turns = 0
    for i in range(len(dump)):
        sample, row = dump.sample(i), rows[dump.ids(i)]
        assert sample.input_ids.tolist() == row.input_ids.tolist() and sample.turns == row.turns
        two_turns += len(row.turns) == 2
        if i % 7 == 0:
            with torch.no_grad():
                out = model(torch.from_numpy(row.input_ids)[None].long(), output_hidden_states=True)
            for b, states in zip(dump.spec.layers, np.split(sample.aux, len(dump.spec.layers), axis=1), strict=True):
                assert torch.allclose(
                    torch.from_numpy(states.copy()).view(torch.bfloat16).float(), out.hidden_states[b][0].float(), atol=0.05, rtol=0.05
                )
            last = torch.from_numpy(sample.last).view(torch.bfloat16).float()
            assert torch.allclose(last, out.hidden_states[-1][0, sample.last_positions].float(), atol=0.05, rtol=0.05)
    assert two_turns or all("length" in row.finish_reasons for row in rows.values())


def test_other_layers_by_the_command_line(answered):
    """Boundary 8 enters the final norm; `store seal` takes the layers that were dumped."""
    wrong = answered.stage("dump-hidden", "--layers", "2,9", exit_code=2)
    assert "expected distinct boundary indices between 0 and 8" in wrong
    answered.stage("dump-hidden", "--layers", "2,8")
    answered.stage("store", "seal")
    dump = Dump.open(Run(answered.run).dump)
    assert dump.spec.layers == (2, 8)
    sample, norm = dump.sample(0), torch.from_numpy(dump.target_tensors()["norm.weight"].copy()).view(torch.bfloat16).float()
    before, last = (torch.from_numpy(states.copy()).view(torch.bfloat16).float() for states in (sample.aux[:, 32:], sample.last))
    normed = before * (before.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    assert torch.allclose(normed[sample.last_positions], last, atol=0.05, rtol=0.05)


def test_greedy_answers_are_the_targets_own(dumped, random_target):
    """Every answer token is the argmax of a plain forward pass over what stands before it (up to bf16 ties)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_target, dtype=COMPUTED)
    rows = read_token_rows(Run(dumped.run).tokens(0))
    agree = total = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.from_numpy(row.input_ids)[None].long()).logits[0].float()
        for start, end in row.turns:
            argmax = logits[start - 1 : end - 1].argmax(-1)
            agree += int((argmax == torch.from_numpy(row.input_ids[start:end]).long()).sum())
            total += end - start
    assert agree / total > 0.97


def test_a_prompt_that_is_too_long_is_rejected_with_the_reason(random_target, tmp_path):
    rows = [*conversations(10), {"id": "long", "conversations": [{"role": "user", "content": "word " * 400}]}]
    cli = Cli(write_recipe(tmp_path, random_target, rows, max_rejected=0.2), tmp_path / "run")
    cli.stage("prepare")
    summary = cli.stage("regenerate")
    assert summary["done"] + summary["rejected"] == 11 and summary["rejected"] == 1
    run = Run(cli.run)
    rejects = [reject for unit in run.read_plan().units for reject in run.read_rejects("regenerate", unit.unit)]
    assert rejects[0].id == "long" and "the limit is 160" in rejects[0].reason
    cli.stage("dump-hidden")
    sealed = cli.stage("store", "seal")
    assert sealed["done"] == 10 and sealed["rejected"] == 1


def test_a_row_longer_than_the_limit_is_rejected_in_the_dump(random_target, tmp_path):
    """As rows that came from elsewhere may be."""
    from eagle3_offline.conversations.token_rows import write_token_rows
    from eagle3_offline.records import TokenRow

    cli = Cli(write_recipe(tmp_path, random_target, conversations(10), max_rejected=0.5), tmp_path / "run")
    cli.stage("prepare")
    cli.stage("regenerate")
    run = Run(cli.run)
    rows = read_token_rows(run.tokens(0))
    rows[0] = TokenRow(rows[0].id, "src", "train", np.full(200, 5, np.int32), ((10, 200),), ("stop",))
    write_token_rows(run.tokens(0), rows)
    summary = cli.stage("dump-hidden")
    assert summary["rejected"] == 1 and summary["done"] == 9
    assert "200 tokens, the limit is 160" in run.read_rejects("dump-hidden", 0)[0].reason
    assert cli.stage("store", "seal")["done"] == 9


def test_more_rejects_than_allowed_exit_with_3(random_target, tmp_path):
    rows = [*conversations(8), *({"id": f"long-{i}", "conversations": [{"role": "user", "content": "word " * 400}]} for i in range(4))]
    cli = Cli(write_recipe(tmp_path, random_target, rows), tmp_path / "run")
    cli.stage("prepare")
    assert "4 of 12 rows were rejected" in cli.stage("regenerate", exit_code=3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["prepare", "--set", "prepare.unit_row=3"], "did you mean prepare.unit_rows?"),
        (["prepare", "--set", "prepare.unit_rows=0"], "must be greater than 0"),
        (["prepare", "--set", "prepare.unit_rows=many"], "expected int"),
        (["regenerate", "--set", "target.layers=[2,2,4]"], "distinct boundary indices"),
        (["regenerate", "--set", "target.model=/nowhere"], "neither a local folder"),
        (["regenerate", "--units", "99"], "do not exist"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_do(dumped, words, message):
    assert message in dumped.stage(*words, exit_code=2)


def test_a_run_that_does_not_exist_is_not_made_by_a_later_stage(dumped, tmp_path):
    cli = Cli(dumped.recipe, tmp_path / "none")
    for words in (["regenerate"], ["dump-hidden"], ["store", "seal"], ["train"], ["evaluate"], ["export"]):
        assert "run `prepare` first" in cli.stage(*words, exit_code=2)
    assert not cli.run.exists()
    cli.stage("prepare")
    assert "dump.json" in cli.stage("train", exit_code=2)


def test_a_target_with_colliding_layers_is_refused(dumped, random_target, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    shallow = tmp_path / "shallow"
    shutil.copytree(random_target, shallow)
    model = AutoModelForCausalLM.from_pretrained(random_target)
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    model.config.layer_types = None
    model.save_pretrained(shallow)
    cli = Cli(write_recipe(tmp_path, shallow, conversations(8)), tmp_path / "run")
    cli.stage("prepare")
    assert "collide" in cli.stage("regenerate", exit_code=2)


def test_another_target_in_the_same_run_is_refused(dumped, random_target, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(random_target, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    assert "outputs of target made with other settings" in dumped.stage("regenerate", "--set", f"target.model={other}", exit_code=2)
