"""The declarations of all metrics: name, meaning, unit, axis and better direction.

Training metrics have TRL's names if TRL has them. Producers use the `name` of a constant. The report, the model card,
Weights & Biases and docs/metrics.md use its other fields. A run replaces a part in braces.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """The declaration of a metric.

    Attributes:
        name: its key in metrics.jsonl and summary.json; `{part}` stands for any text without a slash.
        meaning: what it measures, as text for a table cell.
        unit: "share", "share difference", "ratio", "count", "flag" (0 or 1), "nats", …; the report formats values by
            their unit.
        axis: "step" if every optimiser step logs it, "iteration" if a model or its data has it once.
        better: the better direction; empty if there is none.
        title: the heading of a column or panel; if empty, the last part of the name.
    """

    name: str
    meaning: str
    unit: str
    axis: Literal["step", "iteration"] = "iteration"
    better: Literal["higher", "lower", ""] = ""
    title: str = ""

    @property
    def heading(self) -> str:
        """The title, or the last part of the name as words."""
        return self.title or self.last.replace("_", " ")

    @property
    def panel(self) -> str:
        """The heading as the title of a chart."""
        return self.heading[0].upper() + self.heading[1:].replace("\u00a0", " ")

    @property
    def arrow(self) -> str:
        """The better direction as an arrow; empty if there is none."""
        return {"higher": "↑", "lower": "↓", "": ""}[self.better]

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def own(self) -> str:
        """The name of a benchmark's metric without the benchmark's name, which the stage adds."""
        return self.name.removeprefix(BENCHMARK)

    def of(self, **parts: object) -> "Metric":
        """Return the metric with each `{part}` replaced by its value."""
        name, title = self.name, self.title
        for part, value in parts.items():
            name, title = (text.replace(f"{{{part}}}", str(value)) for text in (name, title))
        return replace(self, name=name, title=title)

    def matches(self, name: str) -> bool:
        """Whether a name is this metric's name with its `{part}` replaced."""
        return re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(self.name)), name) is not None


BENCHMARK = "{benchmark}/"
"""Prefix of the names of metrics that only benchmarks have."""

# fmt: off
# M0 and the seed data
PARAMETERS = Metric("parameters", "weights of the model, an adapter's not counted", "count")
CONTEXT = Metric("context", "the longest sequence M0 takes, in tokens", "tokens")
DROPOUT = Metric("dropout", "whether M0 has dropout that can be set", "flag")
HAS_ROUTER_LOSS = Metric("has_router_loss", "whether M0 has experts with a load balancing loss", "flag")
CHAT_TEMPLATE = Metric("chat_template", "whether M0's tokenizer has a chat template", "flag")
SYSTEM_TURNS = Metric("system_turns", "whether that template takes system turns", "flag")
EARLIER_TURNS = Metric("earlier_turns", "whether that template takes turns before the last question", "flag")
IFT = Metric("ift", "demonstrations of following instructions", "count")
IFT_TURNS = Metric("ift_turns", "assistant turns of these demonstrations that are taught", "count")
EFT = Metric("eft", "demonstrations of judging", "count")
QUESTIONS_TAUGHT = Metric("questions_taught", "ranked questions that judging is taught with", "count")
QUESTIONS_HELD_OUT = Metric("questions_held_out", "ranked questions that are held out, to measure judging", "count")
JUDGEMENTS_SCORED = Metric("judgements_scored", "judgements that the SFT baseline wrote with a score", "count")
QUESTIONS_AGREEING = Metric("questions_agreeing", "ranked questions with a judgement in the humans' order", "count")

# Training, step by step
LOSS = Metric("loss", "the optimised loss of the step, averaged over its pairs (or target tokens, or demonstrations)",
    "", axis="step", better="lower")
LOSS_PER_TOKEN = Metric("loss_per_token", "negative log-likelihood of a target token, nats",
    "nats", axis="step", better="lower")
LEARNING_RATE = Metric("learning_rate", "learning rate of the step", "", axis="step")
GRAD_NORM = Metric("grad_norm", "norm of the gradient before clipping", "", axis="step")
REWARDS_CHOSEN = Metric("rewards/chosen", "mean β[log π - log π_ref] of the chosen responses; of desirable ones in KTO",
    "reward", axis="step")
REWARDS_REJECTED = Metric("rewards/rejected",
    "mean β[log π - log π_ref] of the rejected responses; of undesirable ones in KTO", "reward", axis="step")
