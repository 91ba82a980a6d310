"""What a run will use: defaults < the saved run < a preset named now < flags. No torch."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mypt_fast import presets, publish
from mypt_fast.config import ARCHITECTURE_KEYS, ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.schema import build, field_names, opt, shown

BUNDLE_HINTS = ("config.json", "model.pt")
STATE_FILE = "training_state.json"
# Single-file checkpoints, where there is no bundle (MyPT specification 5.2).
RESUME_FILES, INIT_FILES = ("latest.pt",), ("final.pt",)
# What a new run may have otherwise than the model it starts from: its weights stay what they are.
CONTEXT_KEYS = ("block_size", "rope_theta", "rope_scale")


@dataclass(kw_only=True)
class DataConfig:
    """Where a run's text comes from. One of `dataset_dir` and `input_file`."""

    dataset_dir: str | None = opt(None, "dataset made by `mypt-fast prepare`")
    input_file: str | None = opt(None, "train on this text file directly; its last 10% validates")
    tokenization: str | None = opt(
        None, "tokens of --input_file and of the demo corpus", choices=("gpt2", "char")
    )
    verify_data: str = opt(
        "open",
        "what is compared with its hash before training; open: headers and indexes; full: all; "
        "skip: all, and damaged shards are left out",
        choices=("open", "full", "skip"),
    )
    eval_dataset_dir: str | None = opt(None, "a further validation set, logged as eval_general")


@dataclass(frozen=True)
class OldRun:
    """What an old checkpoint says about a run, read by `checkpoint.legacy.old_run`."""

    config: dict[str, Any]  # with `per_head_era`, where the weights need it
    state: dict[str, Any]  # of training_state.json
    tokenizer: dict[str, Any] | None
    file: Path | None = None  # where it is a single file; None: a bundle in the old layout


# place, single files to look for -> what is there, or None where there is nothing old
ReadOld = Callable[[Path, tuple[str, ...]], OldRun | None]


@dataclass
class Settings:
    """The resolved settings of a run and how they came about."""

    model_name: str
    run_dir: Path
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    resume: bool = False
    saved_state: dict[str, Any] = field(default_factory=dict)  # training_state.json
    preset_path: Path | None = None
    typed: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)
    init_dir: Path | None = None  # the bundle a new run takes its weights from
    allow_gate: bool = False  # whether the external gate's script may run
    strict_compat: bool = False  # do as MyPT does where its documents say otherwise
    legacy_file: Path | None = None  # the single file a run is resumed from
    old_layout: bool = False  # the run directory's bundle is of the per-head era
    tokenizer: dict[str, Any] | None = None  # of an old checkpoint; else tokenizer.json has it

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.model.batch_size * self.train.grad_accum_steps


