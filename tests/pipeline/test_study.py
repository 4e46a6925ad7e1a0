"""benchmarks/study.py on a small run: its walk is `evaluate`'s, cells are made once, and the usual trainer's masks are what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eagle3_offline.draft import batch as draft_batch
from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.loss import row_weights
from eagle3_offline.training import step as training_step
from eagle3_offline.training.metrics import read_metrics
from tests.unit.draft.conftest import make_sample

FILE = Path(__file__).parents[2] / "benchmarks" / "study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("benchmark_study", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_rows_of_the_usual_masks(study):
    """Tokens s u A B C D u E F. A row p has a loss at step k where m[p+k] = 1 and token p+1+k exists, whatever it is."""
    turn = np.array([0, 0, 1, 1, 1, 1, 0, 2, 2])
    assert study.usual_rows(turn, 0, 1).tolist() == [2, 3, 4, 5, 7]  # never row 1, the first root; row 5 (D u) reads the user's token
    assert study.usual_rows(turn, 1, 2).tolist() == [1, 2, 3, 4, 6]
    assert study.usual_rows(turn, 0, 2).tolist() == [1, 2, 3, 4, 5, 6, 7]  # 1 and 6 live for step 1


def test_the_usual_loss_is_the_mean_over_padded_positions(study):
    samples = [make_sample("long", 12, ((3, 7), (9, 12)), seed=4), make_sample("short", 10, ((4, 9),), seed=8)]
    exact = collate(samples, 2)
    with study.usual_masks(2):
        usual = collate(samples, 2)
        total = training_step.denominators([usual], "sequence")
        weights = [draft_batch_weights(usual, k, total) for k in range(2)]
    assert total.tolist() == [24.0, 24.0]  # two conversations, padded to 12 tokens
    assert [int((w > 0).sum()) for w in weights] == [4 + 2 + 5, 4 + 2 + 5]  # m[p+k] over p + 1 + k < T: the last token has no row
    assert all(torch.allclose(w[w > 0], torch.tensor(1 / 24.0)) for w in weights)
    again = collate(samples, 2)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(exact.steps, again.steps, strict=True))  # put back


def draft_batch_weights(batch, step, total):
    from eagle3_offline.draft import loss

    assert loss.row_weights is not row_weights and draft_batch._step_rows.__name__ == "step_rows"
    return loss.row_weights(batch, step, float(total[step]), "sequence")


def test_cells(study, copied, tmp_path):
    options = ["--data", str(copied.run), "--recipe", str(copied.recipe), "--steps", "6", "--results", str(tmp_path / "results")]
    options += [word for name in ("baseline", "usual-masks", "compact-r0.25-top16") for word in ("--variant", name)]
    first = CliRunner().invoke(study.main, [*options, "--seeds", "1"])
    assert first.exit_code == 0, f"{first.output}\n{first.exception!r}"
    found = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert set(found) == {"baseline-seed0.json", "usual-masks-seed0.json", "compact-r0.25-top16-seed0.json"}
    cells = {name: json.loads((tmp_path / "results" / name).read_text()) for name in found}
    baseline, usual, compact = (cells[f"{name}-seed0.json"] for name in ("baseline", "usual-masks", "compact-r0.25-top16"))
    assert baseline["dump"] == usual["dump"] != compact["dump"]
    copied.stage("train", "--set", "train.total_steps=6", "--set", "train.draft=study", "--set", "evaluate.decode_rows=0")
    walked = copied.stage("evaluate", "--set", "train.draft=study", "--set", "evaluate.decode_rows=0")
    assert baseline["tau"] == pytest.approx(walked["held_out"]["tau"], abs=1e-9)
    assert len(baseline["products"].split()) == 6
    losses = read_metrics(copied.run / "drafts" / "study" / "metrics.csv")
    assert len(losses) == 6
    again = CliRunner().invoke(study.main, [*options, "--seeds", "1", "--report"])
    assert found == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert "| usual-masks |" in again.output and "| unscaled | not run |" in again.output
