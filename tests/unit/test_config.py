from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from longrun import config
from longrun.config import REFUSED, SECTIONS, Settings
from longrun.errors import BadConfig
from longrun.lineage import Lineage
from tests.unit.builders import RECIPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longrun.home import Home


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """config.load of a longrun.toml with this text, in an environment without other settings."""
    for name in [name for name in os.environ if name.startswith("LONGRUN_")]:
        monkeypatch.delenv(name)

    def load(text: str = "", *, flags: dict[str, Any] | None = None, **environment: str) -> Settings:
        (tmp_path / "longrun.toml").write_text(text)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return config.load(tmp_path / "longrun.toml", flags=flags)

    return load


def test_everything_has_a_default_that_is_valid(load: Callable[..., Settings]) -> None:
    settings = load()
    assert settings == Settings()
    assert settings.recipe == RECIPE
    assert settings.sources == {}
    everything = "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in vars(section()).items())
        for name, section in SECTIONS.items()
    )
    assert load(everything) == settings


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)


def test_a_missing_file_is_all_defaults(tmp_path: Path) -> None:
    assert config.load(tmp_path / "longrun.toml").train.batch_size == 8


def test_flags_come_before_the_environment_before_the_file(load: Callable[..., Settings]) -> None:
    text = "[train]\nseed = 1\nbatch_size = 16\n[log]\nformat = 'json'"
    settings = load(text, LONGRUN_TRAIN_SEED="2", LONGRUN_LOG_FORMAT="json", flags={"log.format": "text"})
    assert (settings.train.batch_size, settings.train.seed, settings.log.format) == (16, 2, "text")
    assert settings.sources == {"train.batch_size": "longrun.toml", "train.seed": "environment", "log.format": "flag"}


def test_a_flag_that_was_not_given_changes_nothing(load: Callable[..., Settings]) -> None:
    assert load("[log]\nformat = 'json'", flags={"log.format": None}).log.format == "json"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate = '2e-5'", 2e-5),  # as people write it in YAML
        ("learning_rate = 1", 1.0),
        ("num_train_epochs = '3'", 3),
        ("num_train_epochs = 3.0", 3),
        ("save_steps = '1e3'", 1000),
        ("seed = '9007199254740993'", 9007199254740993),  # 2^53 + 1: no float on the way
        ("gradient_checkpointing = 'yes'", True),
        ("gradient_checkpointing = '0'", False),
        ("report_to = 'tensorboard, wandb'", ("tensorboard", "wandb")),
        ("report_to = ['wandb']", ("wandb",)),
        ("report_to = 'none'", ()),
        ("report_to = []", ()),
    ],
)
def test_a_value_is_read_as_the_type_that_is_wanted(load: Callable[..., Settings], line: str, value: object) -> None:
    found = getattr(load(f"[train]\n{line}").train, line.partition(" ")[0])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate = true",
        "learning_rate = 'fast'",
        "learning_rate = nan",
        "max_grad_norm = inf",
        f"learning_rate = 1{'0' * 400}",
        "num_train_epochs = 1.5",
        "num_train_epochs = true",
        "num_train_epochs = inf",
        "num_train_epochs = nan",
        "num_train_epochs = [1]",
        "seed = ''",
        "gradient_checkpointing = 1",
        "gradient_checkpointing = 'perhaps'",
        "report_to = 5",
        "report_to = { a = 1 }",
        "optim = 5",
        "optim = ''",
    ],
)
def test_a_value_of_another_type_is_refused_by_name(load: Callable[..., Settings], line: str) -> None:
    with pytest.raises(BadConfig, match=rf"^train\.{line.partition(' ')[0]} = .*\(longrun.toml\) is not "):
        load(f"[train]\n{line}")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("[train]\nlearning_rate = 0", "between 1e-12 and 10"),
        ("[train]\nlearning_rate = 11", "between 1e-12 and 10"),
        ("[train]\nbatch_size = 0", "at least 1"),
        ("[train]\nsave_total_limit = 1", "at least 2"),
        ("[train]\nmax_length = 1", "at least 2"),
        ("[inbox]\non_bad_row = 'keep'", "reject, skip"),
        ("[model]\ndtype = 'float16'", "auto, float32, bfloat16"),
        ("[log]\nformat = 'xml'", "text, json"),
    ],
)
def test_a_value_out_of_range_is_told_what_is_right(load: Callable[..., Settings], text: str, right: str) -> None:
    with pytest.raises(BadConfig, match=right):
        load(text)


