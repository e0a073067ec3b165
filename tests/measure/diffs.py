"""Rewrites the diffs that README.md shows, between <!-- diff A B --> and <!-- end -->.

    python tests/measure/diffs.py                # all of them
    python tests/measure/diffs.py dcgan wgan     # prints one

A diff shows how B's losses and its train() differ from A's, and the functions that B alone has.
Lines of comments, and lines that differ in their indentation alone, are not shown.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent
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
        (HERE / "README.md").write_text(BLOCK.sub(lambda found: block(*found.groups()), text))
