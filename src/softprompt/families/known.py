"""The architectures for which training, generation and comparison are tested exact (`tests/families`)."""

KNOWN_FAMILIES = frozenset(
    {
        "bloom", "falcon", "gemma", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mpt", "opt",
        "phi", "phi3", "qwen2", "qwen3",
    }
)  # fmt: skip
