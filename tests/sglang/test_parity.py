"""The same rows through SGLang and through transformers, in fp32: states to 1e-5, ids and greedy answers identical."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eagle3_offline.config import RegenerateConfig
from eagle3_offline.conversations.stdlib_questions import answer_pairs
from eagle3_offline.records import Message
from eagle3_offline.target.engine import Asked, Request, Sampling, States
from eagle3_offline.target.folder import head_tensors
from eagle3_offline.target.reduction import Reducer
from eagle3_offline.target.sglang_engine import SglangEngine
from eagle3_offline.target.transformers_engine import TransformersEngine

from ..families import make_family

TOLERANCE = 1e-5  # of a row's own size, where that is above 1
GREEDY = Sampling(0.0, 1.0, 0, 0)
CHUNK = 64
LAYERS = (0, 1, 2, 3, 4, 5, 6, 7, 8)  # every boundary of the tiny target; 8 enters its final norm


def difference(ours: States, theirs: States) -> float:
    """The largest difference of any state, relative to the row's size where that is above 1."""
    assert ours.aux.keys() == theirs.aux.keys()
    pairs = [(ours.aux[b], theirs.aux[b]) for b in ours.aux] + [(ours.last, theirs.last)]
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)


@pytest.fixture(scope="session")
def tiny_rows(tiny) -> list[np.ndarray]:
    """16 chats of the tiny target, 30 to 250 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in answer_pairs()[:64]]
    ids = tokenizer("".join(texts))["input_ids"]
    lengths = np.linspace(30, 250, 16).astype(int)
    starts = np.cumsum(lengths) - lengths
    return [np.array(ids[start : start + length], np.int32) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="session")
def tiny_reference(tiny, tiny_rows) -> list[States]:
    engine = TransformersEngine(tiny, LAYERS, "float32")
    return [engine.prefill([row])[0] for row in tiny_rows]


@pytest.fixture(scope="session")
def reducer(tiny) -> Reducer:
    """A random projection to 32 channels, the target's own head, its 8 largest logits."""
    projection = torch.randn(len(LAYERS) * 192, 32, generator=torch.Generator().manual_seed(0))
    return Reducer(projection, head_tensors(tiny, "float32")["lm_head.weight"], 8)


@pytest.fixture(scope="session", params=["whole", "chunked"])
def tiny_engine(request, tiny, reducer, tmp_path_factory):
    log = tmp_path_factory.mktemp("engine") / "log"
    chunk = CHUNK if request.param == "chunked" else -1
    options = {"chunked_prefill_size": chunk}
    engine = SglangEngine(tiny, LAYERS, "float32", context=256, log=log, options=options, reducer=reducer)
    yield engine
    engine.close()
    assert (f"#new-token: {CHUNK}," in log.read_text()) == (request.param == "chunked")  # rows did come in pieces


@pytest.mark.parametrize("size", [1, 16])
def test_states_are_those_of_transformers(tiny_engine, tiny_rows, tiny_reference, size):
    batches = [tiny_rows[start : start + size] for start in range(0, len(tiny_rows), size)]
    captured = [states for batch in tiny_engine.prefill_batches(batches) for states in batch]
    assert max(map(difference, captured, tiny_reference)) <= TOLERANCE
    for row, states in zip(tiny_rows, captured, strict=True):
        assert states.last.shape == (len(row), 192) and states.last.dtype == np.float32


