"""What a reader relies on: same name, same text; the paper first; the loop in sight; nothing long;
a README whose commands, numbers and diffs are those of the files.
"""

import ast
import re
import shlex

import pytest
from conftest import EVALUATOR, HERE, SCRIPTS, load

LINE = "# --- the same in every script from here on"
OWN = {"Generator", "Discriminator", "d_loss", "g_loss", "add_arguments", "train", "SIZES", "Z",
       "SCRIPT"}
BUDGET = {  # lines of a file
    "gan_mlp": 680, "dcgan": 710, "lsgan": 700, "wgan": 715, "ebgan": 730, "sngan": 740,
    "cgan": 795, "acgan": 890, "egan": 860, "pix2pix_color": 945, "fid": 740,
}
README = (HERE / "README.md").read_text()


TERMS = [  # a student meets these words elsewhere; each is named where its thing is explained
    "binary cross-entropy", "latent vector", "minimax", "equilibrium", "non-saturating",
    "vanishing gradient", "mode collapse", "checkerboard artefacts", "critic", "lipschitz",
    "wasserstein-1", "earth mover's distance", "duality", "encoder", "decoder", "hinge", "ablation",
    "power iteration", "one-hot", "embedding", "conditional", "label smoothing", "skip connection",
    "receptive field", "patchgan",
]


def text(script):
    return (HERE / f"{script}.py").read_text()


def definitions(script):
    """{name: text} of every top-level function, class and constant."""
    found = {}
    for node in ast.parse(text(script)).body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            found[name] = ast.get_source_segment(text(script), node)
    return found


# --- the files ------------------------------------------------------------------------------------


def test_the_same_name_has_the_same_text_in_all_files():
    texts = {}
    for script in [*SCRIPTS, EVALUATOR]:
        own = OWN | {"main"} if script == EVALUATOR else OWN
        for name, source in definitions(script).items():
            if name not in own:
                texts.setdefault(name, {}).setdefault(source, []).append(script)
    differing = {name: list(found.values()) for name, found in texts.items() if len(found) > 1}
    assert not differing


def test_the_lower_parts_are_byte_identical():
    assert len({text(script).split(LINE)[1] for script in SCRIPTS}) == 1


@pytest.mark.parametrize("name", [*SCRIPTS, EVALUATOR])
def test_no_line_no_function_and_no_file_is_too_long(name):
    source = text(name)
    assert max(map(len, source.splitlines())) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 55, node.name
    assert source.count("\n") <= BUDGET[name]


@pytest.mark.parametrize("name", [*SCRIPTS, EVALUATOR])
def test_a_file_says_its_licence_in_its_first_line(name):
    assert text(name).startswith('# SPDX-License-Identifier: MIT\n"""')


def test_the_docstring_names_the_paper_the_changes_and_how_to_run_it(script):
    doc = ast.get_docstring(ast.parse(text(script)))
    assert "arXiv" in doc and "Differs from the paper" in doc and f"python {script}.py" in doc
    assert ("Changes from" in doc) == (script != "gan_mlp")


def test_the_docstrings_above_the_line_name_the_terms_of_the_field():
    nodes = [node for script in SCRIPTS for node in ast.walk(ast.parse(text(script).split(LINE)[0]))
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    prose = " ".join(" ".join(map(str, map(ast.get_docstring, nodes))).lower().split())
    assert len(set(TERMS)) == 25
    assert not [term for term in TERMS if not re.search(rf"\b{term}\b", prose)]


def test_the_losses_stand_in_the_first_half(script):
    source = text(script)
    assert source[: source.index("def g_loss")].count("\n") < source.count("\n") / 2


def test_the_loop_is_in_sight_and_reads_no_number(script):
    """It stands in train(); .item() and the like would make the GPU wait in every step."""
    train = definitions(script)["train"]
    loops = [node for node in ast.parse(train).body[0].body
             if isinstance(node, ast.For) and ast.unparse(node).startswith("for log in steps(")]
    assert len(loops) == 1
    body = "\n".join(map(ast.unparse, loops[0].body))
    assert "log.update(" in body
    assert not [word for word in (".item()", ".tolist()", "print(", "float(") if word in body]


# --- README ---------------------------------------------------------------------------------------

# python x.py --flags, torchrun ... x.py --flags, or `x.py --flags`, as far as the command goes.
COMMAND = re.compile(rf"(?:python |torchrun [^`]*?|`(?=\w+\.py -))({'|'.join(SCRIPTS)})\.py"
                     r"((?: (?:'[^']*'|\"[^\"]*\"|[^\s`|&;#])+)*)")
GOES_ON = {"--resume", "--generate", "--colorize"}  # with a run that is there


def groups(markdown):
    """Its code blocks and tables, as lists of lines; of all other text every line for itself."""
    found, fenced, last = [], False, ""
    for line in markdown.splitlines():
        fenced = fenced != line.startswith("```")
        kind = "code" if fenced or line.startswith("    ") else line[:1] if line[:1] == "|" else ""
        if kind and kind == last:
            found[-1].append(line)
        else:
            found.append([line])
        last = kind
    return found


def commands(lines):
    """[(script, flags)] of the commands in these lines; those that need a shell's $ are left."""
    found = [(name, shlex.split(flags)) for line in lines for name, flags in COMMAND.findall(line)]
    return [(name, flags) for name, flags in found
            if "--help" not in flags and not any("$" in flag for flag in flags)]


def assert_understood(found, monkeypatch, folder):
    """Each is accepted as it stands, in an empty folder, and none wants the folder of another."""
    monkeypatch.chdir(folder)
    outs = []
    for name, flags in found:
        saved = {"script": name, "settings": {}}
        monkeypatch.setattr("torch.load", lambda *args, saved=saved, **options: saved)
        out = load(HERE / f"{name}.py").parse_arguments(flags).out
        if not GOES_ON & set(flags):
            assert out not in outs, f"two runs in {out}: {name}.py {shlex.join(flags)}"
            outs.append(out)


def test_the_commands_of_a_docstring_work_one_after_the_other(script, monkeypatch, tmp_path):
    found = commands(load(HERE / f"{script}.py").__doc__.splitlines())
    assert len(found) >= 3
    assert_understood(found, monkeypatch, tmp_path)


def test_the_commands_of_the_readme_work_one_after_the_other(monkeypatch, tmp_path):
    found = [commands(lines) for lines in groups(README)]
    assert sum(map(len, found)) > 20
    for group in found:
        assert_understood(group, monkeypatch, tmp_path)


def test_the_files_that_the_readme_names_exist():
    named = re.findall(r"(?:tests|\.github)/[\w/]+\.\w+|\b\w+\.py\b", README)
    assert len(set(named)) > 15
    assert not [name for name in named if not (HERE / name).exists()
                and not list((HERE / "tests").rglob(name))]


def test_the_table_of_the_readme_tells_how_long_the_files_are_and_what_is_new():
    """If it does not: python tests/measure/diffs.py"""
    diffs = load(HERE / "tests" / "measure" / "diffs.py")
    rows = list(diffs.ROW.finditer(README))
    assert sorted(found[2] for found in rows) == SCRIPTS
    assert not [(found[0], diffs.row(found)) for found in rows if found[0] != diffs.row(found)]


def test_the_diffs_in_the_readme_are_those_of_the_files():
    """If they are not: python tests/measure/diffs.py"""
    diffs = load(HERE / "tests" / "measure" / "diffs.py")
    shown = list(diffs.BLOCK.finditer(README))
    assert shown and README.count("<!-- diff ") == len(shown)
    for found in shown:
        assert found[0] == diffs.block(*found.groups())