def resolve(
    typed: dict[str, Any],
    *,
    model_name: str | None = None,
    config_file: str | None = None,
    checkpoints: Path = Path("checkpoints"),
    strict: bool = False,
    allow_gate: bool = False,
    strict_compat: bool = False,
    preset_yields: bool = False,
    read_old: ReadOld | None = None,
) -> Settings:
    """Merge every source of settings.

    Args:
        typed: flags the user typed, by field name.
        model_name: run name; default: the preset's stem, else "default".
        config_file: preset path or name.
        checkpoints: folder of run directories.
        strict: make an ignored architecture flag an error.
        allow_gate: let the external gate's script run. No file can say this.
        strict_compat: do as MyPT does where its documents say otherwise.
        preset_yields: continue a run whatever architecture the preset names, as train.py does.
        read_old: reads checkpoints of older layouts (`checkpoint.legacy.old_run`); without it
            only bundles in today's are found.

    Raises:
        ConfigError: with one line, on anything that does not fit.
    """
    # an empty word is an unset shell variable: never the same as not given
    words = {**typed, "model_name": model_name, "config_file": config_file}
    for key in (k for k, v in words.items() if v == ""):
        raise ConfigError(f"--{key} is empty", cure="give it a value, or drop the flag")
    preset = presets.load(config_file) if config_file else None
    run_dir = _run_dir(model_name, preset, checkpoints)
    name = run_dir.name
    flags = {section: _pick(typed, section) for section in (ModelConfig, TrainConfig, DataConfig)}
    for section, values in flags.items():
        build(section, values, "command line")
    saved_config, saved_state = _saved(run_dir)
    old = read_old(run_dir, RESUME_FILES) if read_old else None
    if old is not None:
        saved_config, saved_state = old.config, old.state
    out = Settings(
        name, run_dir, ModelConfig(), TrainConfig(), DataConfig(), typed=frozenset(typed)
    )
    out.resume, out.saved_state = saved_config is not None, saved_state
    out.preset_path = preset.path if preset else None
    out.allow_gate, out.strict_compat = allow_gate, strict_compat
    if old is not None:
        out.legacy_file, out.old_layout, out.tokenizer = old.file, old.file is None, old.tokenizer
        if old.file:
            out.notices.append(f"continuing {old.file}; the next save writes a bundle beside it")
    wanted = flags[TrainConfig].get("init_from_model") or (preset and preset.train.init_from_model)
    if wanted and not out.resume:
        out.init_dir, old = _source(wanted, checkpoints, read_old)
        out.tokenizer = old.tokenizer if old else None
        out.model = _model_of_source(
            flags[ModelConfig], preset, out.init_dir, old, strict, out.notices
        )
    else:
        out.model = _model(
            flags[ModelConfig], preset, saved_config, run_dir, strict, out.notices, preset_yields
        )
    saved_run = _known(saved_state.get("training_config"), TrainConfig)
    if name != (saved_state.get("training_config") or {}).get("model_name", name):
        for key in (
            "log_file",
            "terminal_log_file",
            "tensorboard",
        ):  # a gold directory is a run of its own
            saved_run.pop(key, None)
    from_preset = _given(preset, preset.train) if preset else {}
    merged = {**saved_run, **from_preset, **flags[TrainConfig]}
    began = saved_run.get("init_from_model")
    path = Path(str(began))
    names = [str(path), path.name]
    if path.suffix == ".pt":  # a single file was found by its run's name or directory
        names += [str(path.parent), path.parent.name]
    if out.resume and wanted and wanted not in names:
        out.notices.append(f"init_from_model {wanted} is ignored: {run_dir} goes on from itself")
    start = str(out.init_dir) if out.init_dir else None
    merged["init_from_model"] = began if out.resume else start
    # flags and preset were checked above: what is wrong from here on came from the saved run
    out.train = build(TrainConfig, merged, str(run_dir / STATE_FILE) if saved_run else "settings")
    out.data = _data(flags[DataConfig], saved_state)
    out.model.check("settings")
    out.train.check("settings")
    return out


def run_dir(
    model_name: str | None, config_file: str | None, checkpoints: Path = Path("checkpoints")
) -> Path:
    """The directory of the run that `resolve` would settle; raises ConfigError as it does."""
    preset = presets.load(config_file) if config_file and not model_name else None
    return _run_dir(model_name, preset, checkpoints)


def _run_dir(model_name: str | None, preset: presets.Preset | None, checkpoints: Path) -> Path:
    name = model_name or (preset.path.stem if preset else "default")
    if not _is_plain(name):
        cure = "it becomes a folder of checkpoints/"
        raise ConfigError("--model_name is a plain name", f"found {shown(name)}", cure)
    return checkpoints / name


def _is_plain(name: str) -> bool:
    """A folder name that hides nothing and leads nowhere else."""
    ends_well = name == name.strip() and not name.startswith(".")  # .name is a run's snapshot
    return bool(name) and ends_well and name.isprintable() and not set(name) & set("/\\")


def _pick(typed: dict[str, Any], section: type) -> dict[str, Any]:
    names = set(field_names(section))
    return {k: v for k, v in typed.items() if k in names}


