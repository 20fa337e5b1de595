"""The forms for reports ask for what a report needs, and the citation is of this version."""

from __future__ import annotations

import tomllib

import pytest
import yaml

from tests.helpers.tiny import CLONE

FORMS = CLONE / ".github" / "ISSUE_TEMPLATE"
KINDS = {"textarea", "input", "dropdown", "checkboxes", "markdown"}


@pytest.mark.parametrize("name", ["bug", "question"])
def test_a_form_asks_for_config_command_rows_and_version(name):
    form = yaml.safe_load((FORMS / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]) and {field["type"] for field in form["body"]} <= KINDS
    assert {"config", "data", "version"} <= set(fields)
    assert any("command" in field["attributes"]["label"].lower() for field in form["body"])
    assert "rows" in fields["data"]["attributes"]["label"] + fields["data"]["attributes"]["description"]
    assert "mmctr --version" in fields["version"]["attributes"]["description"]
    required = {key for key, field in fields.items() if field.get("validations", {}).get("required")}
    assert required >= ({"command", "config", "data", "version"} if name == "bug" else {"data", "version"})


def test_a_report_starts_from_a_form():
    assert yaml.safe_load((FORMS / "config.yml").read_text(encoding="utf-8")) == {"blank_issues_enabled": False}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((CLONE / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## [{citation['version']}] - {citation['date-released']}" in (CLONE / "CHANGELOG.md").read_text("utf-8")
