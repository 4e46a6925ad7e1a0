"""The embedded engine against transformers' own outputs, in fp32, on a small random Llama."""

import numpy as np
import pytest
import torch

from eagle3_offline.records import UserError
from eagle3_offline.target import transformers_engine
from eagle3_offline.target.engine import Request, Sampling, capture_layers
from eagle3_offline.target.folder import head_tensors
from eagle3_offline.target.transformers_engine import TransformersEngine, truncate

from ...families import FAMILIES, make_family

GREEDY = Sampling(0.0, 1.0, 0, 0)
LAYERS = (2, 4, 5)


@pytest.fixture(scope="module")
def engine(random_target):
    return TransformersEngine(random_target, LAYERS, "float32")


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 200, int(rng.integers(3, 30))).astype(np.int32) for _ in range(count)]


def test_captured_states_are_hugging_faces_hidden_states(engine):
    """Boundary b is hidden_states[b]; the last state is the input of lm_head. A layer more or less is far off."""
    batch = rows(5)
    for row, states in zip(batch, engine.prefill(batch), strict=True):
        with torch.no_grad():
            out = engine.model(torch.from_numpy(row)[None].long(), output_hidden_states=True)
        for b in LAYERS:
            assert np.allclose(states.aux[b], out.hidden_states[b][0], atol=1e-5)
            assert not np.allclose(states.aux[b], out.hidden_states[b + 1][0], atol=1e-2)
        assert np.allclose(states.last, out.hidden_states[-1][0], atol=1e-5)
        assert np.allclose(engine.model.lm_head(torch.from_numpy(states.last)).detach(), out.logits[0], atol=1e-4)


def test_the_last_boundary_is_what_enters_the_final_norm(random_target):
    """Against the layers called one by one; Hugging Face's hidden_states[L] is what leaves the norm."""
    engine = TransformersEngine(random_target, (7, 8), "float32")
    row = rows(1)[0]
    (states,) = engine.prefill([row])
    base = engine.model.model
    with torch.no_grad():
        h, positions = base.embed_tokens(torch.from_numpy(row)[None].long()), torch.arange(len(row))[None]
        mask = torch.full((len(row), len(row)), float("-inf")).triu(1)[None, None]
        for number, layer in enumerate(base.layers):
            if number == 7:
                assert np.allclose(states.aux[7], h[0], atol=1e-5)
            h = layer(h, attention_mask=mask, position_embeddings=base.rotary_emb(h, positions))
        assert np.allclose(states.aux[8], h[0], atol=1e-5)
        assert np.allclose(states.last, base.norm(h)[0], atol=1e-5)
        assert not np.allclose(states.aux[8], states.last, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, random_target, tmp_path):
    """The layers are found, boundaries are hidden_states[b], and the head's tensors make the logits of boundary L."""
    folder = make_family(family, random_target, tmp_path / family)
    engine = TransformersEngine(folder, (0, 1, 2, 4), "float32")
    short, row = rows(2)
    _, states = engine.prefill([short, row])
    with torch.no_grad():
        out = engine.model(torch.from_numpy(row)[None].long(), output_hidden_states=True)
    for b in (0, 1, 2):
        assert np.allclose(states.aux[b], out.hidden_states[b][0], atol=1e-4)
    assert np.allclose(states.last, out.hidden_states[4][0], atol=1e-4)
    tensors, before = head_tensors(folder, "float32"), torch.from_numpy(states.aux[4])
    last = before * (before.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors["norm.weight"]
    assert np.allclose(last, states.last, atol=1e-3)
    logits = last @ tensors["lm_head.weight"].T
    if family == "gemma2":
        logits = 30 * torch.tanh(logits / 30)  # its soft-capping
    assert torch.allclose(logits, out.logits[0], atol=1e-2)
    assert torch.equal(tensors["embed_tokens.weight"], engine.model.get_input_embeddings().weight)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_states_where_the_processor_would_emulate_it(native, engine, random_target, monkeypatch):
    """There the target runs in fp32, and its states are rounded."""
    monkeypatch.setattr(transformers_engine, "cpu_multiplies_bfloat16", lambda: native)
    found = TransformersEngine(random_target, LAYERS, "bfloat16")
    assert found.model.dtype == (torch.bfloat16 if native else torch.float32)
    (row,) = rows(1)
    (wide,), (states,) = engine.prefill([row]), found.prefill([row])
    for state, expected in [*((states.aux[b], wide.aux[b]) for b in LAYERS), (states.last, wide.last)]:
        assert state.dtype == np.uint16
        equal = torch.equal(torch.from_numpy(state).view(torch.bfloat16), torch.from_numpy(expected).bfloat16())
        assert equal == (not native)


def test_batched_greedy_answers_equal_those_alone(engine):
    requests = [Request(f"r{i}", row.tolist(), 12) for i, row in enumerate(rows(6, seed=1))]
    together = engine.generate(requests, GREEDY)
    assert together == [engine.generate([request], GREEDY)[0] for request in requests]
    for request, answer in zip(requests, together, strict=True):
        full = [*request.prompt, *answer.token_ids]
        with torch.no_grad():
            argmax = engine.model(torch.tensor([full])).logits[0].argmax(-1)
        assert argmax[len(request.prompt) - 1 : -1].tolist() == answer.token_ids
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in engine.end_ids else "length")


def test_the_end_of_turn_ends_one_row_and_not_the_others(engine, monkeypatch):
    requests = [Request(f"r{i}", row.tolist(), 9) for i, row in enumerate(rows(5, seed=2))]
    free = engine.generate(requests, GREEDY)
    monkeypatch.setattr(engine, "end_ids", [free[2].token_ids[3]])
    ended = engine.generate(requests, GREEDY)
    for before, after in zip(free, ended, strict=True):
        stop = next((n for n, token in enumerate(before.token_ids) if token in engine.end_ids), len(before.token_ids) - 1)
        assert after.token_ids == before.token_ids[: stop + 1]
    assert ended[2].finish_reason == "stop"


def test_sampling_depends_on_seed_and_row_alone(engine):
    requests = [Request(f"r{i}", row.tolist(), 8) for i, row in enumerate(rows(4, seed=3))]
    hot = Sampling(1.0, 0.95, 50, seed=7)
    together = engine.generate(requests, hot)
    assert together[1:3] == engine.generate(requests[1:3], hot)
    assert together != engine.generate(requests, Sampling(1.0, 0.95, 50, seed=8))


def test_truncate_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert truncate(logits, 1.0, 2).isinf().tolist() == [[False, False, True, True]]
    assert truncate(logits, 0.6, 0).isinf().tolist() == [[False, False, True, True]]  # 0.5 is below 0.6, so 0.3 stays
    assert truncate(logits, 0.5, 0).isinf().tolist() == [[False, True, True, True]]
    assert not truncate(logits, 1.0, 0).isinf().any()


def test_layers():
    assert capture_layers([], 32) == (2, 16, 29)
    assert capture_layers([], 8) == (2, 4, 5)
    assert capture_layers([7, 1, 3, 5], 8) == (1, 3, 5, 7)
    with pytest.raises(UserError, match="collide"):
        capture_layers([], 6)
    assert capture_layers([8, 4], 8) == (4, 8)
    for wrong in ([1, 1, 2], [0, 9], [-1, 2]):
        with pytest.raises(UserError, match="distinct boundary indices"):
            capture_layers(wrong, 8)
