"""The example of a column of the user's own table, as its page says it."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from embeddings_pipeline.config.settings import revealed
from embeddings_pipeline_tests.support.command_line import PROJECT, commands_of


@pytest.mark.slow
class TestExample:
    @pytest.mark.timeout(900)  # eight commands, most of which load a model
    def test_1536_to_384_as_the_page_says(self, settings, tmp_path) -> None:
        """The commands of docs/how-to/your-own-column.md, on the example's own table."""
        defs = tmp_path / "segments"
        shutil.copytree(PROJECT / "examples" / "segments", defs)
        environment = {
            **os.environ,
            "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
            "EMBEDDINGS_DEFS_DIR": str(defs),
            "DATABASE_URL": revealed(settings.database_url) or "",
        }
        page = (PROJECT / "docs" / "how-to" / "your-own-column.md").read_text(encoding="utf-8")
        commands = commands_of(page)
        said = {}
        for command in commands:
            command_line = [sys.executable, *shlex.split(command)]
            done = subprocess.run(
                command_line, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said[command.removeprefix("-m embeddings_pipeline ")] = done.stdout + done.stderr
        assert "1,160 items scanned: 1,160 new" in said["sync"]
        assert "50 texts embedded, 1,110 reused" in said["sync"]
        assert "RENAME COLUMN" in said["profile plan minilm"]
        assert "former → minilm: 1,160 texts embedded" in said["profile switch minilm --yes --write"]
        assert "profile: minilm " in (defs / "defs.yaml").read_text(encoding="utf-8")
        assert "Apollo 13" in said['search "a journey to the moon by rocket"'].splitlines()[0]
        assert re.search(r"embedding +\| vector\(384\)", said['psql -c "\\d segments"'])
