"""train.start_from: a published draft in each layout goes on as it was, and one that belongs elsewhere is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3_offline.config import load_recipe
from eagle3_offline.draft.export import read_export
from eagle3_offline.draft.published import read_published
from eagle3_offline.records import UserError
from eagle3_offline.runs import Run
from eagle3_offline.training.data import open_source

from ..small_runs import Cli, losses

OFFICIAL = (  # all that the official drafts' config.json says of the draft
    "architectures", "hidden_act", "hidden_size", "intermediate_size", "model_type", "num_attention_heads", "num_key_value_heads",
    "num_hidden_layers", "rms_norm_eps", "vocab_size", "draft_vocab_size", "tie_word_embeddings",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory) -> dict[str, Path]:
    """Folders of the trained draft by layout."""
    folder = tmp_path_factory.mktemp("published")
    cli = trained.copy(folder / "run")
    for to in ("sglang", "vllm"):
        cli.stage("export", "--to", to)
        shutil.copytree(Run(cli.run).draft("draft") / "export", folder / to)
    (folder / "official").mkdir()
    torch.save(load_file(folder / "sglang" / "model.safetensors"), folder / "official" / "pytorch_model.bin")
    config = json.loads((folder / "sglang" / "config.json").read_text())
    (folder / "official" / "config.json").write_text(json.dumps({name: config[name] for name in OFFICIAL}))
    return {name: folder / name for name in ("sglang", "vllm", "official")}


def held_out(cli: Cli, draft: str = "draft") -> list[dict]:
    return [json.loads(line) for line in (Run(cli.run).draft(draft) / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ["sglang", "vllm", "official"])
def test_step_0_is_the_published_draft_and_training_goes_on(trained, copied, published, layout):
    folder = published[layout]
    config = load_recipe(str(copied.recipe), (f"train.start_from={folder}", "train.draft_vocab_size=64")).train
    source = open_source(copied.run / "dump", config)
    assert source.aux_scale is not None
    head, (exported, target_ids) = source.new_head(config), read_export(published["sglang"])
    assert torch.equal(source.target_ids, target_ids)  # not the 64 that the recipe asks for
    raw = torch.randn(8, source.settings.aux_width) / source.aux_scale
    assert torch.allclose(head.features(raw * source.aux_scale), exported.features(raw), rtol=1e-5, atol=1e-5)
    theirs = exported.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in head.state_dict().items() if name != "fc.weight")
    options = ("--set", f"train.start_from={folder}", "--set", "train.total_steps=1", "--set", "train.draft=warm")
    copied.stage("train", *options)
    first, last = held_out(copied, "warm")[0], held_out(trained)[-1]
    assert first["step"] == 0 and first["conditional_acceptance"] == last["conditional_acceptance"]
    assert first["kl"] == pytest.approx(last["kl"], rel=1e-4)
    assert len(losses(copied, "warm")) == 1
    copied.stage("export", *options)
    assert copied.stage("export", "--check", *options)["problems"] == 0


def test_a_shape_of_its_own_is_kept(copied, published, tmp_path):
    """Half the MLP: no matter to the target."""
    folder = changed(published["sglang"], tmp_path / "half", intermediate_size=32)
    tensors = load_file(folder / "model.safetensors")
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        key = f"midlayer.mlp.{name}.weight"
        tensors[key] = tensors[key].narrow(axis, 0, 32).contiguous()
    save_file(tensors, folder / "model.safetensors")
    options = ("--set", f"train.start_from={folder}", "--set", "train.total_steps=1")
    copied.stage("train", *options)
    copied.stage("export", *options)
    assert copied.stage("export", "--check", *options)["problems"] == 0


def changed(folder: Path, to: Path, **values) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **values}))
    return to


@pytest.mark.parametrize(
    "values, problem",
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters is .*500000.* in the draft, .*10000.* by the recipe",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}}, r"reads the boundaries \[6\], the dump holds \[2, 4, 5\]"),
        ({"norm_output": True}, "norm_output is True in the draft, False by"),
        ({"vocab_size": 300}, "vocab_size is 300 in the draft, 259 by"),
        ({"intermediate_size": 48}, r"midlayer.mlp.gate_proj.weight is \[64, 32\], expected \[48, 32\]"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"),
        ({"norm_before_residual": True}, "norm_before_residual = True"),
    ],
)
def test_another_targets_draft_is_refused(dumped, published, tmp_path, values, problem):
    folder = changed(published["sglang"], tmp_path / "changed", **values)
    with pytest.raises(UserError, match=problem):
        open_source(dumped.run / "dump", load_recipe(str(dumped.recipe), (f"train.start_from={folder}",)).train)


def test_another_embedding_and_no_folder_are_refused(dumped, published, tmp_path):
    def start(folder: Path):
        return open_source(dumped.run / "dump", load_recipe(str(dumped.recipe), (f"train.start_from={folder}",)).train)

    with pytest.raises(UserError, match="expected a folder with config.json and one of model.safetensors, pytorch_model.bin"):
        start(tmp_path)
    folder = changed(published["sglang"], tmp_path / "embedded")
    tensors = load_file(folder / "model.safetensors")
    embed = load_file(dumped.run / "dump" / "target" / "target.safetensors")["embed_tokens.weight"]
    save_file({**tensors, "embed_tokens.weight": embed}, folder / "model.safetensors")
    assert start(folder).published.embed is not None
    save_file({**tensors, "embed_tokens.weight": embed.flip(0).contiguous()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="an embedding that is not the target's"):
        start(folder)


def test_nothing_of_a_pickle_runs(published, tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = changed(published["official"], tmp_path / "pickle")
    torch.save({"fc.weight": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        read_published(folder, {"num_hidden_layers": 8, "max_position_embeddings": 512})
    assert not (tmp_path / "ran").exists()
