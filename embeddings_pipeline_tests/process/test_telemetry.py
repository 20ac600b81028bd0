"""`dg` of the checkout's .venv, outside `make`: no telemetry, and no notice of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embeddings_pipeline_tests.support.command_line import PROJECT

LIST = "import sys; sys.argv = ['dg', 'list', 'components']; from dagster_dg_cli.cli import main; main()"


def test_dg_sends_no_telemetry_and_says_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("install", PROJECT / ".ci" / "install.py")
    assert spec is not None and spec.loader is not None
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    folder = tmp_path / "lib" / "python3.11" / "site-packages"
    folder.mkdir(parents=True)
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path)
    install.silence_dg()
    [line] = (folder / "quiet_dg.pth").read_text().splitlines()
    environment = {name: value for name, value in os.environ.items() if name not in {"DAGSTER_HOME", "DG_CLI_CONFIG"}}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=PROJECT, env=environment | more, capture_output=True, text=True, timeout=120, check=True
        )

    told = run("-S", "-c", f"{line}\nprint(os.environ['DG_CLI_CONFIG'])").stdout.strip()  # without .venv's own
    for configuration, quiet in ((told, True), (str(tmp_path / "none.toml"), False)):
        done = run("-c", LIST, DG_CLI_CONFIG=configuration)
        assert "EmbeddingCollection" in done.stdout
        assert ("Telemetry" not in done.stderr) is quiet
        assert (not (tmp_path / ".dagster").exists()) is quiet
