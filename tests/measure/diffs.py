"""Rewrites the diffs that README.md shows, between <!-- diff A B --> and <!-- end -->.

    python tests/measure/diffs.py                # all of them
    python tests/measure/diffs.py dcgan wgan     # prints one

A diff shows how B's losses and its train() differ from A's, and the functions that B alone has.
Lines of comments, and lines that differ in their indentation alone, are not shown. The table of
the scripts is told, too, how long they are, and how many lines of code are new in each.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent
ROW = re.compile(r"^(\| \[(\w+)\.py\]\(.*\| )\d+ \| (?:-|\d+ from (\w+)) \|$", re.MULTILINE)
BLOCK = re.compile(r"<!-- diff (\w+) (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def functions(script):
    """{name: lines} of the functions above the part that is the same in every script."""
    source = (HERE / f"{script}.py").read_text().split("# --- the same in every script")[0]
    lines = source.splitlines()
    return {node.name: [line for line in lines[node.lineno - 1 : node.end_lineno]
                        if line.strip() and line.strip()[0] != "#"]
            for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def changes(old, new):
    """The changed lines, each with one before and one after it."""
    bare = [[line.strip() for line in lines] for lines in (old, new)]
    groups = difflib.SequenceMatcher(None, *bare, autojunk=False).get_grouped_opcodes(1)
    for number, group in enumerate(groups):
        if number > 0:
            yield "  ..."
        for kind, a, b, c, d in group:
            yield from ("- " + line for line in old[a:b] if kind != "equal")
            yield from (("  " if kind == "equal" else "+ ") + line for line in new[c:d])


def new_lines(a, b):
    """How many lines of code B has above the shared part and A has not, without docstrings."""
    bare = []
    for script in (a, b):
        source = (HERE / f"{script}.py").read_text().split("# --- the same in every script")[0]
        texts = {line for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)
                 and isinstance(node.value, ast.Constant)
                 for line in range(node.lineno, node.end_lineno + 1)}
        lines = [line.strip() for i, line in enumerate(source.splitlines(), 1) if i not in texts]
        bare.append([line for line in lines if line and line[0] != "#"])
    opcodes = difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes()
    return sum(d - c for kind, _, _, c, d in opcodes if kind != "equal")


def row(found):
    """A row of the table of the scripts, up to date. It ends: | lines | new from a script |"""
    start, script, before = found.groups()
    lines = (HERE / f"{script}.py").read_text().count("\n")
    new = f"{new_lines(before, script)} from {before}" if before else "-"
    return f"{start}{lines} | {new} |"


def block(a, b):
    """-> the Markdown text of one diff."""
    old, new, lines = functions(a), functions(b), []
    for name in new:
        if name.endswith("_loss") or name == "train" or name not in old:
            found = list(changes(old.get(name, []), new[name]))
            lines += [f"@@ {name}() @@", *found] if found else []
    return (f"<!-- diff {a} {b} -->\n<details><summary>From {a}.py to {b}.py</summary>\n\n```diff\n"
            + "\n".join(lines) + "\n```\n\n</details>\n<!-- end -->")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(block(*sys.argv[1:]))
    else:
        text = (HERE / "README.md").read_text()
        text = BLOCK.sub(lambda found: block(*found.groups()), ROW.sub(row, text))
        (HERE / "README.md").write_text(text)
