"""Rows of an encoder-decoder: [soft prompt, text] for the encoder, [decoder's prompt, start, target] for the decoder.

N targets, D hidden width, P prompt length, H embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.splice.embed import Row, Targets


def decoded_targets(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Targets]:
    """The decoder's hidden states [N, D] that predict the rows' targets, and the targets.

    A row's `source` is what the encoder reads behind the prompt, its `ids` what the decoder is to write behind its
    start token. With `has_decoder_prompt` the first half of the vectors is the encoder's, the second the decoder's.
    """
    raise NotImplementedError