REWARDS_MARGINS = Metric("rewards/margins",
    "mean reward of the chosen minus that of the rejected responses; of desirable minus undesirable ones in KTO",
    "reward", axis="step", better="higher", title="reward margin")
REWARDS_MARGINS_PER_TOKEN = Metric("rewards/margins_per_token",
    "mean reward margin, with each reward divided by its response's tokens",
    "reward/token", axis="step", better="higher")
REWARDS_ACCURACIES = Metric("rewards/accuracies",
    "share of pairs whose chosen response has the larger reward; a tie counts as not",
    "share", axis="step", better="higher", title="reward accuracy")
REWARDS_TIES = Metric("rewards/ties", "share of pairs with equal rewards", "share", axis="step", title="reward ties")
REWARDS_ACCURACIES_AUGMENTED = Metric("rewards/accuracies_augmented",
    "share of pairs with Δ > 0, that is accuracy under p⊕x; Δ = 0 counts as not",
    "share", axis="step", better="higher", title="reward accuracy under p⊕x")
REWARDS_TIES_AUGMENTED = Metric("rewards/ties_augmented", "share of pairs with Δ = 0", "share", axis="step")
REFINEMENT_MEAN = Metric("refinement/mean",
    "mean of Δ over the pairs, in units of reward; of reward per token with loss.reduction=mean",
    "reward", axis="step", title="mean\u00a0Δ")
REFINEMENT_STD = Metric("refinement/std", "standard deviation of Δ over the pairs of a step, in the same units",
    "reward", axis="step", title="std of\u00a0Δ")
REFINEMENT_CORRELATION_WITH_MARGIN = Metric("refinement/correlation_with_margin",
    "Pearson's, of Δ and summed reward margin over the pairs of a step", "correlation", axis="step")
KL = Metric("kl",
    "KTO's estimate of KL(π ‖ π_ref) from responses to other prompts, nats; the loss takes it as 0 where it is below",
    "nats", axis="step", title="KL to the reference, nats")
LOGPS_CHOSEN = Metric("logps/chosen", "mean summed log-probability of the chosen responses, nats", "nats", axis="step")
LOGPS_REJECTED = Metric("logps/rejected", "mean summed log-probability of the rejected responses, nats",
    "nats", axis="step")
ROUTER_LOSS = Metric("router_loss",
    "load balancing loss of the experts before its coefficient, mean over forward passes; it is not part of the loss "
    "that is shown; there only for models that have one", "", axis="step", better="lower")
TOKENS_PER_SECOND = Metric("tokens_per_second", "tokens trained on a second; those of a second pass (p⊕x) count too",
    "tokens/s", axis="step", better="higher", title="tokens/s")
STEP_SECONDS = Metric("step_seconds", "wall time of an optimiser step; checkpoints and their comparison are left out",
    "s", axis="step", better="lower")
PEAK_MEMORY_GB = Metric("peak_memory_gb",
    "the most memory so far of any process, GiB: of its GPU, or resident where there is none",
    "GiB", axis="step", better="lower", title="memory, GiB")
TOKEN_ACCURACY = Metric("token_accuracy", "share of target tokens that were the most likely ones",
    "share", axis="step", better="higher")
STEP = Metric("{stage}/step", "optimiser step of a training", "count", axis="step")

# Training, once a model
DEMONSTRATIONS = Metric("demonstrations", "demonstrations trained on", "count")
TOKENS = Metric("tokens",
    "tokens of these demonstrations with their prompts; what those of a question begin with is counted once", "tokens")
PAIRS = Metric("pairs", "preference pairs trained on", "count")
LABELLED = Metric("labelled", "responses labelled as desirable or undesirable", "count", title="labelled responses")
DESIRABLE = Metric("desirable", "desirable ones among them", "count")
LOGPS_CHOSEN_CHANGE = Metric("logps/chosen_change",
    "log π of the chosen responses trained on, after alignment minus before, mean nats a pair",
    "nats", title="log\u00a0π of chosen, change")
LOGPS_CHOSEN_CHANGE_PER_TOKEN = Metric("logps/chosen_change_per_token",
    "the same change per token: all nats divided by all tokens",
    "nats/token", title="log\u00a0π of chosen, change a token")
LOGPS_REJECTED_CHANGE = Metric("logps/rejected_change",
    "log π of the rejected responses trained on, after alignment minus before, nats a pair",
    "nats", title="log\u00a0π of rejected, change")
LOGPS_REJECTED_CHANGE_PER_TOKEN = Metric("logps/rejected_change_per_token",
    "the same change per token: all nats divided by all tokens",
    "nats/token", title="log\u00a0π of rejected, change a token")
