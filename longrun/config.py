"""Settings: default < longrun.toml < environment (LONGRUN_TRAIN_LEARNING_RATE=...) < flag.

Read whole, checked whole, and each value remembers where it came from. Names under [train] are those of
transformers.TrainingArguments, except `batch_size`, the effective one, and `max_length`, as in trl.SFTConfig.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.errors import BadConfig
from longrun.plan import Recipe
from longrun.retention import Keep
from longrun.wording import unpinned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longrun.lineage import Lineage

ENVIRONMENT = "LONGRUN_"
MEBIBYTE = 1 << 20
NO_TARGET = "none"
TINY = "tiny"  # the built-in base model


def _setting(default: Any, *, least: float | None = None, most: float | None = None, one_of: str = "") -> Any:
    """A field with its limits: [least, most], or one of the words in `one_of`."""
    limits = {"least": least, "most": most, "one_of": tuple(one_of.split())}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class ModelSettings:
    base_model: str = TINY  # a folder, a hub name, or the built-in tiny model
    dtype: str = _setting("auto", one_of="auto float32 bfloat16")  # auto: fp32 weights, bf16 autocast on a GPU
    attn_implementation: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TrainSettings:
    learning_rate: float = _setting(2e-5, least=1e-12, most=10)
    num_train_epochs: int = _setting(1, least=1, most=1000)  # of each file
    batch_size: int = _setting(8, least=1)  # rows an optimizer step, over devices and accumulation
    per_device_train_batch_size: int = _setting(0, least=0)  # rows at once on a device; 0: as suits it
    weight_decay: float = _setting(0.0, least=0, most=10)
    adam_beta1: float = _setting(0.9, least=0, most=0.999999)
    adam_beta2: float = _setting(0.999, least=0, most=0.999999999)
    adam_epsilon: float = _setting(1e-8, least=0, most=1)
    max_grad_norm: float = _setting(1.0, least=0)  # 0: no clipping
    warmup_steps: int = _setting(0, least=0)  # of the model's life, not of each file
    max_length: int = _setting(2048, least=2)  # tokens a row; longer rows are cut, counted and reported
    seed: int = _setting(42, least=0)
    save_steps: int = _setting(0, least=0)  # 0: as often as costs 2 % of the time
    save_total_limit: int = _setting(2, least=2)  # checkpoints kept
    logging_steps: int = _setting(10, least=1)
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch_fused"
    use_cpu: bool = False  # also where there is a GPU, or was one
    report_to: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class InboxSettings:
    settle_s: float = _setting(1.0, least=0.1)
    settle_without_lease_s: float = _setting(10.0, least=0.1)
    scan_s: float = _setting(5.0, least=0.1)
    on_bad_row: str = _setting("reject", one_of="reject skip")
    max_line_bytes: int = _setting(16 * MEBIBYTE, least=1024)
    keep_days: float = _setting(0.0, least=0)  # of files in trained/ and rejected/; 0: for ever


@dataclass(frozen=True)
class WorkerSettings:
    processes: int = _setting(1, least=1)  # that share a step, each with a GPU of its own
    idle_release_minutes: float = _setting(30.0, least=0)
    start_timeout_s: float = _setting(600.0, least=1)  # until the model is loaded
    step_timeout_s: float = _setting(600.0, least=1)  # without any progress
    max_attempts: int = _setting(3, least=1)
    prepare_ahead: int = _setting(2, least=1)  # files
    retry_s: float = _setting(60.0, least=0.1)  # between looks at a full disk, or a model or worker of no use


@dataclass(frozen=True)
class BackupSettings:
    after_files: int = _setting(0, least=0)  # a scheduled backup after so many trained files; 0: never
    after_hours: float = _setting(0.0, least=0)  # and when the last one is so old; 0: never
    store: str = "backups"  # a folder, from the home
    target: str = NO_TARGET  # a URL that each scheduled backup is copied to
    keep_last: int = _setting(3, least=1)  # scheduled backups, besides the newest of each
    keep_daily: int = _setting(7, least=0)  # of so many days,
    keep_weekly: int = _setting(4, least=0)  # weeks
    keep_monthly: int = _setting(6, least=0)  # and months

    def folder(self, home: Path) -> Path:
        """Where backups are kept."""
        return home / expanded(self.store)

    @property
    def keep(self) -> Keep:
        return Keep(last=self.keep_last, daily=self.keep_daily, weekly=self.keep_weekly, monthly=self.keep_monthly)


@dataclass(frozen=True)
class LogSettings:
    format: str = _setting("text", one_of="text json")
    progress_s: float = _setting(30.0, least=0.1)  # between progress lines, away from a terminal
    max_bytes: int = _setting(10 * MEBIBYTE, least=4096)
    keep: int = _setting(5, least=1)
    rows: bool = False  # also write logs/rows.jsonl: the rows of each step as they reached the model


@dataclass(frozen=True)
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    inbox: InboxSettings = field(default_factory=InboxSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    backup: BackupSettings = field(default_factory=BackupSettings)
    log: LogSettings = field(default_factory=LogSettings)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)  # "train.seed" -> where from

    @property
    def recipe(self) -> Recipe:
        train = self.train
        return Recipe(
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            max_grad_norm=train.max_grad_norm,
            warmup_steps=train.warmup_steps,
            epochs=train.num_train_epochs,
            batch_size=train.batch_size,
            max_length=train.max_length,
            seed=train.seed,
        )


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSettings,
    "train": TrainSettings,
    "inbox": InboxSettings,
    "worker": WorkerSettings,
    "backup": BackupSettings,
    "log": LogSettings,
}

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list of words"}

# TrainingArguments' names that cannot be settings here, each with the reason.
REFUSED = {
    "max_steps": "it is computed for every file: the steps so far plus this file's. Set num_train_epochs",
    "gradient_accumulation_steps": "it follows from batch_size / per_device_train_batch_size. Set those",
    "lr_scheduler_type": "a decaying schedule would starve later files; the rate is constant after warmup_steps",
    "warmup_ratio": "a share of an unknown total has no meaning in a run without an end. Set warmup_steps",
    "resume_from_checkpoint": "every file resumes from the newest verified checkpoint",
    "output_dir": "the model is current_model/ of the home. Use --home",
    "auto_find_batch_size": "it trains rows twice; out of memory is handled at the same batch_size",
    "save_strategy": "every file ends in a checkpoint. Set save_steps for those in between",
    "ignore_data_skip": "the plan decides which rows a step trains",
}


def load(path: Path, *, flags: Mapping[str, Any] | None = None, only: str = "") -> Settings:
    """The settings in force; BadConfig names the key, its source, what is wrong and what is right.

    With `only`, those of that section; what is wrong elsewhere must not keep anybody from a backup.
    """
    layers: list[tuple[str, dict[str, Any]]] = [
        (path.name, _from_file(path, only)),
        ("environment", _from_environment(os.environ)),
        ("flag", {key: value for key, value in (flags or {}).items() if value is not None}),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for key, value in layer.items():
            if only and not key.startswith(f"{only}."):
                continue
            values[key] = _checked(key, value, source)
            sources[key] = source
    settings = Settings(
        **{
            name: section(
                **{f.name: values[f"{name}.{f.name}"] for f in fields(section) if f"{name}.{f.name}" in values}
            )
            for name, section in SECTIONS.items()
        },
        sources=sources,
    )
    _check_together(settings)
    return dataclasses.replace(settings, model=_found_folder(settings.model, path.parent))


def _found_folder(model: ModelSettings, home: Path) -> ModelSettings:
    """A base model that is a folder, by its absolute path: from here or from the home."""
    for folder in (expanded(model.base_model), home / model.base_model):
        if model.base_model != TINY and os.path.isdir(folder):  # noqa: PTH112 - Path's raises where it may not look
            return dataclasses.replace(model, base_model=str(folder.resolve()))
    return model


def expanded(path: str) -> Path:
    """The path, from the user's home where it begins with a ~; BadConfig when there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadConfig(f"cannot use {path}: there is no user of that name here", hint="write the path out") from None


