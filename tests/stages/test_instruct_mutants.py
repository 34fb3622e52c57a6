"""Instruction writing broken on purpose, as others have broken it: every mutant must be caught by a named test."""

from functools import partial
from types import ModuleType
from typing import Any

import pytest
import test_instruct as tests
import test_rouge
import test_text_filters
from builders import completion
from mutation import Check, assert_caught

from selfalign.data import rouge, text_filters
from selfalign.engines.protocol import Completion, Request, generate_batched
from selfalign.stages import instruct

LEDGER = tests.test_every_written_text_is_kept_or_counted_as_dropped
PARROT = tests.test_copy_of_what_the_prompt_shows_is_told_from_a_copy_of_another_seed
HELD_OUT = tests.test_copy_of_a_held_out_instruction_is_dropped
EARLIER = tests.test_new_instruction_differs_from_those_of_earlier_iterations
SHOTS = tests.test_paper_s_prompt_shows_six_seeds_and_two_own_instructions_drawn_by_seed
NUMBERS = tests.test_prompts_show_the_configured_numbers_of_seeds_and_own_instructions
BOUND = tests.test_prompts_do_not_grow_from_batch_to_batch
TEMPLATE = tests.test_prompt_is_in_the_writer_s_own_chat_template
FAILURE = tests.test_failure_of_the_generator_is_no_empty_instruction
RESUMED = tests.test_interrupted_writing_goes_on_where_it_stopped
ORDER = tests.test_given_instructions_are_taken_in_their_order_and_once

COPIES = '        if words in map(words_of, shown):\n            return "copy_of_demonstration"\n'
NEAR = "if self._known_held_out.highest(words) >= self.config.max_rouge_l:"
OWN = "rng.sample(generated, min(config.generated_examples, len(generated)))"
EXAMPLES = "examples += rng.sample(pool.seeds, min(missing, len(pool.seeds)))"
ASKED = 'encode_prompt(generator.tokenizer, [user], f"Task {len(examples) + 1}:")'
WRITTEN = "made = generate_batched("
SWALLOWED = "made = _swallow("
# (name, old text, new text, the test that notices)
STAGE: list[tuple[str, str, str, Check]] = [
    ("D3 1: demonstrations come back as new", COPIES, "", PARROT),
    ("D3 1: seeds come back as new", "RougeIndex.of(self.seeds + self.earlier)", "RougeIndex.of(self.earlier)", LEDGER),
    ("D3 1: nothing kept is compared with", "self._known.add(words)", "", LEDGER),
    ("D3 1: earlier iterations are forgotten", "RougeIndex.of(self.seeds + "
    "self.earlier)", "RougeIndex.of(self.seeds)", EARLIER),
    ("D3 1: the prompt is parsed too", "completion.text)]", '"Task 0: seed\\n" + completion.text)]', LEDGER),
    ("D3 2: all that was kept goes into the prompt", OWN, "list(generated)", NUMBERS),
    ("D3 2: every prompt shows the same", "derive_seed(seed, batch, index))", "derive_seed(seed))", SHOTS),
    ("the examples are the same for every seed", "random.Random(seed)", "random.Random(0)", SHOTS),
    ("no own instructions in the prompt", EXAMPLES, EXAMPLES.replace("+=", "="), SHOTS),
    ("D3 3: the last task always goes", "if cut else (tasks, 0)", "if cut else (tasks[:-1], 0)", LEDGER),
    ("D3 3: a cut task is kept", "return (tasks[:-1], 1) if cut else (tasks, 0)", "return tasks, 0", LEDGER),
    ("D3 3: a cut task is dropped without being counted", 'pool.dropped["truncated"] += cut', "pass", LEDGER),
    ("several tasks stay one", r'"(?:^|\n)\s*(?:\W*)Task \d+\s*:"', '"never"', LEDGER),
    ("D3 7: held-out instructions are trained on", NEAR, "if False:", HELD_OUT),
    ("D3 7: only exact copies of them are noticed", NEAR, "if words in self._known_held_out:", HELD_OUT),
    ("D3 7: they are not passed on", "earlier_texts, held_out_texts)", "earlier_texts)", HELD_OUT),
    ("D3 12: another family's template", ASKED,
     'generator.tokenizer.encode("<|im_start|>user\\n" + user["content"] + "<|im_end|>\\n<|im_start|>assistant\\n'
     'Task " + str(len(examples) + 1) + ":")', TEMPLATE),
    ("D3 13: exceptions are swallowed", WRITTEN, SWALLOWED, FAILURE),
    ("the batch's number is not in the seeds", 'derive_seed(seed, "write", batch, index)',
     'derive_seed(seed, "write", index)', BOUND),
    ("a resumed run writes everything anew", "str(batch), size=0", "str(random.random()), size=0", RESUMED),
    ("given ones are read from the start again", "records[start:]", "records", ORDER),
    ("given ones are read in another order", "records[start:]", "sorted(records[start:], key=lambda r: r.text)", ORDER),
]  # fmt: skip

RANDOM = test_rouge.test_rouge_is_the_plain_definition_on_random_texts
UNKNOWN = test_rouge.test_words_that_no_known_text_has_match_nothing
ROUGE: list[tuple[str, str, str, Check]] = [
    ("recall instead of F1", "(len(words) + len(other))", "(2 * len(other))", RANDOM),
    ("F1 without its 2", "return 2 * LCS", "return LCS", RANDOM),
    (
        "unknown words count as words",
        'self._characters.get(word, "\\0")',
        "self._characters.get(word, chr(1))",
        UNKNOWN,
    ),
    ("the first known text instead of the nearest", "found[0])", "next(iter(self._texts)))", UNKNOWN),
]

SCRIPTS = test_text_filters.test_other_script_or_no_common_word_is_another_language
KEPT = test_text_filters.test_few_foreign_letters_and_few_words_are_none
FOREIGN, WORDLESS = (partial(SCRIPTS, test_text_filters.FOREIGN[n]) for n in (1, 3))
QUOTED = partial(KEPT, "Translate “доброе утро” into English.")
SHORT = partial(KEPT, "Name edible wild mushrooms.")
FILTERS: list[tuple[str, str, str, Check]] = [
    ("every script passes", "other_script = bool(self.scripts) and", "other_script = False and", FOREIGN),
    ("one foreign letter is enough", "foreign > letters.total() / 2", "foreign > 0", QUOTED),
    ("every word passes", "unknown = bool(self.common) and", "unknown = False and", WORDLESS),
    ("short texts need a common word too", "len(words) >= WORDS_TO_TELL and", "", SHORT),
]
MUTANTS = [
    *((instruct, tests, *mutant) for mutant in STAGE),
    *((rouge, test_rouge, *mutant) for mutant in ROUGE),
    *((text_filters, test_text_filters, *mutant) for mutant in FILTERS),
]


def swallow(generator: Any, requests: list[Request], *rest: Any, size: int) -> list[list[Completion]]:
    """Takes every failure for an empty answer."""
    try:
        return generate_batched(generator, requests, *rest, size=size)
    except RuntimeError:
        return [[completion("")] for _ in requests]


@pytest.mark.parametrize(
    ("module", "tested_in", "old", "new", "check"),
    [(module, where, old, new, check) for module, where, _, old, new, check in MUTANTS],
    ids=[mutant[2] for mutant in MUTANTS],
)
def test_mutant_is_caught(
    module: ModuleType, tested_in: ModuleType, old: str, new: str, check: Check, given: dict[str, Any]
) -> None:
    assert_caught(module, tested_in, old, new, check, given, _swallow=swallow)
