import numpy as np
import pytest

from eagle3_offline.conversations.token_rows import answer_tokens, read_token_rows, write_token_rows
from eagle3_offline.records import TokenRow, UserError


def row(name="a", turns=((2, 4), (5, 6))):
    return TokenRow(name, "src", "train", np.arange(7, dtype=np.int32), turns, ("stop",) * len(turns))


def test_round_trip(tmp_path):
    path = tmp_path / "unit-00000.parquet"
    write_token_rows(path, [row("a"), row("b", ((1, 7),))])
    first, second = read_token_rows(path)
    assert first.loss_mask.tolist() == [0, 0, 1, 1, 0, 1, 0]
    assert (first.id, first.turns, second.finish_reasons) == ("a", ((2, 4), (5, 6)), ("stop",))
    assert first.input_ids.dtype == np.int32 and first.input_ids.tolist() == list(range(7))
    assert answer_tokens(path) == 3 + 6 and answer_tokens(tmp_path / "none") is None


def test_damage_is_an_error(tmp_path):
    path = tmp_path / "unit-00000.parquet"
    with pytest.raises(UserError, match="does not exist"):
        read_token_rows(path)
    write_token_rows(path, [row()])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        read_token_rows(path)


@pytest.mark.parametrize("turns", [((3, 3),), ((4, 6), (2, 3)), ((5, 8),)])
def test_turns_that_cannot_be(turns):
    with pytest.raises(ValueError, match="turn"):
        row(turns=turns)
