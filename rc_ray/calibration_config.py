"""How the settings of the score are chosen, under `evaluate.calibration`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, model_validator

from rc_ray.data_config import Section


class CalibrationConfig(Section):
    """Alpha, gamma and the prior in the trie; the values to choose from stand under `evaluate`."""

    chosen_by: Literal["clicks", "unlabeled", "fixed"] = "clicks"
    """`clicks`: by NDCG on validation users. `unlabeled`: by the lists of the same users without
    their clicks, see docs/method.md. `fixed`: the three values below."""
    scope: Literal["domain", "global"] = "domain"
    """`domain`: for each system and domain. `global`: one setting per system for all domains, by
    the mean over the domains. A merge sees one domain, so its guard calibrates by domain anyway."""
    alpha: NonNegativeFloat | None = None
    """`chosen_by: fixed` only, like the next two."""
    gamma: NonNegativeFloat | None = None
    prior_in_trie: bool | None = None

    @model_validator(mode="after")
    def _fixed(self) -> CalibrationConfig:
        names = ("alpha", "gamma", "prior_in_trie")
        given = [name for name in names if getattr(self, name) is not None]
        if self.chosen_by == "fixed" and len(given) < len(names):
            missing = next(name for name in names if name not in given)
            raise ValueError(f"`chosen_by: fixed` needs `{missing}` beside it")
        if self.chosen_by != "fixed" and given:
            raise ValueError(
                f"`{given[0]}` needs `chosen_by: fixed`; what `{self.chosen_by}` chooses from are "
                "`evaluate.alphas`, `evaluate.gammas` and `evaluate.prior_in_trie`"
            )
        return self

    @property
    def fixed(self) -> tuple[float, float, bool] | None:
        """(alpha, gamma, prior in the trie); None unless they are fixed."""
        if self.alpha is None or self.gamma is None or self.prior_in_trie is None:
            return None
        return self.alpha, self.gamma, self.prior_in_trie
