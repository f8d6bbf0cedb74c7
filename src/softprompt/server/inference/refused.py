"""Fields of OpenAI's and vLLM's APIs that would change the answer and that this server does not have.

All other unknown fields are ignored: clients send many that change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from softprompt.server.errors import ApiError

_log = logging.getLogger(__name__)
_TOOLS = "the base is no tool-calling model; describe the tool in a message, or ask for JSON with response_format"
_GUIDES = "an answer can be guided by a choice or a JSON schema; use structured_outputs or response_format"
_FORM = "a prompt's own form says how its input is written; use /v1/completions to write it yourself"
_SPEECH = "answers are text"
_MISSING = "this server does not have it; leave it out"

_REFUSED: Mapping[str, str] = {
    "tools": _TOOLS, "tool_choice": _TOOLS, "functions": _TOOLS, "function_call": _TOOLS,
    "parallel_tool_calls": _TOOLS, "web_search_options": _TOOLS, "tool_calls": _TOOLS, "tool_call_id": _TOOLS,
    "audio": _SPEECH, "modalities": _SPEECH,
    "guided_regex": _GUIDES, "guided_grammar": _GUIDES, "regex": _GUIDES, "grammar": _GUIDES,
    "structural_tag": _GUIDES, "json_object": _GUIDES,
    "chat_template": _FORM, "continue_final_message": _FORM, "documents": _FORM,
    "suffix": "a causal language model only continues a text; leave it out",
    "prediction": _MISSING, "use_beam_search": _MISSING, "prompt_logprobs": _MISSING, "prompt_embeds": _MISSING,
    "truncate_prompt_tokens": _MISSING, "allowed_token_ids": _MISSING, "bad_words": _MISSING,
    "logits_processors": _MISSING,
}  # fmt: skip
_HARMLESS: Mapping[str, tuple[object, ...]] = {  # values of them that ask for nothing
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "parallel_tool_calls": (True,),
}  # fmt: skip
_TOOLS_OF = {
    "tool_choice": ("tools", "parallel_tool_calls"),
    "function_call": ("functions",),
}  # "none": they are unused


def refuse(extra: Mapping[str, Any] | None) -> None:  # Any: a client's JSON
    """Raises ApiError 400 for a field that would have to change the answer."""
    unused = {tool for choice, tools in _TOOLS_OF.items() if (extra or {}).get(choice) == "none" for tool in tools}
    for name, value in (extra or {}).items():
        if name in unused:
            continue
        is_off = value is None or value is False or value in ("", 0, [], {})
        if name in _REFUSED and not is_off and value not in _HARMLESS.get(name, ()):
            raise ApiError(400, f"{name} is not supported: {_REFUSED[name]}", "unsupported_parameter", name)
    if extra:
        _log.debug("fields ignored: %s", ", ".join(map(ascii, extra)))