REWARDS_LENGTH_CORRELATION = Metric("rewards/length_correlation",
    "Pearson's, of implicit reward and tokens over both responses of the training pairs",
    "correlation", title="reward and length")
HELD_OUT_PAIRS = Metric("validation_pairs",
    "held-out preference pairs, which share no prompt and no response with other pairs", "count")
HELD_OUT_PASSED_OVER = Metric("held_out_passed_over",
    "pairs that cannot be held out, because they share a prompt or a response with earlier training data", "count")
CHOSEN_STEP = Metric("chosen_step", "optimiser step whose policy was taken, where checkpoints are compared", "count")
CHECKPOINT_WIN_RATE = Metric("checkpoint_win_rate/{step}",
    "validation instructions that the checkpoint after this step won against the one before it",
    "share", better="higher")
CHECKPOINT_WINS = Metric("checkpoint_wins/{step}", "validation instructions that it won in both orders",
    "count", better="higher")
CHECKPOINT_LOSSES = Metric("checkpoint_losses/{step}",
    "validation instructions that it lost in both orders; training stops if they are too many", "count", better="lower")
PROMPTS_CUT = Metric("prompts_cut", "pairs whose prompt lost its beginning to fit into train.align.max_length", "count")
PROMPTS_CUT_BEHIND_P = Metric("prompts_cut_behind_p",
    "pairs whose prompt is cut after p, to fit into the model's context", "count")
WITH_UNKNOWN_TOKENS = Metric("with_unknown_tokens",
    "texts with a token that the tokenizer does not know; missing if there are none", "count")
WITH_CONTROL_TOKENS = Metric("with_control_tokens",
    "texts that spell a control token, which is read as its characters; missing if there are none", "count")

# Instructions, responses and pairs
INSTRUCTIONS = Metric("instructions", "evaluation or validation instructions", "count")
QUESTIONS = Metric("questions", "ranked questions that are judged", "count")
WRITTEN = Metric("written", "instructions written, or read from a source", "count", title="instructions written")
KEPT = Metric("kept", "new instructions that passed the filters", "count", title="instructions kept")
BATCHES = Metric("batches", "batches of prompts for new instructions", "count")
NOVELTY = Metric("novelty",
    "1 minus an instruction's highest ROUGE-L F1 to a seed or one kept before it, mean over the new ones",
    "ratio", better="higher")
DISTINCT_1 = Metric("distinct_1",
    "distinct words among all words of an iteration's new instructions (Li et al. 2016, 1510.03055)",
    "ratio", better="higher", title="distinct words")
DISTINCT_2 = Metric("distinct_2",
    "distinct word bigrams among all bigrams; both fall as the count grows, so compare equal counts",
    "ratio", better="higher", title="distinct pairs of words")
MEAN_WORDS = Metric("mean_words", "mean length of the new instructions, words", "words")
RESPONSES = Metric("responses", "responses to all instructions", "count")
MEAN_TOKENS = Metric("mean_tokens", "mean length of the responses, tokens", "tokens")
MEAN_CHARACTERS = Metric("mean_characters", "mean length of the responses, characters", "characters")
FINISHED_SHARE = Metric("finished_share", "share of responses that end by themselves",
    "share", better="higher", title="finished")
MEAN_THOUGHT_TOKENS = Metric("mean_thought_tokens", "mean length of the thoughts before the responses, tokens",
    "tokens", title="thought tokens")
TRUNCATED_SHARE = Metric("truncated_share", "share of responses whose thought has no end, so that they have no answer",
    "share", better="lower", title="thoughts truncated")
CANDIDATE_PAIRS = Metric("candidate_pairs",
    "pairs of the rule if none were dropped: kept and dropped pairs together", "count")
MEAN_SCORE_MARGIN = Metric("mean_score_margin", "mean difference of the judge's scores in a pair",
    "score", title="score margin")
MEAN_LENGTH_DIFFERENCE = Metric("mean_length_difference", "mean length of chosen minus rejected responses, tokens",
    "tokens", title="chosen longer by")
SCORE_LENGTH_CORRELATION = Metric("score_length_correlation",
    "Spearman's, of the candidates' score and tokens, mean over instructions",
    "correlation", title="candidates: score and length")
REPLAYED_PAIRS = Metric("replayed_pairs", "given pairs that are trained on beside an iteration's own", "count")
REPLAYED_PAIRS_MISSING = Metric("replayed_pairs_missing",
    "given pairs that `data.replay.share` asks for beyond those that there are", "count")