def _saved(run_dir: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return config.json and training_state.json of an existing run, or (None, {}).

    A save that died between two renames is finished first, and what is left of a checkpoint is
    refused: a new run would write over it.
    """
    if run_dir.parent.is_dir():
        publish.clean_stale(run_dir)
    missing = [n for n in BUNDLE_HINTS if not (run_dir / n).is_file()]
    remains = [n for n in ("model.pt", "optimizer.pt", STATE_FILE) if (run_dir / n).is_file()]
    if missing and remains:
        raise ConfigError(
            f"{run_dir} holds a part of a checkpoint",
            f"{remains[0]} without {missing[0]}",
            "restore the file, or move the folder away to start anew",
        )
    if missing:
        return None, {}
    config = presets.read_json(run_dir / "config.json")
    state_path = run_dir / STATE_FILE
    state = presets.read_json(state_path) if state_path.is_file() else {}
    for path, content in ((run_dir / "config.json", config), (state_path, state)):
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a JSON object", f"found {type(content).__name__}")
    step = state.get("step")
    if step is not None and (type(step) is not int or step < 0):
        raise ConfigError(f"{state_path}: step: expected a whole number", f"found {shown(step)}")
    if not isinstance(state.get("training_config") or {}, dict):
        found = f"found {shown(state['training_config'])}"
        raise ConfigError(f"{state_path}: training_config: expected an object", found)
    return config, state


def _known(raw: object, section: type) -> dict[str, Any]:
    """Keep a file's known keys: bundles carry other programs' keys too."""
    if not isinstance(raw, dict):
        return {}
    kept = {}
    for f in (f for f in dataclasses.fields(section) if f.name in raw):
        value, kinds = raw[f.name], (f.type, *typing.get_args(f.type))
        nested = next((k for k in kinds if dataclasses.is_dataclass(k)), None)
        if nested is None:
            kept[f.name] = value
        elif typing.get_origin(f.type) is tuple:  # the phases of a curriculum
            items = value if isinstance(value, list) else []
            kept[f.name] = [_known(item, nested) for item in items]  # type: ignore[arg-type]
        elif isinstance(value, dict):  # else MyPT takes its defaults, and so do we
            # MyPT keeps its saturation state among the saturation settings: read the settings
            kept[f.name] = _known(value, nested)  # type: ignore[arg-type]
    return kept


def _given(preset: presets.Preset, section: Any) -> dict[str, Any]:
    values = dataclasses.asdict(section)
    return {k: v for k, v in _listed(values).items() if k in preset.given}


def _listed(value: Any) -> Any:
    """JSON has lists where a dataclass has tuples."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _model(
    flags: dict[str, Any],
    preset: presets.Preset | None,
    saved: dict[str, Any] | None,
    run_dir: Path,
    strict: bool,
    notices: list[str],
    preset_yields: bool,
) -> ModelConfig:
    from_preset = _given(preset, preset.model) if preset else {}
    if saved is None:
        base, source = from_preset, str(preset.path) if preset else ""
    else:
        base, source = _known(saved, ModelConfig), str(run_dir)
        _refuse_conflict(base, preset, run_dir, notices if preset_yields else None)
        base |= {k: v for k, v in from_preset.items() if k not in ARCHITECTURE_KEYS}
    if source:
        known = build(ModelConfig, base, source)
        known.check(source)
        for key in ARCHITECTURE_KEYS:
            if key in flags and flags[key] != getattr(known, key):
                text = f"--{key} {flags[key]} is ignored: {source} has {getattr(known, key)}"
                if saved is not None and key in CONTEXT_KEYS:
                    text += "; another context needs a new run, with --init_from_model"
                if strict:
                    raise ConfigError(text, cure="drop the flag, or --strict")
                notices.append(text)
        flags = {k: v for k, v in flags.items() if k not in ARCHITECTURE_KEYS}
    return build(ModelConfig, {**base, **flags}, source or "command line")


