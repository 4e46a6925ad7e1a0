"""The recipe: one frozen dataclass per stage, and its strict loading. Defaults < file < `--set section.key=value`.

The one-line doc of each field is the help text of the command line, so it names the unit and the special values.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .records import UserError


def opt(default: Any, doc: str) -> Any:
    """A config field with its one-line doc."""
    metadata = {"doc": doc}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(config: Any, section: str, *names: str) -> None:
    """Refuse values that are not above zero, naming the field."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{section}.{name} is {value}; it must be greater than 0")


def share(config: Any, section: str, *names: str) -> None:
    """Refuse values outside [0, 1], naming the field."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise UserError(f"{section}.{name} is {value}; it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The model whose decoding is to become faster."""

    model: str = opt("smollm2", "hub name or local folder of the target; `smollm2` and `tiny` are the demo's own targets")
    revision: str | None = opt(None, "hub revision; none: the newest")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = opt("auto", "dtype of the target and its states; auto: that of its config")
    engine: Literal["auto", "sglang", "transformers"] = opt(
        "auto", "what runs the target; auto: SGLang where it is installed and there is a GPU, else transformers, embedded"
    )
    sglang: dict[str, Any] = opt({}, "arguments for the SGLang that is started here, passed on untouched, such as {tp_size: 2}")
    layers: list[int] = opt(
        [], "boundary indices of the captured layers (0: the embedding's output, L: what enters the final norm); empty: [2, L//2, L-3]"
    )
    max_length: int = opt(4096, "longest row in tokens, prompt and answers together; longer rows are rejected")
    chat_template: str | None = opt(None, "file with a chat template of your own; none: the tokenizer's")
    trust_remote_code: bool = opt(False, "run Python code that the target's folder brings along")

    def __post_init__(self) -> None:
        positive(self, "target", "max_length")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Raw data to conversations in work units."""

    inputs: list[str] = opt(["stdlib"], "JSONL files, hub or local data sets; `stdlib` makes questions about Python's standard library")
    eval_inputs: list[str] = opt([], "separate evaluation inputs; empty: a share of `inputs` is held out by the hash of each row's group")
    eval_share: float = opt(0.05, "share of the groups that is held out; ignored with eval_inputs or eval_rows")
    eval_rows: int | None = opt(None, "exact number of held-out groups instead of a share; none: use eval_share")
    unit_rows: int = opt(2000, "rows per work unit, the piece of work of one Slurm array task")
    max_rows: int | None = opt(None, "use at most so many rows, in hash order; none: all")
    answer_tokens: int | None = opt(None, "ask train questions, unit by unit, until so many answer tokens exist; none: ask all")
    system_prompt: str | None = opt(None, "put before every conversation that has no system message; none: the template's default")

    def __post_init__(self) -> None:
        positive(self, "prepare", "unit_rows", "max_rows", "answer_tokens", "eval_rows")
        share(self, "prepare", "eval_share")


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """The target answers every user turn anew."""

    temperature: float = opt(0.0, "sampling temperature; 0: greedy")
    top_p: float = opt(1.0, "nucleus sampling; 1: off")
    top_k: int = opt(0, "sample among the k most likely tokens; 0: off")
    min_p: float = opt(0.0, "drop tokens less likely than this share of the likeliest; 0: off")
    max_tokens: int = opt(1024, "longest answer in tokens; a longer one is cut, kept and marked finish_reason `length`")
    reasoning: Literal["keep", "drop", "off"] = opt(
        "keep",
        "of targets that think. keep: thoughts stay in the history of later turns, a conversation is one token row; drop: each answer has "
        "its thought, later turns see the answers alone, as the chat template renders them, so each turn is a token row of its own; off: "
        "as drop, with the template's switch (enable_thinking) set to false",
    )
    seed: int = opt(
        0, "seed of sampling; each row draws from (seed, row id), whatever the batch (SGLang: with enable_deterministic_inference only)"
    )
    batch_size: int = opt(64, "rows that transformers answers at the same time")
    concurrency: int = opt(256, "rows that SGLang servers answer at the same time, over all servers")
    timeout: float = opt(600.0, "seconds that one answer may take before its request is sent again")
    attempts: int = opt(5, "times that a request is sent before its row is rejected")
    patience: float = opt(300.0, "seconds without any living server after which the stage gives up")

    def __post_init__(self) -> None:
        positive(self, "regenerate", "max_tokens", "batch_size", "concurrency", "timeout", "attempts", "patience")
        share(self, "regenerate", "top_p", "min_p")
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(f"regenerate.temperature is {self.temperature} and top_k {self.top_k}; neither may be negative")


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """The target's hidden states, written to the store."""

    location: str | None = opt(None, "where the dump lies; none: RUN/dump; s3://BUCKET/PREFIX: object storage, credentials from AWS_*")
    mode: Literal["full", "compact"] = opt(
        "full", "full: the captured layers and the last states; compact: a projection of the layers and top logits"
    )
    codec: Literal["auto", "lossless", "lossless-fast", "none", "int8", "fp8", "bitround"] = opt(
        "auto", "of the captured states: lossless (zstd), lossless-fast (lz4), none, or lossy; auto: lossless, in a compact dump int8"
    )
    last_codec: Literal["lossless", "lossless-fast", "none", "int8", "fp8", "bitround"] | None = opt(
        None, "of the last states of a full dump; none: the same as codec"
    )
    rank: float = opt(0.75, "compact: channels of the projection, as a share of the hidden size")
    top_k: int = opt(16, "compact: how many of the largest logits are kept of each teacher")
    batch_tokens: int = opt(4096, "tokens of one prefill batch")
    writer_threads: int = opt(2, "threads that encode beside the engine; 0: none, everything in the writer's own thread")
    force: bool = opt(False, "go on although the estimate says that the disk will not hold the dump")

    def __post_init__(self) -> None:
        positive(self, "dump", "batch_tokens", "rank", "top_k")
        if self.writer_threads < 0:
            raise UserError(f"dump.writer_threads is {self.writer_threads}; it may not be negative")
        if self.location is not None and not self.location.startswith("s3://"):
            raise UserError(f"dump.location is {self.location!r}; expected s3://BUCKET/PREFIX, or none for RUN/dump")
        if self.mode == "compact" and self.last_codec is not None:
            raise UserError("dump.last_codec is set, but a compact dump keeps no last states: leave it out")

    @property
    def aux_codec(self) -> str:
        """The codec that `auto` stands for."""
        if self.codec != "auto":
            return self.codec
        return "lossless" if self.mode == "full" else "int8"

    @property
    def teacher_codec(self) -> str | None:
        """The codec of the last states; None in a compact dump, which has none."""
        return None if self.mode == "compact" else self.last_codec or self.aux_codec

    def compact_rank(self, hidden_size: int) -> int:
        """r, channels of a compact dump's projection."""
        return max(1, round(self.rank * hidden_size))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The draft head, trained from the dump alone."""

    draft: str = opt("draft", "name of the draft: its folder is RUN/drafts/NAME")
    draft_vocab_size: int = opt(32000, "tokens that the draft can propose, the most frequent ones of the train answers")
    ttt_length: int = opt(7, "K, steps of test-time training: how many tokens deep the draft is unrolled")
    layers: list[int] = opt([], "which of the dump's captured layers the draft reads, boundary indices; empty: all of them")
    step_decay: float = opt(0.8, "weight of step k's loss is step_decay**k")
    loss: Literal["soft cross-entropy", "lk-alpha", "lk-lambda"] = opt(
        "soft cross-entropy", "of each row; the LK losses (arXiv 2602.23881) aim at the acceptance rate itself"
    )
    normalisation: Literal["sequence", "token"] = opt(
        "sequence", "mean over each conversation's rows and then over conversations, or over all rows"
    )
    hidden_size: int = opt(0, "width of the draft; 0: the target's; a narrower one trains its own embedding, and needs head_init: random")
    start_from: str | None = opt(None, "folder of a published draft to start from, whose vocabulary is kept; none: a new draft")
    head_init: Literal["target", "random"] = opt("target", "lm_head and final norm start as the target's rows, or random")
    layer_init: Literal["target", "random"] = opt("random", "the layer starts random, or as the last one of a target of Llama's shape")
    fc_init: Literal["random", "ridge"] = opt("random", "fc starts random, or as the best linear guess of the next token's last state")
    aux_scaling: bool = opt(True, "divide each captured channel by its rms in training; folded back into fc at export (see fc_norm)")
    fc_norm: bool = opt(False, "EAGLE-3.1: norm each captured layer before fc; aux_scaling then is where the norms' weights start")
    norm_output: bool = opt(False, "EAGLE-3.1: the state after the final norm goes into the next step, not the one before it")
    dtype: Literal["auto", "bfloat16", "float32"] = opt(
        "auto", "compute dtype, masters are fp32; auto: bfloat16 where the processor multiplies it natively"
    )
    deepspeed: str = opt("zero1", "DeepSpeed JSON: a file, or the name of configs/deepspeed_NAME.json")
    batch_size: int = opt(64, "conversations per optimiser step, over all ranks")
    micro_batch_size: int = opt(1, "conversations per forward pass of one rank")
    micro_batch_tokens: int = opt(
        0, "most tokens per forward pass of one rank, filled with conversations of any number; 0: micro_batch_size conversations"
    )
    total_steps: int = opt(10000, "optimiser steps, over which the learning rate rises and falls")
    epochs: int = opt(0, "passes over the train rows after which training ends, unless total_steps end it before; 0: any number")
    learning_rate: float = opt(1e-4, "peak learning rate of AdamW (0.9, 0.95), without weight decay")
    warmup_ratio: float = opt(0.015, "share of the steps in which the rate rises to its peak")
    schedule: Literal["cosine", "linear"] = opt("cosine", "how the rate falls after the warm-up")
    final_ratio: float = opt(0.05, "the rate at the last step, as a share of the peak")
    clip: float = opt(0.5, "gradient norm above which gradients are scaled down")
    seed: int = opt(0, "seed of the starting weights and of the sample order")
    eval_every: int = opt(1000, "steps between held-out evaluations; 0: only at the end")
    eval_rows: int = opt(64, "held-out conversations of an evaluation during training")
    checkpoint_every: int = opt(1000, "steps between checkpoints")
    keep_checkpoints: int = opt(2, "checkpoints that are kept, the newest ones")
    keep_epochs: bool = opt(False, "also write and keep a checkpoint at the end of each epoch")
    publish: Literal["last", "best"] = opt("last", "which weights become the draft: the last step's, or those with the best held-out tau")
    early_stop: int = opt(0, "end when so many evaluations in a row bring no better held-out tau; 0: never")
    attention: Literal["auto", "reference", "blockwise", "flex", "flash", "sdpa"] = opt(
        "auto",
        "auto: sdpa on a CPU, else reference, or blockwise where a conversation is long; reference: all scores of a conversation; "
        "blockwise: little memory; sdpa: a CPU's fused kernel; flex, flash (FlashAttention, in bfloat16): a GPU's",
    )
    checkpoint_activations: bool = opt(False, "make each unroll step's activations again in the backward pass: less memory, more time")
    dist_timeout: float = opt(10.0, "minutes that a rank waits for the others before it gives up")

    def __post_init__(self) -> None:
        positive(
            self,
            "train",
            "draft_vocab_size",
            "ttt_length",
            "batch_size",
            "micro_batch_size",
            "total_steps",
            "learning_rate",
            "clip",
            "eval_rows",
            "checkpoint_every",
            "keep_checkpoints",
            "dist_timeout",
        )
        share(self, "train", "warmup_ratio", "final_ratio")
        if self.start_from and (self.fc_init == "ridge" or self.layer_init == "target"):
            raise UserError("train.start_from brings its fc and layer along: leave out train.fc_init ridge and train.layer_init target")
        for name in ("early_stop", "epochs", "hidden_size", "micro_batch_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it may not be negative")
        if self.batch_size % self.micro_batch_size:
            raise UserError(f"train.batch_size is {self.batch_size}, no multiple of micro_batch_size {self.micro_batch_size}")
        if not self.draft or "/" in self.draft or self.draft.startswith("."):
            raise UserError(f"train.draft is {self.draft!r}; it names a folder, so no slash and no leading dot")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where else a training's values go, through DeepSpeed's monitor. drafts/NAME/metrics.csv and held_out.jsonl are always written."""

    trackers: list[Literal["tensorboard", "wandb", "comet", "csv"]] = opt(
        [],
        "tensorboard and csv (a file a value) write to drafts/NAME/tracking; wandb and comet take their keys from the environment",
    )
    project: str = opt("eagle3-offline", "project at wandb and comet")
    run_name: str | None = opt(None, "name of the run there; none: the recipe's name and the draft's")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accept length on held-out rows."""

    chain: int = opt(4, "drafted tokens per verification step (a chain)")
    rows: int | None = opt(None, "held-out conversations to walk; none: all")
    decode_rows: int = opt(48, "held-out prompts to decode speculatively and plainly with the target in fp32; 0: skip")
    ngram: int = opt(6, "longest suffix that the n-gram lookup, the baseline, searches for")

    def __post_init__(self) -> None:
        positive(self, "evaluate", "chain", "rows", "ngram")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The trained draft as a folder that an inference engine loads."""

    to: Literal["sglang", "vllm", "hf"] = opt("sglang", "whose weight names and layer numbers to write; hf: for the hub, both numbers")
    dtype: Literal["bfloat16", "float16", "float32"] = opt("bfloat16", "dtype of the weights")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str = opt("run", "the run folder is runs/NAME unless --run says otherwise")
    max_rejected: float = opt(0.01, "share of a stage's rows that may be rejected before it exits with 3")
    target: TargetConfig = field(default_factory=TargetConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    dump: DumpConfig = field(default_factory=DumpConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        share(self, "recipe", "max_rejected")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def packaged(folder: str) -> Path:
    """`configs/` or `slurm/`: beside the package in a checkout, inside it after a plain install."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def recipe_path(name: str) -> Path:
    """A recipe file, or the recipe of that name in configs/."""
    if Path(name).is_file():
        return Path(name)
    known = packaged("configs") / f"{name}.yaml"
    if known.is_file():
        return known
    names = sorted(path.stem for path in packaged("configs").glob("*.yaml"))
    raise UserError(f"no recipe {name!r}: neither a file nor one of configs/: {', '.join(names)}")


def load_recipe(name: str | None, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a file or name, with `section.key=value` overrides applied. Raises UserError for anything unknown."""
    where = "defaults" if name is None else str(recipe_path(name))
    values = {} if name is None else _read_yaml(recipe_path(name))
    for override in overrides:
        _apply_override(values, override)
    return from_dict(Recipe, values, where)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of sections")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected section.key=value")
    *sections, last = key.strip().split(".")
    here = values
    for section in sections:
        here = here.setdefault(section, {})
        if not isinstance(here, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
    try:
        here[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {error}") from None


def from_dict(cls: type, values: dict[str, Any], where: str, section: str = "") -> Any:
    """Build a config dataclass from plain values; unknown keys and wrong types are errors that name the field."""
    hints = typing.get_type_hints(cls)
    prefix = f"{section}." if section else ""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {section or 'the recipe'} is {values!r}, expected a mapping")
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
    built = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            built[key] = from_dict(hints[key], value or {}, where, key)
        else:
            built[key] = _convert(value, hints[key], f"{where}: {prefix}{key}")
    return cls(**built)


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        value = "off" if value is False and "off" in args else value  # YAML 1.1 reads off as false
        if value not in args:
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name} is {value!r}, a {type(value).__name__}; expected a mapping")
        return {str(key): item for key, item in value.items()}
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_convert(item, args[0], f"{name}[{i}]") for i, item in enumerate(items)]
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-5 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{name} is {value!r}, a {type(value).__name__}; expected {hint.__name__}")
    return value


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; loading it again gives an equal one."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def section_help(name: str) -> str:
    """The keys of one section with their defaults and docs, for `--help`."""
    lines = []
    for item in dataclasses.fields(typing.get_type_hints(Recipe)[name]):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        lines.append(f"{name}.{item.name} [{default}]\n    {item.metadata['doc']}")
    return "\n".join(lines)
