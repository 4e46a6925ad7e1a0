"""A plain install outside the checkout works, and brings configs/ and slurm/ along."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eagle3_offline.config import load_recipe, packaged, to_yaml
from eagle3_offline.records import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_a_plain_install_outside_the_checkout(tmp_path):
    for name in ("eagle3_offline", "stages", "configs", "slurm"):  # a copy: setuptools leaves build/ where it builds
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(tmp_path / "source")]
    subprocess.run(pip, check=True, cwd=tmp_path)
    code = (
        "import eagle3_offline, json; from eagle3_offline.config import packaged, load_recipe\n"
        "from eagle3_offline.stages.cli import main\n"
        "from eagle3_offline import pipeline\n"
        "print(eagle3_offline.__file__, load_recipe('demo').name, sorted(main.commands), (packaged('slurm') / 'train.sh').is_file())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "dump-hidden" in done.stdout and done.stdout.endswith("True\n")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_reloads_equal(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "resolved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_defaults_file_and_overrides(tmp_path):
    (tmp_path / "r.yaml").write_text("train: {learning_rate: 5e-5}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ("train.batch_size=8", "target.layers=[2, 5, 7]", "prepare.max_rows=null", "name=x"))
    assert (recipe.train.learning_rate, recipe.train.batch_size, recipe.target.layers, recipe.name) == (5e-5, 8, [2, 5, 7], "x")
    assert recipe.prepare.unit_rows == 2000 and recipe.prepare.max_rows is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lerning_rate=1", "did you mean train.learning_rate"),
        ("trane.clip=1", "did you mean train"),
        ("train.clip=high", "expected float"),
        ("train.clip=-1", "must be greater than 0"),
        ("train.head_init=zeros", "expected one of target, random"),
        ("train.micro_batch_size=3", "no multiple of micro_batch_size"),
        ("train", "expected section.key=value"),
        ("target.trust_remote_code=1", "expected bool"),
        ("prepare.eval_share=2", "between 0 and 1"),
    ],
)
def test_mistakes_are_refused_with_the_field(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, (override,))


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(UserError, match="demo-tiny"):
        load_recipe("demmo")
    assert packaged("configs").is_dir()
