"""A short check of a model when it is fetched, before anything is paid for: what it can do, and what it cannot."""

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from safetensors import safe_open

from selfalign.core.errors import SelfalignError
from selfalign.engines.model_trials import ScoringTrial, check_gradient, dropout_applies, writing_of
from selfalign.metrics import catalog
from selfalign.models.capabilities import Capabilities
from selfalign.models.chat_template import (
    ASKED,
    BEGINNINGS,
    EARLIER,
    PLAIN_TEXT,
    QUESTION,
    RULE,
    altered_answer,
    answer_shape,
    control_words,
    empty_thought,
    generation_prompt,
    markers_of,
    render_prompt,
    render_trained,
    rendered_ids,
    text_ids,
    unmarked_control_words,
    writes_all,
)
from selfalign.models.checkpoint import Policy, PolicyCheckpoint, default_device, not_finite
from selfalign.models.logprobs import has_router_loss
from selfalign.models.reward_model import RewardHead, labels_of, load_reward_model
from selfalign.models.tokenizer import (
    RARE,
    Answer,
    decode_response,
    encode_answers,
    encode_prompt,
    stop_ids,
    strips_answers,
    unknown_id,
)
from selfalign.store.artifacts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

UNUSED = (
    *("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "repetition_penalty"),
    *("sequence_bias", "suppress_tokens", "typical_p"),
)
"""Settings of generation_config.json about sampling that the run's sampling does not have."""


def check_model(files: PolicyCheckpoint, dtype: str) -> Counts:
    """Check a model, save its capabilities beside its weights, and note what is done about those it lacks.

    Args:
        files: the fetched model; gets capabilities.json.
        dtype: of its weights in the run; the check is in float32 where there is memory for it.

    Returns:
        What was found, for the manifest: the number of parameters, how it scores and writes, and notes.

    Raises:
        SelfalignError: the model cannot be used, with the reason.
    """
    checked_in, device = roomiest(files, dtype)
    policy = files.load(checked_in, device=device)
    policy.capabilities = Capabilities()
    check_finite(policy)
    check_vocabulary(policy)
    templated = bool(policy.tokenizer.chat_template)
    notes = check_template(policy.tokenizer) if templated else ["no chat template"]
    notes += notes_on_texts(policy.tokenizer)
    system_turns = templated and writes_all(policy.tokenizer, [RULE, *ASKED])
    notes += [] if system_turns or not templated else ["no system turns: the chat template does not take them"]
    earlier_turns = templated and writes_all(policy.tokenizer, [*EARLIER, *ASKED])
    notes += [] if earlier_turns or not templated else ["one question only: the chat template takes no earlier turns"]
    found = Capabilities(writes=writing_of(policy), packs=False)
    scoring = ScoringTrial(policy)
    scoring.settle()
    check_gradient(scoring)
    found = replace(found, packs=scoring.packs, shares_states=scoring.shares_states, dropout=dropout_applies(scoring))
    found.save(files.path)
    notes += scoring.notes + notes_on(found) + unused_settings(policy)
    for note in notes:
        logger.info("%s: %s", type(policy.model).__name__, note)
    return {
        catalog.PARAMETERS.name: policy.model.num_parameters(),
        catalog.CONTEXT.name: policy.context,
        "checked_in": checked_in,
        "scores": "packed" if found.packs else "prompt states shared" if found.shares_states else "padded",
        "writes": found.writes,
        catalog.DROPOUT.name: found.dropout,
        catalog.HAS_ROUTER_LOSS.name: has_router_loss(policy.model),
        catalog.CHAT_TEMPLATE.name: templated,
        catalog.SYSTEM_TURNS.name: system_turns,
        catalog.EARLIER_TURNS.name: earlier_turns,
        "stops_at": [str(policy.tokenizer.convert_ids_to_tokens(token)) for token in stop_ids(policy.tokenizer)],
        "notes": notes,
    }


def check_reward_model(files: PolicyCheckpoint, dtype: str, head: RewardHead) -> Counts:
    """Check that a reward model can score: its weights, its vocabulary, its chat template, and its logits' weights.

    Args:
        files: the fetched model.
        dtype: of its weights where there is no memory for float32.
        head: how its logits are summed.

    Returns:
        What was found, for the manifest: the number of parameters, the context, and {logit: its weight}.

    Raises:
        SelfalignError: the model cannot be used, with the reason.
    """
    policy = load_reward_model(files, *roomiest(files, dtype))
    check_finite(policy)
    check_rows(policy)
    tokenizer = policy.tokenizer
    if not writes_all(tokenizer, ASKED) or altered_answer(tokenizer) is not None:
        raise SelfalignError(
            "judge.model: the chat template of this reward model leaves out or changes what is asked or answered. Put "
            "another beside its weights, as chat_template.jinja"
        )
    labels = labels_of(policy.model)
    return {
        catalog.PARAMETERS.name: policy.model.num_parameters(),
        catalog.CONTEXT.name: policy.context,
        "weights": dict(zip(labels, head.resolve(labels), strict=True)),
    }


def roomiest(files: PolicyCheckpoint, dtype: str) -> tuple[str, str]:
    """Return (dtype, device) of the check: float32 if there is memory for it, on the accelerator if it fits there."""
    if files.quantization:
        return dtype, default_device()
    needed = {"float32": 6 * count_parameters(files), "bfloat16": 3 * count_parameters(files)}
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        fitting = [one for one in ("float32", dtype) if needed[one] < free]
        if fitting:
            return fitting[0], "cuda"
    return ("float32" if needed["float32"] < psutil.virtual_memory().available else dtype), "cpu"


def count_parameters(files: PolicyCheckpoint) -> int:
    """Return the number of values in the weight files, read from their headers."""
    total = 0
    for path in sorted((files.path / "weights").glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
    return total


def check_finite(policy: Policy) -> None:
    """Check that every weight is finite.

    Raises:
        SelfalignError: a weight is not finite, as in a checkpoint of a training that diverged.
    """
    if name := not_finite(policy.model):
        raise SelfalignError(f"the model's weights {name!r} are not all finite. Use another checkpoint.")


def check_vocabulary(policy: Policy) -> None:
    """Check that every token has a row of the embedding, and that no text is read as control tokens.

    Raises:
        SelfalignError: a token has no row, so that reading it would crash, on a GPU without a message; or a control
            token is a single character, or stands for characters that have no token.
    """
    if unknown_id(policy.tokenizer) in stop_ids(policy.tokenizer):
        raise SelfalignError(
            f"the tokenizer replaces unknown characters by {policy.tokenizer.unk_token!r}, which also ends a text, so "
            "an unknown character would end it. Give the tokenizer an unk_token or an eos_token of its own."
        )
    letters = [word for word in control_words(policy.tokenizer) if len(word) == 1 and word.isascii()]
    if letters:
        raise SelfalignError(
            f"the tokenizer's control token {letters[0]!r} is a single character, so texts that contain it would be "
            "misread. Use a tokenizer whose control tokens are longer."
        )
    check_rows(policy)


def check_rows(policy: Policy) -> None:
    """Check that every token has a row of the embedding.

    Raises:
        SelfalignError: a token has none.
    """
    rows = cast(Any, policy.model.get_input_embeddings()).weight.shape[0]
    largest = max(policy.tokenizer.get_vocab().values())
    if largest >= rows:
        word = policy.tokenizer.convert_ids_to_tokens(largest)
        raise SelfalignError(
            f"the tokenizer's token {word!r} has id {largest}, but the model's embedding has only {rows} rows. Resize "
            "the embedding (model.resize_token_embeddings in transformers), or use the model's own tokenizer."
        )


def check_template(tokenizer: "Tokenizer") -> list[str]:
    """Render a few conversations with the chat template.

    Returns:
        Notes on what the template cannot do, and what is mended.

    Raises:
        SelfalignError: it loses or changes what the user asks or the assistant answers.
    """
    notes: list[str] = []
    before = render_prompt(tokenizer, QUESTION)
    if (altered := altered_answer(tokenizer)) is not None:
        raise SelfalignError(
            f"the chat template changes the assistant's answer {PLAIN_TEXT!r} to {altered!r}, so training would differ "
            "from conversations. Give another template with model.chat_template=FILE."
        )
    if not writes_all(tokenizer, ASKED):
        raise SelfalignError(
            "the chat template leaves out or changes the user's question. Give another with model.chat_template=FILE."
        )
    shape, asked = answer_shape(tokenizer), generation_prompt(tokenizer, QUESTION)
    if asked not in (before, before[: len(before) - len(shape.margin)]):
        start = next((at for at, (a, b) in enumerate(zip(before, asked, strict=False)) if a != b), None)
        start = min(len(before), len(asked)) if start is None else start
        notes.append(
            f"the chat template opens an answer with {before[start:]!r} in a conversation and with {asked[start:]!r} "
            "where it is asked for one: answers are written and trained behind the former"
        )
    if (markers := markers_of(tokenizer)) is not None:
        notes.append(
            f"thinks between {markers.open!r} and {markers.close!r}; an answer without a thought stands behind "
            f"{empty_thought(tokenizer)!r}"
        )
    if spelled := [word for word in control_words(tokenizer) if re.fullmatch(r"[\w\s]+:?", word)]:
        notes.append(f"control tokens that are words: {' '.join(sorted(spelled))}; in texts they are broken up")
    if unmarked := unmarked_control_words(tokenizer):
        notes.append(f"control tokens that are not marked as special: {' '.join(sorted(unmarked))}")
    return notes


def notes_on_texts(tokenizer: "Tokenizer") -> list[str]:
    """Return notes on what the tokenizer loses: characters, case, white space, the ids of a whole conversation."""
    notes: list[str] = []
    unknown = unknown_id(tokenizer)
    if unknown is not None:
        notes.append(f"the tokenizer cannot spell everything: it reads {tokenizer.unk_token} for what it cannot")
    elif not text_ids(tokenizer, RARE):
        notes.append("the tokenizer leaves out characters that it has no token for, without a trace")
    if unknown is not None and tokenizer.chat_template and unknown in encode_prompt(tokenizer, QUESTION):
        notes.append(f"what the chat template writes has {tokenizer.unk_token} in it, which may be a line break")
    prompt = QUESTION if tokenizer.chat_template else QUESTION[0]["content"]
    [ids] = encode_answers(tokenizer, prompt, [Answer(text=PLAIN_TEXT)])
    if (kept := decode_response(tokenizer, ids)) != PLAIN_TEXT:
        notes.append(f"the tokenizer keeps of {PLAIN_TEXT!r} no more than {kept!r}")
    if strips_answers(tokenizer):
        notes.append("the end of a turn takes the white space before it to itself: no answer is trained to end in any")
    if tokenizer.chat_template and (odd := [text for text in BEGINNINGS if not is_read_as_whole(tokenizer, text)]):
        notes.append(
            f"a prompt and an answer, as {odd[0]!r}, are not read as the tokens that the whole conversation is read as"
        )
    return notes


def is_read_as_whole(tokenizer: "Tokenizer", answer: str) -> bool:
    """Whether prompt and answer have the ids of the whole conversation."""
    ids = [*encode_prompt(tokenizer, QUESTION), *encode_answers(tokenizer, QUESTION, [Answer(text=answer)])[0]]
    whole = rendered_ids(tokenizer, render_trained(tokenizer, QUESTION, answer))
    return whole[: len(ids)] == ids


def notes_on(found: Capabilities) -> list[str]:
    """Return notes on what is done about missing capabilities."""
    notes: list[str] = []
    if found.writes == "prompts":
        notes.append("its cache cannot drop rows: it writes the answers to one prompt at a time")
    if found.writes == "without_cache":
        notes.append("its cache is not exact: with engine=transformers it reads the whole text for every token")
    if not found.dropout:
        notes.append("has no dropout that could be set")
    return notes


def unused_settings(policy: Policy) -> list[str]:
    """Return notes on generation settings of the model that the run's sampling ignores."""
    own = policy.model.generation_config
    asked = [name for name in UNUSED if getattr(own, name, None) not in (None, 0, 1)]
    return [f"{', '.join(asked)} in its generation_config.json: not applied to what is written here"] if asked else []