def _from_file(path: Path, only: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadConfig(f"cannot read {path}: {error.strerror}", hint="make it a file that can be read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadConfig(f"cannot read {path}: {error}", hint="correct that line; numbers need no quotes") from None
    found = {}
    for section, table in tables.items():
        if only and section != only:
            continue
        if section not in SECTIONS:
            home = next((name for name, known in SECTIONS.items() if section in known.__dataclass_fields__), None)
            hint = f"write it below [{home}]" if home else _did_you_mean(section, list(SECTIONS))
            raise BadConfig(f"{path.name} has an unknown section or loose setting: {section}", hint=hint)
        if not isinstance(table, dict):
            raise BadConfig(f"{path.name}: {section} must be a table", hint=f"write [{section}] on a line of its own")
        found.update({f"{section}.{key}": value for key, value in table.items()})
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, value in environment.items():
        section, _, key = name.removeprefix(ENVIRONMENT).lower().partition("_")
        if name.startswith(ENVIRONMENT) and section in SECTIONS:
            found[f"{section}.{key}"] = value
    return found


def _checked(key: str, value: Any, source: str) -> Any:
    section, _, name = key.partition(".")
    known = {f.name: f for f in fields(SECTIONS[section])}
    if name in REFUSED:
        raise BadConfig(f"{name} ({source}) is not a setting: {REFUSED[name]}")
    if name not in known:
        raise BadConfig(f"unknown setting {key} ({source})", hint=_did_you_mean(name, list(known)))
    default = known[name].default
    try:
        converted = _convert(value, default)
    except (TypeError, ValueError, OverflowError):
        kind = KINDS[type(default)]
        raise BadConfig(f"{key} = {value!r} ({source}) is not {kind}", hint=f"the default is {default!r}") from None
    _check_limits(key, converted, known[name].metadata, source)
    return converted


def _convert(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; words are read as the type that is wanted, never the other way."""
    if isinstance(default, bool):
        return _to_bool(value)
    if isinstance(default, tuple):
        return _to_words(value)
    if isinstance(default, int):
        return _to_int(value)
    if isinstance(default, float):
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _to_words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(str(word) for word in value if word != "none")


def _to_bool(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise TypeError


def _to_int(value: Any) -> int:
    """Digits are taken as they are; only a form such as 1e6 goes by way of a float."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdecimal()):
        return int(value)
    if not float(value).is_integer():
        raise ValueError
    return int(float(value))


def _check_limits(key: str, value: Any, limits: Mapping[str, Any], source: str) -> None:
    if limits.get("one_of") and value not in limits["one_of"]:
        raise BadConfig(f"{key} = {value!r} ({source})", hint=f"it can be one of: {', '.join(limits['one_of'])}")
    least, most = limits.get("least"), limits.get("most")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadConfig(f"{key} = {value!r} ({source}) is not a finite number")
    if (least is not None and value < least) or (most is not None and value > most):
        raise BadConfig(f"{key} = {value!r} ({source})", hint=f"it must be {_range_words(least, most)}")


def _range_words(least: float | None, most: float | None) -> str:
    return f"at least {least}" if most is None else f"between {least} and {most}"


def _check_together(settings: Settings) -> None:
    _check_shares(settings)
    store, target = settings.backup.store, settings.backup.target
    expanded(store)
    if "://" in store:
        raise BadConfig(
            f"backup.store = {store!r} ({settings.sources.get('backup.store')}) is a URL, not a folder",
            hint="backups are kept in a folder; backup.target is where each scheduled one is copied to",
        )
    if target != NO_TARGET and "://" not in target:
        raise BadConfig(
            f"backup.target = {target!r} ({settings.sources.get('backup.target')}) is not a URL",
            hint="a folder is file:///path; where backups are kept is backup.store",
        )


def _check_shares(settings: Settings) -> None:
    """Every process must train the same number of rows of every step, and a device the same number at once."""
    batch, at_once = settings.train.batch_size, settings.train.per_device_train_batch_size or 1
    processes = settings.worker.processes
    if batch % (at_once * processes):
        by = f"train.per_device_train_batch_size = {at_once}" if at_once > 1 else ""
        by += " x " if by and processes > 1 else ""
        by += f"worker.processes = {processes}" if processes > 1 else ""
        raise BadConfig(
            f"train.batch_size = {batch} is not a multiple of {by}",
            hint=f"every step must train exactly batch_size rows: make {batch} a multiple, or lower the other",
        )


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'nothing yet'}"


def check_model(settings: Settings, lineage: Lineage, home: Path) -> None:
    """BadConfig when the settings name another base model, or optimizer, than the current model was grown with."""
    given, wanted = settings.sources.get("model.base_model"), settings.model.base_model
    if given and is_other_base(settings, lineage, home):
        raise BadConfig(
            f"base_model is {wanted} ({given}), but the current model grew from {lineage.base_model}",
            hint="to begin anew: `daemon.py reset`; to go on: take base_model back",
        )
    check_optim(settings, lineage)


def is_other_base(settings: Settings, lineage: Lineage, home: Path) -> bool:
    """Whether a model that begins by these settings begins from another base model than this one did."""
    grown, wanted = lineage.base_model, settings.model.base_model
    return wanted not in (grown, unpinned(grown)) and os.path.abspath(home / wanted) != grown  # noqa: PTH100


def check_optim(settings: Settings, lineage: Lineage) -> None:
    """BadConfig when the optimizer of the settings cannot go on from the state that is beside the weights."""
    optim, source = settings.train.optim, settings.sources.get("train.optim", "default")
    if lineage.optim and _same_moments(optim) != _same_moments(lineage.optim):
        raise BadConfig(
            f"optim is {optim} ({source}), but the current model was trained by {lineage.optim}, whose state that"
            " cannot go on from",
            hint=f'to go on: optim = "{lineage.optim}" below [train]; to begin anew: `daemon.py reset`',
        )


def _same_moments(optim: str) -> str:
    """A fused optimizer is the same one, computed in fewer steps."""
    return optim.removesuffix("_fused")


def changes(old: Settings, new: Settings) -> list[str]:
    """What differs, as "train.learning_rate 2e-05 -> 1e-05", for the log."""
    return [
        f"{name}.{f.name} {getattr(getattr(old, name), f.name)!r} -> {getattr(getattr(new, name), f.name)!r}"
        for name in SECTIONS
        for f in dataclasses.fields(getattr(old, name))
        if getattr(getattr(old, name), f.name) != getattr(getattr(new, name), f.name)
    ]
