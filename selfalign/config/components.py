"""Every component that a configuration can choose, by group and name."""

from selfalign.benchmarks.alpaca_eval import AlpacaEval
from selfalign.benchmarks.lm_eval import LmEval
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.data.pair_rules import AllOrdered, BestVsK, BestWorst, RandomPair
from selfalign.engines.server import Server
from selfalign.engines.transformers import Transformers
from selfalign.engines.vllm_engine import VLLM
from selfalign.losses.preference import DPO, IPO, ODPO, Positives, SrDPO, SrIPO
from selfalign.models.config import ModelConfig
from selfalign.stages.compare import HeadToHead
from selfalign.stages.evaluate import EvaluateConfig
from selfalign.stages.judge import ExpectedScore, ExternalScore, ImplicitReward, Pairwise, SampledScore
from selfalign.stages.pair import PositivesOnly
from selfalign.tracking.wandb import NoTracking, Wandb
from selfalign.training.checkpoint_selection import CheckpointComparator
from selfalign.training.config import TrainConfig

COMPONENTS: dict[str, dict[str, type]] = {
    "model": {"model": ModelConfig},
    "data": {"self_rewarding": SelfRewarding, "pairs": Pairs},
    "generate": {"transformers": Transformers, "vllm": VLLM, "server": Server},
    "judge": {
        "sampled_score": SampledScore,
        "expected_score": ExpectedScore,
        "pairwise": Pairwise,
        "implicit": ImplicitReward,
        "external": ExternalScore,
    },
    "pair": {
        "best_worst": BestWorst,
        "random": RandomPair,
        "all_ordered": AllOrdered,
        "best_vs_k": BestVsK,
        "positives": PositivesOnly,
    },
    "loss": {"dpo": DPO, "ipo": IPO, "sr_dpo": SrDPO, "sr_ipo": SrIPO, "odpo": ODPO, "positives": Positives},
    "train": {"train": TrainConfig, "head_to_head": CheckpointComparator},
    "evaluate": {"evaluate": EvaluateConfig, "head_to_head": HeadToHead},
    "benchmark": {"mt_bench": MTBench, "alpaca_eval": AlpacaEval, "lm_eval": LmEval},
    "track": {"wandb": Wandb, "none": NoTracking},
}
"""Group → name → component; `conf/<group>/*.yaml` refer to them as /schema/<group>/<name>."""
