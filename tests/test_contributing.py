"""The worked examples of CONTRIBUTING.md run as they stand there, one after the other."""

import re

import torch

from tests.goldens import ROOT


def test_the_worked_examples_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    assert len(blocks) == 4, "a tokenizer, an order, a head, a sampler"
    names = {"__name__": "contributing"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            lines_before = "\n" * text[: block.start(1)].count("\n")  # so that an error names the line of the page
            exec(compile(lines_before + block.group(1), "CONTRIBUTING.md", "exec"), names)


def test_every_folder_and_file_it_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {name for name in re.findall(r"`([\w./]+/[\w./]*)`", text) if "<" not in name}
    assert len(named) > 10
    assert not {name for name in named if not (ROOT / name).exists()}
