"""Every setting of a run: names, types, ranges and help in one place.

A field's name is its JSON key and its flag. The JSON of a preset is one flat object; the sections
below say who owns a key, and `curriculum`, `gold_selection` and `token_accuracy_saturation` nest.
Standard library only: a wrong key is reported before torch is imported.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mypt_fast.errors import ConfigError
from mypt_fast.schema import arch, build, field_names, opt, shown, typed, unknown_key

MOST_STEPS = 1 << 40  # of a run
DTYPE_NAMES = ("fp32", "float32", "bf16", "bfloat16", "fp16", "float16")


@dataclass(kw_only=True)
class ModelConfig:
    """MyPT's GPTConfig: the fields of `config.json`, in its key order (MyPT specification 1.2)."""

    batch_size: int = opt(32, "sequences per micro-step before accumulation", lo=1, hi=1 << 20)
    block_size: int = arch(256, "context length in tokens", lo=1, hi=1 << 20)
    vocab_size: int = arch(
        50304, "rows of the embedding; set by the tokenizer for char", lo=1, hi=1 << 24
    )
    n_embd: int = arch(384, "width of the residual stream", lo=1, hi=1 << 16)
    n_head: int = arch(6, "attention heads; must divide n_embd", lo=1, hi=4096)
    n_layer: int = arch(6, "transformer blocks", lo=1, hi=1024)
    dropout: float = opt(
        0.2, "probability of dropping an activation in training", lo=0.0, below=1.0
    )
    bias: bool = arch(False, "biases in the attention projections")
    use_checkpoint: bool = opt(False, "same as --recompute block; --recompute wins")
    device: str | None = opt(None, "cpu, cuda or cuda:N; default: the GPU where there is one")
    use_loss_mask: bool = opt(False, "weigh the loss by the dataset's masks")
    tie_weights: bool = arch(False, "share the embedding and the output matrix")
    save_dtype: str | None = opt(None, "dtype of the weights in saved bundles", choices=DTYPE_NAMES)
    pos_encoding: str = arch("learned", "position encoding", choices=("learned", "rope"))
    mlp_type: str = arch("gelu", "feed-forward kind", choices=("gelu", "swiglu"))
    norm_type: str = arch("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    rope_theta: float = arch(10000.0, "base of the rotary frequencies", above=0.0)
    rope_scale: float = arch(1.0, "positions are divided by this before rotation", above=0.0)
    segment_position_reset: bool = opt(True, "restart positions at each packed segment")
    neftune_alpha: float = opt(
        0.0, "scale of the noise on embeddings in training; 0 is off", lo=0.0
    )
    batch_sampling_mode: str = opt("epoch", "order of episodes", choices=("epoch", "random"))
    pad_token_id: int | None = opt(None, "padding id of episode datasets", lo=0)
    episode_min_tokens: int = opt(2, "shorter episodes are skipped", lo=1)
    epoch_seed: int = opt(1337, "seed of the episode order", lo=0)
    epoch_shuffle: bool = opt(True, "shuffle the episodes of each epoch")
    epoch_drop_last: bool = opt(True, "kept for MyPT; reads as a no-op there too")
    # Not one of MyPT's fields: what weights of 2025 need beside them (`checkpoint/eras.py`).
    per_head_era: bool = arch(
        False, "ReLU, and a bias in the attention's output whatever `bias` says", flag=False
    )

    def check(self, where: str = "config") -> None:
        """Check what single ranges cannot; raises ConfigError."""
        if self.n_embd % self.n_head:
            near = [h for h in range(1, min(self.n_embd, 4096) + 1) if self.n_embd % h == 0]
            best = min(near, key=lambda h: abs(h - self.n_head))
            raise ConfigError(
                f"{where}: n_embd must be divisible by n_head",
                f"found n_embd={self.n_embd}, n_head={self.n_head}",
                f"the nearest n_head that divides is {best}",
            )
        if self.pos_encoding == "rope" and (self.n_embd // self.n_head) % 2:
            raise ConfigError(
                f"{where}: pos_encoding=rope rotates pairs, so n_embd/n_head must be even",
                f"found {self.n_embd}/{self.n_head} = {self.n_embd // self.n_head}",
                "change n_head or n_embd, or use pos_encoding=learned",
            )
        for key in ("pos_encoding", "mlp_type", "norm_type"):
            first, *later = type(self).__dataclass_fields__[key].metadata["choices"]
            if self.per_head_era and getattr(self, key) in later:
                raise ConfigError(
                    f"{where}: per_head_era knows {key}={first} only",
                    f"found {getattr(self, key)}",
                    "drop one of the two",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return MyPT's 26 fields in its order, and `per_head_era` behind them where it is set."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not self.per_head_era:
            del fields["per_head_era"]
        return fields


@dataclass(kw_only=True)
class CurriculumPhase:
    """One dataset for a span of steps."""

    name: str = opt("", "name shown in the log")
    dataset_dir: str = opt("", "dataset of the phase")
    until_iter: int | None = opt(
        None, "first step that no longer belongs to it; null: the rest", lo=1
    )
    description: str | None = opt(None, "for people")


@dataclass(kw_only=True)
class Curriculum:
    """Phases in order; the last may be open-ended."""

    phases: tuple[CurriculumPhase, ...] = opt((), "the phases, in order")
    description: str | None = opt(None, "for people")


@dataclass(kw_only=True)
class GoldGuards:
    """What may keep a new validation minimum from becoming the gold checkpoint."""

    overfit_ratio: float = opt(5.0, "largest val/train loss ratio", above=0.0)
    consecutive_rises: int = opt(
        2, "rises of the val loss in a row before a dip is distrusted", lo=1
    )
    eval_regression: float = opt(0.20, "largest relative rise of any eval set", above=0.0)


@dataclass(kw_only=True)
class ExternalGate:
    """A script of the user's that judges a checkpoint; runs only where it is allowed to."""

    enabled: bool = opt(False, "ask the script")
    script: str | None = opt(None, "path of the script")
    args: tuple[str, ...] = opt((), "its arguments")
    timeout_s: float = opt(1200, "seconds it may take", above=0)
    run_interval_evals: int = opt(1, "every how many evaluations", lo=1)
    run_on_final_eval: bool = opt(True, "also at the end")
    metric_path: str | None = opt(None, "dotted path of the metric in its JSON")
    metric_goal: str = opt("max", "better is larger or smaller", choices=("max", "min"))
    pass_path: str = opt("gate_passed", "dotted path of its verdict")
    require_pass: bool = opt(False, "no gold without a pass")
    strict: bool = opt(False, "no gold when the script fails")


@dataclass(kw_only=True)
class GoldSelection:
    """How the best checkpoint of a run is chosen."""

    strategy: str = opt("val_loss", "rule", choices=("val_loss", "hybrid", "external_gate"))
    apply_loss_guards: bool = opt(True, "apply the three guards")
    guards: GoldGuards = field(default_factory=GoldGuards)
    external_gate: ExternalGate = field(default_factory=ExternalGate)


@dataclass(kw_only=True)
class Saturation:
    """When masked token accuracy has stopped improving (MyPT specification 4.5)."""

    enabled: bool | None = opt(None, "null: follow use_loss_mask")
    window: int = opt(4, "evaluations looked at", lo=2)
    min_steps_before_check: int = opt(200, "steps before the first check", lo=0)
    min_delta: float = opt(0.002, "smallest gain that counts", lo=0)
    gap_growth_threshold: float = opt(0.01, "train/val gap growth that counts", lo=0)
    action: str = opt("log", "MyPT only logs, whatever it says, and so does this")


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of the training run. Any of them may change when a run is resumed."""

    learning_rate: float = opt(3e-4, "peak learning rate", above=0.0, hi=10.0)
    max_iters: int = opt(1000, "optimizer steps in all", lo=0, hi=MOST_STEPS)
    warmup_iters: float = opt(
        0, "steps of linear warmup; between 0 and 1: a share of max_iters", lo=0, hi=MOST_STEPS
    )
    schedule: str = opt(
        "cosine", "learning rate after warmup", choices=("cosine", "constant", "wsd")
    )
    decay_fraction: float = opt(
        0.2, "wsd: share of max_iters spent decaying at the end", above=0.0, hi=1.0
    )
    min_lr_ratio: float = opt(0.1, "final learning rate as a share of the peak", lo=0.0, hi=1.0)
    weight_decay: float = opt(0.1, "AdamW decay of matrices", lo=0.0)
    grad_clip: float = opt(1.0, "largest gradient norm; 0 is off", lo=0.0)
    grad_accum_steps: int = opt(1, "batches per optimizer step", lo=1, hi=1 << 20)
    micro_batch_size: int = opt(
        0, "sequences per forward; 0: as planned, what fits memory", lo=0, hi=1 << 20
    )
    use_amp: bool = opt(True, "mixed precision where the device has it natively")
    amp_dtype: str = opt("bf16", "mixed precision dtype", choices=("bf16", "fp16"))
    plan: str = opt(
        "auto",
        "auto: on a GPU, state, recompute, chunk_rows and micro_batch_size that are not given are "
        "chosen as `mypt-fast plan` does; off: a new run is exact, makes nothing again, and takes "
        "a batch in one forward",
        choices=("auto", "off"),
    )
    tf32: bool = opt(
        False, "fp32 matmuls on a GPU may round their factors to TF32; else fp32 is fp32"
    )
    state: str = opt(
        "auto",
        "weights, gradients and moments; exact: fp32; exact16: weights as bf16 and a 16-bit rest "
        "of the same fp32 values; fast: that, bf16 gradients and 8-bit moments, not exact; "
        "auto: as planned, exact on a CPU",
        choices=("auto", "exact", "exact16", "fast"),
    )
    recompute: str = opt(
        "auto",
        "what the backward makes again to save memory; norms: norms and activations; mlp: the "
        "first matmul of the feed-forward, too; block: every block; offload: that, from residuals "
        "in host memory; auto: block with use_checkpoint, else as planned",
        choices=("auto", "none", "norms", "mlp", "block", "offload"),
    )
    chunk_rows: int = opt(0, "rows of logits at a time; 0: as planned", lo=0, hi=1 << 20)
    residual_dtype: str = opt(
        "auto",
        "residual stream under bf16 mixed precision; auto: bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16"),
    )
    compile: str = opt(
        "auto",
        "torch.compile; auto: on a GPU, and on a CPU where it pays back",
        choices=("auto", "on", "off"),
    )
    kernels: str = opt(
        "auto",
        "what runs the operators; auto: what is fastest on the device",
        choices=("auto", "triton", "reference", "inductor"),
    )
    attention: str = opt(
        "auto",
        "which of torch's attention kernels a GPU tries first; auto: the fastest, measured on this "
        "card; a resumed run keeps its own",
        choices=("auto", "flash", "cudnn", "efficient", "math"),
    )
    documents: str = opt(
        "auto",
        "concat: attention crosses document ends; mask: it does not; bestfit: rows are packed "
        "with documents, whole where they fit; auto: an episode a row where the dataset has "
        "episodes, else concat",
        choices=("auto", "concat", "mask", "bestfit"),
    )
    order: str = opt(
        "epoch",
        "windows of the training data; epoch: each once, shuffled; replacement: drawn at random; "
        "block: shuffled within a few large blocks, for slow disks; sequential: as they lie; "
        "mypt: drawn as MyPT does with that seed",
        choices=("epoch", "replacement", "block", "sequential", "mypt"),
    )
    seed: int = opt(1337, "seed of weights, data order and dropout", lo=0, hi=(1 << 63) - 1)
    eval_interval: int = opt(50, "steps between evaluations, each saved", lo=1, hi=MOST_STEPS)
    eval_iters: int = opt(200, "batches per evaluation", lo=1, hi=MOST_STEPS)
    eval_seed: int = opt(1337, "seed of the evaluation windows", lo=0, hi=(1 << 63) - 1)
    eval_prompts_file: str | None = opt(
        None, 'JSON {"prompts": {name: text}} that the model continues at each evaluation'
    )
    eval_max_new_tokens: int = opt(64, "tokens per such continuation", lo=1, hi=4096)
    save_interval: int = opt(
        0, "also save every N steps; 0: only at evaluations", lo=0, hi=MOST_STEPS
    )
    async_save: str = opt(
        "auto",
        "write saves beside the training, from a copy; auto: where memory has room for it",
        choices=("auto", "on", "off"),
    )
    keep_last: int = opt(1, "older states kept, hidden, to go back to when one is damaged", lo=0)
    log_file: str | None = opt(None, "JSONL log; default logs/train/<model_name>_eval.jsonl")
    terminal_log_file: str | None = opt(None, "also write the terminal output here")
    tensorboard: str | None = opt(None, "also write the log's events here, for TensorBoard")
    nonfinite_limit: int = opt(
        3,
        "steps in a row with a loss or gradient that is not finite before the run goes back to "
        "its last checkpoint and skips their data; each is skipped; 0: stop at the first",
        lo=0,
    )
    spike_action: str = opt(
        "log",
        "what a training loss far above the ones before it does, beside an event; skip: its step "
        "is not taken; rollback: back to the last checkpoint, and past its data",
        choices=("log", "skip", "rollback"),
    )
    init_from_model: str | None = opt(
        None, "start a new run from this one's weights: a run's name, or its directory"
    )
    gold_ci: bool = opt(
        False, "log how sure a new gold's lower loss is: a 95% interval over pairs of windows"
    )
    freeze_layers: int = opt(0, "blocks that are not trained, from the bottom", lo=0)
    freeze_embeddings: bool = opt(False, "do not train the embeddings")
    eval_sets: dict[str, str] | None = opt(
        None, "name: dataset_dir of further validation sets", flag=False
    )
    mixture: dict[str, float] | None = opt(
        None, "dataset_dir: share of the training windows that come from it", flag=False
    )
    curriculum: Curriculum | None = opt(None, "datasets by phase", flag=False)
    gold_selection: GoldSelection | None = opt(None, "how gold is chosen", flag=False)
    token_accuracy_saturation: Saturation | None = opt(None, "masked accuracy check", flag=False)

    def check(self, where: str = "config") -> None:
        """Check what single ranges cannot; raises ConfigError."""
        for name, folder in (self.eval_sets or {}).items():
            if name == "duration_s":  # the log's eval events have an eval_duration_s
                raise ConfigError(f"{where}: eval_sets: '{name}' is taken", cure="rename the set")
            if not name or not folder or not name.isprintable():
                raise ConfigError(
                    f"{where}: eval_sets maps a name to a dataset_dir",
                    f"found {shown(name)}: {shown(folder)}",
                )
        phases = self.curriculum.phases if self.curriculum else ()
        if self.curriculum and not phases:
            raise ConfigError(
                f"{where}: curriculum.phases is empty", cure="name a phase, or drop the curriculum"
            )
        ends = [p.until_iter for p in phases]
        for i, phase in enumerate(phases):
            key = f"{where}: curriculum.phases[{i}]"
            if not phase.dataset_dir:
                raise ConfigError(f"{key}.dataset_dir is missing", cure="name the phase's dataset")
            last = i == len(phases) - 1
            if ends[i] is None and not last:
                raise ConfigError(
                    f"{key}.until_iter: only the last phase may be open-ended",
                    "found null",
                    "give the step at which the next phase starts",
                )
            if i and ends[i] is not None and ends[i] <= (ends[i - 1] or 0):  # type: ignore[operator]
                raise ConfigError(
                    f"{key}.until_iter must grow from phase to phase",
                    f"found {ends[i]} after {ends[i - 1]}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, nested sections included."""
        return dataclasses.asdict(self)


ALIASES = {"save_every": "save_interval"}
DISPLAY_KEYS = ("name", "description")


ARCHITECTURE_KEYS = tuple(field_names(ModelConfig, "arch"))


def split_flat(raw: dict[str, Any], where: str) -> tuple[ModelConfig, TrainConfig, dict[str, str]]:
    """Build both sections from one flat preset object.

    Returns:
        The model section, the training section and the display strings.

    Raises:
        ConfigError: on an unknown key, a wrong type or a value out of range; one line with the
            key path, what was found and the nearest valid key or range.
    """
    sections: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    display: dict[str, str] = {}
    model_keys, train_keys = set(field_names(ModelConfig)), set(field_names(TrainConfig))
    for key, value in raw.items():
        name = ALIASES.get(key, key)
        if name != key and name in raw:
            raise ConfigError(f"{where}: '{key}' and '{name}' are one setting", cure="keep one")
        if name in model_keys:
            sections["model"][name] = value
        elif name in train_keys:
            sections["train"][name] = value
        elif key in DISPLAY_KEYS:
            display[key] = typed(value, str, f"{where}: {key}", {})
        elif not key.startswith("comment"):  # archived MyPT configs carry comment_* keys
            raise unknown_key(key, where, [*model_keys, *train_keys, *DISPLAY_KEYS, *ALIASES])
    model = build(ModelConfig, sections["model"], where)
    train = build(TrainConfig, sections["train"], where)
    model.check(where)
    train.check(where)
    return model, train, display
