"""A small real Llama, trained on this machine in about two minutes: a target for machines that can get no model.

Legend: B rows of a batch, T tokens of a row, P parameters.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine import cpu_multiplies_bfloat16
from ..records import UserError
from ..runs import atomic_folder, digest, write_json

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

START_TOKEN, END_TOKEN, PAD_TOKEN = "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, END_TOKEN)  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORED = -100  # the label of a padding token

Progress = Callable[[str], None]
Pairs = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySettings:
    """What decides the tiny target's weights, beside the data and the seed."""

    layers: int = 8  # so that the captured boundaries 2, 4 and 5 are distinct
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 512
    vocabulary: int = 2048  # tokens, special ones included
    positions: int = 2048  # longest sequence of the finished model
    initializer_range: float = 0.05  # standard deviation of new weights; Llama has 0.02
    row_tokens: int = 256  # T of a training row
    batch_rows: int = 4  # B
    answers: int = 192  # so many of the pairs are learnt, chosen by hash: as many as stick in the time
    document_steps: int = 40  # first on plain documents, to learn the language
    pair_steps: int = 500  # then on questions and answers
    learning_rate: float = 3e-3  # peak; 20 steps of warm-up, then a cosine to a tenth
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        if len(set(captured_layers(self.layers))) < 3:
            raise UserError(
                f"layers: found {self.layers}, expected at least 7: the captured boundaries {captured_layers(self.layers)} must differ"
            )

    @property
    def steps(self) -> int:
        return self.document_steps + self.pair_steps


def captured_layers(layers: int) -> tuple[int, int, int]:
    """The boundaries that EAGLE-3 captures by default in a model of that many layers."""
    return 2, layers // 2, layers - 3


def tiny_folder(
    cache: Path, pairs: Pairs, documents: list[str], seed: int = 0, settings: TinySettings | None = None, progress: Progress = print
) -> Path:
    """The Hugging Face folder of a tiny chat model that answers `pairs`' questions; trained on the first call, found by later ones."""
    if not pairs or not documents:
        raise UserError(
            f"a tiny target needs training text: found {len(pairs)} pairs and {len(documents)} documents, expected some of both"
        )
    settings = settings or TinySettings()
    source = {"settings": asdict(settings), "seed": seed, "data": digest([pairs, documents]), "python": platform.python_version()}
    folder = cache / f"tiny-llama-{digest(source)[:12]}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _make(temporary, pairs, documents, seed, settings, source, progress)
    return folder


def _make(
    folder: Path, pairs: Pairs, documents: list[str], seed: int, settings: TinySettings, source: dict[str, Any], progress: Progress
) -> None:
    """Train tokenizer and model, write them to `folder`."""
    import torch

    tokenizer = train_tokenizer([*documents, *(text for pair in pairs for text in pair)], settings)
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(settings, tokenizer)
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        progress(f"training a tiny target of {size} for {settings.steps} steps, about two minutes on two cores")
        loss = train(model, tokenizer, learnt_pairs(pairs, settings.answers), documents, settings, progress)
    measured = {
        "loss": round(loss, 4),
        "seconds": round(time.monotonic() - started, 1),
        "parameters": model.num_parameters(),
        "bf16": cpu_multiplies_bfloat16(),
    }
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "source.json", {"source": "trained here", **source, **measured})


def learnt_pairs(pairs: Pairs, count: int) -> Pairs:
    """`count` of the pairs, by the hash of their question."""
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


def train_tokenizer(texts: list[str], settings: TinySettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML-like template and no default system prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama in float32; its weights come from torch's random state."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.positions,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**ids)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Pairs,
    documents: list[str],
    settings: TinySettings,
    progress: Progress,
) -> float:
    """Train for the fixed number of steps; return the mean loss of the last 20."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, settings))
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(_batches(tokenizer, pairs, documents, settings)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            loss = model(input_ids=batch.clamp_min(0), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            progress(f"tiny target: step {step + 1} of {settings.steps}, loss {_mean(losses[-20:]):.2f}")
    model.eval()
    return _mean(losses[-20:])


def rate_at(step: int, settings: TinySettings) -> float:
    """Share of the peak learning rate at a step."""
    import math

    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def _batches(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, documents: list[str], settings: TinySettings) -> Iterator[torch.Tensor]:
    """[B, T] token ids with IGNORED as padding: first the document steps, then the pair steps."""
    document_rows = _endless(lambda: _document_rows(tokenizer, documents, settings))
    pair_rows = _endless(lambda: _pair_rows(tokenizer, pairs, settings))
    for rows, steps in ((document_rows, settings.document_steps), (pair_rows, settings.pair_steps)):
        for _ in range(steps):
            yield _stack([next(rows) for _ in range(settings.batch_rows)], settings.row_tokens)


def _endless(epoch: Callable[[], Iterator[list[int]]]) -> Iterator[list[int]]:
    while True:
        yield from epoch()


def _document_rows(tokenizer: PreTrainedTokenizerFast, documents: list[str], settings: TinySettings) -> Iterator[list[int]]:
    """One epoch: the documents in random order as one stream, cut into rows of T."""
    stream: list[int] = []
    for index in _shuffled(len(documents)):
        stream += [*_encode(tokenizer, documents[index]), tokenizer.eos_token_id]
        while len(stream) >= settings.row_tokens:
            yield stream[: settings.row_tokens]
            stream = stream[settings.row_tokens :]
    yield stream


def _pair_rows(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, settings: TinySettings) -> Iterator[list[int]]:
    """One epoch: the pairs in random order as chats, whole chats packed into rows of at most T."""
    row: list[int] = []
    for index in _shuffled(len(pairs)):
        chat = _encode(tokenizer, chat_text(*pairs[index]))[: settings.row_tokens]
        if len(row) + len(chat) > settings.row_tokens:
            yield row
            row = []
        row += chat
    yield row


def chat_text(question: str, answer: str) -> str:
    """A question and its answer exactly as `CHAT_TEMPLATE` renders them."""
    return f"{START_TOKEN}user\n{question}{END_TOKEN}\n{START_TOKEN}assistant\n{answer}{END_TOKEN}\n"


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text of any length; the backend does not warn of documents longer than the model."""
    return tokenizer.backend_tokenizer.encode(text).ids


def _shuffled(count: int) -> list[int]:
    import torch

    return torch.randperm(count).tolist()


def _stack(rows: list[list[int]], length: int) -> torch.Tensor:
    import torch

    batch = torch.full((len(rows), length), IGNORED)  # [B, T]
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.tensor(row)
    return batch


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
