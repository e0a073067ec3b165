"""What all tests share: the scripts, found by pattern, and ways to run them."""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
EVALUATOR = "fid"  # the one top-level file that trains nothing
if "GAN_TESTS_DATA" not in os.environ:  # one --root for all: the processes of xdist inherit it
    os.environ["GAN_TESTS_DATA"] = tempfile.mkdtemp()
DATA = os.environ["GAN_TESTS_DATA"]
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem != EVALUATOR)


def pytest_configure(config):
    """One thread, here and in the processes that tests start, and sums always in the same order:
    runs are compared bit for bit, and networks this small hardly gain by a second thread.

    A GPU is hidden from all but those that shell(gpu=True) starts: where torch sees one, a forked
    process cannot compute gradients. The processes of xdist inherit what the first has found.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.device_count() else ""
    os.environ.setdefault("GAN_TESTS_GPU", shown)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the last to leave
        shutil.rmtree(DATA, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not os.environ["GAN_TESTS_GPU"]:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@functools.cache
def load(path):
    """Import a script from a path, once, without its folder on sys.path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The name of every training script, one after the other."""
    return request.param


@pytest.fixture
def module(script):
    """Every training script as a module."""
    return load(HERE / f"{script}.py")


@pytest.fixture
def tiny(module):
    """Flags for about the smallest run that the script can make."""
    flags = ["--size", str(min(module.SIZES)), "--batch", "8", "--device", "cpu", "--root", DATA]
    return flags + ["--width", "8"] * ('"--width"' in Path(module.__file__).read_text())


@pytest.fixture
def alone(script, tmp_path, monkeypatch):
    """An empty folder with a copy of the script, as the current directory."""
    shutil.copy(HERE / f"{script}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    """Every folder and every file with its content: what "nothing changed" means."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def call(module, *args):
    """Run main() in this process -> exit status."""
    try:
        module.main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code
    return 0


def shell(*args, code=None, gpu=False, **options):
    """Run Python in a process of its own -> the finished process, with its output as text."""
    command = [sys.executable, *(["-c", code] if code else []), *map(str, args)]
    if gpu:
        options["env"] = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GAN_TESTS_GPU"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def forked(module, *args):
    """Run main() in a copy of this process, which may be killed -> exit status, or -signal.

    A fork need not import torch again, and knows what a test has patched.
    """
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = call(module, *args)
        except Exception:
            traceback.print_exc()
        finally:  # whatever was raised: there must never be a second pytest
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*args):
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cartoons(module, n, size):
    """The first n cartoon faces as a module's Data; they are drawn once for all tests."""
    data = module.load_images("cartoon", size, DATA)
    return data._replace(images=data.images[:n].clone(), labels=data.labels[:n].clone())


def nets(to_save):
    """[(name, network)] of what steps() is to save."""
    return [(name, part) for name, part in to_save.items() if isinstance(part, torch.nn.Module)]


def run_train(module, monkeypatch, flags, data, n=1, watch=lambda run: None):
    """train() with a steps() that makes n steps and writes nothing.

    -> run: args, draw, to_save, grid, measure, as steps() got them, and logs, a dict for each step.
    watch(run) is called before the first step and after each.
    """
    run = SimpleNamespace(logs=[])

    def steps(args, data, draw, to_save, grid=None, measure=dict):
        vars(run).update(args=args, draw=draw, to_save=to_save, grid=grid, measure=measure)
        watch(run)
        for _ in range(n):
            log = {}
            yield log
            run.logs.append(log)
            watch(run)

    out = tempfile.mkdtemp(dir=DATA)
    args = module.parse_arguments([*map(str, flags), "--root", DATA, "--out", out])
    args.steps = args.steps or n  # in a run, get_data() sees to this
    torch.manual_seed(hash(args.seed))
    with monkeypatch.context() as patch:
        patch.setattr(module, "steps", steps)
        module.train(args, data)
    return run