POSITIVES = Metric("positives", "responses good enough to train on", "count")

# Judging
JUDGEMENTS = Metric("judgements", "judgements made, further attempts included", "count")
CRITERIA = Metric("criteria", "criteria written for instructions", "count")
RETRIES = Metric("retries", "further attempts, where a judgement carried no score", "count")
UNJUDGED_RESPONSES = Metric("unjudged_responses", "responses without a score", "count")
COMPARISONS = Metric("comparisons", "comparisons of two responses, both orders together", "count")
JUDGE_MEAN_SCORE = Metric("judge/mean_score", "mean score of the candidates", "score", title="mean score")
JUDGE_STD_SCORE = Metric("judge/std_score", "standard deviation of the scores", "score", title="std of scores")
JUDGE_ENTROPY = Metric("judge/token_entropy", "mean entropy of the judge's score distribution, nats", "nats")
JUDGE_VARIANCE = Metric("judge/variance", "mean variance of a response's judgements, where it has several valid ones",
    "score²")
JUDGE_SCORE_ENTROPY = Metric("judge/score_entropy", "entropy of the responses' scores, nats: 0 where all are the same",
    "nats")
JUDGE_TIED_SHARE = Metric("judge/tie_rate", "share of instructions with several responses whose scores are all equal",
    "share", better="lower", title="tied")
JUDGE_CONSTANT = Metric("judge/constant",
    "1 if the judge's scores are nearly constant (`judge.degeneracy`), else 0", "flag", better="lower")
CONSISTENCY = Metric("consistency",
    "share of two responses that the judge and a second one (`pair.consistent_with`) order alike, ties counting half",
    "share", better="higher", title="consistency")
JUDGE_DISAGREEMENT = Metric("judge/disagreement",
    "share of two responses that two judges of a panel rank in opposite orders, of those that both rank",
    "share", better="lower", title="judges disagree")
JUDGE_POSITION_BIAS = Metric("judge/position_bias",
    "share of comparisons in which the same position won in both orders",
    "share", better="lower", title="position bias")
JUDGE_PLACE_PREFERENCE = Metric("judge/position_bias_nats",
    "preference of a pairwise judge for the first position, nats", "nats")
JUDGE_FIRST_WINS = Metric("judge/first_position_wins",
    "share of the wins of compared judgements that are in the first position, over both orders; ½ is no preference",
    "share", title="wins in the first position")
JUDGE_HIGHER_CHOSEN = Metric("judge/higher_score_chosen",
    "share of pairs of judgements whose chosen judgement gives the higher score, of those with unequal scores; near 1 "
    "the judge is taught to score higher", "share", title="higher score chosen")
JUDGE_TIED_COMPARISONS = Metric("judge/tied_comparisons",
    "share of comparisons that are ties, disagreeing orders included", "share")
JUDGE_ALPHA = Metric("judge/alpha", "length penalty of the implicit reward per token of the response",
    "reward/token")
JUDGE_REQUESTS = Metric("judge/requests", "judgements requested from an external judge", "count")
JUDGE_REQUESTS_WITHOUT_USAGE = Metric("judge/requests_without_usage",
    "requested judgements whose reply has no token counts", "count")
JUDGE_PROMPT_TOKENS = Metric("judge/prompt_tokens", "tokens an external judge read", "tokens")
JUDGE_COMPLETION_TOKENS = Metric("judge/completion_tokens", "tokens an external judge wrote", "tokens")
JUDGE_COST = Metric("judge/cost",
    "cost of these tokens, by the prices of `judge.endpoint` at the time of judging, without requests that have no "
    "token counts",
    "currency", better="lower")

# One comparison of two models
WINS = Metric("wins", "instructions that the first of two models won in both orders", "count", better="higher")
TIES = Metric("ties", "instructions with a tie, or with orders that disagree", "count")
LOSSES = Metric("losses", "instructions lost in both orders", "count", better="lower")
WIN_RATE = Metric("win_rate", "share of instructions won head to head, a tie counts half", "share", better="higher")
WIN_RATE_LENGTH_CONTROLLED = Metric("win_rate_length_controlled",
    "expected win rate at equal length, by a logistic model of length and outcome",
    "share", better="higher", title="win rate at equal length")
MEAN_CHARACTERS_OPPONENT = Metric("mean_characters_opponent", "mean length of the opponent's answers, characters",
    "characters")

# Evaluation of a model
EVAL_WIN_RATE = Metric("eval/win_rate",
    "share of evaluation instructions won head to head against M1, a tie counts half",
    "share", better="higher", title="win rate vs\u00a0M1")
