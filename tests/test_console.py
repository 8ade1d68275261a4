"""What a command says when the system fails it: one line, and nothing where nobody reads."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from extraction_world import environment

from utils import atomic_path, printable, write_json

ROOT = Path(__file__).resolve().parent.parent


def run_main(body: str, shell: str = 'exec "$@"') -> subprocess.CompletedProcess[str]:
    """Run a command whose main does this."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils\n"
    code += f"def main(argv):\n    {body}\n"
    command = [sys.executable, "-c", f"{code}utils.run_command(main)"]
    return subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise utils.UserError('a\\nb\\x1b[31m: wrong')", "error: a\\nb\\x1b[31m: wrong\n"),
        ("raise utils.UserError('\\udcff: wrong')", "error: \\udcff: wrong\n"),
        (
            "raise ImportError('x.so: failed to map\\nsegment')",
            "error: x.so: failed to map segment\n",
        ),
        ("raise MemoryError", "error: no memory is left\n"),
        (
            "raise OSError(28, 'No space left on device', 'x')",
            "error: x: No space left on device\n",
        ),
    ],
)
def test_one_line(body, said):
    done = run_main(body)
    assert done.returncode == 2
    assert done.stderr == said


def test_a_broken_pipe_is_silent():
    done = run_main("print('x' * 10**6)", '("$@"; echo "$?" >&2) | true')
    assert done.stderr.strip() == "141"


def test_a_closed_stdout_is_no_error():
    done = run_main("print('x')", 'exec "$@" >&-')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_is_no_error_where_a_command_ends_at_once():
    done = run_main("import utils_startup; utils_startup.quick_exit()", 'exec "$@" >&-')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_path(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_limit_on_file_sizes_names_the_file(tmp_path):
    body = f"utils.write_text({str(tmp_path / 'a.txt')!r}, 'x' * 10**6)"
    done = run_main(body, 'ulimit -f 16; exec "$@"')
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'a.txt'}: File too large\n"


def test_printable_leaves_other_alphabets_alone(tmp_path):
    assert printable("é 猫 a\tb\u202e") == "é 猫 a\\tb\\u202e"
    write_json(tmp_path / "x.json", {})
