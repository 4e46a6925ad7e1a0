import pytest

from eagle3_offline.config import TrainConfig
from eagle3_offline.training.engine import rate


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rate_rises_to_its_peak_and_falls_to_its_end(schedule):
    config = TrainConfig(total_steps=100, warmup_ratio=0.1, schedule=schedule, final_ratio=0.05)
    rates = [rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0  # no step at rate 0
    assert rates[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
