"""How much code one Stage-2 step is: a table for docs/pages/extending.md; ``python -m tests.lines_of_a_step``."""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dat_lightning"

FILES = {
    "modules/dual_adversarial.py": "the step: chain, loss terms, curriculum, as methods to override",
    "modules/base.py": "logits, attack, classification loss, evaluation",
    "core/ascent.py": "the loop that attack, chain and generation walk",
    "core/threat_model.py": "ball, box and steepest step",
    "core/losses.py": "binary cross-entropy of the energies, cross-entropy, R1",
    "core/curriculum.py": "AUC and T",
}


def code_lines(source: str) -> int:
    """Returns how many lines have code: neither blank, comment, docstring nor import."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and (is_text or isinstance(node, ast.Import | ast.ImportFrom)):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    space = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {line for t in tokens if t.type not in space for line in range(t.start[0], t.end[0] + 1)}
    return len(found - left_out)


def counts() -> dict[str, tuple[int, int]]:
    """Returns, by file, its lines of code and all its lines."""
    sources = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in FILES}
    return {name: (code_lines(source), len(source.splitlines())) for name, source in sources.items()}


def table() -> str:
    """Returns the page's table."""
    rows = [f"| `{name}` | {FILES[name]} | {code} | {whole} |" for name, (code, whole) in counts().items()]
    code, whole = (sum(column) for column in zip(*counts().values(), strict=True))
    head = ["| file | what it has | lines of code | with documentation |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| together | | {code} | {whole} |"])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