EVAL_WIN_RATE_LENGTH_CONTROLLED = Metric("eval/win_rate_length_controlled",
    "expected win rate at equal length, by a logistic model of length and outcome",
    "share", better="higher", title="win rate at equal length")
EVAL_WINS = Metric("eval/wins", "instructions won head to head, in both orders", "count", better="higher")
EVAL_TIES = Metric("eval/ties", "instructions with a tie, or with orders that disagree", "count")
EVAL_LOSSES = Metric("eval/losses", "instructions lost in both orders", "count", better="lower")
EVAL_POSITION_BIAS = Metric("eval/position_bias", "share of comparisons in which the same position won in both orders",
    "share", better="lower")
EVAL_SCORE_WIN_RATE = Metric("eval/score_win_rate",
    "share of instructions whose answer scores above M1's, a tie counts half",
    "share", better="higher", title="win rate by score")
EVAL_SCORE_WIN_RATE_LENGTH_CONTROLLED = Metric("eval/score_win_rate_length_controlled",
    "expected win rate by score at equal length", "share", better="higher")
EVAL_LENGTH_GROWTH = Metric("eval/length_growth", "mean length of the answers as a multiple of M1's",
    "ratio", title="answer length × M1's")
EVAL_DISTINCT_2 = Metric("eval/distinct_2",
    "distinct word bigrams of the answers (character bigrams for scripts without spaces) among all bigrams",
    "ratio", better="higher", title="distinct-2")
EVAL_REPEATED_4 = Metric("eval/repetition_4",
    "share of word 4-grams (or character 4-grams) that occur earlier in the same answer",
    "share", better="lower", title="repeated 4-grams")
EVAL_KL_TO_M1 = Metric("eval/kl_to_m1",
    "mean log π - log π_M1 of the model's own answers, nats per answer: an estimate of KL(π ‖ M1), which may be "
    "negative where answers are sampled below temperature 1 or top-p 1",
    "nats", title="KL to M1, nats")
EVAL_KL_TO_M1_PER_TOKEN = Metric("eval/kl_to_m1_per_token", "the same estimate per token", "nats/token")
EVAL_ANSWERS = Metric("eval/answers", "evaluation instructions answered", "count")
EVAL_MEAN_SCORE = Metric("eval/mean_score", "mean score of the answers, by the evaluation's judge",
    "score", better="higher")
EVAL_MEAN_CHARACTERS = Metric("eval/mean_characters", "mean length of the answers, characters",
    "characters", title="answer characters")
EVAL_FINISHED_SHARE = Metric("eval/finished_share", "share of answers that end by themselves",
    "share", better="higher", title="answers finished")
EVAL_SCORE_LENGTH_CORRELATION = Metric("eval/score_length_correlation",
    "Spearman's, of score and length in characters over the answers", "correlation", title="answers: score and length")
EVAL_TRUE_RATE = Metric("eval/true_rate",
    "share of an instruction's checks that the answer passes, whoever judges; mean over evaluation instructions",
    "share", better="higher", title="true rate")
EVAL_TRUE_GAIN = Metric("eval/true_gain", "true rate minus M1's on the same instructions; its interval is paired",
    "share difference", better="higher", title="true rate minus M1's")
EVAL_TRUE_WIN_RATE = Metric("eval/true_win_rate",
    "share of instructions whose answer passes more checks than M1's, a tie counts half",
    "share", better="higher", title="win rate by truth")
LONGER_PAIRS = Metric("longer_pairs", "pairs with responses of several turns or tool calls, which no judge scores",
    "count")
PREFERENCES_PAIRS = Metric("preferences/pairs", "pairs of `evaluate.preference_pairs` measured", "count")
PREFERENCES_SCORED = Metric("preferences/scored", "measured pairs whose responses both have a score",
    "count", title="scored pairs")
PREFERENCES_MARGIN_SCORE_PEARSON = Metric("preferences/margin_score_pearson",
    "Pearson's correlation of margin and score difference, over the scored pairs",
    "correlation", better="higher", title="margin and score, Pearson")
PREFERENCES_MARGIN_SCORE_SPEARMAN = Metric("preferences/margin_score_spearman",
    "Spearman's correlation of margin and score difference, over the scored pairs",
    "correlation", better="higher", title="margin and score, Spearman")
PREFERENCES_DELTA_SCORE_PEARSON = Metric("preferences/delta_score_pearson",
    "Pearson's correlation of Δ and score difference, over the scored pairs",
    "correlation", better="higher", title="Δ and score, Pearson")