def _source(name: str, checkpoints: Path, read_old: ReadOld | None) -> tuple[Path, OldRun | None]:
    """Find what --init_from_model names: a run, a directory or an old single file."""
    for path in (checkpoints / name, Path(name)):
        if all((path / n).is_file() for n in (*BUNDLE_HINTS, "tokenizer.json")):
            return path, read_old(path, INIT_FILES) if read_old else None
    for path in (checkpoints / name, Path(name)):
        old = read_old(path, INIT_FILES) if read_old else None
        if old and old.file:
            return old.file, old
    for path in (checkpoints / name, Path(name)):
        missing = [n for n in (*BUNDLE_HINTS, "tokenizer.json") if not (path / n).is_file()]
        if path.is_dir():
            raise ConfigError(
                f"--init_from_model {name}", f"{path} has no {missing[0]}", "name a checkpoint"
            )
    raise ConfigError(
        f"--init_from_model {name}", f"nothing in {checkpoints / name}", "check the name"
    )


def _model_of_source(
    flags: dict[str, Any],
    preset: presets.Preset | None,
    source: Path,
    old: OldRun | None,
    strict: bool,
    notices: list[str],
) -> ModelConfig:
    """The source's architecture with everything else as given for the new run."""
    where = str(source) if old and old.file else f"{source}/config.json"
    raw = old.config if old else presets.read_json(source / "config.json")
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a JSON object", f"found {type(raw).__name__}")
    theirs = build(ModelConfig, _known(raw, ModelConfig), where)
    theirs.check(where)
    ours = {**(_given(preset, preset.model) if preset else {}), **flags}
    if "vocab_size" not in flags:  # a preset's is a padded guess: the tokenizer decides
        ours.pop("vocab_size", None)
    changed = [k for k in ARCHITECTURE_KEYS if k in ours and ours[k] != getattr(theirs, k)]
    ignored = [k for k in changed if k not in CONTEXT_KEYS]
    if ignored:
        found = ", ".join(f"{k} {getattr(theirs, k)}, not {ours[k]}" for k in ignored)
        text = f"the architecture is that of {source}: {found}"
        if strict:
            raise ConfigError(text, cure="drop what differs, or --strict")
        notices.append(text)
    notices += [
        f"{k} is {ours[k]}, where {source} has {getattr(theirs, k)}"
        for k in changed if k in CONTEXT_KEYS
    ]  # fmt: skip
    kept = {k: getattr(theirs, k) for k in ARCHITECTURE_KEYS if k not in ours or k in ignored}
    return build(ModelConfig, {**ours, **kept}, where)


def _refuse_conflict(
    saved: dict[str, Any], preset: presets.Preset | None, run_dir: Path, notices: list[str] | None
) -> None:
    """A preset that names another architecture than the run's is a mistake, not a wish.

    With `notices` it is that all the same, but the run goes on, and they tell.
    """
    if preset is None:
        return
    defaults = ModelConfig()
    for key in ARCHITECTURE_KEYS:
        ours = saved.get(key, getattr(defaults, key))
        theirs = getattr(preset.model, key)
        # the tokenizer decides the vocabulary, and no preset knows of the per-head era
        if key not in ("vocab_size", "per_head_era") and ours != theirs:
            if notices is not None:
                notices.append(f"{run_dir} goes on with {key} {ours}: {preset.path} has {theirs}")
                continue
            raise ConfigError(
                f"{run_dir} cannot continue with {preset.path}",
                f"{key} is {ours} in the run and {theirs} in the preset",
                "drop --config to continue the run, or start another with --model_name",
            )


def _data(flags: dict[str, Any], state: dict[str, Any]) -> DataConfig:
    saved = _known(state.get("training_config"), DataConfig)
    if flags.get("dataset_dir") and flags.get("input_file"):
        raise ConfigError("--dataset_dir and --input_file are both given", cure="name one source")
    if flags.get("dataset_dir") or flags.get("input_file"):
        saved = {k: v for k, v in saved.items() if k not in ("dataset_dir", "input_file")}
    return build(DataConfig, {**saved, **flags}, "settings")
