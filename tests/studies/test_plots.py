"""The plots of a study as SVG files."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from mmctr.studies.plots import write_figures

pytestmark = pytest.mark.slow


def test_figures_are_files_that_stand_alone(finished_study, tmp_path):
    results = finished_study[2]
    protocols = {**results.protocols, "empty": replace(results.protocols["held_out"], methods={})}
    written = write_figures(replace(results, protocols=protocols), tmp_path / "figures")
    names = [f"held_out_{name}.svg" for name in ("clicks", "epochs_gauc", "epochs_auc", "epochs_log_loss")]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)
    for path in written:
        root = ElementTree.parse(path).getroot()  # well-formed, with a namespace, or no viewer shows it
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(--p0)" in path.read_text()
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert words[-2:] == ["ids", "content"]
        assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == 2 * 2  # a line and a key for each method
