"""Find, start and continue models by name, as MyPT's train.py and generate.py do."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from mypt_fast import console
from mypt_fast.checkpoint import legacy
from mypt_fast.checkpoint.manifest import exists, read_info
from mypt_fast.config import ARCHITECTURE_KEYS, TrainConfig
from mypt_fast.core import files
from mypt_fast.core.config import GPTConfig, strict_compat
from mypt_fast.core.errors import NoCheckpointError, TokenizerError
from mypt_fast.core.model import GPT, Loaded, tie
from mypt_fast.core.tokenizer import KINDS, Tokenizer
from mypt_fast.schema import shown
from mypt_fast.settings import CONTEXT_KEYS
from mypt_fast.tokenizer import GPT2_MODEL_VOCAB
from mypt_fast.training.init_from import POSITIONS, fitted_positions
from mypt_fast.training.optim import freeze

LATEST, FINAL = "latest.pt", "final.pt"
ROOT = "checkpoints"
Prepared = tuple[GPT, torch.optim.AdamW, int]


class CheckpointManager:
    """The directory of a model; it is made when something is saved, not before.

    Attributes:
        model_name: as given.
        checkpoint_dir: `base_dir/model_name`, a string.
    """

    def __init__(self, model_name: str, base_dir: str | os.PathLike[str] = ROOT) -> None:
        self.model_name, self.base_dir = model_name, base_dir
        self.checkpoint_dir = os.path.join(base_dir, model_name)
        if strict_compat():
            os.makedirs(self.checkpoint_dir, exist_ok=True)

    def get_path(self, filename: str = files.WEIGHTS) -> str:
        """The path of a file of the model."""
        return os.path.join(self.checkpoint_dir, filename)

    def exists_new_format(self) -> bool:
        """Whether there is a bundle: config.json and model.pt."""
        return exists(Path(self.checkpoint_dir))

    def exists_legacy_format(self, filename: str = LATEST) -> bool:
        """Whether there is a single-file checkpoint of this name."""
        return os.path.isfile(self.get_path(filename))

    def exists(self) -> bool:
        """Whether a run can be resumed: from a bundle or latest.pt. A lone final.pt cannot."""
        return self.exists_new_format() or self.exists_legacy_format()

    def initialize_for_training(
        self,
        config: GPTConfig,
        tokenization: str,
        input_text: str | None,
        learning_rate: float,
        init_from_model: str | None = None,
        dataset_tokenizer_state: dict[str, Any] | None = None,
        weight_decay: float = 0.1,
        freeze_layers: int = 0,
        freeze_embeddings: bool = False,
    ) -> Prepared:
        """Resume this model, else start from another's weights, else afresh.

        Args:
            config: of a new model. A resumed one has its own; its architecture stays the other
                model's where one is named. Its vocab_size becomes the tokenizer's.
            tokenization: "gpt2" or "char".
            input_text: what a char vocabulary is made of.
            learning_rate: of the optimizer.
            init_from_model: the name of the model to start from.
            dataset_tokenizer_state: content of the dataset's tokenizer_state.json.
            weight_decay: of matrices.
            freeze_layers: blocks, from the bottom, that are not trained.
            freeze_embeddings: nor are the embeddings.

        Returns:
            The model on its device, its optimizer, and the step to go on from.

        Raises:
            NoCheckpointError: (a FileNotFoundError) if `init_from_model` is not there.
            TokenizerError: (a ValueError) if tokenizers disagree, or there is no vocabulary.
        """
        data_state, state, step = dataset_tokenizer_state, None, 0
        if self.exists():
            model, theirs, saved_step, state = self._resumed(config)
            model.train()
            check_tokenizers(theirs, data_state, self.checkpoint_dir)
            step = saved_step or 0
            console.say(f"Resuming {self.checkpoint_dir} from step {step}")
        elif init_from_model:
            model = self._fine_tuned(config, tokenization, init_from_model, data_state)
        else:
            model = fresh(config, tokenization, input_text, data_state)
        self._apply_layer_freezing(model, freeze_layers, freeze_embeddings)
        return model, model.configure_optimizer(learning_rate, weight_decay, state), step

    def _resumed(self, config: GPTConfig) -> Loaded:
        if self.exists_new_format():
            return GPT.load(self.checkpoint_dir, map_location=config.device)
        return GPT.load_legacy(self.get_path(LATEST), map_location=config.device)

    def _fine_tuned(
        self, config: GPTConfig, tokenization: str, name: str, data_state: dict[str, Any] | None
    ) -> GPT:
        """The other model's weights and architecture; everything else from the new config."""
        places = dict.fromkeys((os.path.join(ROOT, name), os.path.join(self.base_dir, name), name))
        for place in (os.path.normpath(place) for place in places):
            source = CheckpointManager(os.path.basename(place), os.path.dirname(place))
            if source.exists_new_format():
                loaded = GPT.load(place, map_location="cpu")
            elif source.exists_legacy_format(FINAL):
                loaded = GPT.load_legacy(source.get_path(FINAL), map_location="cpu")
            else:
                continue
            console.say(f"Starting from the weights of {place}")
            check_kind(loaded[1], tokenization, data_state, place)
            check_tokenizers(loaded[1], data_state, place)
            return adopted(loaded[0], config)
        first = next(iter(places))
        raise NoCheckpointError(
            f"no model to start from in {first}", "found neither a bundle nor final.pt"
        )

    @staticmethod
    def _apply_layer_freezing(model: GPT, n: int, freeze_embeddings: bool) -> None:
        """Do not train the lowest n blocks (all, if there are fewer), nor the embeddings."""
        n = min(max(n or 0, 0), len(model.blocks))
        freeze(model, TrainConfig(freeze_layers=n, freeze_embeddings=freeze_embeddings))

    @staticmethod
    def load_for_inference(
        model_name: str,
        base_dir: str | os.PathLike[str] = ROOT,
        legacy_filename: str | None = None,
        load_dtype: str | None = None,
    ) -> GPT:
        """Read a model to write with: its bundle, else `legacy_filename`, latest.pt, final.pt.

        Raises:
            NoCheckpointError: (a FileNotFoundError) if there is none of them.
        """
        here = CheckpointManager(model_name, base_dir)
        if here.exists_new_format():
            return GPT.load(here.checkpoint_dir, None, load_dtype, load_optimizer=False)[0]
        for name in (legacy_filename, LATEST, FINAL):
            if name and here.exists_legacy_format(name):
                saved = files.read_legacy(here.get_path(name), optimizer=False)
                return files.revived(GPT, saved, None, load_dtype, False)[0]
        raise NoCheckpointError(
            f"no checkpoint in {here.checkpoint_dir}",
            "found neither a bundle nor latest.pt nor final.pt",
            "check the name, or train it first",
        )


