"""The report of `mmctr concepts` as frozen dataclasses, and the JSON it is written as."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmctr.concepts.naming import Name

End = Literal["low", "high"]
"""an end of a latent dimension"""
COLLAPSE_WARNING = "posterior collapse: no dimension varies over items. Lower beta (or gamma), or raise the capacity"


@dataclass(frozen=True)
class Histogram:
    """Numbers of items by value, in bins of equal width from low to high."""

    counts: list[int]
    low: float
    high: float


@dataclass(frozen=True)
class TraversalStep:
    """Raw ids of items near a quantile of a dimension."""

    quantile: float
    item_ids: list[Any]


@dataclass(frozen=True)
class Correlation:
    """Another dimension with the Pearson correlation r of the two dimensions over items."""

    dimension: int
    r: float


@dataclass(frozen=True)
class Variation:
    """How an active dimension varies over items."""

    histogram: Histogram
    traversal: list[TraversalStep]
    most_correlated: Correlation | None
    """The active dimension with the highest absolute correlation, None for a single active dimension."""
    prevalence: dict[End, float] | None
    """Shares of items clearly at each end, None for a dimension without a name."""

    def to_json(self) -> dict[str, Any]:
        """{"histogram", "traversal", "correlates"} and, for a dimension with a name, "prevalence"."""
        histogram = self.histogram
        result = {
            "histogram": {"counts": histogram.counts, "from": histogram.low, "to": histogram.high},
            "traversal": [{"quantile": step.quantile, "items": step.item_ids} for step in self.traversal],
            "correlates": self.most_correlated and asdict(self.most_correlated),
        }
        return result if self.prevalence is None else result | {"prevalence": self.prevalence}


@dataclass(frozen=True)
class Dimension:
    """A latent dimension."""

    number: int
    variance: float
    name: Name | None
    """The best name, verified or not; None without a candidate."""
    variation: Variation | None
    """None for a dimension that does not vary over items, which is not active."""
    click_effect: float | None = None
    """Change of the predicted click probability from one end to the other; None without a ranker."""

    @property
    def verified_name(self) -> Name | None:
        """The name, None for a dimension without a verified name."""
        return self.name if self.name is not None and self.name.verified else None

    def to_json(self) -> dict[str, Any]:
        """{"dimension", "active", "variance", "name"}, the fields of `Variation` and "click_effect" where known."""
        result: dict[str, Any] = {
            "dimension": self.number,
            "active": self.variation is not None,
            "variance": self.variance,
            "name": self.name and self.name.to_json(),
        }
        if self.variation is not None:
            result |= self.variation.to_json()
        return result if self.click_effect is None else result | {"click_effect": self.click_effect}


@dataclass(frozen=True)
class Scores:
    """Disentanglement scores against K attributes."""

    scores: dict[str, float]
    chance: dict[str, float]
    """The scores of shuffled items."""
    columns: list[str]
    """Names of the attributes."""
    dependency: list[list[float]]
    """(K, K) dependency of the attributes."""

    def to_json(self) -> dict[str, Any]:
        """{"scores", "chance", "dependency": {"columns", "matrix"}}."""
        dependency = {"columns": self.columns, "matrix": self.dependency}
        return {"scores": self.scores, "chance": self.chance, "dependency": dependency}


@dataclass(frozen=True)
class Description:
    """The latent dimensions of a catalog's items."""

    num_items: int
    dimensions: list[Dimension]
    scores: Scores | None
    """None without attributes, and where no dimension is active."""

    @property
    def active(self) -> list[Dimension]:
        """The dimensions that vary over items."""
        return [dimension for dimension in self.dimensions if dimension.variation is not None]

    @property
    def warning(self) -> str | None:
        """A warning where no dimension is active."""
        return None if self.active else COLLAPSE_WARNING

    def to_json(self) -> dict[str, Any]:
        """{"items", "active", "dimensions"}, "warning" where there is one, and the fields of `Scores`."""
        result: dict[str, Any] = {
            "items": self.num_items,
            "active": len(self.active),
            "dimensions": [dimension.to_json() for dimension in self.dimensions],
        }
        if self.warning:
            result["warning"] = self.warning
        return result if self.scores is None else result | self.scores.to_json()


@dataclass(frozen=True)
class ClickReason:
    """An end of a dimension that raises the clicks predicted for a user."""

    dimension: int
    end: End
    likes: list[str] | None
    """The verified name of the end, None without one."""
    click_effect: float
    because_of: list[Any]
    """Raw ids of items of the user's history at that end."""


@dataclass(frozen=True)
class UserReasons:
    """The dimensions with the greatest effects on the clicks predicted for a user."""

    user_id: Any
    reasons: list[ClickReason]


@dataclass(frozen=True)
class RankerEffects:
    """A ranker that the click effects of the dimensions are of."""

    run: str
    num_impressions: int
    """Test impressions that the effects are averaged over."""


@dataclass(frozen=True)
class RunScore:
    """A run among several, with the score that the best run is chosen by."""

    run: str
    score: float
    parts: dict[str, float]
    """Scores that the score is computed from."""

    def to_json(self) -> dict[str, Any]:
        """{"run", "score"} and the parts."""
        return {"run": self.run, "score": self.score, **self.parts}


@dataclass(frozen=True)
class ConceptsReport:
    """The report of `mmctr concepts` on the best of one or several runs."""

    run: str
    data: str
    weights: str
    """Key of the run's weights."""
    description: Description
    refused_columns: dict[str, str]
    """Catalog columns that cannot be attributes, with reasons."""
    mean: list[float]
    """Mean of each dimension over items."""
    std: list[float]
    """Standard deviation of each dimension over items."""
    runs: list[RunScore]
    """The runs that the best one was chosen from; empty for a single run."""
    ranker: RankerEffects | None = None
    user: UserReasons | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of concepts.json."""
        result: dict[str, Any] = {"run": self.run, "data": self.data, "weights": self.weights}
        result |= self.description.to_json()
        result["columns set aside"] = self.refused_columns
        result["spread"] = {"mean": self.mean, "std": self.std}
        if self.runs:
            result["runs"] = [run.to_json() for run in self.runs]
        if self.ranker is not None:
            result["ranker"] = {"run": self.ranker.run, "impressions": self.ranker.num_impressions}
        if self.user is not None:
            result["user"] = asdict(self.user)
        return result
