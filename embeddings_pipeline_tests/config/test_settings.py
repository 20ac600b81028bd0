"""Settings: the folders of a project are the same from everywhere."""

from pathlib import Path

import pytest

from embeddings_pipeline.config.settings import load_settings


def test_relative_folders_are_below_the_project_and_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, shell, cron = (tmp_path / name for name in ("project", "shell", "cron"))
    for folder in (project, shell, cron, project / "below"):
        folder.mkdir()
    (project / ".env").write_text("EMBEDDINGS_STATE_DIR=data/state\nEMBEDDINGS_DEFS_DIR=../defs\nLAKE_URI=data/lake\n")
    (project / "dagster.yaml").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(project))
    for folder in (shell, cron):
        monkeypatch.chdir(folder)
        settings = load_settings()
        assert (settings.state_dir, settings.lake_uri) == (project / "data/state", str(project / "data/lake"))
        assert settings.defs_dir == tmp_path / "defs"
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.chdir(project / "below")
    settings = load_settings()
    monkeypatch.chdir(cron)
    assert settings.state_dir == project / "data/state"


def test_absolute_folders_and_urls_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("EMBEDDINGS_STATE_DIR", "/srv/state")
    monkeypatch.setenv("LAKE_URI", "s3://bucket/path")
    assert load_settings().state_dir == Path("/srv/state")
    assert load_settings().lake_uri == "s3://bucket/path"