def test_an_unknown_setting_is_told_the_nearest_name(load: Callable[..., Settings]) -> None:
    with pytest.raises(BadConfig, match=r"unknown setting train.lerning_rate .* did you mean learning_rate\?"):
        load("[train]\nlerning_rate = 1")
    with pytest.raises(BadConfig, match=r"unknown section or loose setting: trian; did you mean train\?"):
        load("[trian]\nseed = 1")
    with pytest.raises(BadConfig, match=r"unknown setting log.zzzzzz .* known: format, progress_s"):
        load("[log]\nzzzzzz = 1")
    with pytest.raises(BadConfig, match="known: "):
        load("[qqqqqqqq]")


def test_an_unknown_name_in_the_environment_is_an_error(load: Callable[..., Settings]) -> None:
    with pytest.raises(BadConfig, match=r"unknown setting train.typo \(environment\)"):
        load(LONGRUN_TRAIN_TYPO="1")


def test_other_programs_may_use_the_environment(load: Callable[..., Settings]) -> None:
    assert load(LONGRUN_HOME="/x", LONGRUN_PROBE="/y", TRAIN_SEED="7", LONGRUNTRAIN_SEED="7") == Settings()


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_break_the_plan_is_refused_with_the_reason(
    load: Callable[..., Settings], name: str
) -> None:
    with pytest.raises(BadConfig) as refused:
        load(f"[train]\n{name} = 1")
    assert str(refused.value) == f"{name} (longrun.toml) is not a setting: {REFUSED[name]}"


@pytest.mark.parametrize("text", ["[train", "train = 5", "\x00", "[train]\nseed = 1\nseed = 2"])
def test_a_file_that_is_no_settings_is_refused(load: Callable[..., Settings], text: str) -> None:
    with pytest.raises(BadConfig, match=r"longrun.toml"):
        load(text)


def test_a_settings_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "longrun.toml").mkdir()
    with pytest.raises(BadConfig, match="Is a directory"):
        config.load(tmp_path / "longrun.toml")
    (tmp_path / "other.toml").write_bytes(b"# \xff")
    with pytest.raises(BadConfig, match="utf-8"):
        config.load(tmp_path / "other.toml")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "longrun.toml").write_bytes(b"\xef\xbb\xbf[train]\nseed = 5\n")
    assert config.load(tmp_path / "longrun.toml").train.seed == 5


def test_the_batch_must_be_a_multiple_of_what_a_device_takes(load: Callable[..., Settings]) -> None:
    assert load("[train]\nbatch_size = 12\nper_device_train_batch_size = 4").train.per_device_train_batch_size == 4
    with pytest.raises(BadConfig, match=r"train.batch_size = 8 is not a multiple"):
        load("[train]\nper_device_train_batch_size = 3")


