"""Generation of an iteration's pairs: instructions, responses of every writer, judgements, pairs.

Who writes, who judges and which rule pairs are settings; no published loop has a branch of its own here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.core.files import derive_seed
from selfalign.data.pair_rules import PairRule
from selfalign.judges.protocol import asks_a_policy
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.models import RunJudge, RunModels
from selfalign.runs.labels import AHEAD, JUDGE_PAIRS, Label
from selfalign.runs.runner import StageRunner
from selfalign.stages.demonstrated_instructions import demonstrated_instructions, demonstrated_responses
from selfalign.stages.instruct import DEMONSTRATIONS, given_instructions, instruct
from selfalign.stages.meta_judge import meta_judge
from selfalign.stages.pair import gather_pairs, pair
from selfalign.stages.respond import DEMONSTRATION, NEXT, join_responses, respond
from selfalign.stages.truth import truth_of_candidates
from selfalign.store.artifacts import Artifact


@dataclass(slots=True)
class PairGeneration:
    """Generates the pairs of one iteration after the other.

    Attributes:
        config: the experiment.
        run: makes artifacts.
        inputs: the run's data.
        align: aligns the current model on pairs; for the writer that is one alignment ahead.
        instructions: the new instructions of the iterations so far.
    """

    config: ExperimentConfig
    run: StageRunner
    inputs: RunInputs
    align: Callable[..., Artifact]
    instructions: list[Artifact] = field(default_factory=list)

    def pairs(self, iteration: int, models: RunModels) -> Artifact:
        """Generate the pairs or positives of an iteration."""
        self.instructions.append(self._instruct(iteration, models))
        return self._pair(self.config.in_iteration(iteration), iteration, models)

    def _instruct(self, iteration: int, models: RunModels) -> Artifact:
        """Generate or read new instructions, which differ from all known ones."""
        label, config = Label.iteration(iteration, "instructions"), self.config.data.instruct
        earlier, held_out = list(self.instructions), self.inputs.held_out
        if config.source == DEMONSTRATIONS:
            drawn = {"count": config.count, "seeds": self.inputs.seed_data, "held_out": held_out}
            return self.run.make(label, demonstrated_instructions, seed=self._seed(label), **drawn)
        known = {"config": config, "seeds": self.inputs.seed_data, "earlier": earlier, "held_out": held_out}
        if self.inputs.instructions is not None:
            return self.run.make(label, given_instructions, given=self.inputs.instructions, **known)
        return self.run.make(
            label,
            instruct,
            policy=models.writer or models.named(config.model),
            engine=self.config.engine,
            seed=self._seed(label),
            **known,
        )

    def _pair(self, config: ExperimentConfig, iteration: int, models: RunModels, prefix: str = "") -> Artifact:
        """Let every writer respond to the newest instructions, judge the responses, and pair them, and the judgements.

        Args:
            config: the settings of the iteration.
            iteration: its number.
            models: the models of the run so far.
            prefix: of the labels' parts.
        """
        rule, instructions = config.pair, self.instructions[-1]
        label = Label.iteration(iteration, f"{prefix}responses")
        responses = self._responses(config, label, iteration, models)
        judging = RunJudge(config, self.run, config.judge, config.judge_setting(iteration))
        judgements, second = None, {}
        if not isinstance(rule, PairRule) or rule.needs_scores:
            label = label.sibling(f"{prefix}judgements")
            judgements = judging.judge(label, None, models, instructions, responses)
        if isinstance(rule, PairRule) and rule.consistency != "none":
            label = label.sibling(f"{prefix}second_judgements")
            second["second"] = judging.judge(label, rule.consistent_with, models, instructions, responses)
        label = label.sibling(f"{prefix}pairs")
        pairs = self.run.make(
            label,
            pair,
            rule=rule.at(iteration) if isinstance(rule, PairRule) else rule,
            instructions=instructions,
            responses=responses,
            judgements=judgements,
            seed=self._seed(label),
            **({"thought_prompt": asked} if (asked := config.model.thinking.prompt) else {}),
            **second,
        )
        if judgements is not None and not prefix:
            self._check(label, instructions, responses, judgements, pairs if isinstance(rule, PairRule) else None)
        meta = config.data.meta_judge
        if meta is None or iteration not in meta.chosen_iterations(config.iterations):
            return pairs
        label = label.sibling(f"{prefix}{JUDGE_PAIRS}")
        judged = {"instructions": instructions, "responses": responses, "judgements": judgements}
        parts = [pairs, self._judge_pairs(config, label, models, judged)]
        return self.run.make(label.sibling(f"{prefix}joined_pairs"), gather_pairs, parts=parts)

    def _check(
        self, label: Label, instructions: Artifact, responses: Artifact, judgements: Artifact, pairs: Artifact | None
    ) -> None:
        """Check responses, scores and pairs by what given instructions say is right, where they must say it."""
        if self.inputs.say_what_is_right and self.inputs.instructions is not None:
            made = {"instructions": instructions, "responses": responses, "judgements": judgements}
            self.run.make(label.sibling("truth"), truth_of_candidates, pairs=pairs, **made)

    def _judge_pairs(
        self, config: ExperimentConfig, label: Label, models: RunModels, judged: dict[str, Any]
    ) -> Artifact:
        """Pair judgements of the newest responses with one another (arXiv 2407.19594)."""
        meta = config.data.meta_judge
        policy = models.own_or(meta.model, models.outside.get(meta.key)) if asks_a_policy(meta) else None
        return self.run.make(
            label,
            meta_judge,
            comparator=replace(meta, iterations=None),
            judge=config.judge,
            policy=policy,
            engine=config.engine,
            seed=self._seed(label),
            **judged,
        )

    def _responses(self, config: ExperimentConfig, label: Label, iteration: int, models: RunModels) -> Artifact:
        """Return the responses of the iteration's writers, which are joined unless M_t alone writes."""
        writers, parts = config.data.respond.writers, dict[str, Artifact]()
        for writer in writers:
            own = label if writers == ["self"] else label.sibling(f"{label.part}_by_{writer}")
            if writer == DEMONSTRATION:
                given = {"instructions": self.instructions[-1], "seeds": self.inputs.seed_data, "base": models.base}
                parts[writer] = self.run.make(own, demonstrated_responses, **given)
                continue
            policy = self._next_model(config, iteration, models) if writer == NEXT else models.named(writer)
            parts[writer] = self.run.make(
                own,
                respond,
                config=config.data.respond.by_one_writer(),
                policy=policy,
                instructions=self.instructions[-1],
                engine=config.engine,
                seed=self._seed(Label.iteration(iteration, "responses" + f"_by_{writer}" * (writer != "self"))),
            )
        if writers == ["self"]:
            return parts["self"]
        return self.run.make(label, join_responses, instructions=self.instructions[-1], parts=parts)

    def _next_model(self, config: ExperimentConfig, iteration: int, models: RunModels) -> Artifact:
        """Align once ahead, on pairs in which M_t writes in place of the next model (arXiv 2508.06026)."""
        respond = config.data.respond
        writers = list(dict.fromkeys("self" if writer == NEXT else writer for writer in respond.writers))
        rule = config.pair.without_writer(NEXT, "self")
        ahead = replace(config, data=replace(config.data, respond=replace(respond, writers=writers)), pair=rule)
        pairs = self._pair(ahead, iteration, models, prefix=AHEAD)
        return self.align(iteration, models, pairs, ahead=True)

    def _seed(self, purpose: Label) -> int:
        return derive_seed(self.config.seed, str(purpose))
