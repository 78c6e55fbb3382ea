"""`fastllama --help`, `--version` and the help of each command."""

import subprocess
import sys
import time

import pytest

from fastllama.cli import COMMANDS, main
from fastllama.cli.errors import FAILED, INTERRUPTED, MISTAKE, STOPPED


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from fastllama.cli import COMMANDS, main\n"
        "for args in (['--help'], ['--version']):\n"
        "    main(args)\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        main([*name, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastllama generate runs/NAME --prompt TEXT" in done.stdout
    assert "fastllama verify-resume CONFIG.toml" in done.stdout
    assert "--optimizer.warmup-iterations INT" in done.stdout
    assert "Updates over which the learning rate rises" in done.stdout
    assert "--max-new-tokens INT" in done.stdout
    for name in COMMANDS:
        assert f"usage: fastllama {' '.join(name)} " in done.stdout


def test_help_within_a_second() -> None:
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fastllama", "--help"], capture_output=True, check=True
        )
        took.append(time.perf_counter() - start)
    # The fastest of three, because other processes slow the machine down.
    assert min(took) < 1.0


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    help_text = capsys.readouterr().out
    main([])
    assert capsys.readouterr().out == help_text
    shown = [line for line in help_text.splitlines() if line.startswith("  fastllama ")]
    forms = [
        f"  fastllama {' '.join(name)} {arguments}"
        for name, command in COMMANDS.items()
        for arguments in command.forms
    ]
    assert shown == forms


def test_help_lists_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    section = capsys.readouterr().out.partition("exit codes:\n")[2]
    codes = [line.split()[0] for line in section.splitlines() if line[2:3].isdigit()]
    assert codes == [str(code) for code in (0, FAILED, MISTAKE, STOPPED, INTERRUPTED)]
    assert codes == ["0", "1", "2", "85", "130"]
