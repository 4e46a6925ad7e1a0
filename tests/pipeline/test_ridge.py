"""The ridge start of fc against a plain regression, and what it does to the loss before the first step."""

import numpy as np
import pytest
import torch

from eagle3_offline.config import load_recipe
from eagle3_offline.draft.batch import to_torch
from eagle3_offline.runs import Run
from eagle3_offline.training.data import open_source
from eagle3_offline.training.metrics import read_metrics
from eagle3_offline.training.ridge import RIDGE, regress, start_fc


def plain_pairs(source):
    """Features and targets token by token, float64."""
    x, y = [], []
    for row in source.train_rows:
        sample = source.sample(int(row))
        aux, last = to_torch(sample.aux).double(), to_torch(sample.last).double()
        for start, end in sample.turns:
            for token in range(start, end):  # the answer's tokens; the row before each is where it would be drafted
                x.append(aux[token - 1] * source.aux_scale)
                y.append(last[list(sample.last_positions).index(token)] / source.norm.double())
    return torch.stack(x), torch.stack(y)


def test_fc_starts_as_the_plain_ridge_regression(dumped):
    source = open_source(Run(dumped.run).dump, load_recipe(str(dumped.recipe), ("train.fc_init=ridge",)).train)
    head = source.new_head(load_recipe(str(dumped.recipe)).train)
    start_fc(source, head)
    x, y = plain_pairs(source)
    ridge = RIDGE * (x * x).sum(0).mean()
    # ridge regression as least squares with sqrt(ridge) I below
    system = torch.cat((x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
    wanted = torch.cat((y, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)))
    expected = torch.linalg.lstsq(system, wanted).solution.T
    assert torch.allclose(head.fc.weight.double(), expected, atol=1e-4)


def test_it_finds_a_linear_map():
    torch.manual_seed(0)
    true = torch.randn(4, 9)
    x = torch.randn(5000, 9)
    assert torch.allclose(regress([(x[:2000], x[:2000] @ true.T), (x[2000:], x[2000:] @ true.T)], 9), true, atol=0.01)


@pytest.mark.parametrize("more", [(), ("train.fc_norm=true",)])
def test_a_training_starts_from_it(dumped, tmp_path, more):
    first = {}
    for init in ("random", "ridge"):
        cli = dumped.copy(tmp_path / init)
        settings = (f"train.fc_init={init}", "train.total_steps=2", "train.eval_every=0", *more)
        cli.stage("train", *[word for setting in settings for word in ("--set", setting)])
        first[init] = read_metrics(Run(cli.run).draft("draft") / "metrics.csv")[0]["ce_0"]
    assert np.isfinite(first["ridge"]) and first["ridge"] != first["random"]
