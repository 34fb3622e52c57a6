"""Policies on disk and in memory: load, save, identify.

A policy artifact holds `weights/` (a transformers checkpoint, or a link to one), `tokenizer/` and, for LoRA,
`adapter/`. `weights.json` identifies the policy: the digests of the weight files, and how they are quantised when they
are loaded. An empty file `trusted` is there if the user allowed code that comes with the model to run.
"""

import gc
import logging
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.core.failures import is_out_of_memory
from selfalign.core.files import digest_file, digest_folder, digest_json, read_json, write_json
from selfalign.models.capabilities import Capabilities
from selfalign.models.config import DTYPES
from selfalign.models.quantization import keep_layers_differentiable, quantise_on_load
from selfalign.models.tokenizer import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

TRUSTED = "trusted"

UNPACKED = "mxfp4"
"""The quantised form that is always turned into plain weights when it is loaded, as nothing trains in it (gpt-oss)."""

UNBOUNDED = 1 << 30
"""Stands for the longest sequence of a model that names none."""

CONTEXT_NAMES = (
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "seq_length",
)
"""Names of the longest sequence in configs without max_position_embeddings."""


@dataclass(slots=True)
class Policy:
    """A loaded model with its tokenizer, its identity (the digest of its weights), and its capabilities."""

    model: "PreTrainedModel"
    tokenizer: "Tokenizer"
    digest: str
    capabilities: Capabilities = field(default_factory=Capabilities)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return longest_sequence(self.model.config)


@dataclass(slots=True)
class LoadedPolicy:
    """A policy in this process's memory, until the `with` block around it ends."""

    policy: Policy

    @property
    def tokenizer(self) -> "Tokenizer":
        """The policy's tokenizer."""
        return self.policy.tokenizer

    @property
    def digest(self) -> str:
        """The policy's identity."""
        return self.policy.digest

    @property
    def context(self) -> int:
        """The longest sequence the policy takes, in tokens."""
        return self.policy.context

    @property
    def counts(self) -> dict[str, Any]:
        """Empty: the versions of the packages in this process are the run's."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.policy


def release_memory() -> None:
    """Free unused memory: models in reference cycles, and torch's cache.

    What is loaded next, or another process, then has the memory to itself.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Multiply in `dtype` inside the block, while the weights keep theirs; no effect for "float32" or "".

    It is used on weights of any dtype, because it also decides what is computed in float32, and training and scoring
    should not differ. Its cache is off, because it would keep all weights in `dtype`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)


