"""A training step against the plain path and against SpecForge's, on the same rows and shapes: tokens a second and peak memory.

    python benchmarks/train.py                          # the small shape, on this machine's CPU
    python benchmarks/train.py --shape 8b-2048          # a Llama-3.1-8B draft, on a GPU (also 8b-4096)

Each way runs in a process of its own; they take turns, every turn on rows that no way has seen, one optimiser step each:

    ours               the trainer's step: exact mask, dead rows' queries and logits left out, blocked loss, DeepSpeed ZeRO-1
    ours, known        the same on rows whose whole-vocabulary argmax an earlier epoch has left behind
    plain              the same loss by a padded loop in which every row lives at all K steps, logits and teachers whole
    specforge          SpecForge's strategy, model, loss and optimiser, from its PyPI package, in an environment of its own
    specforge compact  the same with its compact teacher, which never makes logits of the whole vocabulary

Tokens are the rows' unpadded ones, dead rows included. Reading and padding rows is not timed: every trainer does it beside the step.

Peak memory is what a process holds at most in a step beyond what it held before the draft was made, after two steps. On a CPU it is
measured in processes of their own, whose allocator gives large blocks back at once: so it counts what is alive and what libraries keep,
not what malloc does. There SpecForge's Triton loss cannot run either; the reference that its file keeps beside it stands in.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from eagle3_offline.config import TrainConfig
from eagle3_offline.draft.batch import DraftBatch, collate
from eagle3_offline.draft.loss import denominators, row_weights
from eagle3_offline.draft.model import DraftHead, new_head
from eagle3_offline.draft.settings import DraftSettings
from eagle3_offline.draft.teacher import FullTeacher
from eagle3_offline.records import Sample
from eagle3_offline.store.format import last_positions
from eagle3_offline.training.distributed import native_bfloat16, start
from eagle3_offline.training.engine import build
from eagle3_offline.training.step import Carried, Training, one_step

SPECFORGE = "specforge==0.2.0"
HERE = Path(__file__).parent
TURN = (40, 160)  # a prompt's and an answer's mean length, with the template's tokens: 0.6 of the tokens are answers
GPU_SHAPES = ("8b-2048", "8b-4096")


@dataclass(frozen=True)
class Shape:
    """A draft and the rows of one optimiser step."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    draft_vocabulary: int
    rows: int
    tokens: int  # of the longest row
    steps: int  # K

    def settings(self) -> DraftSettings:
        return DraftSettings(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, vocab_size=self.vocabulary,
            draft_vocab_size=self.draft_vocabulary, layers=(2, 16, 29), rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5}, max_position_embeddings=8192,
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 128, 4, 2, 16, 500, 200, 2, 96, 3),  # for the test
    "small": Shape(768, 2048, 12, 4, 64, 32000, 4096, 2, 512, 7),
    "8b-2048": Shape(4096, 14336, 32, 8, 128, 128256, 32000, 4, 2048, 7),
    "8b-4096": Shape(4096, 14336, 32, 8, 128, 128256, 32000, 2, 4096, 7),
}


# ---------------------------------------------------------------------------------------------------------------------
# The rows and the target, the same in every process


@dataclass(frozen=True)
class Target:
    """The frozen tensors, in the compute dtype, on the device."""

    embed: Tensor  # [V, H]
    lm_head: Tensor  # [V, H]
    target_ids: Tensor  # [D]
    device: torch.device
    dtype: torch.dtype


def make_target(shape: Shape) -> Target:
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if native_bfloat16() else torch.float32
    generator = torch.Generator().manual_seed(1)
    embed, lm_head = (torch.randn(shape.vocabulary, shape.hidden, generator=generator).mul_(0.05).to(device, dtype) for _ in range(2))
    target_ids = torch.randperm(shape.vocabulary, generator=generator)[: shape.draft_vocabulary].sort().values
    return Target(embed, lm_head, target_ids.to(device), device, dtype)


