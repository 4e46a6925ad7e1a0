"""Compact dumps: the basis against plain numpy, top logits against plain float64, and the fold that export will do."""

import numpy as np
import pytest
import torch

from eagle3_offline.capture.compact import Moments, Reduction, asked
from eagle3_offline.records import STORAGE_DTYPE, TokenRow, UserError
from eagle3_offline.store.format import Compact, DumpSpec, last_positions
from eagle3_offline.store.numeric import put_float32, to_float32
from eagle3_offline.target.reduction import Reducer, top_logits
from eagle3_offline.target.transformers_engine import TransformersEngine

H, V, LAYERS = 6, 40, 2
CHANNELS = H * LAYERS


def make_spec(rank, top_k=3, dtype="float32"):
    return DumpSpec(
        layers=tuple(range(1, LAYERS + 1)), hidden_size=H, vocab_size=V, dtype=dtype, codec="none", last_codec=None,
        compact=Compact(rank, top_k, "digest"), target={}, engine={}, max_length=100, conversation={},
    )  # fmt: skip


def make_rows(count, rank, seed=0):
    """Rows whose captured states span `rank` dimensions, with one outlier token each."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((rank, CHANNELS)) * 10.0 ** rng.uniform(-1, 1, CHANNELS)
    for number in range(count):
        aux = (rng.standard_normal((30, rank)) @ mix).astype(np.float32)
        aux[4] *= 100
        row = TokenRow(f"r{number}", "s", "train", rng.integers(0, V, 30).astype(np.int32), ((10, 30),), ("stop",))
        yield row, aux, rng.standard_normal((len(last_positions(row.turns, 30)), H)).astype(np.float32)


@pytest.fixture
def moments():
    found = Moments(CHANNELS, H)
    for row, aux, last in make_rows(10, CHANNELS):
        found.add(row, aux, last, torch.full((H,), 2.0), "float32")
    return found


def test_the_basis_is_that_of_plain_numpy(moments):
    states = np.concatenate([np.delete(aux, 4, axis=0) for _, aux, _ in make_rows(10, CHANNELS)]).astype(np.float64)
    scale = np.sqrt((states**2).mean(0))
    values, vectors = np.linalg.eigh((states / scale).T @ (states / scale) / len(states))
    basis = moments.basis(4)
    assert moments.tokens == len(states) == 290
    np.testing.assert_allclose(basis["scale"], scale, rtol=1e-5)
    np.testing.assert_allclose(basis["eigenvalues"], values[::-1], rtol=1e-4, atol=1e-6)
    assert basis["components"].shape == (CHANNELS, 4) and basis["ridge"].shape == (H, 4)
    np.testing.assert_allclose(np.abs(basis["components"].T @ vectors[:, ::-1][:, :4]), np.eye(4), atol=1e-4)
    assert (basis["components"].sum(0) >= 0).all()


def test_the_ridge_start_is_the_regression_one_token_ahead(moments):
    # root p reads aux[p] and foresees last[p + 1]: answers are tokens 10..29, so roots 9..28
    basis = moments.basis(CHANNELS)
    projection = basis["components"].astype(np.float64) / basis["scale"][:, None]
    features, ahead = [], []
    for row, aux, last in make_rows(10, CHANNELS):
        positions = last_positions(row.turns, 30).tolist()
        for p in range(9, 29):
            features.append(aux[p] @ projection)
            ahead.append(last[positions.index(p + 1)] / 2.0)
    features, ahead = np.array(features), np.array(ahead)
    gram = features.T @ features
    wanted = np.linalg.solve(gram + 1e-3 * np.mean(np.diag(gram)) * np.eye(CHANNELS), features.T @ ahead)
    np.testing.assert_allclose(basis["ridge"].T, wanted, rtol=2e-3, atol=1e-4)


def test_states_of_low_rank_lose_nothing():
    moments = Moments(CHANNELS, H)
    for row, aux, last in make_rows(10, 3):
        moments.add(row, aux, last, torch.ones(H), "float32")
    basis = moments.basis(3)
    reduction = Reduction(make_spec(3), basis, torch.randn(V, H))
    fc = torch.randn(H, CHANNELS, dtype=torch.float64)  # any fc has an equal in the projected space
    projection = torch.from_numpy(basis["components"]).double() / torch.from_numpy(basis["scale"]).double()[:, None]  # P
    back = torch.from_numpy(basis["components"].T * basis["scale"]).double()  # aux = (aux @ P) @ back on the span
    for row, aux, last in make_rows(2, 3):
        projected = torch.from_numpy(reduction(row, aux, last).aux).double()
        torch.testing.assert_close(projected @ back @ fc.T, torch.from_numpy(aux).double() @ fc.T, rtol=1e-3, atol=1e-3)
        # and what is trained there is served as an ordinary fc = fc_r @ P.T
        fc_r = torch.randn(H, 3, dtype=torch.float64)
        torch.testing.assert_close(projected @ fc_r.T, torch.from_numpy(aux).double() @ (fc_r @ projection.T).T, rtol=1e-4, atol=1e-4)


def test_too_few_tokens_are_refused():
    moments = Moments(CHANNELS, H)
    for row, aux, last in make_rows(1, CHANNELS):
        moments.add(row, aux, last, torch.ones(H), "float32")
    with pytest.raises(UserError, match="needs at least 120 tokens, found 29"):
        moments.basis(2)


def test_top_logits_by_hand():
    # logits of token 0: 3 1 2 0 -> the two largest are 0 and 2; it was followed by 1, which takes the second place
    head = torch.tensor([[3.0], [1.0], [2.0], [0.0]])
    top = top_logits(torch.ones(3, 1), head, np.array([1, 2, -1]), 2)
    total = np.log(np.exp([3, 1, 2, 0]).sum())
    assert top.ids.tolist() == [[0, 1], [0, 2], [0, 2]] and top.ids.dtype == np.int32
    np.testing.assert_allclose(top.log_normaliser, [total] * 3, rtol=1e-6)
    np.testing.assert_allclose(top.log_probs, np.array([[3, 1], [3, 2], [3, 2]]) - total, atol=2e-3)


def test_top_logits_against_float64():
    rng = np.random.default_rng(0)
    last, head, following = rng.standard_normal((600, H)), rng.standard_normal((V, H)), rng.integers(0, V, 600)
    top = top_logits(torch.from_numpy(last).float(), torch.from_numpy(head).float(), following, 5)
    logits = last @ head.T
    lse = np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(top.log_normaliser, lse, rtol=1e-5)
    for t in range(600):
        wanted = np.argsort(-logits[t])[:5].tolist()
        if following[t] not in wanted:
            wanted[-1] = following[t]
        assert top.ids[t].tolist() == wanted
        np.testing.assert_allclose(top.log_probs[t], logits[t, wanted] - lse[t], atol=1e-2)


def test_a_reduced_row(moments):
    spec = make_spec(4)
    row, aux, last = next(make_rows(1, CHANNELS))
    head = torch.randn(V, H)
    captured = Reduction(spec, moments.basis(4), head)(row, aux, last)
    assert captured.last is None and captured.aux.shape == (30, 4) and captured.aux.dtype == np.float32
    # teachers stand at 9..29; what follows 9 is token 10's id, what follows the last is nothing
    positions = last_positions(row.turns, 30)
    assert positions.tolist() == list(range(9, 30)) and captured.top.ids.shape == (21, 3)
    for n, t in enumerate(positions[:-1]):
        assert row.input_ids[t + 1] in captured.top.ids[n]
    with pytest.raises(UserError, match="rank 4, the dump's is 5"):
        Reduction(make_spec(5), moments.basis(4), head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_reduced_on_the_engines_device_is_what_the_host_would_make_of_its_states(random_target, dtype):
    """Byte for byte, on a CPU: the states copied to the host, then projected and multiplied by the head there."""
    rng = np.random.default_rng(0)
    layers, width = (2, 5, 8), 32
    projection, head = torch.randn(3 * width, 8), torch.randn(259, width).to(getattr(torch, dtype))
    engine = TransformersEngine(random_target, layers, dtype, reducer=Reducer(projection, head, 4))
    rows = [
        TokenRow(f"r{n}", "s", "train", rng.integers(3, 200, length).astype(np.int32), ((length // 2, length),), ("stop",))
        for n, length in enumerate((5, 30, 70))
    ]
    (reduced,) = engine.reduced_batches([[asked(row) for row in rows]])
    (states,) = engine.prefill_batches([[row.input_ids for row in rows]])
    for row, ours, whole in zip(rows, reduced, states, strict=True):
        positions = last_positions(row.turns, len(row.input_ids))
        projected = np.empty((len(row.input_ids), 8), STORAGE_DTYPE[dtype])
        put_float32((torch.from_numpy(to_float32(whole.side_by_side(), dtype)) @ projection).numpy(), projected, dtype)
        following = np.append(row.input_ids, -1)[positions + 1]
        top = top_logits(torch.from_numpy(to_float32(whole.last[positions], dtype)), head.float(), following, 4)
        assert ours.aux.dtype == projected.dtype and ours.aux.tobytes() == projected.tobytes()
        for name in ("ids", "log_probs", "log_normaliser"):
            assert getattr(ours.top, name).tobytes() == getattr(top, name).tobytes()
