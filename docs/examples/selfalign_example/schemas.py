"""A data schema of one's own: two answers and who voted for which."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class Votes:
    """Rows with `task`, `a`, `b`, `votes_a` and `votes_b` as preference pairs.

    Attributes:
        minimum_lead: pairs whose votes differ by less are left out.
    """

    minimum_lead: int = 1

    def read(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A pair with prompt, chosen and rejected; other rows as they are."""
        if "votes_a" not in row:
            return row
        lead = row["votes_a"] - row["votes_b"]
        if abs(lead) < self.minimum_lead:
            return None
        chosen, rejected = ("a", "b") if lead > 0 else ("b", "a")
        return {"prompt": row["task"], "chosen": row[chosen], "rejected": row[rejected]}