PREFERENCES_DELTA_SCORE_SPEARMAN = Metric("preferences/delta_score_spearman",
    "Spearman's correlation of Δ and score difference, over the scored pairs",
    "correlation", better="higher", title="Δ and score, Spearman")
CROSSED = Metric("bound_violated/{bound}", "value that violates this bound of `evaluate.bounds`; missing otherwise", "")

# An iteration's judge and pairs against the truth
TRUTH_RATE = Metric("truth/rate", "share of an instruction's checks that a candidate passes, mean over instructions",
    "share", better="higher", title="candidates' true rate")
TRUTH_JUDGE_ACCURACY = Metric("truth/judge_accuracy",
    "share of two candidates to one instruction that differ in truth and that the judge orders alike; equal scores "
    "count half", "share", better="higher", title="judge right")
TRUTH_PAIR_GAP = Metric("truth/pair_gap", "share of checks that the chosen response passes minus the rejected one's",
    "share difference", better="higher", title="true gap of pairs")
TRUTH_PAIRS_RIGHT = Metric("truth/pairs_right", "share of pairs whose chosen response passes more checks",
    "share", better="higher", title="pairs right")
TRUTH_PAIRS_WRONG = Metric("truth/pairs_wrong", "share of pairs whose chosen response passes fewer checks",
    "share", better="lower", title="pairs wrong")

# How well a model judges
JUDGE_QUALITY_PAIRWISE_ACCURACY = Metric("judge_quality/pairwise_accuracy",
    "share of answer pairs ordered as the humans did, a tie counts as not",
    "share", better="higher", title="judge accuracy")
JUDGE_QUALITY_FIVE_BEST = Metric("judge_quality/top_score_precision",
    "share of answers with the top score that are the humans' best", "share", better="higher", title="judge 5-best")
JUDGE_QUALITY_EXACT_MATCH = Metric("judge_quality/exact_match", "share of questions whose whole order is the humans'",
    "share", better="higher", title="judge exact match")
JUDGE_QUALITY_SPEARMAN = Metric("judge_quality/spearman", "Spearman's ρ with the human order, mean over questions",
    "correlation", better="higher", title="judge\u00a0ρ")
JUDGE_QUALITY_KENDALL = Metric("judge_quality/kendall", "Kendall's τ-b with the human order, mean over questions",
    "correlation", better="higher", title="judge\u00a0τ")
JUDGE_QUALITY_QUESTIONS = Metric("judge_quality/questions", "questions measured", "count", title="judged questions")
JUDGE_QUALITY_UNJUDGED = Metric("judge_quality/unjudged", "questions left out because an answer carries no score",
    "count", title="unjudged questions")
JUDGE_QUALITY_UNDEFINED = Metric("judge_quality/undefined",
    "questions left out of the two correlations because all scores are equal", "count", title="constant questions")
CALIBRATION_PARSED = Metric("calibration/parsed", "share of judgements that carry a score", "share", better="higher")
CALIBRATION_SPREAD = Metric("calibration/score_entropy",
    "entropy of how often each whole score was given, nats; 0 for a constant judge", "nats", title="spread, nats")
CALIBRATION_TIES = Metric("calibration/ties", "share of answer pairs of a question with equal scores", "share")
CALIBRATION_POSITION_BIAS = Metric("calibration/position_bias",
    "share of a pairwise judge's comparisons in which the same position won in both orders", "share", better="lower")
CALIBRATION_SELF_CONSISTENCY = Metric("calibration/self_consistency",
    "share of pairs of judgements of one answer that give the same score",
    "share", better="higher", title="self-consistency")
CALIBRATION_LENGTH_CORRELATION = Metric("calibration/length_correlation",
    "Spearman's, of score and length in characters, mean over questions", "correlation", title="score and length")
CALIBRATION_SCORE_OF_RANK = Metric("calibration/score_of_rank/{rank}",
    "mean score of the answers with this human rank", "score", title="score of rank {rank}")

# Instruments: the judges by which two models' answers are told apart, and the model's own judging
INSTRUMENT_PASSED = Metric("instrument/{instrument}/passed",
    "1 if the instrument passes the bar of `evaluate.instruments`, 0 if it is blind; missing if it was not measured",
    "flag", better="higher", title="passed")
INSTRUMENT_ACCURACY = Metric("instrument/{instrument}/accuracy",
    "share of pairs of held-out ranked answers in which it prefers the better one; what it does not decide counts half",
    "share", better="higher", title="accuracy")
