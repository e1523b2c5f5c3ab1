"""From hidden state to token: interchangeable heads, each built as head(width, spec)."""

from heads.categorical import Categorical

CLASSES = {made.__name__: made for made in (Categorical,)}
