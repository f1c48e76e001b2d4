"""A trained model as a folder in Hugging Face layout, which `from_pretrained` loads.

A run ends with one, `runs/NAME/model`; `elpo export` makes one of any checkpoint. Adapters are
merged into it, in float32, where a small change is not rounded away; by themselves they are another
folder, in peft's layout. A folder is either complete or not there.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from elpo_fast.config import Config, ModelConfig, run_config
from elpo_fast.eval.evaluation import Subject
from elpo_fast.model.load import LoadedModel, load_model, quiet
from elpo_fast.model.lora import adapters, named_weights
from elpo_fast.model.sharded import empty_like
from elpo_fast.train.checkpoint import (
    MANIFEST,
    PARTIAL,
    TRASH,
    CheckpointError,
    checkpoint_of,
    force_to_disk,
    read_weights,
)
from elpo_fast.train.parallel import ALONE, Ranks
from elpo_fast.train.run import SECRET


def export_model(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks = ALONE,
) -> None:
    """Write `model`, with its adapters merged, and `tokenizer` to `out`, in place of an earlier
    export. All ranks call this, and the leading one writes.

    Raises `CheckpointError` when the disk refuses.
    """
    weights = {name: ranks.whole(weight) for name, weight in named_weights(model)}
    if ranks.leads:
        _write(out, empty_like(model), tokenizer, weights)


def export_adapters(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks = ALONE,
) -> None:
    """As `export_model`, the adapters alone, in peft's layout."""
    weights = {name: ranks.whole(factor) for name, factor in adapters(model).items()}
    if ranks.leads:
        _write(out, model, tokenizer, weights)


def _write(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor],
) -> None:
    partial, trash = (out.with_name(f"{prefix}{out.name}") for prefix in (PARTIAL, TRASH))
    try:
        for leftover in (partial, trash):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        with quiet():
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        force_to_disk([*partial.iterdir(), partial])
        if out.exists():
            out.rename(trash)
        partial.rename(out)
        force_to_disk([out.parent])
        shutil.rmtree(trash, ignore_errors=True)
    except Exception as error:  # safetensors, too, reports a full disk by an exception of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"cannot write model {out}: {reason}; free or change the disk"
        ) from error


def export_run(
    run: Path, out: Path, step: int | None = None, *, adapters_alone: bool = False
) -> Path:
    """Export the checkpoint of `step`, by default the latest, of a run to `out`; the checkpoint.

    The model is built as at the start of the run, in main memory, and then given the trained
    weights. Raises `LookupError` where there is no such run or checkpoint, or no adapters that
    could be `adapters_alone`, or `out` is taken.
    """
    config = run_config(run)
    if out.exists():
        raise LookupError(f"{out} already exists; choose another folder")
    checkpoint = checkpoint_of(run, step)
    if adapters_alone and config.model.lora is None:
        raise LookupError(f"{run} has no adapters: all weights were trained")
    here = config.model.model_copy(update={"device": "cpu", "attention": "auto"})
    model = trained_model(run, checkpoint, here).model
    export = export_adapters if adapters_alone else export_model
    export(out, model, AutoTokenizer.from_pretrained(run / "tokenizer"))
    return checkpoint


def trained_model(run: Path, checkpoint: Path, model: ModelConfig) -> LoadedModel:
    """The model as at the start of `run`, with a checkpoint's weights. `model` is that of the run,
    perhaps on another device."""
    seed, tokenizer = run_config(run).run.seed, run / "tokenizer"
    loaded = load_model(model, seed=seed, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    named = loaded.model.named_parameters()
    read_weights(checkpoint, {name: p.detach() for name, p in named if p.requires_grad})
    return loaded


def run_subject(run: Path, config: Config, step: int | None = None) -> Subject:
    """The checkpoint of `step`, by default the latest, as what is evaluated: the run's own model
    and tasks, and else what `config` says. Raises `LookupError` where there is none."""
    checkpoint = checkpoint_of(run, step)
    trained = run_config(run).model
    its = {name: getattr(trained, name) for name in ("name", "revision", "scratch", "lora")}
    its["chat_template"] = config.model.chat_template or trained.chat_template
    its["chat_template_kwargs"] = trained.chat_template_kwargs | config.model.chat_template_kwargs
    model = config.model.model_copy(update=its)
    secret = run / SECRET
    return Subject(
        name=f"{run.name}-{checkpoint.name}",
        config=config.model_copy(update={"model": model}),
        weights=hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
        load=lambda _: trained_model(run, checkpoint, model),
        secret=secret.read_text(encoding="utf-8") if secret.is_file() else None,
    )
