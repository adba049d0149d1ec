"""The code on the pages about using a trained model runs: each python block, in order, in one namespace per page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in (DOCS / "generation.md", DOCS / "export.md") if page.is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks, f"{page} has no code"
    for block in blocks:
        before = text[: block.start()].count("\n") + 1  # so that a traceback names the page's own lines
        exec(compile("\n" * before + block[1], str(page), "exec"), names)
