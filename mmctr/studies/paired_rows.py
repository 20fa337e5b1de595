"""Test rows that all runs of a protocol share, and paired differences of methods on these rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet

from mmctr.evaluation.metrics import paired_samples
from mmctr.evaluation.user_resampling import MIN_USERS, t_interval, users_with_both_labels
from mmctr.reports.run import Estimate, finite_interval, read_predictions
from mmctr.run_folder import AGAIN, RunFolder
from mmctr.studies.config import StudyConfig
from mmctr.studies.intervals import mean_interval
from mmctr.studies.result_types import Difference, GapClosed, MethodDifference
from mmctr.studies.runner import Cell

Scores = dict[tuple[str, int], np.ndarray]
"""(method, seed) -> (n,) scores of the test rows"""


@dataclass(frozen=True)
class PairedRows:
    """The n test rows of a protocol, and the scores that each run gives these rows."""

    study: StudyConfig
    labels: np.ndarray
    users: np.ndarray
    masks: dict[str, np.ndarray]
    """(n,) bool by split"""
    scores: Scores
    stage_scores: dict[str, Scores]
    """Scores by stage of a `staged` protocol, in order."""

    @classmethod
    def read(cls, study: StudyConfig, cells: Sequence[Cell]) -> PairedRows:
        """Read the predictions of the finished cells of a protocol, one or more.

        Raises ValueError for a cell without predictions, and for cells with other rows than the first cell.
        """
        scores: Scores = {}
        stage_scores: dict[str, Scores] = {}
        first = None
        for cell in cells:
            table = read_predictions(cell.folder)
            if table is None:
                raise ValueError(f"{cell.folder}: has no predictions.parquet; {AGAIN}")
            first = table if first is None else first
            if not all(table[key].equals(first[key]) for key in ("user", "item", "label", "cold")):
                raise ValueError(
                    f"{cell.folder}: its test rows are not those of {cells[0].folder}, as the dataset has changed "
                    f"between the two; delete the older one of them and start the study again"
                )
            scores[cell.method, cell.seed] = table["score"].to_numpy()
            for stage, values in _read_stages(RunFolder(cell.folder)).items():
                stage_scores.setdefault(stage, {})[cell.method, cell.seed] = values
        if first is None:
            raise ValueError("no finished cells: give at least one")
        cold = first["cold"].to_numpy().astype(bool)
        masks = {"all": np.ones_like(cold), "warm": ~cold, "cold": cold}
        return cls(study, first["label"].to_numpy(), first["user"].to_numpy(), masks, scores, stage_scores)

    def num_rows(self) -> dict[str, int]:
        """Number of rows by split."""
        return {split: int(mask.sum()) for split, mask in self.masks.items()}

    def num_users(self, split: str) -> int:
        """Number of users with clicked and other rows in a split."""
        mask = self.masks[split]
        return users_with_both_labels(self.labels[mask] == 1, self.users[mask])

    def shared_seeds(self, *methods: str) -> list[int]:
        """Seeds of which all these methods are finished."""
        seeds = dict.fromkeys(seed for _, seed in self.scores)
        return [seed for seed in seeds if all((method, seed) in self.scores for method in methods)]

    def differences(self, method: str) -> dict[str, MethodDifference | None] | None:
        """A method's difference to the baseline by split; None for the baseline, and where the two share no seed."""
        if method == self.study.baseline or not self.shared_seeds(method, self.study.baseline):
            return None
        return {split: self.difference(method, split) for split in self.masks}

    def stage_difference(self, method: str, stage: str) -> MethodDifference | None:
        """A method's difference to the baseline at a stage; None as for `differences`."""
        if method == self.study.baseline or not self.shared_seeds(method, self.study.baseline):
            return None
        return self.difference(method, "all", self.stage_scores[stage])

    def difference(self, method: str, split: str, scores: Scores | None = None) -> MethodDifference | None:
        """A method's difference to the baseline on a split; None for a split without rows.

        Args:
            scores: default: those of the predictions.
        """
        if not self.masks[split].any():
            return None
        seeds, num_users = self.shared_seeds(method, self.study.baseline), self.num_users(split)
        means: dict[str, Estimate] = {}
        by_seed: list[dict[str, Estimate]] = [{} for _ in seeds]
        for metric, (values, samples) in self._samples(method, seeds, split, scores or self.scores).items():
            means[metric] = Estimate(_finite(values.mean()), mean_interval(values, samples, num_users))
            for position, estimates in enumerate(by_seed):
                ends = finite_interval(t_interval(float(values[position]), samples[:, position], num_users))
                estimates[metric] = Estimate(_finite(values[position]), ends)
        per_seed = {seed: Difference(num_users, **one) for seed, one in zip(seeds, by_seed, strict=True)}
        return MethodDifference(num_users, **means, by_seed=per_seed)

    def gap_closed(self, method: str) -> GapClosed | None:
        """A method's difference on cold gAUC as a share of the oracle's.

        None without an oracle or cold rows, for the baseline and the oracle, and where the interval of the oracle's
        difference is not above zero or comes from fewer than `MIN_USERS` users.
        """
        baseline, oracle = self.study.baseline, self.study.oracle
        if oracle is None or method in (baseline, oracle) or not self.masks["cold"].any():
            return None
        seeds, num_users = self.shared_seeds(method, baseline, oracle), self.num_users("cold")
        if not seeds or num_users < MIN_USERS:
            return None
        values, samples = self._samples(method, seeds, "cold", self.scores)["gauc"]
        oracle_values, oracle_samples = self._samples(oracle, seeds, "cold", self.scores)["gauc"]
        oracle_interval = mean_interval(oracle_values, oracle_samples, num_users)
        if oracle_interval is None or oracle_interval[0] <= 0:
            return None
        # method and oracle have the same users and seed in a sample, so a ratio of the two is one of the sample
        with np.errstate(divide="ignore", invalid="ignore"):
            seed_ratios = values / oracle_values
            ratios = samples / oracle_samples
        share = _finite(values.mean() / oracle_values.mean())
        return GapClosed(share, mean_interval(seed_ratios, ratios, num_users), [_finite(r) for r in seed_ratios])

    def _samples(
        self, method: str, seeds: Sequence[int], split: str, scores: Scores
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`paired_samples` of baseline and method for S seeds, {"auc" | "gauc": ((S,), (num_samples, S))}.

        The users of a sample depend on the split alone.
        """
        mask = self.masks[split]
        baseline_scores, method_scores = (
            [scores[name, seed][mask] for seed in seeds] for name in (self.study.baseline, method)
        )
        return paired_samples(self.labels[mask], baseline_scores, method_scores, self.users[mask], self.study.bootstrap)


def _read_stages(run: RunFolder) -> dict[str, np.ndarray]:
    """Scores by stage of a run under a `staged` protocol; empty for other runs, which have no such file."""
    if not run.has_results(run.stages):
        return {}
    table = pyarrow.parquet.read_table(run.stages)
    return {stage: table[stage].to_numpy() for stage in table.column_names[3:]}  # after user, item and label


def _finite(value: float) -> float | None:
    """A number, None where it is not finite."""
    return float(value) if np.isfinite(value) else None