def fresh(
    config: GPTConfig, tokenization: str, text: str | None, state: dict[str, Any] | None
) -> GPT:
    """A new model; sets config.vocab_size to what its tokenizer needs."""
    if state is not None:
        check_state(state, "the dataset")
        kind = state["token_kind"]
    else:
        kind = tokenization
    if kind == "char":
        if state is None and text is None:
            raise TokenizerError(
                "a char model needs its characters",
                "found neither a text nor a dataset's tokenizer state",
                "give input_text or dataset_tokenizer_state",
            )
        tokenizer = Tokenizer(config, "char")
        if state is not None:
            tokenizer.set_state(state)
        else:
            tokenizer.build_char_vocab(text or "")
        config.vocab_size = tokenizer.vocab_size
    elif state is not None and kind == "bpe":
        config.vocab_size = Tokenizer.from_state(config, state).engine.model_vocab_size
        tokenizer = Tokenizer.from_state(config, state)
    else:
        config.vocab_size = GPT2_MODEL_VOCAB
        tokenizer = Tokenizer(config, kind)
        if state is not None:
            tokenizer.set_state(state)
    return GPT(config, tokenizer).to(config.device)


def adopted(source: GPT, config: GPTConfig) -> GPT:
    """The source's weights under the new config: its architecture stays, but for the context.

    Learned positions beyond the source's are drawn as a new model's are, N(0, 0.02); an untied
    source becomes tied where the new config says so.
    """
    merged = copy.copy(config)
    for key in ARCHITECTURE_KEYS:
        if key not in CONTEXT_KEYS:
            setattr(merged, key, getattr(source.config, key))
    weights = source.state_dict()
    if POSITIONS in weights:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        weights[POSITIONS] = fitted_positions(weights[POSITIONS], merged.block_size, seed)
    source.tokenizer.config = merged
    model = files.blank(GPT, merged, source.tokenizer)
    files.load_weights(model, weights, "init_from_model")
    if config.tie_weights and not merged.tie_weights:
        merged.tie_weights = True
        tie(model)
    return model.to(merged.device).train()


