"""What a model can do, found out when it is fetched and saved beside its weights and those trained from it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from selfalign.core.files import read_json, write_json

FILE = "capabilities.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """How a model can be run, found out by `selfalign.engines.model_check`.

    Attributes:
        packs: whether it scores packed rows as it scores each text alone.
        shares_states: whether it scores responses that go on from the states behind their prompt so; if it does
            neither, batches are padded.
        writes: "tree" for batches of several prompts, which are read as a tree of their prefixes, and whose finished
            rows are dropped; "batches" for the same with padded prompts; "prompts" one at a time, for caches that
            cannot drop rows; "without_cache", from the whole text for every token, for caches that are not exact.
        dropout: whether a dropout that is asked for is applied.
    """

    packs: bool = True
    shares_states: bool = False
    writes: str = "batches"
    dropout: bool = True

    def save(self, folder: Path) -> None:
        """Write the capabilities into a policy's folder."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Capabilities":
        """Read the capabilities of a policy's folder; all of them if none were found out."""
        file = folder / FILE
        return cls(**read_json(file)) if file.exists() else cls()