def test_what_a_compact_dump_keeps_is_that_of_transformers(tiny_engine, tiny_rows, tiny_reference, reducer):
    """Reduced in the scheduler, whole and in chunks: as reduced from transformers' states, to the same tolerance."""
    rows = [Asked(row, np.arange(len(row) // 3, len(row))) for row in tiny_rows]
    reduced = next(tiny_engine.reduced_batches([rows]))
    host = reducer.on("cpu")
    for row, ours, states in zip(rows, reduced, tiny_reference, strict=True):
        theirs = host(torch.from_numpy(states.side_by_side()), torch.from_numpy(states.last[row.teachers]), row.following)
        assert np.abs(ours.aux - theirs.aux).max() <= TOLERANCE * np.abs(theirs.aux).max()
        assert np.abs(ours.top.log_normaliser - theirs.top.log_normaliser).max() <= 10 * TOLERANCE
        assert np.array_equal(ours.top.ids[:, 0], theirs.top.ids[:, 0])  # later ones may change places
        assert np.allclose(np.sort(ours.top.log_probs), np.sort(theirs.top.log_probs), atol=0.02)  # fp16, about 10


def test_a_shifted_layer_is_seen(tiny_engine, tiny_rows, tiny_reference):
    """The comparison above fails when each boundary holds its neighbour's states."""
    captured = next(tiny_engine.prefill_batches([tiny_rows[:1]]))[0]
    shifted = States({b: captured.aux[(b + 1) % 9] for b in captured.aux}, captured.last)
    assert difference(shifted, tiny_reference[0]) > 1000 * TOLERANCE
    one = replace(captured, aux={**captured.aux, 4: captured.aux[3]})
    assert difference(one, tiny_reference[0]) > 1000 * TOLERANCE


def answers(url: str, requests: list[Request]) -> list[list[int]]:
    """Through the pool, all at once."""
    import asyncio

    from eagle3_offline.target.server_pool import ServerPool

    async def verify(_pool, _server):
        pass

    async def ask():
        config = RegenerateConfig()
        limits = {"concurrency": 64, "timeout": 120.0, "attempts": 2, "patience": 30.0}
        assert limits.keys() <= set(config.__dataclass_fields__)
        async with ServerPool([url], verify, **limits) as pool:
            return await asyncio.gather(*(pool.answer(request, GREEDY) for request in requests))

    return asyncio.run(ask())


def prompts(folder, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    from eagle3_offline.conversations.template import ChatTemplate

    template = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    return [template.first_prompt([Message("user", question)]) for question, _ in answer_pairs()[:count]]


def test_greedy_answers_of_the_tiny_target_are_those_of_transformers(tiny, tiny_server):
    requests = [Request(f"q{n}", prompt, 48) for n, prompt in enumerate(prompts(tiny, 50))]
    theirs = TransformersEngine(tiny, (), "float32").generate(requests, GREEDY)
    assert answers(tiny_server.url, requests) == theirs
    assert {answer.finish_reason for answer in theirs} == {"stop", "length"}


def test_smollm2_states_and_answers_are_those_of_transformers(smollm2, tmp_path):
    rows = [np.array(prompt, np.int32) for prompt in prompts(smollm2, 4)]
    requests = [Request(f"q{n}", prompt, 24) for n, prompt in enumerate(prompts(smollm2, 8))]
    reference = TransformersEngine(smollm2, (2, 15, 27), "float32")
    engine = SglangEngine(smollm2, (2, 15, 27), "float32", context=256, log=tmp_path / "engine.log")
    try:
        captured = next(engine.prefill_batches([rows]))
        given = answers(engine.url, requests)
    finally:
        engine.close()
    assert max(map(difference, captured, reference.prefill(rows))) <= TOLERANCE
    assert given == reference.generate(requests, GREEDY)


def test_a_family_whose_layers_leave_the_residual_with_the_batch(sglang, random_target, tmp_path):
    """Qwen3, random: its layers return what they add, unlike Llama's; gpt-oss and the mixtures of experts are written so, too."""
    folder = make_family("qwen3", random_target, tmp_path / "qwen3")
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 250, length).astype(np.int32) for length in (5, 40, 23)]
    layers = (0, 1, 2, 3, 4)
    engine = SglangEngine(folder, layers, "float32", context=64, log=tmp_path / "log")
    try:
        captured = next(engine.prefill_batches([rows]))
    finally:
        engine.close()
    assert max(map(difference, captured, TransformersEngine(folder, layers, "float32").prefill(rows))) <= TOLERANCE
