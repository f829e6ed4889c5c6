"""How text is drawn from a model."""

import dataclasses


@dataclasses.dataclass
class SamplingConfig:
    """temperature 0 is greedy; top_k and top_p keep the likeliest tokens before drawing.

    max_tokens: None fills the model's max_length. prompts: what a finished run continues.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0
    max_tokens: int | None = 128
    prompts: tuple[str, ...] = ("",)

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a value that means nothing."""
        if self.temperature < 0:
            raise ValueError(f"sample.temperature={self.temperature}: expected >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sample.top_k={self.top_k}: expected at least 1, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sample.top_p={self.top_p}: expected 0 < top_p <= 1, or None")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"sample.max_tokens={self.max_tokens}: expected at least 1, or None")
