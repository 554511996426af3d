"""GRPOConfig with the fields of CreditConfig added."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trl import GRPOConfig

from sgcd_kernels.credit.config import CreditConfig, Rule, SpanValue


@dataclass
class SGCDConfig(GRPOConfig):  # type: ignore[misc]
    """The fields of trl.GRPOConfig, and those of `sgcd_kernels.CreditConfig` (documented there) except `seed`.

    Rule "permuted" uses the `seed` of the training arguments. Its constructor raises ValueError as those of both do.
    """

    reference_column: str = "reference"  # of the data set; not read if the trainer gets a `reference_func`
    rule: Rule = "sgcd"
    gamma: float = 1.0
    clip: float = 2.0
    quantile: float = 0.99
    d_floor: float = 0.1
    start: float = 0.1
    reset: float = 0.02
    patience: int = 16
    entropy_ratio: float = 1.5
    entropy_margin: float = 0.1
    span_value: SpanValue = "onset"
    gear_alpha: float = 0.2
    rlsd_lambda: float = 0.5
    rlsd_epsilon: float = 0.2
    sc_grpo_quantile: float = 0.75
    sc_grpo_floor: float = 1e-4
    egrsd_epsilon: float = 0.2
    egrsd_gamma: float = 0.3
    egrsd_floor: float = 0.1
    dgpo_kappa: float = 1.0
    dgpo_tau: float = 0.5
    turn_epsilon: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.credit()

    def credit(self, salt: int = 0) -> CreditConfig:
        """The credit rule; `salt` varies the permutation of rule "permuted" from one micro-batch to the next."""
        names = (f.name for f in fields(CreditConfig) if f.name != "seed")
        return CreditConfig(**{name: getattr(self, name) for name in names}, seed=self.seed + salt)