INSTRUMENT_ONE_PLACE = Metric("instrument/{instrument}/one_place",
    "share of its comparisons in which the same place wins in both orders", "share", better="lower", title="one place")
INSTRUMENT_FIRST_PLACE = Metric("instrument/{instrument}/first_place",
    "share of its wins that are in the first place, over both orders; ½ is no preference",
    "share", title="wins in the first place")
INSTRUMENT_TIES = Metric("instrument/{instrument}/ties",
    "share of these pairs that are ties, disagreeing orders included", "share", better="lower", title="ties")
INSTRUMENT_UNREAD = Metric("instrument/{instrument}/unread", "share of these pairs without a verdict or a score",
    "share", better="lower", title="without verdict")
INSTRUMENT_REPEATED = Metric("instrument/{instrument}/repeated",
    "share of two samples of one judge that order two answers alike; missing if it samples once",
    "share", better="higher", title="repeated alike")
INSTRUMENT_COMPARISONS = Metric("instrument/{instrument}/comparisons", "pairs of held-out ranked answers", "count",
    title="pairs")

# Benchmarks
BENCHMARK_QUESTIONS = Metric("{benchmark}/questions", "questions of the benchmark", "count")
BENCHMARK_SCORE = Metric("{benchmark}/score", "mean grade of its answers, 1 to 10, by its judge",
    "score", better="higher")
BENCHMARK_TURN = Metric("{benchmark}/turn_{turn}", "mean grade of the answers to the turns of this number",
    "score", better="higher")
BENCHMARK_REFERENCED = Metric("{benchmark}/referenced", "answers that were graded beside reference answers", "count")
BENCHMARK_MEAN_CHARACTERS = Metric("{benchmark}/mean_characters", "mean length of the answers, characters",
    "characters")
BENCHMARK_FINISHED_SHARE = Metric("{benchmark}/finished_share", "share of the answers that end by themselves",
    "share", better="higher")
BENCHMARK_WEIGHTED_WIN_RATE = Metric("{benchmark}/win_rate_weighted",
    "share of the verdicts of both orders that are for the model and not for the baseline; a tie counts half, and a "
    "verdict by far three times", "share", better="higher")
BENCHMARK_WEIGHTED_WIN_RATE_IN = Metric("{benchmark}/win_rate_weighted/{category}", "the same rate in this category",
    "share", better="higher")
BENCHMARK_STYLE_WIN_RATE = Metric("{benchmark}/win_rate_style_controlled",
    "expected rate where both answers have the same length and markdown, by a logistic model of style and verdicts",
    "share", better="higher", title="win rate at equal style")
BENCHMARK_STYLE_WIN_RATE_IN = Metric("{benchmark}/win_rate_style_controlled/{category}",
    "the expected rate at equal style in this category", "share", better="higher")
BENCHMARK_STYLE_EFFECT = Metric("{benchmark}/style_effect/{feature}",
    "what a difference of one standard deviation in this feature of style adds to the log-odds of a verdict for the "
    "model", "")
BENCHMARK_COMPARISONS = Metric("{benchmark}/labelled", "labelled comparisons that the judge was asked about", "count")
BENCHMARK_ACCURACY = Metric("{benchmark}/accuracy",
    "share of labelled comparisons that the judge decides as the label does; in RewardBench the mean of its sections",
    "share", better="higher", title="judge accuracy")
BENCHMARK_ACCURACY_IN = Metric("{benchmark}/accuracy/{subset}",
    "the same share in this subset; of RewardBench 2's Ties, its score", "share", better="higher")
BENCHMARK_CHANCE = Metric("{benchmark}/chance",
    "accuracy of a judge that guesses; RewardBench 2's Ties are left out", "share")
BENCHMARK_FAILED = Metric("{benchmark}/failed",
    "share of labelled comparisons in which a judgement failed, which count as wrong", "share", better="lower")
BENCHMARK_TIED = Metric("{benchmark}/tied", "share of labelled comparisons in which the judge prefers neither side",
    "share")
BENCHMARK_AVERAGE = Metric("{benchmark}/average", "mean of the tasks' metrics; the interval assumes independent tasks",
    "", better="higher")
BENCHMARK_TASK_DOCUMENTS = Metric("{benchmark}/{task}/documents", "documents of the task", "count")
BENCHMARK_TASK_PROMPTS_CUT = Metric("{benchmark}/{task}/prompts_cut",
    "requests whose prompt lost its beginning to fit into the context", "count")
