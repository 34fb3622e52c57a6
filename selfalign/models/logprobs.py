"""Response log-probabilities without full logits.

The vocabulary projection is done at response positions only, and in tiles: log p(y_t) is the selected logit minus
the logsumexp of its row. What the backward needs of the tiles is kept up to a fixed size and made again beyond it, so
no tensor of all tokens × vocabulary is ever held, forward or backward.
"""

import inspect
import math
import sys
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfalign.core.errors import SelfalignError
from selfalign.models.batches import Batch, SharedPrompt, make_batch
from selfalign.models.prompt_states import PromptStates, read_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE_ELEMENTS = 1 << 24
"""Logits made at a time: 64 MiB in float32."""

KEPT_ELEMENTS = 1 << 27
"""Slopes kept for the backward, 512 MiB in float32; those of further tiles are made a second time there."""


class SelectedLogProbability(torch.autograd.Function):
    """log softmax(hidden @ weightᵀ + bias)[target], row by row in tiles, with its own backward.

    The second output, without gradient, is whether the target was the likeliest token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float,
        differentiated: bool,
    ) -> tuple[Tensor, Tensor]:
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        hits = hidden.new_empty(len(hidden), dtype=torch.bool)
        embedding = weight.to(hidden.dtype)
        ctx.kept = []
        for rows in _tiles(len(hidden), len(weight)):
            keep = differentiated and rows.stop * len(weight) <= KEPT_ELEMENTS
            logps[rows], hits[rows], slopes = _score_tile(
                hidden[rows], embedding, bias, targets[rows], scale, softcap, keep
            )
            if slopes is not None:
                ctx.kept.append(slopes)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.mark_non_differentiable(hits)
        return logps, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        gradient = (gradients[0] * ctx.scale).to(hidden.dtype)[:, None]
        embedding = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient: Tensor | None = None
        bias_gradient: Tensor | None = None
        for number, rows in enumerate(_tiles(len(hidden), len(weight))):
            if number < len(ctx.kept):
                slopes = ctx.kept[number]
            else:
                *_, slopes = _score_tile(hidden[rows], embedding, bias, targets[rows], ctx.scale, ctx.softcap, True)
                assert slopes is not None
            if hidden_gradient is not None:
                hidden_gradient[rows] = (slopes @ embedding) * gradient[rows]
            if ctx.needs_input_grad[1]:
                weight_gradient = _added(weight_gradient, slopes.T @ (hidden[rows] * gradient[rows]))
            if ctx.needs_input_grad[2]:
                bias_gradient = _added(bias_gradient, slopes.T @ gradient[rows])
        weight_gradient = None if weight_gradient is None else weight_gradient.to(weight.dtype)
        bias_gradient = None if bias_gradient is None else bias_gradient.squeeze(1).to(bias.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Add a tile's gradient to the total, in float32."""
    return part.float() if total is None else total.add_(part)


