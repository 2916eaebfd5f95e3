"""The base model: the built-in tiny one, a folder, or a hub name, through the ordinary from_pretrained."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.config import TINY
from longrun.errors import BadConfig, BadFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HUB_TIMEOUT_S = 5
# As cuBLAS and cuDNN say it, which allocate besides torch; and as torch does where it may not ask for what is free, as
# in containers and on parts of a GPU (pytorch issues 112377, 197312).
OTHER_ALLOCATORS = ("_status_alloc_failed", "nvml_success == r internal assert failed")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", *OTHER_ALLOCATORS)


@dataclass(frozen=True)
class Device:
    """Where and how numbers are computed, and why."""

    name: str  # cpu, cuda
    bf16: bool  # autocast to bfloat16
    why: str

    def __str__(self) -> str:
        return f"{self.name}{' with bf16' if self.bf16 else ''} ({self.why})"


def find_device(dtype: str = "auto", *, use_cpu: bool = False) -> Device:
    import torch

    if use_cpu:
        return Device("cpu", bf16=False, why="use_cpu is set")
    if not torch.cuda.is_available():
        built = "torch sees no CUDA device" if torch.version.cuda else "this torch is built for the CPU only"
        return Device("cpu", bf16=False, why=built)
    name = torch.cuda.get_device_name(0)
    if dtype == "float32":
        return Device("cuda", bf16=False, why=f"{name}, dtype is set to float32")
    # GPUs before Ampere emulate it, slower than float32: 1.85 times on a GTX 1080, as measured in
    # github.com/kubeedge/ianvs/issues/888.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", bf16=bf16, why=f"{name}, which {'computes' if bf16 else 'cannot compute'} in bf16")


def load_tokenizer(source: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if source == TINY:
        from longrun.training.tiny import make_tokenizer

        return make_tokenizer()
    from transformers import AutoTokenizer

    name, commit = _name_and_commit(source)
    with _told_as_bad_config(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **commit
        )
        return tokenizer


def load_model(
    source: str, *, dtype: torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The causal language model at `source`: tiny, a folder (also a checkpoint), or a hub name, maybe name@commit."""
    if source == TINY:
        from longrun.training.tiny import make_model

        tiny: Any = make_model()
        made: PreTrainedModel = tiny.to(dtype)
        return made
    from transformers import AutoModelForCausalLM

    name, commit = _name_and_commit(source)
    options: dict[str, Any] = dict(commit)
    if attn_implementation != "auto":
        options["attn_implementation"] = attn_implementation
    with _told_as_bad_config(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise unusable(
            source, f"{len(missing)} of its weights are not in its files ({few}), and would be random numbers"
        )
    _drop_what_cannot_be_saved(model)
    return model


# Only with do_sample; transformers warns of them without it, and refuses to save them once a token of them is changed.
SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def _drop_what_cannot_be_saved(model: PreTrainedModel) -> None:
    """Settings of generation that have no effect, and would keep every checkpoint from being written."""
    generation = model.generation_config
    if generation is None or generation.do_sample:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        for name in SAMPLING:
            if hasattr(generation, name):
                setattr(generation, name, None)


def padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows up with, which the model must have, whatever the tokenizer says."""
    known = _tokens_of(model)
    wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in wanted if token is not None and token < known))


def check_takes(model: Any, facts: dict[str, Any], tokenizer: Any) -> None:
    """BadFile when prepared rows have tokens that the model has not, BadConfig when they are too long for it."""
    known, highest = _tokens_of(model), facts.get("highest_token", 0)
    if highest >= known:
        word = tokenizer.convert_ids_to_tokens(highest)
        raise BadFile(
            f"its rows have the token {word!r} ({highest}), and the model has tokens up to {known - 1}",
            kind="token",
            hint="resize the base model's embeddings to its tokenizer, or leave that token out",
        )
    positions, longest = _learnt_positions(model), facts["longest"]
    if positions is not None and longest > positions:
        raise BadConfig(
            f"rows of up to {longest} tokens are to be trained, and this model has learnt {positions} positions",
            hint=f"set max_length = {positions} below [train]",
        )


def _tokens_of(model: Any) -> int:
    """How many tokens have an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def _learnt_positions(model: Any) -> int | None:
    """How many positions there are where each has an embedding of its own (GPT-2, OPT); None where any can be told."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    import torch

    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and id(m) not in tables]
    # OPT keeps two more than it has positions, for padding.
    return int(most) if any(table.num_embeddings - int(most) in (0, 2) for table in others) else None


def pinned(source: str) -> str:
    """The name to write into the lineage: a hub name with the commit that was loaded, anything else as it is.

    The commit is the name of the snapshot in the hub's cache: transformers does not always keep it in the config.
    """
    if source == TINY or os.path.isdir(source):  # noqa: PTH112
        return source
    from huggingface_hub import try_to_load_from_cache

    name, commit = _name_and_commit(source)
    cached = try_to_load_from_cache(name, "config.json", revision=commit.get("revision"))
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else source


def _name_and_commit(source: str) -> tuple[str, dict[str, str]]:
    name, _, commit = ("" if os.path.isabs(source) else source).partition("@")  # noqa: PTH117
    return name or source, {"revision": commit} if commit else {}


@contextlib.contextmanager
def _told_as_bad_config(source: str) -> Iterator[None]:
    """What from_pretrained raises, as one sentence with a way out.

    That may be anything: cut weights raise errors of their format, a pickle that would run code one of pickle's, and
    code that came with a model whatever it likes. No dropped file is at fault.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise unusable(source, first) from error


def is_out_of_memory(error: Exception) -> bool:
    import torch

    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    )


def unusable(source: str, why: str) -> BadConfig:
    return BadConfig(
        f"cannot load the base model {source}: {why}",
        hint="give a folder made by save_pretrained, a hub name that can be reached (HF_ENDPOINT, HF_TOKEN),"
        " or --base-model tiny; `daemon.py demo` needs no download",
    )


def check(source: str) -> None:
    """BadConfig unless the base model is there; asks only for its config, and not for long."""
    if source == TINY:
        return
    if os.path.isdir(source):  # noqa: PTH112
        if not (Path(source) / "config.json").is_file():
            raise unusable(source, "the folder has no config.json")
        return
    if source.startswith(("/", ".", "~")) or source.partition("@")[0].count("/") > 1:
        raise unusable(source, "there is no such folder")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(HUB_TIMEOUT_S))
    from huggingface_hub import hf_hub_download

    name, commit = _name_and_commit(source)
    try:
        hf_hub_download(name, "config.json", revision=commit.get("revision"))
    except Exception as error:
        first = str(error).strip().splitlines()
        raise unusable(source, first[0] if first else type(error).__name__) from error
