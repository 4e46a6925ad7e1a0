"""Targets whose logits are more than W h: the teacher against transformers' own logits, full and compact."""

import numpy as np
import pytest
import torch
import transformers as tf

from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.teacher import FullTeacher
from eagle3_offline.logits import head_transform
from eagle3_offline.records import Sample, UserError
from eagle3_offline.target.folder import head_tensors, read_config
from eagle3_offline.target.reduction import Reducer, top_logits
from eagle3_offline.target.transformers_engine import TransformersEngine

V, H = 60, 16
SHAPE = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TARGETS = {
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SHAPE, logits_scaling=4.0, embedding_multiplier=3.0)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SHAPE, logit_scale=0.3)),
    "biased": lambda: biased(tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, tie_word_embeddings=False))),
}


def biased(model):
    model.lm_head.bias = torch.nn.Parameter(3 * torch.randn(V))
    return model


@pytest.fixture(params=TARGETS)
def target(request, tmp_path):
    """(folder, model) of a random target in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TARGETS[request.param]()
        for name, parameter in model.named_parameters():
            if name.endswith("model.norm.weight"):
                torch.nn.init.normal_(parameter, 0.5)
    model.eval().save_pretrained(tmp_path)
    return tmp_path, model


@torch.no_grad()
def test_the_teacher_has_transformers_own_logits(target):
    folder, model = target
    ids = list(range(3, 23))
    expected = model(input_ids=torch.tensor([ids])).logits[0].float()  # [T, V]
    last = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    tensors = head_tensors(folder, "float32")
    transform = head_transform(read_config(folder), tensors.get("lm_head.bias"))
    target_ids = torch.arange(0, V, 2)
    sample = Sample("row", np.array(ids, np.int32), ((1, 20),), np.zeros((20, H), np.float32), last.numpy(), np.arange(20))
    found = FullTeacher(tensors["lm_head.weight"], target_ids, transform)(collate([sample], 2), whole=True)
    assert torch.allclose(found.inside, expected[:, target_ids].softmax(-1), atol=1e-6, rtol=1e-4)
    assert torch.allclose(found.true, expected.softmax(-1)[:, target_ids], atol=1e-6, rtol=1e-4)
    assert torch.equal(found.argmax_known, torch.isin(expected.argmax(-1), target_ids))
    top = top_logits(last, tensors["lm_head.weight"], np.array([*ids[1:], -1]), 5, transform)
    share = expected.log_softmax(-1).gather(1, torch.from_numpy(top.ids).long())
    assert torch.allclose(torch.from_numpy(top.log_probs).float(), share, atol=4e-3, rtol=1e-3)  # kept in fp16
    assert np.array_equal(top.ids[:, 0], expected.argmax(-1).numpy())
    Reducer(torch.ones(H, 2), tensors["lm_head.weight"], 5, transform).save(folder / "reducer")  # as SGLang's scheduler gets it
    again = Reducer.load(folder / "reducer")(torch.zeros(20, H), last, np.array([*ids[1:], -1])).top
    assert np.array_equal(again.log_probs, top.log_probs)


@torch.no_grad()
def test_the_norms_weight_is_what_the_state_is_multiplied_by(target):
    """Gemma stores it less one; Cohere's norm also takes the mean away."""
    folder, model = target
    state = torch.randn(4, H)
    centred = state - state.mean(-1, keepdim=True) if "cohere" in model.config.model_type else state
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.allclose(model.model.norm(state), normed * head_tensors(folder, "float32")["norm.weight"], atol=1e-4)


@pytest.mark.parametrize("target", ["gemma2", "granite", "cohere"], indirect=True)  # no class here would load the Llama's bias
def test_the_engine_reads_the_same_last_states(target):
    folder, model = target
    engine = TransformersEngine(folder, (2, 3, 4), "float32", False)
    states = engine.prefill([np.array([5, 6, 7, 8])])[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
        transform = head_transform(read_config(folder))
        found = transform(torch.from_numpy(states.last) @ model.lm_head.weight.T)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"logits_soft_cap": 30.0}, "logits_soft_cap = 30.0"),
        ({"lm_head_multiplier": 0.5}, "lm_head_multiplier = 0.5"),
        ({"logit_scale": -1.0}, "above 0"),
        ({"logit_scale": 0.5, "final_logit_softcapping": 30.0}, "at most one"),
        ({"text_config": {"logits_soft_cap": 30.0}}, "logits_soft_cap = 30.0"),
    ],
)
def test_other_transforms_are_refused(config, reason):
    with pytest.raises(UserError, match=reason):
        head_transform(config)


def test_what_a_family_leaves_out_is_its_own_default():
    assert head_transform({"model_type": "gemma2"}).cap == 30.0
    assert head_transform({"model_type": "gemma2", "final_logit_softcapping": None}).cap is None
    assert head_transform({"model_type": "cohere"}).scale == 0.0625
    assert head_transform({"logits_scaling": 8.0}).scale == 1 / 8
