"""train, evaluate and export, purely from a dump: resumes, ranks, and what the export holds."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eagle3_offline.config import load_recipe
from eagle3_offline.draft.export import read_export
from eagle3_offline.draft.trained import load_trained
from eagle3_offline.runs import EXIT_STOPPED, Run
from eagle3_offline.training.engine import rate
from eagle3_offline.training.metrics import read_metrics

from ..campaign import size
from ..small_runs import Cli, losses, own_environment, weights, write_recipe


def test_training_lowers_the_loss_and_writes_every_step(trained):
    lines = read_metrics(Run(trained.run).draft("draft") / "metrics.csv")
    assert [line["step"] for line in lines] == list(range(1, 13))
    config = load_recipe(str(trained.recipe)).train
    assert [line["learning_rate"] / config.learning_rate for line in lines] == pytest.approx([rate(step, config) for step in range(12)])
    assert np.mean(losses(trained)[-3:]) < np.mean(losses(trained)[:3])
    held_out = [json.loads(line) for line in (Run(trained.run).draft("draft") / "held_out.jsonl").read_text().splitlines()]
    assert [value["step"] for value in held_out] == [0, 6, 12]


def test_the_target_is_not_opened_and_sglang_not_imported(dumped, tmp_path, random_target):
    """Training in a process without sglang and vllm, from a run whose target is gone."""
    run = dumped.copy(tmp_path / "run").run
    recipe = write_recipe(tmp_path, tmp_path / "gone", [])
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('sglang', 'vllm'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from eagle3_offline.config import load_recipe\n"
        "from eagle3_offline.runs import Run, StopSignal\n"
        "from eagle3_offline.training.loop import train\n"
        f"print(train(Run({str(run)!r}), load_recipe({str(recipe)!r}, ('train.total_steps=2',)), StopSignal()))\n"
        "assert 'eagle3_offline.target.transformers_engine' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=own_environment())
    assert done.returncode == 0, done.stderr


def test_a_stopped_training_goes_on_bit_for_bit(trained, copied):
    """SIGUSR1, as Slurm sends it: a checkpoint at the next step, exit 85; then kill -9; then to the end."""
    process = copied.start("train")
    wait_for_step(copied, 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    stopped = len(losses(copied))
    if stopped < 12:
        assert f"stopped at step {stopped} of 12" in output
        process = copied.start("train")
        wait_for_step(copied, stopped + 1)
        process.kill()
        process.communicate()
    copied.stage("train")
    assert losses(copied) == losses(trained)
    again, once = weights(copied), weights(trained)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.campaign
def test_kills_at_random_steps_change_no_loss_and_no_weight(trained, dumped, tmp_path):
    """kill -9 somewhere in a training of 12 steps with a checkpoint every 4, then to the end: as if nothing had been."""
    rng = random.Random(0)
    for kill in range(size(10)):
        killed = dumped.copy(tmp_path / f"killed-{kill}")
        process = killed.start("train")
        wait_for_step(killed, rng.randint(1, 11))
        time.sleep(rng.uniform(0, 0.1))  # somewhere in a step, or in the checkpoint that follows it
        process.kill()
        process.communicate()
        killed.stage("train")
        assert losses(killed) == losses(trained)
        assert all(torch.equal(tensor, weights(trained)[name]) for name, tensor in weights(killed).items())


def wait_for_step(cli: Cli, step: int, seconds: float = 120) -> None:
    path = Run(cli.run).draft("draft") / "metrics.csv"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and len(path.read_text().splitlines()) > step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} after {seconds} s")


def test_two_ranks_give_the_losses_of_one(trained, copied):
    """Over gloo, ZeRO-1, fp32: the same global batches, hence the same losses."""
    copied.on_ranks(2, "train")
    assert losses(copied) == pytest.approx(losses(trained), rel=1e-5)


def test_bfloat16_trains_and_resumes(copied):
    options = ("--set", "train.dtype=bfloat16", "--set", "train.draft=half")
    copied.stage("train", *options)
    whole = losses(copied, "half")
    folder = Run(copied.run).draft("half")
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    (folder / "draft.json").unlink()
    copied.stage("train", *options)
    assert losses(copied, "half") == whole


def test_several_drafts_from_one_dump_and_other_settings_are_refused(trained, copied):
    copied.stage("train", "--set", "train.draft=other", "--set", "train.total_steps=2", "--set", "train.aux_scaling=false")
    assert len(losses(copied, "other")) == 2
    message = copied.stage("train", "--set", "train.draft=other", "--set", "train.total_steps=3", exit_code=2)
    assert "total_steps was 2, is now 3" in message


def test_evaluate_export_and_decode(trained, tmp_path):
    cli = trained.copy(tmp_path / "run")
    folder = Run(cli.run).draft("draft")
    assert "run `export` first" in cli.stage("evaluate", exit_code=2)
    exported = cli.stage("export")
    assert exported["to"] == "sglang"
    summary = cli.stage("evaluate")
    assert summary["held_out"]["answers"] >= 6
    assert summary["decoded"]["identical"] == summary["decoded"]["answers"] == 3
    assert summary["decoded"]["walk_tau"] == pytest.approx(summary["decoded"]["tau"], abs=0.01)
    again = cli.stage("evaluate")
    assert again == summary  # kept
    cli.stage("export", "--set", "export.dtype=bfloat16")  # another export is decoded anew
    before = (folder / "decoded.json").read_text()
    cli.stage("evaluate")
    assert (folder / "decoded.json").read_text() != before
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # boundaries 2, 4, 5 in SGLang's dialect
    assert config["draft_vocab_size"] == 128 and config["tie_word_embeddings"] is False
    assert (folder / "export" / "tokenizer.json").is_file()


EXPORTED_KEYS = {
    "fc.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
    "t2d",
}


def test_the_export_has_the_exact_keys_and_the_scale_is_folded(trained, tmp_path):
    cli = trained.copy(tmp_path / "run")
    cli.stage("export")
    folder = Run(cli.run).draft("draft")
    tensors = load_file(folder / "export" / "model.safetensors")
    assert set(tensors) == EXPORTED_KEYS
    assert tensors["midlayer.self_attn.q_proj.weight"].shape[1] == 2 * tensors["norm.weight"].shape[0]
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    draft, (head, target_ids) = load_trained(folder), read_export(folder / "export")
    assert torch.equal(target_ids, draft.target_ids)
    aux = torch.randn(5, draft.head.settings.aux_width) * 10
    assert draft.aux_scale is not None and not torch.allclose(draft.aux_scale, torch.ones_like(draft.aux_scale))
    assert torch.allclose(head.fc(aux), draft.head.fc(aux * draft.aux_scale), atol=1e-4)


@pytest.fixture
def exportable(trained, tmp_path) -> Cli:
    """A copy of the trained run, to export in."""
    return trained.copy(tmp_path / "exportable")


@pytest.mark.parametrize("to", ["sglang", "vllm", "hf"])
def test_each_engine_gets_its_own_names_and_layer_numbers(exportable, to):
    assert exportable.stage("export", "--to", to)["to"] == to
    folder = Run(exportable.run).draft("draft") / "export"
    config = json.loads((folder / "config.json").read_text())
    nested = config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    boundaries = config.get("eagle_aux_hidden_state_layer_ids")
    assert (nested, boundaries) == {"sglang": ([1, 3, 4], None), "vllm": (None, [2, 4, 5]), "hf": ([1, 3, 4], [2, 4, 5])}[to]
    layer = "layers.0." if to == "vllm" else "midlayer."
    assert set(load_file(folder / "model.safetensors")) == {name.replace("midlayer.", layer) for name in EXPORTED_KEYS}
    assert exportable.stage("export", "--check")["problems"] == 0


def test_the_model_card_says_what_it_was_made_with_and_what_was_measured(exportable):
    exportable.stage("evaluate", "--set", "evaluate.decode_rows=0")
    exportable.stage("export", "--to", "hf")
    folder = Run(exportable.run).draft("draft")
    card = (folder / "export" / "README.md").read_text()
    about = json.loads((folder / "draft.json").read_text())
    tau = json.loads((folder / "held_out.json").read_text())["summary"]["tau"]
    for text in (about["dump"], f"{tau:.3f}", "[2, 4, 5]", "total_steps: 12", "vllm serve", "sglang.launch_server"):
        assert text in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == about["target"]["model"]


def changed(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}, "layers is (3, 5, 6), expected (2, 4, 5)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is"),
        ({"norm_output": True}, "norm_output is True, expected False"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001"),
        ({"eagle3_offline": {"dump": "other"}}, "it was trained on the dump other"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_the_check_finds_a_wrong_config(exportable, values, problem):
    exportable.stage("export")
    changed(Run(exportable.run).draft("draft") / "export", **values)
    assert problem in exportable.stage("export", "--check", exit_code=2)


def test_the_check_finds_wrong_weights(exportable):
    exportable.stage("export", "--set", "export.dtype=bfloat16")
    exportable.stage("export", "--check")  # rounding is allowed for
    path = Run(exportable.run).draft("draft") / "export" / "model.safetensors"
    tensors = load_file(path)
    low, middle, high = tensors["fc.weight"].chunk(3, dim=1)
    save_file({**tensors, "fc.weight": torch.cat((high, middle, low), dim=1)}, path)
    assert "its logits differ from the trainer's" in exportable.stage("export", "--check", exit_code=2)
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, path)
    assert "norm.weight" in exportable.stage("export", "--check", exit_code=2)


def test_eagle_3_1_trains_exports_and_decodes(copied):
    """A norm of each layer before fc, and the normed state recurs: in the exported keys and flags, and in what is decoded."""
    options = ("--set", "train.fc_norm=true", "--set", "train.norm_output=true")
    copied.stage("train", *options)
    copied.stage("export", *options)
    folder = Run(copied.run).draft("draft")
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["fc_norm"] is True and config["norm_output"] is True
    norms = {f"fc_norm.{i}.weight" for i in range(3)}
    assert set(load_file(folder / "export" / "model.safetensors")) == EXPORTED_KEYS | norms
    decoded = copied.stage("evaluate", *options)["decoded"]
    assert decoded["identical"] == decoded["answers"]
    assert decoded["walk_tau"] == pytest.approx(decoded["tau"], abs=0.01)


def test_a_damaged_dump_is_refused_by_training(copied):
    part = next((copied.run / "dump" / "parts").glob("unit-*/h02/c*"))
    size = part.stat().st_size
    os.truncate(part, size - 1)
    output = copied.stage("store", "verify", exit_code=2)
    assert part.name in output
    message = copied.stage("train", "--set", "train.draft=fresh", exit_code=2)
    assert "unit-" in message