BENCHMARK_TASK_METRIC = Metric("{benchmark}/{task}/{metric}",
    "lm-eval's metric of a task; the interval is ± 1.96 standard errors", "")
BENCHMARK_CATEGORY = Metric("{benchmark}/{category}",
    "mean grade of the answers to the questions of this category, over all turns", "score", better="higher")

# Every stage
DROPPED = Metric("dropped/{reason}", "records that a stage left out for this reason", "count")
STAGE_SECONDS = Metric("{stage}/seconds", "wall time of the stage when it ran", "s")
SECONDS = Metric("seconds", "wall time of a model's training data, training and evaluation",
    "s", better="lower", title="time")
# fmt: on

METRICS = {metric.name: metric for metric in tuple(globals().values()) if isinstance(metric, Metric)}
"""{name: declaration} of all metrics."""

INSTRUMENT = (
    INSTRUMENT_PASSED,
    INSTRUMENT_ACCURACY,
    INSTRUMENT_ONE_PLACE,
    INSTRUMENT_FIRST_PLACE,
    INSTRUMENT_TIES,
    INSTRUMENT_UNREAD,
    INSTRUMENT_REPEATED,
    INSTRUMENT_COMPARISONS,
)
"""Metrics of an instrument."""

COMPARED = (WINS, TIES, LOSSES, WIN_RATE, WIN_RATE_LENGTH_CONTROLLED, JUDGE_POSITION_BIAS)
"""Metrics of a head-to-head comparison that a model's evaluation has as `eval/<last part>`, against M1."""

HELD_OUT, PREFERENCES = "held_out/", "preferences/"
"""Prefixes of metrics over the held-out pairs of an iteration, and over those of `evaluate.preference_pairs`."""

PAIRS_OF = {HELD_OUT: ("held-out", "held-out pairs"), PREFERENCES: ("test", "pairs of `evaluate.preference_pairs`")}
OPPONENTS = {"_vs_previous": ("model before", "the model before it"), "_vs_given": ("given outputs", "given outputs")}
"""{suffix of the metric names: (title, text)} of comparisons with another model than M1."""


def over(pairs: str, metric: Metric) -> Metric:
    """Return the metric over other pairs than the training pairs: `HELD_OUT` or `PREFERENCES`."""
    title, whose = PAIRS_OF[pairs]
    meaning = f"{metric.meaning}; over the {whose}"
    title = f"{title} {metric.heading}"
    return replace(metric, name=pairs + metric.name, title=title, meaning=meaning, axis="iteration")


def against(opponent: str, metric: Metric) -> Metric:
    """Return a metric of `COMPARED` against one of `OPPONENTS`."""
    title, whom = OPPONENTS[opponent]
    title, meaning = f"{metric.heading} vs\u00a0{title}", f"{metric.meaning}; against {whom}"
    return replace(metric, name=f"eval/{metric.last}{opponent}", title=title, meaning=meaning)


def of_benchmark(name: str) -> Metric:
    """Return the declaration of a benchmark's metric, given its name without the benchmark's.

    A name without a declaration for benchmarks may have a general one. All others are metrics of a task or a category.
    """
    patterns = [metric for metric in METRICS.values() if metric.name.startswith(BENCHMARK)]
    known = METRICS.get(BENCHMARK + name) or METRICS.get(name)
    return known or next((metric for metric in patterns if metric.matches(BENCHMARK + name)), BENCHMARK_CATEGORY)


def declared(name: str) -> Metric | None:
    """Return the declaration of a metric, given its name in summary.json; None if there is none.

    The name may be of other pairs or of another opponent, have a text in place of a `{part}`, or be a benchmark's.
    """
    if name in METRICS:
        return METRICS[name]
    for opponent in OPPONENTS:
        compared = {against(opponent, metric).name: metric for metric in COMPARED}
        if name in compared:
            return against(opponent, compared[name])
    for pairs in PAIRS_OF:
        if name.startswith(pairs) and (metric := declared(name.removeprefix(pairs))) is not None:
            return over(pairs, metric)
    families = [metric for metric in METRICS.values() if "{" in metric.name and not metric.name.startswith("{")]
    if (family := next((metric for metric in families if metric.matches(name)), None)) is not None:
        return family
    _, inside, rest = name.partition("/")
    return of_benchmark(rest) if inside else None


def signed(name: str) -> tuple[str, int]:
    """Return (metric, sign). "-metric" has sign -1: the metric should be low. The best has the highest sign × value."""
    return name.removeprefix("-"), -1 if name.startswith("-") else 1
