"""The prompts that are served, by name: the library's, the clients' own, and other names for them."""
