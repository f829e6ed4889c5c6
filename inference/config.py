"""How text is drawn from a model."""

import dataclasses

from batiste.fields import Config, check_types


@dataclasses.dataclass
class SamplingConfig(Config):
    """How tokens are drawn, how many, and what a finished run continues."""

    temperature: float = 0.8  # what logits are divided by; 0 is greedy
    top_k: int | None = None  # only so many of the likeliest tokens are drawn; None: all
    top_p: float | None = 0.95  # only the likeliest tokens up to this probability in all; None: all
    seed: int = 0  # another seed, another text
    max_tokens: int | None = 128  # tokens to write at most; None: up to model.max_length
    prompts: tuple[str, ...] = ("",)  # what a finished run continues

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a value that means nothing."""
        check_types(self, "sample.")
        if self.temperature < 0:
            raise ValueError(f"sample.temperature={self.temperature}: expected >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sample.top_k={self.top_k}: expected at least 1, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sample.top_p={self.top_p}: expected 0 < top_p <= 1, or None")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"sample.max_tokens={self.max_tokens}: expected at least 1, or None")
