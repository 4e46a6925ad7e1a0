"""Runs of the real stages on a small random target: seconds, not minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from eagle3_offline.stages.cli import main
from safetensors.torch import load_file

from eagle3_offline.machine import free_port
from eagle3_offline.runs import Run
from eagle3_offline.training.metrics import read_metrics

SUBJECTS = ["lists", "dicts", "sets", "tuples", "strings", "files", "loops", "errors", "types", "tests"]


def conversations(count: int) -> list[dict]:
    """Single-turn and two-turn rows."""
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"tell me about {SUBJECTS[i % 10]} number {i}"}]
        if i % 3 == 0:
            messages += [{"role": "assistant", "content": "old answer"}, {"role": "user", "content": "and more?"}]
        rows.append({"id": f"row-{i}", "conversations": messages})
    return rows


def write_recipe(folder: Path, model: Path, rows: list[dict], /, **changes: dict) -> Path:
    """A recipe over these rows with small numbers everywhere; `changes` update its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "small",
        "target": {"model": str(model), "dtype": "bfloat16", "max_length": 160},
        "prepare": {"inputs": [str(folder / "rows.jsonl")], "eval_rows": 6, "unit_rows": 8},
        "regenerate": {"max_tokens": 12, "batch_size": 8},
        "train": {
            "draft_vocab_size": 128,
            "ttt_length": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "total_steps": 12,
            "eval_every": 6,
            "eval_rows": 4,
            "checkpoint_every": 4,
            "dtype": "float32",
        },
        "evaluate": {"chain": 3, "decode_rows": 3},
        "export": {"dtype": "float32"},
    }
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def own_environment() -> dict[str, str]:
    """This process's environment without the ranks that an earlier training left in it."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


class Cli:
    """The command line in this process (`stage`) or, to be killed, in one of its own (`start`)."""

    def __init__(self, recipe: Path, run: Path):
        self.recipe, self.run = recipe, run

    def copy(self, run: Path, *without: str) -> Cli:
        """The same on a copy of the run, but for files and folders of these names."""
        shutil.copytree(self.run, run, ignore=shutil.ignore_patterns(*without))
        return Cli(self.recipe, run)

    def arguments(self, *words: str) -> list[str]:
        return [*words, "--recipe", str(self.recipe), "--run", str(self.run)]

    def stage(self, *words: str, exit_code: int = 0):
        """Run a stage; return its summary (exit code 0) or its output."""
        result = CliRunner().invoke(main, self.arguments(*words, "--json"))
        assert result.exit_code == exit_code, f"{words}: exit {result.exit_code}\n{result.output}\n{result.exception!r}"
        return json.loads(result.stdout.splitlines()[-1]) if exit_code == 0 else result.output

    def start(self, *words: str, more: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """The stage in a process of its own; `more` comes last."""
        command = [sys.executable, "-c", "from eagle3_offline.stages.cli import main; main()", *self.arguments(*words), *more]
        env = {**own_environment(), **environment}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    def phase_one(self, compact: bool = False) -> None:
        basis = [["dump-hidden", "--fit-basis"]] if compact else []
        for words in (["prepare"], ["regenerate"], *basis, ["dump-hidden"], ["store", "seal"]):
            self.stage(*words)

    def on_ranks(self, world: int, *words: str, exit_code: int = 0) -> list[str]:
        """A stage on several ranks; one: in this process."""
        if world == 1:
            return [str(self.stage(*words, exit_code=exit_code))]
        environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        started = [self.start(*words, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(world)]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [exit_code] * world, outputs
        return outputs


def losses(cli: Cli, draft: str = "draft") -> list[float]:
    """Of every training step."""
    return [line["loss"] for line in read_metrics(Run(cli.run).draft(draft) / "metrics.csv")]


def weights(cli: Cli) -> dict[str, torch.Tensor]:
    """Of the trained draft."""
    return load_file(Run(cli.run).draft("draft") / "weights.safetensors")


def demo(run: Path, *more: str) -> subprocess.CompletedProcess:
    """The demo on the tiny target, in a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from eagle3_offline.stages.cli import main; main()",
        "demo",
        "--target",
        "tiny",
        "--run",
        str(run),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=own_environment())