def make_rows(shape: Shape, number: int) -> list[Sample]:
    """The rows of turn `number`: prompts and answers of random lengths, random states; every last state is there, as SpecForge wants it."""
    rng = np.random.default_rng([7, number])
    rows = []
    for i in range(shape.rows):
        length = shape.tokens if i == 0 else int(rng.integers(shape.tokens // 2, shape.tokens + 1))
        turns, at = [], 0
        while True:
            begin = at + int(rng.integers(TURN[0], 2 * TURN[0])) if at else TURN[0]
            at = begin + int(rng.integers(TURN[1] // 2, TURN[1] + TURN[1] // 2))
            if begin + 4 >= length:
                break
            turns.append((begin, min(at, length)))
            if at >= length:
                break
        states = [rng.standard_normal((length, width), np.float32) for width in (3 * shape.hidden, shape.hidden)]
        ids = rng.integers(0, shape.vocabulary, length).astype(np.int32)
        rows.append(Sample(f"{number}-{i}", ids, tuple(turns), *states, np.arange(length)))
    return rows


def stored(sample: Sample) -> Sample:
    """The row with the last states that a dump keeps."""
    kept = last_positions(sample.turns, len(sample.input_ids))
    return replace(sample, last=sample.last[kept], last_positions=kept)


def make_batch(rows: list[Sample], shape: Shape, target: Target) -> DraftBatch:
    batch = collate([stored(row) for row in rows], shape.steps)
    dtypes = {name: getattr(batch, name).to(target.dtype) for name in ("aux", "last")}
    return replace(batch, **dtypes)


def train_config(shape: Shape, target: Target) -> TrainConfig:
    dtype = "bfloat16" if target.dtype == torch.bfloat16 else "float32"
    return TrainConfig(draft_vocab_size=shape.draft_vocabulary, ttt_length=shape.steps, batch_size=shape.rows, micro_batch_size=shape.rows,
                       dtype=dtype)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The ways. Each returns a function that prepares rows and one that makes a step with what was prepared and returns the loss


Way = tuple[Callable[[list[Sample]], Any], Callable[[Any], float]]


def ours(shape: Shape, target: Target, known: bool = False) -> Way:
    """known: the teacher's argmaxes of the rows are made before the step."""
    config, ranks = train_config(shape, target), start(10)
    engine = build(config, new_head(shape.settings(), 0), ranks, False)
    teacher = FullTeacher(target.lm_head, target.target_ids)
    training = Training(config, SimpleNamespace(embed=target.embed), engine, teacher, ranks, Carried(torch.zeros(shape.steps)))

    def prepare(rows: list[Sample]) -> DraftBatch:
        batch = make_batch(rows, shape, target)
        if known:
            teacher(batch.to(target.device))
        return batch

    return prepare, lambda batch: one_step(training, [batch])[0]["loss"]


class PlainDraft(nn.Module):
    """The unroll as one would write it first. Legend: B conversations, T their padded length, K steps, D draft vocabulary."""

    def __init__(self, head: DraftHead, target: Target, steps: int, decay: float):
        super().__init__()
        self.head = head
        self.target, self.steps, self.decay = target, steps, decay

    def forward(self, aux: Tensor, ids: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        """aux [B, T, A], ids [B, T], last [B, T, H]; weights [K, B, T] of each row in the mean of its step, 0 where it is dead."""
        head, layer, (b, t, _) = self.head, self.head.midlayer, aux.shape
        attention = layer.self_attn
        ahead = lambda x, k: torch.roll(x, -k, 1)  # noqa: E731  what a row needs of token p + k; rolled-in rows have weight 0
        flat = lambda x: x.flatten(0, 1)  # noqa: E731
        split = lambda x: x.unflatten(-1, (-1, attention.head_dim))  # noqa: E731
        z = last.float() @ self.target.lm_head.float().T  # [B, T, V]
        known = torch.isin(z.argmax(-1), self.target.target_ids)  # [B, T]
        teacher = z[..., self.target.target_ids].softmax(-1)  # [B, T, D]
        g = head.features(flat(aux).to(head.fc.weight.dtype))
        causal = torch.ones(t, t, dtype=torch.bool, device=aux.device).tril()
        keys, values, loss = [], [], 0.0
        for k in range(self.steps):
            positions = (torch.arange(t, device=aux.device) + k).repeat(b)
            embedded = layer.input_layernorm(self.target.embed[flat(ahead(ids, 1 + k))].to(g.dtype))
            u = torch.cat((embedded, layer.hidden_norm(g)), -1)
            query = layer.rotary(split(attention.q_proj(u)), positions).unflatten(0, (b, t))  # [B, T, h, d]
            groups = query.shape[2] // head.settings.num_key_value_heads
            key_value = layer.rotary(split(attention.k_proj(u)), positions), split(attention.v_proj(u))
            key, value = (x.unflatten(0, (b, t)).repeat_interleave(groups, 2) for x in key_value)
            keys, values = [*keys, key], [*values, value]
            scores = torch.einsum("bphd,bjhd->bphj", query, keys[0]).masked_fill(~causal[:, None], -math.inf)
            own = [(query * own).sum(-1, keepdim=True) for own in keys[1:]]
            shares = (torch.cat((scores, *own), -1) * query.shape[-1] ** -0.5).float().softmax(-1).to(value.dtype)  # [B, T, h, T + k]
            attended = torch.einsum("bphj,bjhd->bphd", shares[..., :t], values[0])
            for i, own_value in enumerate(values[1:]):
                attended = attended + shares[..., t + i, None] * own_value
            state, g = head.outputs(layer.finish(g, flat(attended)))
            log_q = head.lm_head(state).float().log_softmax(-1).unflatten(0, (b, t))  # [B, T, D]
            entropy = -(ahead(teacher, 1 + k) * log_q).sum(-1)
            loss = loss + self.decay**k * (weights[k] * ahead(known, 1 + k) * entropy).sum()
        return loss


def padded(rows: list[Sample], names: tuple[str, ...], to: int) -> dict[str, Tensor]:
    """Fields of the rows, zeros behind the short ones: [B, T, ...]."""
    out = {}
    for name in names:
        values = [getattr(row, name) for row in rows]
        out[name] = torch.from_numpy(np.stack([np.pad(v, ((0, to - len(v)), *[(0, 0)] * (v.ndim - 1))) for v in values]))
    return out


def plain_inputs(rows: list[Sample], shape: Shape, target: Target) -> tuple[Tensor, ...]:
    """What PlainDraft reads: the weights are those of our own loss, spread over the padded rows."""
    batch, longest = make_batch(rows, shape, target), max(len(row.input_ids) for row in rows)
    total = denominators([batch], "sequence")
    weights = torch.zeros(shape.steps, len(rows), longest)
    place = torch.cat([b * longest + torch.arange(stop - start) for b, (start, stop) in enumerate(batch.segments)])  # [N]
    for k in range(shape.steps):
        weights[k].view(-1)[place[batch.steps[k].rows]] = row_weights(batch, k, float(total[k]), "sequence")
    fields = padded(rows, ("aux", "input_ids", "last"), longest)
    return fields["aux"].to(target.dtype), fields["input_ids"].long(), fields["last"].to(target.dtype), weights


def plain(shape: Shape, target: Target) -> Way:
    config, ranks = train_config(shape, target), start(10)
    engine = build(config, PlainDraft(new_head(shape.settings(), 0), target, shape.steps, config.step_decay), ranks, False)

    def step(inputs: tuple[Tensor, ...]) -> float:
        loss = engine(*(x.to(target.device) for x in inputs))
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return lambda rows: plain_inputs(rows, shape, target), step


def specforge(shape: Shape, target: Target, compact: bool = False) -> Way:
    """Its own strategy over its own model, as its trainer calls them. compact: with its compact teacher."""
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.core import loss as losses
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    backend = "flex_attention" if target.device.type == "cuda" else "sdpa"
    if target.device.type == "cpu":
        eagle3.LogSoftmaxLoss = SimpleNamespace(apply=losses._compute_loss)  # the kernel's own reference, compiled as it is there
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads, num_hidden_layers=1,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocabulary, rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_theta=5e5, draft_vocab_size=shape.draft_vocabulary, pad_token_id=0,
    )  # fmt: skip
    draft = LlamaForCausalLMEagle3(config, attention_backend=backend)
    weights = {**new_head(shape.settings(), 0).state_dict(), "embed_tokens.weight": target.embed}
    ids = target.target_ids.cpu()
    weights |= {"d2t": ids - torch.arange(len(ids)), "t2d": torch.zeros(shape.vocabulary, dtype=torch.bool).index_fill(0, ids, True)}
    draft.load_state_dict(weights, strict=True)  # the same draft under the same names
    draft.freeze_embedding()
    model = eagle3.OnlineEagle3Model(draft, length=shape.steps, attention_backend=backend).to(target.device, target.dtype)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        head = TargetHead(folder)
    head = head.to(target.device, target.dtype)
    head.fc.weight = nn.Parameter(target.lm_head, requires_grad=False)
    strategy = Eagle3TrainStrategy(model, target_head=head, compact_teacher=compact)
    optimizer = BF16Optimizer(model, lr=1e-4)

    def prepare(rows: list[Sample]) -> TrainBatch:
        """As its normaliser and collator leave them."""
        longest = max(len(row.input_ids) for row in rows)
        fields = padded(rows, ("aux", "input_ids", "last"), longest)
        mask, attention = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
        for row, m, a in zip(rows, mask, attention, strict=True):
            a[: len(row.input_ids)] = 1
            for begin, end in row.turns:
                m[begin:end] = 1
            m[len(row.input_ids) - 1] = 0
        tensors = {
            "input_ids": fields["input_ids"].long(), "attention_mask": attention, "loss_mask": mask,
            "hidden_state": fields["aux"].to(target.dtype), "target": fields["last"].to(target.dtype),
        }  # fmt: skip
        return TrainBatch([row.id for row in rows], "eagle3", tensors, {"target_repr": "hidden_state"})

    def step(batch: TrainBatch) -> float:
        loss = strategy.forward_loss(batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return prepare, step


WAYS: dict[str, Callable[[Shape, Target], Way]] = {
    "ours": ours,
    "ours, known": lambda shape, target: ours(shape, target, known=True),
    "plain": plain,
    "specforge": specforge,
    "specforge compact": lambda shape, target: specforge(shape, target, compact=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# A process that makes steps when it is told to


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process held since reset_peak: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(name: str, shape: Shape) -> None:
    """Reads turn numbers, one a line, and answers each with a JSON line; the first line says that it is ready."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    say = lambda **values: print(json.dumps(values), file=out, flush=True)  # noqa: E731
    small, target = SHAPES["tiny"], make_target(shape)
    prepare, step = WAYS[name](small, make_target(small))
    for turn in range(3):  # what libraries import, compile and keep at their first calls belongs to no step
        step(prepare(make_rows(small, turn)))
    del prepare, step
    gc.collect()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()
    prepare, step = WAYS[name](shape, target)
    say(ready=True)
    for line in sys.stdin:
        rows = make_rows(shape, int(line))
        prepared = prepare(rows)
        gc.collect()
        reset_peak()
        began = time.perf_counter()
        try:
            loss = step(prepared)
        except torch.OutOfMemoryError:
            return say(failed="out of memory")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        say(seconds=seconds, tokens=sum(len(row.input_ids) for row in rows), peak=peak() - before, loss=loss)


@dataclass
class Process:
    """A worker as its parent sees it."""

    name: str
    pipe: subprocess.Popen

    def hear(self) -> dict[str, Any]:
        line = self.pipe.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name!r} ended with {self.pipe.wait()}: see its error above")
        return json.loads(line)

    def step(self, turn: int) -> dict[str, Any]:
        self.pipe.stdin.write(f"{turn}\n")
        self.pipe.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.pipe.stdin.close()
        self.pipe.wait()


def started(name: str, shape: str, python: dict[str, str], **environment: str) -> Process:
    """A worker, which says when it is ready."""
    command = [python.get(name, sys.executable), __file__, "--worker", name, "--shape", shape]
    return Process(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment))


def in_turns(names: list[str], shape: str, python: dict[str, str], turns: int) -> dict[str, list[dict[str, Any]]]:
    """Every way's answers, all ways alive at the same time."""
    processes = [started(name, shape, python) for name in names]
    for process in processes:
        process.hear()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(turns):
        for process in processes:
            if not any("failed" in answer for answer in found[process.name]):
                found[process.name].append(process.step(turn))
    for process in processes:
        process.end()
    return found


def peak_bytes(name: str, shape: str, python: dict[str, str]) -> int | None:
    """Of a way in a process of its own that gives large blocks back at once; None where it ran out of memory."""
    process = started(name, shape, python, MALLOC_MMAP_THRESHOLD_=str(2**18))
    process.hear()
    answers = [process.step(turn) for turn in range(2)]
    process.end()
    return answers[-1].get("peak")


def specforge_python(requirement: str) -> str:
    """A Python that sees this one's packages and SpecForge: an environment in build/, made where it is missing."""
    folder = HERE.parent / "build" / "specforge"
    python = folder / "bin" / "python"
    if not (folder / "done").is_file():
        venv.create(folder, clear=True)
        own = next(folder.glob("lib/python*/site-packages"))
        site = next(path for path in sys.path if path.endswith("site-packages"))
        (own / "project.pth").write_text(f"import site; site.addsitedir({site!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, requirement], check=True)
        if subprocess.run([python, "-c", "import triton"], capture_output=True, check=False).returncode:
            subprocess.run([*pip, "triton"], check=True)  # its loss's file defines kernels
        (folder / "done").touch()
    return str(python)


# ---------------------------------------------------------------------------------------------------------------------
# The floor: what our step's products and the optimiser's bytes take at this machine's rates


def step_operations(shape: Shape, turn: int) -> dict[str, float]:
    """Multiplications and additions of our step on the rows of a turn: those of the draft (thrice its forward pass) and the teacher's."""
    rows = [stored(row) for row in make_rows(shape, turn)]
    batch = collate(rows, shape.steps)
    alive = [len(step.rows) for step in batch.steps]
    query, kv, h = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    every = 3 * h * h + 2 * h * 2 * kv  # fc, keys, values: of every row at step 0
    live = 2 * h * query + query * h + 3 * h * shape.intermediate + h * shape.draft_vocabulary
    seen = sum(float((step.rows - _begins(batch)[step.rows] + 1).sum()) for step in batch.steps)  # step-0 keys of all live rows
    draft = len(batch.tokens) * every + sum(alive) * live + sum(alive[1:]) * 2 * h * 2 * kv + 2 * query * seen
    teacher = 2 * sum(batch.teacher_counts) * h
    others = shape.vocabulary - shape.draft_vocabulary
    return {"draft": 6 * draft, "teacher": teacher * shape.draft_vocabulary, "argmax": teacher * others}


def _begins(batch: DraftBatch) -> Tensor:
    return torch.cat([torch.full((stop - start,), start) for start, stop in batch.segments])


def measured_rates(shape: Shape) -> dict[str, float]:
    """Operations a second of a product in the compute dtype, bytes a second of a copy."""
    target = make_target(SHAPES["tiny"])
    n, k, m = 2048, 2 * shape.hidden, shape.intermediate

    def rate(work: Callable[[], Any], amount: float) -> float:
        best = math.inf
        for _ in range(6):
            began = time.perf_counter()
            work()
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return amount / best

    a, b = (torch.randn(*size, device=target.device, dtype=target.dtype) for size in ((n, k), (k, m)))
    block = torch.empty(2**26, device=target.device)
    copied = torch.empty_like(block)
    return {
        "matmul": rate(lambda: a @ b, 2 * n * k * m),
        "bytes": rate(lambda: copied.copy_(block), 2 * block.numel() * 4),
    }


def floor_seconds(shape: Shape, turn: int, rates: dict[str, float]) -> dict[str, float]:
    """Least seconds of a step, and of the teacher's whole-vocabulary argmax beside it."""
    operations = step_operations(shape, turn)
    parameters = sum(p.numel() for p in DraftHead(shape.settings()).parameters())
    moved = parameters * (3 * 2 * 4 + 4 + 2)  # master and both moments read and written in fp32, gradient read, the new weight written
    step = (operations["draft"] + operations["teacher"]) / rates["matmul"] + moved / rates["bytes"]
    return {"step": step, "argmax": operations["argmax"] / rates["matmul"]}


def measure(shape: str, names: list[str], parts: list[str], rounds: int, warm: int, requirement: str) -> dict[str, Any]:
    """Peaks one way after the other; speeds in turns, medians of the rounds after the warm-up."""
    theirs = [name for name in names if "specforge" in name]
    python = dict.fromkeys(theirs, specforge_python(requirement)) if theirs else {}
    ways: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names if "memory" in parts else []:
        if (peak := peak_bytes(name, shape, python)) is not None:
            ways[name]["peak_mb"] = round(peak / 1e6, 1)
    for name, answers in (in_turns(names, shape, python, warm + rounds) if "speed" in parts else {}).items():
        if "failed" in answers[-1]:
            continue
        kept = answers[warm:]
        ways[name] |= {
            "tokens_per_second": round(statistics.median(a["tokens"] / a["seconds"] for a in kept), 1),
            "seconds": [round(a["seconds"], 6) for a in kept],
        }
    rates = measured_rates(SHAPES[shape])
    floors = [floor_seconds(SHAPES[shape], turn, rates) for turn in range(warm, warm + rounds)]
    floor = {name: round(statistics.median(f[name] for f in floors), 4) for name in floors[0]}
    return {"shape": {"name": shape, **asdict(SHAPES[shape])}, "device": device_name(), "threads": torch.get_num_threads(), "ways": ways,
            "floor_seconds": floor, "rates": {name: round(value / 1e9, 1) for name, value in rates.items()}}  # fmt: skip


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def faster(mine: list[float], others: list[float]) -> float:
    """Median over the turns, in which both made a step of the same rows one after the other: the machine's other load falls on both."""
    return statistics.median(other / own for own, other in zip(mine, others, strict=True))


def table(result: dict[str, Any]) -> str:
    """The result in markdown, ratios against ours."""
    shape, ways = result["shape"], result["ways"]
    lines = [
        f"{result['device']}, {result['threads']} threads, shape {shape['name']}: H {shape['hidden']}, D {shape['draft_vocabulary']}, "
        f"V {shape['vocabulary']}, {shape['rows']} rows of up to {shape['tokens']} tokens, K = {shape['steps']}",
        "",
        "| way | tokens/s | seconds of a step | peak MB | ours is so many times as fast | ours takes so much of its memory |",
        "|---|---|---|---|---|---|",
    ]
    mine = ways.get("ours", {})
    for name, way in ways.items():
        cells = [name, "", ""]  # empty: out of memory, or not asked for
        if "seconds" in way:
            cells = [name, f"{way['tokens_per_second']:,.0f}", f"{statistics.median(way['seconds']):.3f}"]
        cells.append(f"{way['peak_mb']:,.0f}" if "peak_mb" in way else "")
        cells.append(f"{faster(mine['seconds'], way['seconds']):.2f}" if "seconds" in way and "seconds" in mine else "")
        cells.append(f"{mine['peak_mb'] / way['peak_mb']:.2f}" if "peak_mb" in way and "peak_mb" in mine else "")
        lines.append("| " + " | ".join(cells) + " |")
    rates, floor = result["rates"], result["floor_seconds"]
    lines += [
        "",
        f"Floor of our step: {floor['step']:.3f} s for the draft, the sliced teacher and the optimiser's bytes, {floor['argmax']:.3f} s "
        f"for the teacher's argmax over the whole vocabulary (first epoch only), at this run's {rates['matmul']:,.0f} GFLOP/s "
        f"and {rates['bytes']:,.1f} GB/s.",
    ]
    for name in ("ours", "ours, known"):
        if "seconds" in ways.get(name, {}):
            least = floor["step"] + (0 if "known" in name else floor["argmax"])
            lines.append(f"{name}: {least / statistics.median(ways[name]['seconds']):.0%} of the step is the floor.")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option("--way", "names", type=click.Choice(list(WAYS)), multiple=True, default=list(WAYS), help="[default: all]")
@click.option("--part", "parts", type=click.Choice(["memory", "speed"]), multiple=True, default=["memory", "speed"], show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Turns that count.")
@click.option("--warm", default=2, show_default=True, help="Turns before them.")
@click.option("--specforge", "requirement", default=SPECFORGE, show_default=True, help="What pip installs: a requirement, or a wheel.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--worker", hidden=True)
def main(shape: str, names: tuple[str, ...], parts: tuple[str, ...], rounds: int, warm: int, requirement: str, as_json: bool,
         worker: str | None) -> None:  # fmt: skip
    if worker:
        return serve(worker, SHAPES[shape])
    if shape in GPU_SHAPES and not torch.cuda.is_available():
        raise click.ClickException(f"the shape {shape} is for a GPU, and there is none here")
    result = measure(shape, list(names), list(parts), rounds, warm, requirement)
    click.echo(json.dumps(result) if as_json else table(result))
    if not torch.cuda.is_available() and not as_json:
        for name in GPU_SHAPES:
            click.echo(f"{name}: not run, no GPU here; python benchmarks/train.py --shape {name}")


if __name__ == "__main__":
    main()