def settle_imports() -> None:
    """Import what a run with models needs, and take it out of garbage collections.

    Each release of memory would look through these million objects, which took a third of a second.
    """
    import peft
    import transformers.trainer

    del peft, transformers
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A policy in the folder of an artifact."""

    path: Path

    @cached_property
    def weights(self) -> dict[str, str]:
        """{weight file: its digest}, for an adapter also its base's, and how they are quantised if they are."""
        return read_json(self.path / "weights.json")

    @property
    def digest(self) -> str:
        """SHA-256 over the weight files' digests: equal weights, equal digest, wherever they lie."""
        return digest_json(self.weights)

    @property
    def quantization(self) -> dict[str, str]:
        """How the base is quantised when it is loaded, as in weights.json; empty if it is not."""
        return {"quantization": self.weights["quantization"]} if "quantization" in self.weights else {}

    @cached_property
    def config(self) -> Any:
        """The model config of the language model."""
        from transformers import AutoConfig

        own = AutoConfig.from_pretrained(self.path / "weights", trust_remote_code=self.trusted)
        return own.get_text_config()

    @property
    def context(self) -> int:
        """The longest sequence the policy takes, in tokens."""
        return longest_sequence(self.config)

    @property
    def weights_folder(self) -> Path:
        """The folder of the weights, or of an adapter's base. It may be a link to a folder outside the store.

        Raises:
            SelfalignError: a file behind the link has changed since, so that the policy would be another one.
        """
        folder, recorded = self.path / "weights", self.path / "weights.json"
        if not folder.is_symlink():
            return folder
        written = recorded.stat().st_mtime_ns
        # Only files that were touched later are read: the weights may be large.
        if any(path.stat().st_ctime_ns > written for path in weight_files(folder)):
            now = digest_weights(folder)
            own = {name: digest for name, digest in self.weights.items() if name != "quantization"}
            base = self.weights.get("base")
            if (digest_json(now | self.quantization) != base) if base else (now != own):
                raise SelfalignError(
                    f"{folder.resolve()}: its weights or configuration have changed since a run linked to them "
                    f"({self.path}), so its model would be another one. Put the earlier files back, or start a new run"
                )
        return folder

    @property
    def trusted(self) -> bool:
        """Whether the user allowed code that comes with the model to run."""
        return (self.path / TRUSTED).exists()

    def load_tokenizer(self) -> "Tokenizer":
        """Return the tokenizer, with the chat template of the run. Policies with the same files share it."""
        folder = self.path / "tokenizer"
        return shared_tokenizer(TokenizerFiles(digest_json(digest_folder(folder)), folder))

    def load(self, dtype: str, *, device: str = "", trainable: bool = False, keep_adapter: bool = False) -> Policy:
        """Load the policy.

        An adapter is merged into float32 weights, which is exact but for rounding. With weights in bfloat16 or 4 bits
        it stays apart, as it was trained: rounding would lose most of it.

        Args:
            dtype: of the weights.
            device: of the weights; empty for the fastest.
            trainable: whether the adapter, if there is one, takes gradients.
            keep_adapter: whether the adapter stays apart in any case, because multiplications are in bfloat16.
        """
        release_memory()  # The model and the optimiser of the training before are in cycles.
        device = device or default_device()
        quantised = quantise_on_load(DTYPES[dtype], device) if self.weights.get("quantization") == "nf4" else {}
        model = load_checkpoint(self.weights_folder, dtype, trust_remote_code=self.trusted, **quantised)
        if self.quantization:
            keep_layers_differentiable(model)
        if (self.path / "adapter").exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.path / "adapter", is_trainable=trainable)
            model.peft_config["default"].base_model_name_or_path = str(self.path / "weights")
            if dtype == "float32" and not (trainable or keep_adapter or self.quantization):
                model = model.merge_and_unload()
        cast(torch.nn.Module, model).to(torch.device(device)).eval()
        tokenizer, capabilities = self.load_tokenizer(), Capabilities.load(self.path)
        return Policy(cast("PreTrainedModel", model), tokenizer, self.digest, capabilities)

    def save(self, policy: Policy, base: "PolicyCheckpoint") -> None:
        """Write a trained policy: all its weights, or its adapter and a link to its base.

        All its weights come with a generation_config.json that ends a text where the run ends it.

        Raises:
            SelfalignError: a weight is not finite.
        """
        if name := not_finite(policy.model):
            raise SelfalignError(
                f"the trained weights {name!r} are not all finite: the training has diverged. Lower its learning rate"
            )
        policy.tokenizer.save_pretrained(self.path / "tokenizer")
        if hasattr(policy.model, "peft_config"):
            policy.model.save_pretrained(self.path / "adapter")
            _settle_adapter_config(self.path / "adapter" / "adapter_config.json")
            link_folder(self.path / "weights", base.path / "weights")
            weights = {"base": base.digest, **base.quantization, **digest_weights(self.path / "adapter")}
        else:
            if policy.model.can_generate():
                first, *more = stop_ids(policy.tokenizer)
                policy.model.generation_config.eos_token_id = [first, *more] if more else first
            policy.model.save_pretrained(self.path / "weights")
            policy.tokenizer.save_pretrained(self.path / "weights")
            weights = digest_weights(self.path / "weights")
        write_json(self.path / "weights.json", weights)
        Capabilities.load(base.path).save(self.path)
        if base.trusted:
            (self.path / TRUSTED).touch()


def not_finite(model: torch.nn.Module) -> str:
    """Return the name of a model's first parameter that is not finite; "" if all are."""
    weights = ((name, weight) for name, weight in model.named_parameters() if weight.is_floating_point())
    bad = (name for name, weight in weights if weight.element_size() > 1 and not weight.isfinite().all())
    return next(bad, "")


