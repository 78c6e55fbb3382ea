"""The options of sampling. Standard library only: `fastllama generate --help` imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    max_new_tokens: int = 128
    """Tokens to generate at most; an end token, or the end of the context, stops earlier."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample from this many most likely tokens only; None samples from all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the random draws; the same seed gives the same text."""

    def validate(self) -> None:
        """Check the ranges of all values.

        Raises:
            ValueError: a value is out of range; the message names its option.
        """
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more and finite, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be greater than 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and less than 2^63, not {self.seed}.")
