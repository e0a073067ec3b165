"""What a reader relies on: same name, same text; the paper first; nothing too long."""

import ast
import difflib
import re
import shlex
import subprocess

import pytest
from conftest import EVALUATOR, HERE, SCRIPTS, load

README = (HERE / "README.md").read_text()
PAPER = {"Generator", "Discriminator", "d_loss", "g_loss", "options", "train", "SIZES", "Z"}
LINE = "# --- the same in every script from here on"


def definitions(path):
    """{name: text} of every top-level function, class and constant."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            found[name] = ast.get_source_segment(source, node)
    return found


def test_same_name_same_text():
    texts = {}
    for path in HERE.glob("*.py"):
        own = PAPER | {"main"} if path.stem == EVALUATOR else PAPER
        for name, text in definitions(path).items():
            if name not in own:
                texts.setdefault(name, {}).setdefault(text, []).append(path.name)
    differing = {name: list(found.values()) for name, found in texts.items() if len(found) > 1}
    assert not differing


def test_lower_parts_are_byte_identical():
    lower = {name: (HERE / f"{name}.py").read_text().split(LINE)[1] for name in SCRIPTS}
    assert len(set(lower.values())) == 1


@pytest.mark.parametrize("name", [path.name for path in HERE.glob("*.py")])
def test_nothing_is_too_long(name):
    source = (HERE / name).read_text()
    assert max(map(len, source.splitlines())) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_paper_comes_first(script):
    """Docstring with its parts, then the losses in the first half; no number is read in a step."""
    source = (HERE / f"{script}.py").read_text()
    upper, _ = source.split(LINE)
    doc = ast.get_docstring(ast.parse(source))
    assert "arXiv" in doc and "Differs from the paper" in doc and f"python {script}.py" in doc
    assert ("Changes from" in doc) == (script != "gan_mlp")
    assert source[: source.index("def g_loss")].count("\n") < source.count("\n") / 2
    step = next(ast.unparse(node) for node in ast.walk(ast.parse(upper))
                if getattr(node, "name", "") == "step")
    assert not any(word in step for word in (".item()", ".tolist()", "print(", "float("))


def changed_lines(name, base="dcgan"):
    """How many lines outside the docstring differ from the base's; a line changed counts once."""
    old, new = ((HERE / f"{script}.py").read_text().split('"""', 2)[2].splitlines()
                for script in (base, name))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for kind, a, b, c, d in blocks if kind != "equal")


def test_the_readme_tells_how_long_and_how_much_changes(script):
    """Two columns of the table; and the promises of a small diff."""
    row = next(line for line in README.splitlines() if line.startswith(f"| [{script}.py]"))
    lines, changed = (cell.strip() for cell in row.split("|")[4:6])
    expected = str(changed_lines(script)) if script != "dcgan" else "-"
    if script == "acgan":
        expected += f" ({changed_lines(script, 'sngan')} from sngan)"
    assert changed == expected
    assert lines == str((HERE / f"{script}.py").read_text().count("\n"))
    most = {"lsgan": 20, "wgan": 40, "pix2pix_color": 330}.get(script, 200)
    assert changed_lines(script) <= most


def test_the_diff_in_the_readme_is_the_diff():
    block = README.split("losses of `diff dcgan.py lsgan.py`:")[1].split("\nAll have")[0]
    shown = [" ".join(line.split()) for line in block.splitlines()
             if line.strip()[:1] in ("<", ">")]
    found = subprocess.run(["diff", "dcgan.py", "lsgan.py"], cwd=HERE, capture_output=True,
                           text=True).stdout
    found = [" ".join(line.split()) for line in found.splitlines()]
    assert all(line in found for line in shown) and len(shown) == 8


COMMANDS = r"(?:python |`|torchrun .* )((?:" + "|".join(SCRIPTS) + r")\.py(?: [^\s`;&|]+)*)"


@pytest.mark.parametrize("command", sorted(set(re.findall(COMMANDS, README))))
def test_every_command_of_the_readme_is_understood(command, tmp_path):
    name, *flags = shlex.split(command)
    if {"--generate", "--resume", "--colorize", "--help", "$e"} & set(flags):
        return  # they want a run, or a shell
    args = load(HERE / name).command_line([*flags, "--out", str(tmp_path / "run")])
    assert args.data and args.saved == {}
