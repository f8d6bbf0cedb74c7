"""Three small bases with tokenizers of the three kinds that differ where text meets text; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from softprompt.base.load import freeze_base
from softprompt.base.model import Base

CORPUS = [
    "Review: a good film, well told\nSentiment: positive",
    "Review: a bad film, badly told\nSentiment: negative",
    "the one thing that should matter to you is the thing you do\n\n  and so on",
    "User: what do you want? Assistant: I want to act as a coach. System: be kind.",
] * 4
REAL_LLAMA = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K-llama"


def make_base(tokenizer: PreTrainedTokenizerFast, name: str) -> Base:
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=8, n_layer=1, n_head=1)
    config.bos_token_id = config.eos_token_id = None
    return freeze_base(GPT2LMHeadModel(config), tokenizer, name=name)


def byte_tokenizer(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, nothing in front, one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: SentencePiece BPE with byte fallback, a space put before every text, BOS in front."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no token spans two words
    trainer = trainers.BpeTrainer(vocab_size=130, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    learned = trained.get_vocab()
    vocab = {token: i for i, token in enumerate(sorted(learned, key=lambda token: learned[token]))}
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    model = models.BPE(vocab=vocab, merges=_merges(trained), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words between spaces; white space alone is no token, and there is no EOS."""
    words = sorted({word for text in CORPUS for word in text.replace("\n", " ").split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="session")
def byte_base() -> Base:
    return make_base(byte_tokenizer(), "byte")


@pytest.fixture(scope="session")
def spaced_byte_base() -> Base:
    return make_base(byte_tokenizer(add_prefix_space=True), "spaced-byte")


@pytest.fixture(scope="session")
def llama_base() -> Base:
    return make_base(llama_tokenizer(), "llama")


@pytest.fixture(scope="session")
def word_base() -> Base:
    return make_base(word_tokenizer(), "word")


@pytest.fixture(scope="session")
def real_llama() -> Base:
    if not REAL_LLAMA.is_dir():
        pytest.skip(f"{REAL_LLAMA} is not there")
    model = AutoModelForCausalLM.from_pretrained(REAL_LLAMA)
    return freeze_base(model, AutoTokenizer.from_pretrained(REAL_LLAMA), name="stories260K")


@pytest.fixture(params=["byte_base", "spaced_byte_base", "llama_base", "word_base", "real_llama"])
def any_base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def byte_encoder() -> Base:
    """RoBERTa's kind: byte-level BPE, <s> in front and </s> behind."""
    import transformers as hf

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=AddedToken("<mask>", lstrip=True),
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip
    config = hf.RobertaConfig(
        vocab_size=len(made), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=98,
    )  # fmt: skip
    return freeze_base(hf.RobertaForMaskedLM(config), made, name="byte-encoder")
