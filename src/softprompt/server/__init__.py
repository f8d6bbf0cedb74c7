"""OpenAI's API over one frozen base: HTTP in, objects out. It never touches a tensor.

Inside, imports point down: start > app > inference | jobs > prompts > running > clients > state > parts, errors.
A router finds what it needs (the engine, the registry, the jobs) by its type among the app's parts.
"""