def longest_sequence(config: Any) -> int:
    """Return the longest sequence that a model takes, in tokens, by its config.

    If rotary embeddings beyond some length depend on the longest position of a pass, that length is the limit: beyond
    it, the score of a text would depend on the other texts in its batch (transformers does so, padded too).
    """
    own = config.get_text_config()
    named = [getattr(own, name, None) for name in CONTEXT_NAMES]
    others = min((length for length in named if isinstance(length, int) and length > 0), default=UNBOUNDED)
    longest = int(getattr(own, "max_position_embeddings", None) or others)
    rope = getattr(own, "rope_parameters", None) or getattr(own, "rope_scaling", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # Some have one for each kind of layer.
    if any(part.get("rope_type") == "longrope" for part in kinds):
        originals = [part.get("original_max_position_embeddings") for part in kinds]
        original = next(filter(None, originals), None) or getattr(own, "original_max_position_embeddings", None)
        return min(longest, int(original or longest))
    return longest


def default_device() -> str:
    """Return the accelerator if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, *, writing: bool = False) -> str:
    """Return the dtype that "auto" means on this machine, and any other unchanged.

    Args:
        dtype: "auto" or a dtype.
        writing: whether tokens are written one by one. Training and scoring read whole texts.
    """
    return fastest_dtype(writing=writing)[0] if dtype == "auto" else dtype


def fastest_dtype(*, writing: bool) -> tuple[str, str]:
    """Return the dtype in which this machine is faster, and the reason.

    It is told by what the processor has and not measured, so that equal machines make equal artifacts. AVX-512 alone
    multiplies large bfloat16 matrices about twice as fast as float32; writing in it, where attention has one token at a
    time, took 1.4 times as long.
    """
    if torch.cuda.is_available():
        return "bfloat16", "there is a GPU"
    has = torch.cpu.get_capabilities().get
    if has("amx_tile", False):
        return "bfloat16", "the CPU has AMX"
    if has("avx512_bf16", False):
        return ("float32" if writing else "bfloat16"), "the CPU has AVX-512 BF16 and no AMX"
    return "float32", "the CPU has no instructions for bfloat16"


def digest_weights(folder: Path) -> dict[str, str]:
    """Return {file: SHA-256} of a checkpoint's weights and its model config."""
    return {path.name: digest_file(path) for path in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights and its model config, by name."""
    return sorted({*folder.glob("*.safetensors"), *folder.glob("*config.json")})


def load_checkpoint(folder: Path, dtype: str, *, trust_remote_code: bool = False, **options: Any) -> "PreTrainedModel":
    """Load a causal language model, every weight of it.

    Raises:
        SelfalignError: it is damaged, lacks weights or has too many, contradicts its config, or needs a package that
            is not there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    if stored_form(folder) == UNPACKED:
        options = {"quantization_config": Mxfp4Config(dequantize=True), **options}
    model, report = read_weights(AutoModelForCausalLM, folder, dtype, trust_remote_code=trust_remote_code, **options)
    if stored_form(folder) == UNPACKED:
        # transformers 5.23 would save the plain weights under the names of the quantised ones.
        model._weight_conversions = []
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]) + sorted(report["mismatched_keys"])
    if wrong:
        raise SelfalignError(f"{folder}: weights and architecture differ, for example at {wrong[0]!r} ({len(wrong)})")
    check_tied(model, folder)
    return model


def read_weights(auto: Any, folder: Path, dtype: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint with one of transformers' automatic classes, and return what of it is missing or too much.

    Raises:
        SelfalignError: it is damaged, or needs a package that is not there.
    """
    try:
        return auto.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise SelfalignError(f"{folder}: loading its weights needs another package: {reason_of(error)}") from error
    except Exception as error:  # Over files of others transformers stumbles in every way, down to a bare Exception.
        if is_out_of_memory(error):
            raise
        raise SelfalignError(
            f"{folder}: the model cannot be loaded ({reason_of(error)}); its files may be damaged"
        ) from error


def stored_form(folder: Path) -> str:
    """Return how a checkpoint's weights are quantised in its files, "" if they are not."""
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return (settings.get("quantization_config") or {}).get("quant_method", "")


def check_tied(model: "PreTrainedModel", folder: Path) -> None:
    """Check that the output layer is the embedding if the config says so.

    Raises:
        SelfalignError: the files hold two. transformers loads both, and other programs, such as engines, the embedding
            alone: they would run another model.
    """
    embedding, head = model.get_input_embeddings(), cast(Any, model.get_output_embeddings())
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False) and model._tied_weights_keys
    if tied and head is not None and head.weight is not cast(Any, embedding).weight:
        raise SelfalignError(
            f"{folder}: config.json says that the output layer is the embedding (tie_word_embeddings), and the files "
            'hold two that differ: set "tie_word_embeddings": false there if the output layer is its own, else remove '
            "the output layer from the files"
        )


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """Load a folder's tokenizer, always by its own files.

    If mistral-common is installed, a `tekken.json` beside them would be read instead, and the same model would have
    another chat template.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True, mistral_format=False
    )


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer's folder. Two with the same files are equal."""

    digest: str
    path: Path = field(compare=False)


@lru_cache(maxsize=1)
def shared_tokenizer(folder: TokenizerFiles) -> "Tokenizer":
    """Load a tokenizer, which takes longer than a small model does, once for all models of a run."""
    return open_tokenizer(folder.path)


def _settle_adapter_config(path: Path) -> None:
    """Make peft's file the same wherever and whenever it is written: a relative base, sorted lists."""
    config = read_json(path)
    config["base_model_name_or_path"] = "../weights"
    for name in ("target_modules", "target_parameters"):
        config[name] = config[name] and sorted(config[name])
    write_json(path, config)


def link_folder(link: Path, target: Path) -> None:
    """Link to a folder, and replace a link or folder that is there."""
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve(), target_is_directory=True)