def check_state(state: Any, where: str) -> None:
    """Refuse what is no tokenizer's state; raises TokenizerError (a ValueError)."""
    kind = state.get("token_kind") if isinstance(state, dict) else None
    if kind not in KINDS:
        found = f"token_kind is {shown(kind)}" if state else "there is none"
        raise TokenizerError(
            f"{where}: its tokenizer state is not usable", f"{found}; known: {', '.join(KINDS)}"
        )
    if kind == "char" and not state.get("chars"):
        raise TokenizerError(f"{where}: its char tokenizer has no chars")


def check_kind(
    theirs: Any, tokenization: str, data_state: dict[str, Any] | None, where: str
) -> None:
    """Refuse to start from a model of another kind of tokens; raises TokenizerError."""
    check_state(theirs, where)
    wanted = (data_state or {}).get("token_kind", tokenization)
    if theirs["token_kind"] != wanted:
        raise TokenizerError(
            f"{where}: its tokenizer is of another kind",
            f"token_kind: expected {shown(wanted)}, found {theirs['token_kind']!r}",
            "start from a model of the same kind, or prepare the data with its tokenizer",
        )


def check_tokenizers(theirs: Any, data_state: dict[str, Any] | None, where: str) -> None:
    """Refuse a dataset whose ids mean other text than the model's; raises TokenizerError."""
    if not data_state or not theirs:
        return
    for key in ("token_kind", "chars"):
        ours, other = theirs.get(key), data_state.get(key)
        if ours != other:
            raise TokenizerError(
                f"{where}: the dataset was prepared with another tokenizer",
                f"{key}: expected {shown(ours)}, found {shown(other)}",
                "prepare it with the model's tokenizer.json",
            )
    old, new = (s.get("special_tokens_by_name") or {} for s in (theirs, data_state))
    moved = [name for name in old if new.get(name, old[name]) != old[name]]
    if moved:
        console.notice(
            f"{where}: {len(moved)} special tokens have other ids in the dataset, {moved[0]} "
            f"{new[moved[0]]} for {old[moved[0]]}: what the model learnt of them is lost"
        )


def create_model(
    n_layer: int = 6,
    n_head: int = 6,
    n_embd: int = 384,
    block_size: int = 256,
    dropout: float = 0.2,
    bias: bool = False,
    tokenization: str = "gpt2",
    device: str | None = None,
) -> GPT:
    """A new model with 50304 rows of embedding, on its device."""
    config = GPTConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, dropout=dropout,
        bias=bias, vocab_size=GPT2_MODEL_VOCAB, device=device,
    )  # fmt: skip
    return GPT(config, token_kind=tokenization).to(config.device)


def load_model(
    model_name: str, base_dir: str | os.PathLike[str] = ROOT, load_dtype: str | None = None
) -> GPT:
    """Read a model to write with; raises as `CheckpointManager.load_for_inference`."""
    return CheckpointManager.load_for_inference(model_name, base_dir, load_dtype=load_dtype)


def get_model_info(model_name: str, base_dir: str | os.PathLike[str] = ROOT) -> dict[str, Any]:
    """What a model's files say, its weights unread: {} where there is no model.

    Returns:
        `config`, `tokenizer` and `training_state` (a bundle's where their files are there) and
        `format`: "json" or "legacy".
    """
    here = CheckpointManager(model_name, base_dir)
    if here.exists_new_format():
        info = read_info(Path(here.checkpoint_dir))
        members = ("config", "tokenizer", "training_state")
        kept: dict[str, Any] = {k: info[k] for k in members if k in info}
        return {**kept, "format": "json"}
    for name in (LATEST, FINAL):
        if here.exists_legacy_format(name):
            saved = legacy.info(Path(here.get_path(name)))
            return {
                "config": saved["config"], "tokenizer": saved.get("tokenizer"),
                "training_state": {"step": saved["training_state"].get("step")},
                "format": "legacy",
            }  # fmt: skip
    return {}
