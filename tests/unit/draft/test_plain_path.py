"""benchmarks/train.py's plain path, a padded loop over every row, has our loss and gradients."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from eagle3_offline.draft.loss import Objective, RowTerms, denominators
from eagle3_offline.draft.model import new_head
from eagle3_offline.draft.teacher import FullTeacher

FILE = Path(__file__).parents[3] / "benchmarks" / "train.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_train", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_plain_path_has_our_loss_and_gradients(bench):
    shape = bench.SHAPES["tiny"]
    made = bench.make_target(shape)
    target = bench.Target(made.embed.float(), made.lm_head.float(), made.target_ids, torch.device("cpu"), torch.float32)
    rows = bench.make_rows(shape, 0)
    assert len({len(row.input_ids) for row in rows}) == 2  # one is padded
    plain = bench.PlainDraft(new_head(shape.settings(), 0), target, shape.steps, 0.8)
    expected = plain(*bench.plain_inputs(rows, shape, target))
    expected.backward()
    ours, batch = new_head(shape.settings(), 0), bench.make_batch(rows, shape, target)
    objective = Objective("soft cross-entropy", "sequence", 0.8, denominators([batch], "sequence"), torch.zeros(shape.steps))
    teacher = FullTeacher(target.lm_head, target.target_ids)(batch)
    assert 0 < teacher.argmax_known.float().mean() < 1
    loss = ours(batch, target.embed, RowTerms(batch, teacher, objective))[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), plain.head.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-6, rtol=1e-3), name
