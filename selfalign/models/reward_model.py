"""Reward models: a language model with a head that scores whole conversations, loaded, batched and read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_json
from selfalign.core.records import Message
from selfalign.models.chat_template import render_conversation, rendered_ids, template_of
from selfalign.models.checkpoint import (
    LoadedPolicy,
    Policy,
    PolicyCheckpoint,
    default_device,
    digest_weights,
    link_folder,
    read_weights,
    release_memory,
    stored_form,
)
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import (
    find_checkpoint,
    is_adapter,
    load_tokenizer,
    or_from_hub,
    read_settings,
    settle_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

UNUSED_HEAD = "lm_head."
"""Beginning of the weights of an output layer, which some reward models have kept and none computes with."""


@dataclass(kw_only=True, slots=True)
class RewardHead:
    """How the logits of a reward model are read as one number.

    Attributes:
        weights: {name of a logit in the checkpoint's `id2label`, or its index: its weight in the sum}; empty for a
            model with one logit, which then is the reward. A logit that is not named has no weight.
    """

    weights: dict[str, float] = field(default_factory=dict)

    def resolve(self, labels: Sequence[str]) -> list[float]:
        """Return the weight of each logit.

        Args:
            labels: the names of the logits.

        Raises:
            SelfalignError: there are several logits and no weights, or a name is of no logit or of several.
        """
        if not self.weights and len(labels) > 1:
            raise SelfalignError(
                f"judge.weights must say how the {len(labels)} scores of this reward model are summed, such as "
                f"+judge.weights={{{labels[0]}: 1}}; its scores are {', '.join(labels)}"
            )
        found = dict.fromkeys(range(len(labels)), 0.0) if self.weights else {0: 1.0}
        for name, weight in self.weights.items():
            named = [index for index, label in enumerate(labels) if name in (label, str(index))]
            if len(named) != 1:
                raise SelfalignError(
                    f"judge.weights.{name} names {len(named) or 'none'} of this reward model's scores: "
                    f"{', '.join(labels)}; give a name or an index from 0 to {len(labels) - 1}"
                )
            found[named[0]] += weight
        return [found[index] for index in range(len(labels))]


def fetch_reward_model(config: ModelConfig, destination: Path, key: str) -> PolicyCheckpoint:
    """Link to a reward model's weights from `weights/`, and write its `tokenizer/`.

    Raises:
        SelfalignError: there is no such model, or it is none that scores texts; the message names the setting, `key`.
    """
    config = or_from_hub(config)
    folder = find_checkpoint(config, key)
    check_kind(folder, key)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise SelfalignError(
            f"{key}: {folder} has no chat template, so nobody knows how it is asked. Put the one that "
            "it was trained with beside its weights, as chat_template.jinja"
        )
    tokenizer.chat_template = template_of(tokenizer)
    link_folder(destination / "weights", folder)
    settle_tokenizer(tokenizer, destination / "weights")
    tokenizer.save_pretrained(destination / "tokenizer")
    write_json(destination / "weights.json", digest_weights(destination / "weights"))
    return PolicyCheckpoint(destination)


def check_kind(folder: Path, key: str) -> None:
    """Check that a checkpoint is a model for sequence classification, with plain weights.

    Raises:
        SelfalignError: it is something else.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if is_adapter(folder):
        raise SelfalignError(f"{key}: {folder} is an adapter; merge it into its base and give the result")
    settings = read_settings(folder, key)
    kind = settings.get("model_type", "")
    if settings.get("is_encoder_decoder") or kind not in KNOWN:
        raise SelfalignError(
            f"{key}: {folder} ({kind or 'without model_type'}) is of no architecture that transformers scores "
            "sequences with"
        )
    if form := stored_form(folder):
        raise SelfalignError(f"{key}: the weights of {folder} are quantised ({form}): give plain weights")


def load_reward_model(files: PolicyCheckpoint, dtype: str, device: str = "") -> Policy:
    """Load a reward model, its head included.

    transformers gives a head that the files lack random weights, with no more than a warning.

    Args:
        files: as `fetch_reward_model` writes them.
        dtype: of the weights.
        device: of the weights; empty for the fastest.

    Raises:
        SelfalignError: the files lack weights, such as the head of a causal language model, or have others.
    """
    from transformers import AutoModelForSequenceClassification

    release_memory()
    folder = files.weights_folder
    model, report = read_weights(AutoModelForSequenceClassification, folder, dtype, trust_remote_code=False)
    if missing := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
        raise SelfalignError(
            f"judge.model: {folder.resolve()} is no reward model: it has no weights for {missing[0]!r} of "
            f"{type(model).__name__}, which would be random. Give a checkpoint for sequence classification"
        )
    if others := [name for name in sorted(report["unexpected_keys"]) if not name.startswith(UNUSED_HEAD)]:
        raise SelfalignError(
            f"judge.model: {folder.resolve()} has weights that {type(model).__name__} does not use, for example "
            f"{others[0]!r} ({len(others)}), so it computes something else"
        )
    model.config.use_cache = False
    return Policy(model.to(device or default_device()).eval(), files.load_tokenizer(), files.digest)


def labels_of(model: Any) -> list[str]:
    """Return the names of a reward model's logits."""
    names: Mapping[int, str] = model.config.id2label
    return [names[index] for index in range(model.config.num_labels)]


def encode_conversation(tokenizer: "Tokenizer", messages: list[Message], answer: str) -> list[int]:
    """Return the ids of a whole conversation, with BOS once if the tokenizer wants it and no generation prompt.

    Raises:
        SelfalignError: the chat template refuses the turns, or leaves one out.
    """
    return rendered_ids(tokenizer, render_conversation(tokenizer, messages, answer))


@dataclass(slots=True)
class RewardScorer(LoadedPolicy):
    """A loaded reward model.

    Attributes:
        policy: the model.
        max_batch_tokens: the most tokens of a batch, padding included.
        pad: the padding of the model's config; None where it names none.
    """

    max_batch_tokens: int
    pad: int | None = field(init=False)

    def __post_init__(self) -> None:
        model: Any = self.policy.model
        named = model.config.get_text_config().pad_token_id
        self.pad = named if named in range(model.get_input_embeddings().weight.shape[0]) else None

    @property
    def labels(self) -> list[str]:
        """The names of the logits."""
        return labels_of(self.policy.model)

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Put texts of similar length together, within `max_batch_tokens`: indices, batch by batch."""
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self.max_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.inference_mode()
    def logits(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the logits of each text, which do not depend on the others: (texts, logits).

        Such models pool at the last token that is not the padding of their config. Texts are padded with it on the
        right; where there is none, with a token that none of them has.
        """
        model, width = self.policy.model, max(map(len, texts))
        pad = self.pad
        if pad is None:
            used = {token for text in texts for token in text}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
        rows = [[*text, *[pad] * (width - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        return model(**{name: value.to(model.device) for name, value in inputs.items()}).logits.float().tolist()


def weigh(logits: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted sum of logits."""
    return math.fsum(logit * weight for logit, weight in zip(logits, weights, strict=True))
