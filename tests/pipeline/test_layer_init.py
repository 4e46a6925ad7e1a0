"""A draft whose decoder layer starts as the target's last one, which the dump carries where it is a plain one."""

import pytest
import torch
from safetensors.torch import load_file

from eagle3_offline.config import load_recipe
from eagle3_offline.records import UserError
from eagle3_offline.runs import Run
from eagle3_offline.store.reader import Dump
from eagle3_offline.target.folder import carried_tensors
from eagle3_offline.training.data import open_source

from ..families import FAMILIES, make_family
from ..small_runs import losses

FROM_TARGET = ("train.layer_init=target",)


def test_the_layer_starts_as_the_targets_last(dumped, random_target):
    recipe = load_recipe(str(dumped.recipe), FROM_TARGET)
    layer = open_source(Run(dumped.run).dump, recipe.train).new_head(recipe.train).midlayer
    target = load_file(random_target / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in target if name.startswith("model.layers."))
    weights = {name.removeprefix(f"model.layers.{last}."): w.float() for name, w in target.items() if f".layers.{last}." in name}
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        embedding, state = layer.get_parameter(name).chunk(2, dim=1)
        assert torch.equal(embedding, 0.5 * weights[name]) and torch.equal(state, weights[name])
    for name in ("self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
        assert torch.equal(layer.get_parameter(name), weights[name])
    for module, name in (
        (layer.input_layernorm, "input_layernorm.weight"),
        (layer.hidden_norm, "input_layernorm.weight"),
        (layer.post_attention_layernorm, "post_attention_layernorm.weight"),
    ):
        assert torch.equal(module.weight, weights[name])


def test_a_training_starts_from_it(copied):
    copied.stage("train", "--set", "train.total_steps=2")
    copied.stage("train", "--set", "train.total_steps=2", "--set", FROM_TARGET[0], "--set", "train.draft=other")
    assert losses(copied, "other")[0] != losses(copied)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_plain_layers_are_carried(family, random_target, tmp_path):
    """Layers of other families have biases, norms of queries and keys, experts, multipliers or another activation."""
    tensors = carried_tensors(make_family(family, random_target, tmp_path / family), "float32")
    assert any(name.startswith("last_layer.") for name in tensors) == (family in ("llama", "mistral"))


def test_it_is_refused_where_it_does_not_fit(dumped, monkeypatch):
    narrow = load_recipe(str(dumped.recipe), (*FROM_TARGET, "train.hidden_size=16", "train.head_init=random")).train
    with pytest.raises(UserError, match="does not fit a narrower draft"):
        open_source(Run(dumped.run).dump, narrow).new_head(narrow)
    config, tensors = load_recipe(str(dumped.recipe), FROM_TARGET).train, Dump.target_tensors
    monkeypatch.setattr(Dump, "target_tensors", lambda dump: {n: t for n, t in tensors(dump).items() if "last_layer" not in n})
    with pytest.raises(UserError, match="holds no last layer"):
        open_source(Run(dumped.run).dump, config).new_head(config)
    with pytest.raises(UserError, match="brings its fc and layer along"):
        load_recipe(str(dumped.recipe), (*FROM_TARGET, "train.start_from=somewhere"))
