"""Configurations read, changed, checked, written and compared: YAML, dotted overrides, one line a
fault. Unknown keys are refused with the nearest known name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from elpo_fast.config.sections import Config

SectionT = TypeVar("SectionT", bound=BaseModel)


class ConfigError(ValueError):
    """A fault in the user's configuration; the message is one line and names the remedy."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), over: Sequence[str | Path] = ()
) -> Config:
    """Read a YAML file, lay the files `over` over it, key by key, and apply dotted overrides such
    as `train.lr=1e-6`.

    Raises `ConfigError` with one line for every kind of fault: missing or unreadable file, YAML
    syntax, unknown key (with the nearest known name), wrong type or value.
    """
    data = _read(Path(path))
    for file in over:
        _lay_over(data, _read(Path(file)))
    return parse_config(data, overrides)


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def check_run(folder: Path) -> None:
    """Raises `LookupError` for what is no run folder."""
    if not is_run(folder):
        raise LookupError(f"{folder} is not a run folder: it has no config.yaml")


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run folder has. Raises as `check_run` and `load_config`."""
    check_run(run)
    return load_config(run / "config.yaml", overrides)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read configuration {path}: {reason}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `section: ...` entries, not a {type(data).__name__}")
    return data


def _lay_over(data: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        below = data.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _lay_over(below, value)
        else:
            data[key] = value


def parse_config(data: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate a nested mapping, changed by dotted overrides; `ConfigError` names the first
    fault."""
    for override in overrides:
        _apply(data, override)
    return parse_section(Config, data)


def parse_section(model: type[SectionT], data: dict[str, Any], prefix: str = "") -> SectionT:
    """Validate one section, for example a task source's options at prefix `task.options.`.

    Raises `ConfigError` naming the first fault by its full dotted key.
    """
    _known(data, model, prefix)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = prefix + ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        given = first.get("input")
        shown = "" if isinstance(given, (dict, BaseModel)) else f", got {given!r}"
        raise ConfigError(f"{where.rstrip('.') or 'configuration'}: {problem}{shown}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


MECHANICS = (
    *("run.dir", "run.name", "run.threads", "run.log", "parallel", "train.micro_batch_tokens"),
    *("model.device", "model.attention", "model.gradient_checkpointing", "model.compile"),
    *("tools.workers", "tools.remote_url", "tools.isolation"),
    *("rollout.engine", "rollout.sglang", "rollout.trees_in_flight"),
    *("rollout.max_batch", "rollout.cache_tokens"),
)
"""Keys, or sections, that say how things are computed and not what: results are the same but for
rounding and chance."""


def differences(before: Config, now: Config) -> dict[str, str]:
    """The keys that differ, each with a text that says how."""
    first, second = (flat(config.model_dump(mode="json")) for config in (before, now))
    return {
        key: f"{key} was {_brief(first.get(key))} and is now {_brief(second.get(key))}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    }


def _brief(value: Any) -> str:
    """A value in a sentence: a whole template would hide the rest of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def within(key: str, keys: Sequence[str]) -> bool:
    """Whether `key` is one of `keys` or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in keys)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value in override {override!r} is not valid YAML") from None
    if isinstance(parsed, str):
        # YAML 1.1 reads `1e-6` as text; a person means the number.
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    node = data
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = parsed


_VERL = ("actor_rollout_ref", "algorithm", "critic", "custom_reward_function", "data", "trainer")


def _known(data: Any, model: type[BaseModel], prefix: str) -> None:
    """Refuse unknown keys, nested ones too, before values are looked at."""
    if not isinstance(data, dict):
        return
    names = list(model.model_fields)
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            elsewhere = _paths_of(str(key)) if not near else []
            hint = (
                f"did you mean {prefix}{near[0]}?"
                if near
                else f"did you mean {elsewhere[0]}?"
                if elsewhere
                else f"known: {', '.join(names) or 'none'}"
            )
            if not prefix and key in _VERL:
                hint = "docs/migrating.md says where each of verl's keys went"
            raise ConfigError(f"unknown key {prefix}{key}; {hint}")
        child = _section(model.model_fields[key].annotation)
        optional = type(None) in get_args(model.model_fields[key].annotation)
        if child is None or (value is None and optional):
            continue
        inside = {f"{prefix}{key}": value}
        if get_origin(model.model_fields[key].annotation) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{prefix}{key} is a list of sections")
            inside = {f"{prefix}{key}.{place}": each for place, each in enumerate(value)}
        for name, each in inside.items():
            if not isinstance(each, dict):
                raise ConfigError(f"{name} is a section and needs `key: value` entries")
            _known(each, child, f"{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _paths_of(key: str, model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Full dotted names of every key called `key`, to help who put it into the wrong section."""
    found = []
    for name, field in model.model_fields.items():
        if name == key:
            found.append(prefix + name)
        child = _section(field.annotation)
        if child is not None:
            found += _paths_of(key, child, f"{prefix}{name}.")
    return found
