"""docs/runtime-parameters.md says what the code says."""

from pathlib import Path

import pytest

from vllm_dropin.model.contract import CONTRACT
from vllm_dropin.settings.options import OPTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "runtime-parameters.md").read_text(encoding="utf-8")
ROWS = {line.split("|")[1].strip(): line for line in PAGE.splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("parameter", CONTRACT, ids=lambda parameter: parameter.name)
def test_each_parameter_has_its_row(parameter):
    row = ROWS[f"`{parameter.name}`"]
    assert parameter.meaning in row
    assert f"| {parameter.type} |" in row


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_each_option_has_its_row(option):
    row = next(line for cell, line in ROWS.items() if cell.startswith(f"`{option.flag}"))
    assert option.meaning in row
    assert all(f"`{variable}`" in row for variable in option.variables)
    assert not option.default or f"`{option.default}`" in row
