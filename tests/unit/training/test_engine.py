"""What the optimiser holds together, and checkpoints of an earlier grouping."""

import pytest
import torch

from eagle3_offline.records import UserError
from eagle3_offline.runs import write_json
from eagle3_offline.training import checkpoints, engine
from eagle3_offline.training.distributed import Ranks


def test_neighbours_share_a_group_up_to_its_size(monkeypatch):
    monkeypatch.setattr(engine, "GROUP_ELEMENTS", 5)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 2, 4, 9, 1)]
    groups = engine._groups(parameters)
    assert [[len(parameter) for parameter in group["params"]] for group in groups] == [[3, 2], [4], [9], [1]]


@pytest.mark.parametrize("about", [None, {"world": 1, "zero_stage": 1}])
def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path, about):
    (tmp_path / "step-00000005").mkdir()
    if about:
        write_json(tmp_path / "step-00000005" / "about.json", about)
    with pytest.raises(UserError, match="step-00000005 was written by an earlier version.*train again"):
        checkpoints.newest(tmp_path, Ranks(0, 1, torch.device("cpu")), 1)