def _score_tile(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float,
    differentiated: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log p(target), whether it was the likeliest, and d log p(target) / d logits but for `scale`."""
    logits = (hidden @ embedding.T).float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    bend = None
    if softcap:
        capped = torch.tanh(logits / softcap)
        logits, bend = softcap * capped, 1 - capped.square()
    highest = logits.amax(1, keepdim=True)
    selected = logits.gather(1, targets[:, None])
    hits = (selected == highest).squeeze(1)
    # The logits are not needed again, so what follows is computed in their place.
    powers = logits.sub_(highest).exp_()
    total = powers.sum(1, keepdim=True)
    logps = (selected - highest - total.log()).squeeze(1)
    if not differentiated:
        return logps, hits, None
    # d log p(target) / d logits = onehot(target) - softmax(logits)
    slopes = powers.div_(-total)
    slopes.scatter_add_(1, targets[:, None], torch.ones_like(selected))
    if bend is not None:
        slopes *= bend
    return logps, hits, slopes.to(hidden.dtype)


def selected_logps(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, "tokens"],
    *,
    bias: Float[Tensor, "vocabulary"] | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """Return log p(target) in nats, float32, for each hidden state, and whether the target was the likeliest.

    Args:
        hidden: the decoder's last hidden states at the positions that predict a response token.
        weight: the output embedding; tied or not, its gradient is right.
        targets: the tokens predicted there.
        bias: of the output layer, if it has one.
        scale: the factor some architectures put on their logits.
        softcap: logits are squashed to softcap·tanh(logits/softcap); 0 leaves them.
    """
    differentiated = torch.is_grad_enabled()
    scored = SelectedLogProbability.apply(hidden, weight, bias, targets, scale, softcap, differentiated)
    return cast(tuple[Tensor, Tensor], scored)


class TokenScores(NamedTuple):
    """The output of a training pass of a model that returns log-probabilities.

    `logps` are those of the targets (nats), shape (targets,). `hits` tells of each target whether it was the most
    likely token. `router_loss` is the load balancing loss, a scalar; None for a model without one.
    """

    logps: Tensor
    hits: Tensor
    router_loss: Tensor | None


def score_responses_only(model: "PreTrainedModel") -> None:
    """Make the model's forward return log-probabilities of given tokens instead of logits.

    Afterwards `model(input_ids=…, position_ids=…, logit_positions=…, targets=…)` returns log p(targets), shape
    (targets,), where `logit_positions` are positions in the flattened batch. With `training_pass=True` it returns
    `TokenScores`. Because it goes through the model's own forward, it works under DDP, FSDP and peft. The model can
    then only train or score; load another to engine. A second call has no effect.

    Raises:
        SelfalignError: the output layer is not a plain linear layer, or the model computes its logits in a way that
            `logit_shape` does not know.
    """
    inner = model_within(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise SelfalignError(
            f"{type(inner).__name__}: its output layer is a {type(head).__name__}, not a plain linear one: choose "
            "another model"
        )
    if getattr(inner.forward, "__func__", None) is not _score:
        probe, training = _probe(inner), inner.training
        own = _own_logps(inner.eval(), probe)
        head.forward, inner.forward = MethodType(_select, head), MethodType(_score, inner)
        with torch.no_grad():
            ours = inner(logit_positions=probe.logit_positions, targets=probe.targets, **probe.inputs)
        inner.train(training)
        # The tolerance is a bfloat16 model's rounding of its capped logits.
        if not torch.allclose(own, ours, rtol=0, atol=1e-3 if inner.dtype == torch.float32 else 0.25):
            raise SelfalignError(
                f"{type(inner).__name__} computes its logits in an unsupported way. Choose another model."
            )


def _probe(model: "PreTrainedModel") -> Batch:
    """Return a few tokens to score both ways."""
    tokens = [token % cast(nn.Linear, model.get_output_embeddings()).out_features for token in range(8)]
    return make_batch(
        model, [SharedPrompt(id="probe", prompt=tokens[:1], responses=[tokens[1:]], num_context_tokens=[0])]
    ).to(model.device)


@torch.no_grad()
def _own_logps(model: "PreTrainedModel", batch: Batch) -> Tensor:
    logits = model(use_cache=False, **batch.inputs).logits.flatten(0, 1)[batch.logit_positions]
    return logits.float().log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


def _score(
    self: "PreTrainedModel", logit_positions: Tensor, targets: Tensor, *, training_pass: bool = False, **inputs: Any
) -> Tensor | TokenScores:
    routed = training_pass and has_router_loss(self)
    states, routers = _decode(self, inputs, {"output_router_logits": True} if routed else {})
    hidden = states.flatten(0, 1)[logit_positions]
    # Through the layer's own call, because FSDP2 puts its weight together there.
    scored = cast(nn.Linear, self.get_output_embeddings())(hidden, targets, *logit_shape(self.config))
    if not training_pass:
        return scored[0]
    mask = inputs.get("attention_mask")
    balance = _router_loss(self, routers, mask) if routed else None
    return TokenScores(logps=scored[0], hits=scored[1], router_loss=balance)


def _decode(
    model: "PreTrainedModel", inputs: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the last hidden states, shape (rows, tokens, hidden size), and the router logits by layer."""
    if isinstance(layout := inputs.get("layout"), PromptStates):
        return read_groups(decoder_of(model), inputs["input_ids"], layout, **options)
    decoded = decoder_of(model)(use_cache=False, **inputs, **options)
    return decoded.last_hidden_state, decoded.router_logits if options else ()


def model_within(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model that an adapter is put into, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]


def has_router_loss(model: "PreTrainedModel") -> bool:
    """Whether a model, without the wrapper of an adapter, has experts with a load balancing loss."""
    return bool(getattr(model, "num_experts", None)) and _balancing_function(model) is not None


def router_coefficient(model: "PreTrainedModel") -> float:
    """Return the factor on the load balancing loss in a model's config, 0 if there is none."""
    config = model_within(model).config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0)


def _balancing_function(model: "PreTrainedModel") -> Any:
    """Return the load balancing loss in the module of an architecture. FSDP2 gives its class another module."""
    modules = (sys.modules[one.__module__] for one in type(model).__mro__)
    found = next(filter(None, (getattr(module, "load_balancing_loss_func", None) for module in modules)), None)
    usual = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    return found if found and [*inspect.signature(found).parameters] == usual else None


def _router_loss(model: Any, logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Return the architecture's own load balancing loss over all tokens of a pass but padding.

    It is that of the Switch Transformer (Fedus et al. 2022, arXiv 2101.03961, eq. 4 to 6).
    """
    return _balancing_function(model)(logits, model.num_experts, model.num_experts_per_tok, mask)


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """Return the module whose hidden states the output layer takes; some architectures name themselves here."""
    named = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next(part for part in named if part is not None and part is not model)


def _select(self: nn.Linear, hidden: Tensor, targets: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return selected_logps(hidden, self.weight, targets, bias=self.bias, scale=scale, softcap=softcap)


def logit_shape(config: Any) -> tuple[float, float]:
    """Return (scale, softcap) of an architecture's logits: Cohere, Falcon-H1 multiply, Granite divides, Gemma caps."""
    factors = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    scale = math.prod(map(float, factors)) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return scale, float(cap or 0.0)


def _tiles(rows: int, vocabulary: int) -> list[slice]:
    height = max(1, TILE_ELEMENTS // vocabulary)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
