"""The programs of docs/weights.md."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import is_one_line
from pages import code

pytest.importorskip("torch")
pytest.importorskip("mlx")


def test_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for program in code("docs/weights.md", "python"):
        exec(compile(program, "docs/weights.md", "exec"), names)
    error, *pairs = capsys.readouterr().out.splitlines()
    assert is_one_line(
        error, "h.0.attn.in_proj_weight", "lstm.bias_ih_l1", "blocks.0.norm.weight", "nothing is copied"
    )
    assert "h.0.attn.in_proj_bias -> ['blocks.0.attention.query_proj.bias'," in "\n".join(pairs)
    assert "lstm.bias_hh_l1 -> ['lstm.1.bias']" in pairs and len(pairs) == len(names["torch_net"].state_dict())
