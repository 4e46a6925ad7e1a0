"""What surrounds SGLang, without SGLang: its command line, what is refused, and the capture hooks on made-up batches."""

import types

import numpy as np
import pytest
import torch

from eagle3_offline.records import UserError
from eagle3_offline.target import sglang_hook, sglang_server
from eagle3_offline.target.engine import Asked, Request
from eagle3_offline.target.reduction import Reducer
from eagle3_offline.target.serve import without
from eagle3_offline.target.server_pool import completion, normal_url, retry_after
from eagle3_offline.target.sglang_hook import ERROR, NORM, REDUCER, CaptureError, hook_specs, read_row, write_teachers

H = 4


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_options_become_words():
    options = {
        "tp_size": 2,
        "trust_remote_code": True,
        "x": None,
        "y": False,
        "a": ["b", 1],
        "forward_hooks": [{"name": "n"}],
        "j": {"k": 1},
    }
    words = ["--tp-size", "2", "--trust-remote-code", "--a", "b", "1", "--forward-hooks", '[{"name": "n"}]', "--j", '{"k": 1}']
    assert sglang_server.command_line(options) == words


@pytest.mark.parametrize(
    "options, config, message",
    [
        ({"model_path": "x"}, {}, "sets model_path, which eagle3-offline sets itself"),
        ({"forward-hooks": []}, {}, "sets forward_hooks"),
        ({"pp_size": 2}, {}, "pipeline parallelism"),
        ({"dp-size": 4}, {}, "data parallelism"),
        ({"enable_dp_attention": True}, {}, "DP attention"),
        ({"enable_mixed_chunk": True}, {}, "mixed chunks"),
        ({"quantization": "fp8"}, {}, "another model than the dumped head's"),
        ({}, {"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
    ],
)
def test_what_a_dump_cannot_be_made_with_is_refused_with_the_reason(options, config, message):
    with pytest.raises(UserError, match=message):
        sglang_server.check_options(options, config, capture=True)


def test_what_is_harmless_is_passed_on():
    sglang_server.check_options({"tp_size": 2, "pp_size": 1, "enable_mixed_chunk": False}, {}, capture=True)
    sglang_server.check_options({"quantization": "fp8"}, {}, capture=False)  # answers may come from anything


@pytest.mark.parametrize("version, fine", [("0.5.17", True), ("0.5.22.post1", True), ("0.5.16", False), ("0.5.23", False), (None, False)])
def test_versions_that_were_not_tested_are_refused_with_the_range(monkeypatch, version, fine):
    monkeypatch.setattr(sglang_server, "installed_version", lambda: version)
    if fine:
        assert sglang_server.require_tested_version() == version
    else:
        with pytest.raises(UserError, match=r"0\.5\.17 to 0\.5\.22"):
            sglang_server.require_tested_version()


def test_what_follows_the_dashes_replaces_our_defaults():
    options = {"max_running_requests": 32, "attention_backend": "torch_native", "dtype": "float32"}
    assert without(options, ("--max-running-requests=8", "--decode-attention-backend", "intel_amx")) == {"dtype": "float32"}


# ---------------------------------------------------------------------------------------------------------------------
# Capture


class Mode:
    def __init__(self, extend=True, mixed=False):
        self.is_extend, self.is_mixed = (lambda: extend), (lambda: mixed)


def batch(pieces, **mode):
    """A forward batch of (rid, prefix length, tokens)."""
    rids, prefixes, lengths = ([piece[n] for piece in pieces] for n in range(3))
    return types.SimpleNamespace(rids=rids, extend_prefix_lens_cpu=prefixes, extend_seq_lens_cpu=lengths, forward_mode=Mode(**mode))


@pytest.fixture
def model(tmp_path):
    """run(pieces): a forward pass of two layers in which boundary b of token t is 100 b + t, through the hooks that SGLang would
    register."""
    specs = hook_specs((0, 2), tmp_path, "float32", depth=2)
    np.save(tmp_path / NORM, np.ones(H, np.float32))
    hooks = [getattr(sglang_hook, spec["hook_factory"].split(":")[1])(spec["config"]) for spec in specs]
    assert [spec["target_modules"] for spec in specs] == [["*embed_tokens"], ["*layers.1"], ["*logits_processor"]]

    def run(pieces, skip=(), double=False, rows=None, **mode):
        tokens = torch.cat([torch.arange(prefix, prefix + length) for _, prefix, length in pieces])
        state = tokens[: rows or len(tokens), None].float().expand(-1, H)
        outputs = [state, (state + 150, torch.full_like(state, 50.0))]
        for number, (hook, output) in enumerate(zip(hooks[:2], outputs, strict=True)):
            for _ in range(1 + double):
                if number not in skip:
                    hook(None, (), output)
        hooks[2](None, (tokens, state + 900, None, batch(pieces, **mode)), None)

    yield run
    sglang_hook._captures.pop(str(tmp_path))


def expected(length: int) -> np.ndarray:
    tokens = np.arange(length, dtype=np.float32)[:, None].repeat(H, 1)
    return np.stack([tokens, tokens + 200, tokens + 900])


def test_pieces_of_a_row_are_joined_and_others_are_left_alone(model, tmp_path):
    model([("eagle3-0-0", 0, 5), ("HEALTH_CHECK_1", 0, 1), ("eagle3-0-1", 0, 3)])
    model([("eagle3-0-1", 3, 4)])
    model([("eagle3-0-1", 7, 2), ("eagle3-0-2", 0, 1)], extend=False)  # decoding
    for rid, length in (("eagle3-0-0", 5), ("eagle3-0-1", 7)):
        ids, (states,) = read_row(tmp_path, rid, length)
        assert ids.tolist() == list(range(length)) and np.array_equal(states, expected(length))
    assert [path.name for path in tmp_path.iterdir()] == [NORM]


def test_a_row_that_starts_again_is_taken_from_there(model, tmp_path):
    model([("eagle3-0-0", 0, 4)])
    model([("eagle3-0-0", 4, 2)])
    model([("eagle3-0-0", 0, 3)])
    model([("eagle3-0-0", 3, 5)])
    assert np.array_equal(read_row(tmp_path, "eagle3-0-0", 8)[1][0], expected(8))


def test_a_row_of_a_compact_dump_is_reduced_in_the_scheduler(model, tmp_path):
    """Whole and in pieces, beside one that is not: the projection and the teachers are those of the reducer itself."""
    generator = torch.Generator().manual_seed(0)
    reducer = Reducer(torch.randn(2 * H, 3, generator=generator), torch.randn(20, H, generator=generator), 5)
    reducer.save(tmp_path / REDUCER)
    asked = Asked(np.arange(8, dtype=np.int32), np.array([2, 3, 4, 7]))
    assert asked.following.tolist() == [3, 4, 5, -1]
    for rid in ("eagle3-0-0", "eagle3-0-1"):
        write_teachers(tmp_path, rid, asked)
    model([("eagle3-0-0", 0, 8), ("eagle3-0-2", 0, 2)])
    for prefix, length in ((0, 2), (2, 2), (4, 4)):
        model([("eagle3-0-1", prefix, length)])
    low, high, last = map(torch.from_numpy, expected(8))
    wanted = reducer(torch.cat([low, high], 1), last[asked.teachers], asked.following)
    for rid in ("eagle3-0-0", "eagle3-0-1"):
        ids, (aux, top_ids, log_probs, normaliser) = read_row(tmp_path, rid, 8)
        assert ids.tolist() == list(range(8)) and np.allclose(aux, wanted.aux, rtol=1e-6)
        assert np.array_equal(top_ids, wanted.top.ids) and np.allclose(log_probs, wanted.top.log_probs, rtol=1e-3)
        assert np.allclose(normaliser[:, 0], wanted.top.log_normaliser, rtol=1e-6)
    assert np.array_equal(read_row(tmp_path, "eagle3-0-2", 2)[1][0], expected(2))
    assert {path.name for path in tmp_path.iterdir()} == {NORM, REDUCER}


def test_a_layer_that_leaves_its_residual_with_the_batch(tmp_path):
    """As SGLang's Qwen3 and gpt-oss do: the stream's snapshot is the sum; without it nothing is captured."""

    class Stream:
        def snapshot(self, output):
            return output + 5

    capture = sglang_hook.Capture(tmp_path, (1, 2), torch.float32, depth=2)
    capture.guard(capture.keep, 1, torch.ones(2, H), (torch.arange(2), types.SimpleNamespace(residual_stream=Stream())), True)
    assert capture.kept[1].tolist() == [[6.0] * H] * 2
    capture.guard(capture.keep, 2, torch.ones(2, H), (torch.arange(2), types.SimpleNamespace(residual_stream=None)), True)
    assert "leaves its residual where it was not found" in (tmp_path / ERROR).read_text()


@pytest.mark.parametrize("pieces", [[], [(0, 3)], [(2, 6)], [(0, 3), (4, 4)], [(0, 9)]])
def test_a_row_with_a_gap_is_refused(model, tmp_path, pieces):
    for prefix, length in pieces:
        model([("eagle3-0-0", prefix, length)])
    with pytest.raises(CaptureError, match="expected 8 without a gap"):
        read_row(tmp_path, "eagle3-0-0", 8)
    assert [path.name for path in tmp_path.iterdir()] == [NORM]


@pytest.mark.parametrize(
    "how, message",
    [
        ({"skip": (1,)}, r"boundaries \[2\]: its decoder layers were not found"),
        ({"double": True}, "more than one stack of layers"),
        ({"rows": 2}, "split over ranks, or padded"),
        ({"mixed": True}, "--enable-mixed-chunk"),
    ],
)
def test_what_cannot_be_captured_is_written_down_and_never_raised(model, tmp_path, how, message):
    import re

    model([("eagle3-0-0", 0, 5)], **how)
    assert re.search(message, (tmp_path / ERROR).read_text())
    model([("eagle3-0-0", 0, 5)])  # from then on nothing is captured
    assert {path.name for path in tmp_path.iterdir()} == {NORM, ERROR}


def test_boundary_l_is_checked_once_and_need_not_be_asked_for(tmp_path):
    """The final norm (2 x of the first channel) makes the last state of it; a state that it does not make is refused."""
    norm, state = torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(3, 1)
    np.save(tmp_path / NORM, norm.numpy())
    normed = state * norm / state.square().mean().sqrt()

    def forward(capture, after_the_last):
        capture.guard(capture.keep, 1, state)
        capture.guard(capture.keep, 2, after_the_last)
        capture.guard(capture.write, (torch.arange(3), normed, None, batch([("eagle3-0-0", 0, 3)])))

    capture = sglang_hook.Capture(tmp_path, (1,), torch.float32, depth=2)
    forward(capture, state)
    assert capture.checked and not (tmp_path / ERROR).exists()
    forward(capture, torch.zeros(3, H))  # not looked at again
    assert read_row(tmp_path, "eagle3-0-0", 3)[1][0].shape == (2, 3, H)
    forward(sglang_hook.Capture(tmp_path, (1,), torch.float32, depth=2), state.flip(1))
    assert "not what the final norm reads (cosine 0.6" in (tmp_path / ERROR).read_text()


def test_a_deferred_all_reduce_is_refused(tmp_path):
    capture = sglang_hook.Capture(tmp_path, (1,), torch.float32, depth=2)
    partial = torch.zeros(3, H)
    partial._sglang_needs_allreduce_fusion = True
    capture.guard(capture.keep, 1, (partial, torch.zeros(3, H)))
    assert "partial sums" in (tmp_path / ERROR).read_text()


def test_what_is_kept_outlives_work_in_place(tmp_path):
    capture = sglang_hook.Capture(tmp_path, (0,), torch.float32, depth=2)
    output = torch.zeros(2, H)
    capture.keep(0, output)
    output += 1
    assert not capture.kept[0].any()


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def response(status=200, headers=None, **value):
    import httpx

    return httpx.Response(status, json=value, headers=headers)


def test_an_answer_keeps_the_engines_ids():
    meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 2}
    assert completion("u", Request("r", [1, 2], 9), response(output_ids=[5, 6], meta_info=meta)).token_ids == [5, 6]
    cut = completion("u", Request("r", [1, 2], 9), response(output_ids=[5], meta_info={**meta, "finish_reason": {"type": "length"}}))
    assert cut.finish_reason == "length"
    with pytest.raises(UserError, match="changes prompts"):
        completion("u", Request("r", [1, 2, 3], 9), response(output_ids=[5, 6], meta_info=meta))


def test_small_things():
    assert normal_url("node:30000") == "http://node:30000" and normal_url("https://a/b/") == "https://a/b"
    assert retry_after(response(429, {"retry-after": "2.5"})) == 2.5 and retry_after(response(429)) is None
    assert retry_after(response(429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0.0
    assert retry_after(response(429, {"retry-after": "soon"})) is None
