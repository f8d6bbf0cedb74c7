"""transformers' own headed models on a tiny base's weights: the truth for heads, and what PEFT wraps."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from softprompt.base import Base

AUTO = {
    "classify": hf.AutoModelForSequenceClassification,
    "tag": hf.AutoModelForTokenClassification,
    "answer": hf.AutoModelForQuestionAnswering,
    "embed": hf.AutoModel,
}


def headed_model(base: Base, task: str, num_labels: int = 3, seed: int = 0) -> Any:  # Any: whatever the family has
    """Another model with the base's weights, in eval mode, and a head with random weights and biases."""
    settings = base.model.config.to_dict()
    for name in ("id2label", "label2id", "architectures"):
        settings.pop(name, None)
    config = type(base.model.config)(**settings, num_labels=2 if task == "answer" else num_labels)
    config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AUTO[task].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    missing, unexpected = model.base_model.load_state_dict(base.model.base_model.state_dict(), strict=False)
    assert all("pooler" in name for name in (*missing, *unexpected))
    return model.eval().to(base.dtype).requires_grad_(False)


def outputs_of(model: Any, **inputs: Any) -> Tensor:
    """The logits of a headed model; start and end logits side by side; the last hidden states of one without a head."""
    with torch.no_grad():
        found = model(**inputs)
    if hasattr(found, "start_logits"):
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    logits: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return logits
