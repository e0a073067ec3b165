"""Where students work: %run, a script pasted into a cell, an import; and no terminal at all."""

import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, EVALUATOR, HERE, SCRIPTS, call, load
from PIL import Image

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)  # in the README
AGAIN = "holds a run already"  # what the same command says the second time


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder with copies of all scripts, in which data/ is what all tests share."""
    for name in [*SCRIPTS, EVALUATOR]:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    (tmp_path / "data").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tiny):
    """The same without --root: its default, data/, is there."""
    return tiny[: tiny.index("--root")] + tiny[tiny.index("--root") + 2 :] + ["--steps", "1"]


def text(name):
    return (HERE / f"{name}.py").read_text()


# --- a real kernel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A notebook's kernel. run(cell) -> status of sys.exit() or 0, stdout, stderr, its error."""
    pytest.importorskip("ipykernel")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    home = tmp_path_factory.mktemp("home")
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=240, allow_errors=True,
                                     kernel_name="python3",
                                     resources={"metadata": {"path": str(home)}})

    def run(code):
        cell = nbformat.v4.new_code_cell(code)
        client.nb.cells.append(cell)
        client.execute_cell(cell, len(client.nb.cells) - 1)
        result = SimpleNamespace(status=0, stdout="", stderr="", error="")
        for output in cell.outputs:
            if output.output_type == "stream":
                vars(result)[output.name] += output.text
            elif output.output_type == "error":
                result.error = f"{output.ename}: {output.evalue}"
                if output.ename == "SystemExit":
                    result.status, result.error = int(output.evalue), ""
        assert not result.error and "Traceback" not in result.stderr, code[-300:] + str(result)
        return result

    with client.setup_kernel(env={**os.environ, "IPYTHONDIR": str(home)}):
        run.pid = int(run("import os; print(os.getpid())").stdout)
        yield run


@pytest.fixture
def cell(kernel, alone):
    kernel(f"os.chdir({str(alone)!r})")
    return kernel


def test_percent_run_and_import(cell, script, alone, tiny):
    run = alone / "runs" / f"{script}-cartoon"
    assert cell(f"%run {script}.py {' '.join(tiny)}").status == 0
    assert (run / "training.gif").exists()
    again = cell(f"%run {script}.py {' '.join(tiny)}")
    assert again.status == 2 and AGAIN in again.stderr and not again.stdout
    more = cell(f"%run {script}.py --resume --steps 2")
    assert more.status == 0 and "step 2/2" in more.stdout
    assert cell(f"%run {script}.py --generate 2").status == 0
    assert len(list(run.glob("generated/**/*.png"))) >= 2

    # main() takes its defaults, not the kernel's own arguments (-f, a file): the same folder again.
    default = cell(f"import {script}; {script}.main()")
    assert default.status == 2 and f"runs/{script}-cartoon {AGAIN}" in default.stderr
    assert cell(f"{script}.main({[*tiny, '--out', 'imported']})").status == 0
    assert (alone / "imported" / "training.gif").exists()


def test_a_pasted_script_runs_with_its_defaults_until_it_is_stopped(cell, script, alone, tiny):
    checkpoint = alone / "runs" / f"{script}-cartoon" / "checkpoint.pt"
    ended = threading.Event()

    def stop_when_it_trains():  # what the notebook's stop button does
        while not checkpoint.exists() and not ended.wait(0.05):
            pass
        while not ended.wait(0.1):
            os.kill(cell.pid, signal.SIGINT)
            ended.wait(20)

    thread = threading.Thread(target=stop_when_it_trains)
    thread.start()
    try:
        result = cell(text(script))
    finally:
        ended.set()
        thread.join()
    assert result.status == 130, result.stderr
    saved = torch.load(checkpoint, weights_only=True)
    expected = vars(load(HERE / f"{script}.py").parse_arguments(["--out", "other"]))
    for flag in set(expected) - {"checkpoint", "device", "epochs", "out", "steps"}:
        assert saved["settings"][flag] == expected[flag], flag
    assert saved["script"] == script and saved["settings"]["steps"] > 100

    # The next cells use what the pasted one has defined.
    assert cell(f"main({['--data', 'cartoon', *tiny, '--out', 'next']})").status == 0
    assert (alone / "next" / "training.gif").exists()
    default = cell("main()")
    assert default.status == 2 and f"{script}.py: runs/{script}-cartoon {AGAIN}" in default.stderr


def test_fid_in_a_notebook(cell):
    shown = cell("%run fid.py --help")
    assert shown.status == 0 and "FID and KID" in shown.stdout and "--no-kid" in shown.stdout
    for code in ("%run fid.py nowhere cartoon", "import fid; fid.main(['nowhere', 'cartoon'])",
                 text("fid"), "main(['nowhere', 'cartoon'])"):
        result = cell(code)
        assert result.status == 2 and result.stderr.startswith("fid.py:"), result


# --- without a kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("stdout", [io.StringIO, lambda: None], ids=["no reconfigure", "none"])
@pytest.mark.parametrize("name", [*SCRIPTS, EVALUATOR])
def test_stdout_may_be_anything(name, stdout, monkeypatch, capsys):
    """Notebooks, Spyder and IDLE put an object of their own there; with >&- it is None."""
    out = stdout()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", out)
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    shown = out.getvalue() if out else capsys.readouterr().err  # argparse's way, without a stdout
    assert "--root" in shown


@pytest.mark.parametrize("name", ["dcgan", EVALUATOR])  # for the others: the test above
def test_a_closed_stdout(name):
    command = f'"{sys.executable}" "{HERE / name}.py" --help >&-'
    run = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr


def test_a_pasted_script_takes_no_arguments_of_the_notebook(script, alone, monkeypatch, capsys):
    """A cell has no __file__, and sys.argv is the kernel's."""
    (alone / "runs" / f"{script}-cartoon" / "samples").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    with pytest.raises(SystemExit) as end:
        exec(compile(text(script), "<cell>", "exec"), {"__name__": "__main__"})
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"{script}.py: runs/{script}-cartoon {AGAIN}" in message


def test_the_readme_s_way_to_get_a_generator_back(alone, capsys):
    block = BLOCK.search((HERE / "README.md").read_text())
    if not block:
        pytest.skip("the README has no such lines yet")
    script = re.search(r"^import (\w+)$", block[1].replace("import torch\n", ""), re.MULTILINE)[1]
    module = load(HERE / f"{script}.py")  # import in the block finds this one
    assert call(module, "--steps", 1, "--size", 16, "--width", 8, "--batch", 8) == 0
    before = set(alone.rglob("*.png"))
    exec(compile(block[1], "README.md", "exec"), {"__name__": "__main__"})
    (drawn,) = set(alone.rglob("*.png")) - before
    width, height = Image.open(drawn).size
    assert (width, height) == (8 * 18 + 2, 16 + 2 * 2)  # a row of eight, with frames of 2 px
    images = [np.asarray(Image.open(drawn))[2:18, 2 + 18 * i : 18 + 18 * i] for i in range(8)]
    assert len({image.tobytes() for image in images}) > 1