def test_a_base_model_folder_is_found_from_here_and_from_the_home(
    load: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home-model").mkdir()
    (tmp_path / "cwd" / "here-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    assert load("[model]\nbase_model = 'home-model'").model.base_model == str(tmp_path / "home-model")
    assert load("[model]\nbase_model = 'here-model'").model.base_model == str(tmp_path / "cwd" / "here-model")
    assert load("[model]\nbase_model = 'org/hub-name'").model.base_model == "org/hub-name"


def test_a_folder_named_tiny_is_not_taken_for_the_built_in_model(load: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert load().model.base_model == "tiny"


def test_a_model_grows_on_only_from_its_own_base(load: Callable[..., Settings], tmp_path: Path) -> None:
    def check(settings: Settings, grown: str) -> None:
        config.check_model(settings, Lineage(lineage="one", base_model=grown), tmp_path)

    check(load(), "org/other")  # nothing was asked for
    check(load("[model]\nbase_model = 'org/name'"), "org/name@0123abc")
    check(load("[model]\nbase_model = 'gone/base'"), f"{tmp_path}/gone/base")  # it was a folder in the home
    with pytest.raises(
        BadConfig, match=r"base_model is org/name .* grew from org/other; to begin anew: `daemon.py reset`"
    ):
        check(load("[model]\nbase_model = 'org/name'"), "org/other")


@pytest.mark.parametrize(
    ("was", "wanted"),
    [("adamw_torch", "adamw_torch_fused"), ("adamw_torch_fused", "adamw_torch"), ("sgd", "sgd"), ("", "adafactor")],
)
def test_an_optimizer_goes_on_from_its_own_state(
    load: Callable[..., Settings], tmp_path: Path, was: str, wanted: str
) -> None:
    lineage = Lineage(lineage="one", base_model="tiny", optim=was)
    config.check_model(load(f"[train]\noptim = '{wanted}'"), lineage, tmp_path)


@pytest.mark.parametrize(("was", "wanted"), [("adamw_torch_fused", "adafactor"), ("adafactor", None)])
def test_an_optimizer_does_not_go_on_from_the_state_of_another(
    load: Callable[..., Settings], tmp_path: Path, was: str, wanted: str | None
) -> None:
    lineage = Lineage(lineage="one", base_model="tiny", optim=was)
    settings = load(f"[train]\noptim = '{wanted}'" if wanted else "")
    with pytest.raises(BadConfig, match=rf"optim is .* was trained by {was}.*; to go on: optim = \"{was}\" below"):
        config.check_model(settings, lineage, tmp_path)


def test_changes_are_told_by_name(load: Callable[..., Settings]) -> None:
    assert config.changes(load(), load()) == []
    assert config.changes(load(), load("[train]\nlearning_rate = 1e-5")) == ["train.learning_rate 2e-05 -> 1e-05"]


def test_a_setting_outside_its_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "longrun.toml").write_text("learning_rate = 1e-4\n")
    with pytest.raises(BadConfig, match=r"learning_rate; write it below \[train\]"):
        config.load(tmp_path / "longrun.toml")


@pytest.mark.parametrize("store", ["s3://bucket/folder", "file:///mnt/nas"])
def test_backups_are_kept_in_a_folder(home: Home, store: str) -> None:
    home.settings.write_text(f'[backup]\nstore = "{store}"\n')
    with pytest.raises(
        BadConfig, match=r"is a URL, not a folder; backups are kept in a folder; backup.target is where"
    ):
        config.load(home.settings)


@pytest.mark.parametrize("setting", ['[model]\nbase_model = "~no-such-user/m"', '[backup]\nstore = "~no-such-user/b"'])
def test_the_home_of_nobody_is_told(home: Home, setting: str) -> None:
    home.settings.write_text(setting)
    with pytest.raises(BadConfig, match=r"cannot use ~no-such-user/.: there is no user of that name here"):
        config.load(home.settings)


@pytest.mark.parametrize("name", ["x" * 300, "/proc/1/cwd/x/y/m"])
def test_a_base_model_that_may_not_be_looked_at_is_left_to_who_loads_it(home: Home, name: str) -> None:
    home.settings.write_text(f'[model]\nbase_model = "{name}"')
    assert config.load(home.settings).model.base_model == name


def test_settings_nested_without_end_are_told(home: Home) -> None:
    home.settings.write_text(f"train = {'[' * 100_000}")
    with pytest.raises(BadConfig, match=r"cannot read .*longrun.toml"):
        config.load(home.settings)


def test_a_backup_target_is_a_url(home: Home) -> None:
    home.settings.write_text('[backup]\ntarget = "/mnt/nas"\n')
    with pytest.raises(BadConfig, match=r"backup.target = '/mnt/nas' .* is not a URL; a folder is file:///path"):
        config.load(home.settings)


@pytest.mark.parametrize(("store", "folder"), [("backups", "HOME/backups"), ("/mnt/x", "/mnt/x"), ("~/x", "/user/x")])
def test_backups_are_kept_where_the_settings_say(
    home: Home, monkeypatch: pytest.MonkeyPatch, store: str, folder: str
) -> None:
    monkeypatch.setenv("HOME", "/user")
    settings = config.BackupSettings(store=store)
    assert str(settings.folder(home.root)) == folder.replace("HOME", str(home.root))
