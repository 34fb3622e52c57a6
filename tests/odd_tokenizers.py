"""Tokenizers that policies seldom have: by word pieces, without bytes, in lower case, with odd control tokens."""

from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Why so? Because it is so. The city of Rome is in Italy, and Paris in France.",
    "user question assistant answer: It's so & 1 + x. Really (Roma)! One, two, three. - one - two `x` **Rome**",
]
BYTES = pre_tokenizers.ByteLevel.alphabet()


def by_bytes(normalizer: Any = None, **options: bool) -> Any:
    """A byte-level tokenizer whose control tokens have these options."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained(raw, trainers.BpeTrainer(vocab_size=320, initial_alphabet=BYTES, show_progress=False))
    if normalizer is not None:
        raw.normalizer = normalizer
    return with_control_tokens(raw, "<|endoftext|>", **options)


def by_word_pieces() -> Any:
    """BERT's kind: lower case, no white space, [UNK] for a word with a letter it does not know."""
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trained(raw, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))
    return with_control_tokens(raw, "[UNK]")


def by_pieces() -> Any:
    """SentencePiece's Unigram without bytes: <unk> for letters it does not know."""
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trained(
        raw,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return with_control_tokens(raw, "<unk>")


def trained(raw: RawTokenizer, trainer: Any) -> None:
    raw.train_from_iterator(TEXTS * 3, trainer)


def with_control_tokens(raw: RawTokenizer, unknown: str, **options: bool) -> Any:
    """A tokenizer with ChatML's tokens and template."""
    for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        raw.add_special_tokens([AddedToken(word, special=True, **{"normalized": False, **options})])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=unknown,
        chat_template=CHATML,
    )
